"""lm_head=True: the output head in 4 bits, and the embedding that shares its matrix."""

import copy

import pytest
import tiny_models as tiny
import torch
import transformers as hf
from torch import nn

from svdq_hf import SVDQConfig, SVDQLinear, dequantize_model, footprint, quantize_model
from svdq_hf.embedding import SVDQEmbedding

CONFIG = SVDQConfig(k=16, rank=2, lm_head=True)
TIED = ["llama-tied", "gemma3", "gpt2", "opt", "t5", "masked"]


def masked():
    return tiny._seeded(hf.BertForMaskedLM, tiny.bert_config())


def dense(family):
    """A dense model with its head, by the name of its family."""
    return masked() if family == "masked" else tiny.FAMILIES[family].loud_model()


def inputs(family):
    return {"input_ids": tiny.tokens()} if family == "masked" else tiny.FAMILIES[family].inputs()


def logits(model, family):
    with torch.no_grad():
        return model(**inputs(family)).logits


def readers(model):
    return [module for module in model.modules() if isinstance(module, SVDQEmbedding)]


@pytest.fixture(params=TIED)
def family(request):
    return request.param


def test_a_tied_head_is_packed_once_and_the_embedding_reads_its_rows(family):
    model = quantize_model(dense(family), CONFIG)
    head = model.get_output_embeddings()
    assert isinstance(head, SVDQLinear)
    assert readers(model)
    rows, scale = head.dequantize(), readers(model)[0].scale
    ids = torch.tensor([[3, 0, 3], [95, 7, 8]])
    for reader in readers(model):
        torch.testing.assert_close(reader(ids), rows[ids] * scale, rtol=1e-6, atol=0)
    assert scale == (8 if family == "gemma3" else 1)
    names = [name for name in model.state_dict() if "embed_tokens" in name or "word_embeddings" in name]
    assert names == []
    assert model.config.tie_word_embeddings is False


def test_outputs_are_those_of_the_dequantized_model_bit_for_bit_in_the_embedding(family):
    model = quantize_model(dense(family), CONFIG)
    found = logits(model, family)
    plain = dequantize_model(copy.deepcopy(model))
    assert type(plain.get_output_embeddings()) is nn.Linear
    assert plain.get_output_embeddings().weight is plain.get_input_embeddings().weight
    assert plain.config.tie_word_embeddings is True
    assert not readers(plain)
    torch.testing.assert_close(found, logits(plain, family), rtol=1e-4, atol=1e-4)


def test_a_saved_model_reloads_bit_for_bit(family, tmp_path):
    model = quantize_model(dense(family), CONFIG)
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    assert tiny.different_tensors(again, model) == []
    assert isinstance(again.get_output_embeddings(), SVDQLinear)
    assert readers(again)[0].head is again.get_output_embeddings()
    assert torch.equal(logits(again, family), logits(model, family))


@pytest.mark.parametrize("bits", [3, 8])
def test_a_head_of_other_bits_is_packed_once_and_reloads_bit_for_bit(bits, tmp_path):
    model = quantize_model(dense("llama-tied"), SVDQConfig(k=16, rank=2, lm_head=True, bits=bits))
    head = model.get_output_embeddings()
    assert head.weight.shape == (head.out_features, 1, 8 * bits)
    ids = torch.tensor([[3, 0, 3], [95, 7, 8]])
    assert torch.equal(readers(model)[0](ids), head.dequantize()[ids])
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    assert tiny.different_tensors(again, model) == []
    assert again.hf_quantizer.quantization_config.format_version == 3
    assert torch.equal(logits(again, "llama-tied"), logits(model, "llama-tied"))


def test_loading_quantizes_the_head_as_quantize_model_does(family, tmp_path):
    dense(family).save_pretrained(tmp_path)
    loaded = type(dense(family)).from_pretrained(tmp_path, quantization_config=CONFIG)
    assert tiny.different_tensors(loaded, quantize_model(dense(family), CONFIG)) == []
    assert torch.equal(logits(loaded, family), logits(quantize_model(dense(family), CONFIG), family))


def test_in_bfloat16_the_embedding_is_bfloat16_and_salient_weights_are_exact(tmp_path):
    source = dense("llama-tied")
    source.save_pretrained(tmp_path)
    model = hf.LlamaForCausalLM.from_pretrained(tmp_path, quantization_config=CONFIG, dtype=torch.bfloat16)
    head = model.lm_head
    kept = source.lm_head.weight[head.salient_rows.long(), head.salient_columns.long()]
    assert torch.equal(head.salient_values, kept)
    assert model.model.embed_tokens(torch.tensor([1])).dtype == torch.bfloat16
    assert logits(model, "llama-tied").dtype == torch.bfloat16
    assert nn.Module.float(model).model.embed_tokens(torch.tensor([1])).dtype == torch.float32


def test_an_untied_head_is_quantized_and_the_embedding_stays(tmp_path):
    source = dense("llama-untied")
    model = quantize_model(copy.deepcopy(source), CONFIG)
    assert isinstance(model.lm_head, SVDQLinear)
    assert torch.equal(model.model.embed_tokens.weight, source.model.embed_tokens.weight)
    model.save_pretrained(tmp_path)
    again = hf.LlamaForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(logits(again, "llama-untied"), logits(model, "llama-untied"))
    assert type(dequantize_model(again).lm_head) is nn.Linear


def test_it_generates_and_compiles_to_one_graph():
    model = quantize_model(dense("llama-tied"), CONFIG)
    ids = tiny.tokens()
    found = model.generate(ids, max_new_tokens=5, do_sample=False)
    assert found.shape == (ids.shape[0], ids.shape[1] + 5)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    with torch.no_grad():
        assert torch.equal(compiled(ids).logits, model(ids).logits)


def test_every_byte_of_the_head_is_counted_once():
    with_head = footprint(quantize_model(dense("llama-tied"), CONFIG))
    without = footprint(quantize_model(dense("llama-tied"), SVDQConfig(k=16, rank=2)))
    assert {layer.name for layer in with_head.layers} - {layer.name for layer in without.layers} == {
        "lm_head"
    }
    saved = without.total_bytes - with_head.total_bytes
    assert saved == 4 * 96 * 64 - next(x for x in with_head.layers if x.name == "lm_head").stored_bytes


def test_a_packed_head_without_a_model_to_put_it_in_is_an_error(tmp_path):
    quantize_model(dense("llama-tied"), CONFIG).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="AutoModelForCausalLM"):
        hf.AutoModel.from_pretrained(tmp_path)


def test_a_model_without_a_head_says_so_before_anything_is_changed():
    model = tiny.bert()
    with pytest.raises(ValueError, match="BertModel has no output head to quantize"):
        quantize_model(model, CONFIG)
    assert not any(isinstance(module, SVDQLinear) for module in model.modules())


def test_an_id_beyond_the_vocabulary_is_an_error_as_it_is_of_a_dense_embedding():
    model = quantize_model(dense("llama-tied"), CONFIG)
    with pytest.raises(IndexError):
        model.model.embed_tokens(torch.tensor([96]))


def test_lm_head_is_true_or_false():
    with pytest.raises(ValueError, match="lm_head='yes': must be true or false"):
        SVDQConfig(lm_head="yes")
    with pytest.raises(ValueError, match="lm_head=True: must be False where"):
        SVDQConfig.calibrated(lm_head=True)
    assert SVDQConfig.from_dict(CONFIG.to_dict()) == CONFIG
    assert SVDQConfig.paper(lm_head=True).format_version == 2
