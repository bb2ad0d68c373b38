"""SentenceTransformer around a model whose embedding is packed: what asks for its dtype gets a right one."""

import pytest
import tiny_models as tiny
import torch
from torch import nn
from transformers import PreTrainedTokenizerFast

from svdq_hf import SVDQConfig, quantize_model
from svdq_hf.nn.embedding import SVDQEmbedding

CONFIG = SVDQConfig(k=9, embeddings=True)
TEXTS = ["a man plays", "it rains"]
WORDS = ["[PAD]", "[UNK]", "a", "man", "plays", "it", "rains"]

pytest.importorskip("sentence_transformers", reason="needs sentence-transformers>=6: pip install it")


@pytest.fixture
def folder(tmp_path):
    """A model with its tokenizer, of words that are letters and spaces."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = {word: number for number, word in enumerate(WORDS)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    saved = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]", model_max_length=32)
    saved.save_pretrained(tmp_path / "dense")
    tiny.bert().save_pretrained(tmp_path / "dense")
    return tmp_path / "dense"


def sentences(folder, dtype=torch.float32, **choices):
    """With a Dense module behind the pooling, as EmbeddingGemma's."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Dense, Pooling, Transformer

    torch.manual_seed(0)
    transformer = Transformer(str(folder), model_kwargs={"dtype": dtype, **choices})
    return SentenceTransformer(modules=[transformer, Pooling(64, "mean"), Dense(64, 8)], device="cpu")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_packed_embedding_leaves_the_modules_behind_it_their_dtype(dtype, folder, tmp_path):
    dense = sentences(folder, dtype)
    model = sentences(folder, dtype, quantization_config=CONFIG)
    assert isinstance(model[0].model.get_input_embeddings(), SVDQEmbedding)
    assert model.dtype == dense.dtype == dtype
    assert {one.dtype for one in model[2].parameters()} == {dtype}
    answers = model.encode(TEXTS, convert_to_tensor=True)
    assert answers.dtype == dtype
    before = dense.encode(TEXTS, convert_to_tensor=True)
    assert nn.functional.cosine_similarity(answers.float(), before.float()).min() > 0.9
    model.save_pretrained(str(tmp_path / "packed"))
    from sentence_transformers import SentenceTransformer

    again = SentenceTransformer(str(tmp_path / "packed"), device="cpu", model_kwargs={"dtype": dtype})
    assert torch.equal(again.encode(TEXTS, convert_to_tensor=True), answers)


def test_every_parameter_is_there_once(folder):
    model = sentences(folder, quantization_config=CONFIG)
    for recurse in (True, False):
        named = {id(one) for _, one in model[0].named_parameters(recurse=recurse)}
        listed = [id(one) for one in model[0].parameters(recurse)]
        assert len(listed) == len(set(listed))
        assert set(listed) == named


def test_sentence_transformers_casts_to_the_dtype_of_packed_bytes(folder, monkeypatch):
    from sentence_transformers.base.model import BaseModel
    from sentence_transformers.base.modules.module import Module

    packed = sentences(folder, quantization_config=CONFIG)
    assert BaseModel.dtype.fget.__wrapped__(packed) == torch.int8
    monkeypatch.setattr(Module, "parameters", Module.parameters.__wrapped__)
    with pytest.raises(TypeError, match="floating point"):
        sentences(folder, quantization_config=CONFIG)


def test_a_dense_model_is_answered_as_ever(folder):
    from sentence_transformers.base.modules.module import Module

    model = sentences(folder)
    own = list(Module.parameters.__wrapped__(model[0]))
    assert [id(one) for one in model[0].parameters()] == [id(one) for one in own]
    quantize_model(model[0].model, SVDQConfig(k=9))
    assert model.dtype == torch.float32
