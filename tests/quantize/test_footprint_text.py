"""A footprint in words: printed, in a notebook, in one line."""

import pytest
import torch
from tiny_models import bert_config, llama_config
from transformers import BertModel, LlamaForCausalLM

from svdq_hf import SVDQConfig, footprint, quantize_model, read_footprint
from svdq_hf.quantize.footprint import Footprint
from svdq_hf.quantize.footprint_text import WIDTH, rows, sentence


@pytest.fixture(scope="module")
def bert():
    torch.manual_seed(0)
    return quantize_model(BertModel(bert_config(vocab_size=4000)), SVDQConfig(k=2))


def test_a_footprint_prints_as_a_table_of_about_ten_lines_with_the_totals_first(bert):
    result = footprint(bert)
    lines = str(result).splitlines()
    assert 8 <= len(lines) <= 13
    assert max(map(len, lines)) <= WIDTH
    assert lines[0] == f"size             {result.total_bytes / 1e6:.1f} MB, all counted"
    assert lines[2].startswith(f"bits per weight  {result.bits_per_weight:.3f}")
    assert len(repr(result)) < 80
    assert result._repr_html_().count("<tr>") == len(rows(result))


def test_what_stayed_dense_is_named_with_the_choice_that_would_shrink_it(bert, tmp_path):
    result = footprint(bert)
    assert result.dense[0][:3] == ("embeddings.word_embeddings.weight", 4000 * 64 * 4, "FP32")
    assert sum(one.bytes for one in result.dense) == result.dense_bytes
    assert rows(result)["to shrink it"] == "embeddings=True"
    share = f"{result.dense[0].bytes / result.total_bytes:.0%} of that is the FP32 embedding"
    assert sentence(result, 2_000_000, options=True).startswith("2.0 MB -> ")
    assert sentence(result, options=True).endswith(f"{share}: --embeddings")
    bert.save_pretrained(tmp_path)
    assert read_footprint(tmp_path).dense == result.dense


@pytest.mark.parametrize(("tied", "choice"), [(True, "lm_head"), (False, "embeddings")])
def test_an_embedding_that_is_the_head_too_is_the_heads_choice(tied, choice, tmp_path):
    config = llama_config(tie_word_embeddings=tied, vocab_size=2000)
    model = quantize_model(LlamaForCausalLM(config), SVDQConfig(k=2))
    model.save_pretrained(tmp_path)
    for result in (footprint(model), read_footprint(tmp_path)):
        found = {one.name: one.choice for one in result.dense}
        assert found["model.embed_tokens.weight"] == choice
        assert tied or found["lm_head.weight"] == "lm_head"


def test_nothing_to_shrink_is_not_said():
    model = quantize_model(BertModel(bert_config(vocab_size=40)), SVDQConfig(k=2))
    assert "to shrink it" not in rows(footprint(model))
    assert ";" not in sentence(footprint(model))
    assert str(Footprint([], 10)).startswith("size             0.0 MB")
