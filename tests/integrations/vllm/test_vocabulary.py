"""Output heads and embeddings in vLLM: shares of the packed rows, as logits and as rows of tokens."""

import sys

import pytest
import torch
from tiny_models import llama
from vllm_layers import LAYERS, build_vocabulary, config_of, load

from svdq_hf import SVDQConfig, quantize_model

VOCABULARY = 100
"""No multiple of 64: vLLM pads it to 128."""

CHOICES = {
    "head": {"lm_head": True},
    "embedding": {"embeddings": True},
    "both": {"lm_head": True, "embeddings": True},
    "tied": {"lm_head": True, "tie": True},
    "3 bits": {"lm_head": True, "tie": True, "bits": 3},
}


@pytest.fixture(scope="module", params=CHOICES.values(), ids=CHOICES)
def model(request, tmp_path_factory):
    """The folder of a quantized model, its dense matrices by name, and whether head and embedding are one."""
    choices = dict(request.param)
    tied = choices.pop("tie", False)
    made = llama(vocab_size=VOCABULARY, tie_word_embeddings=tied)
    folder = tmp_path_factory.mktemp("vocabulary")
    quantize_model(made, SVDQConfig(k=16, **choices)).save_pretrained(folder)
    head = getattr(made.lm_head, "dequantize", lambda: made.lm_head.weight.detach())()
    rows = made.model.embed_tokens(torch.arange(VOCABULARY)).detach()
    return folder, head, rows, tied


def layers_of(plugin, model, rank: int, size: int):
    """The embedding and the head of one device, as vLLM makes and loads them."""
    folder = model[0]
    config = config_of(plugin, folder)
    where = {"config": config, "rank": rank, "size": size}
    sizes = (VOCABULARY, 64)
    embedding = build_vocabulary("VocabParallelEmbedding", *sizes, prefix="", **where)  # as vLLM's Llama
    head = build_vocabulary("ParallelLMHead", *sizes, prefix="lm_head", **where)
    for layer, name in ((embedding, "model.embed_tokens"), (head, "lm_head")):
        load(layer, folder, {name: None})
    return embedding, head


@pytest.mark.parametrize("size", [1, 2])
def test_logits_are_those_of_the_devices_tokens_and_zeros(plugin, model, size):
    x = torch.randn(3, 64)
    for rank in range(size):
        _, head = layers_of(plugin, model, rank, size)
        height = 128 // size
        wanted = torch.zeros(3, height)
        mine = model[1][rank * height : (rank + 1) * height]
        wanted[:, : len(mine)] = x @ mine.T
        torch.testing.assert_close(head.quant_method.apply(head, x), wanted, rtol=1e-5, atol=1e-5)
        bias = torch.randn(height)
        torch.testing.assert_close(
            head.quant_method.apply(head, x, bias), wanted + bias, rtol=1e-5, atol=1e-5
        )


@pytest.mark.parametrize("size", [1, 2])
def test_rows_of_tokens_are_those_of_the_model(plugin, model, size):
    for rank in range(size):
        embedding, _ = layers_of(plugin, model, rank, size)
        start, stop = rank * 128 // size, min((rank + 1) * 128 // size, VOCABULARY)
        ids = torch.arange(stop - start).view(2, -1)
        found = embedding.quant_method.embedding(embedding, ids)
        assert torch.equal(found, model[2][start:stop].view(2, -1, 64))


def test_head_of_another_height_is_refused(plugin, model):
    config = config_of(plugin, model[0])
    head = build_vocabulary("ParallelLMHead", 90, 64, config=config, prefix="lm_head", rank=0, size=1)
    with pytest.raises(ValueError, match=r"lm_head: 100 rows, where the model's config says 90"):
        load(head, model[0], {"lm_head": None})


def test_embedding_for_which_nothing_came_needs_a_head_in_its_process(plugin, model):
    config = config_of(plugin, model[0])
    where = {"config": config, "rank": 0, "size": 1}
    embedding = build_vocabulary("VocabParallelEmbedding", VOCABULARY, 64, prefix="wte", **where)
    with pytest.raises(ValueError, match=r"wte: the files have no weight for it.*0 output heads.*pipeline"):
        embedding.quant_method.process_weights_after_loading(embedding)


def test_head_that_vllm_ties_is_the_embedding(plugin, model):
    """Where the files have no head: an embedding that stays dense, for example."""
    config = config_of(plugin, model[0])
    where = {"config": config, "rank": 0, "size": 1}
    embedding = build_vocabulary("VocabParallelEmbedding", VOCABULARY, 64, prefix="", **where)
    head = build_vocabulary("ParallelLMHead", VOCABULARY, 64, prefix="lm_head", **where)
    assert head.quant_method.tie_weights(head, embedding) is embedding
    assert config.heads == []


def test_vocabulary_that_stays_dense_is_left_to_vllm(plugin, tmp_path):
    quantize_model(llama(), SVDQConfig(k=4)).save_pretrained(tmp_path)
    config = config_of(plugin, tmp_path)
    head = object.__new__(sys.modules[f"{LAYERS}.vocab_parallel_embedding"].ParallelLMHead)
    assert config.get_quant_method(head, "lm_head") is None
