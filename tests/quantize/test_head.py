"""lm_head=True: the output head in 4 bits, and the embedding that shares its matrix."""

import copy

import pytest
import tiny_models as tiny
import torch
import transformers as hf
from torch import nn

from svdq_hf import SVDQConfig, SVDQLinear, dequantize_model, footprint, quantize_model
from svdq_hf.hub.card import model_card
from svdq_hf.nn.embedding import TiedEmbedding

CONFIG = SVDQConfig(k=16, rank=2, lm_head=True)
TIED = ["llama-tied", "gemma3", "gpt2", "opt", "t5", "umt5", "masked"]


def masked():
    return tiny._seeded(hf.BertForMaskedLM, tiny.bert_config())


def umt5():
    """It scales what goes into a tied head, and asks the config whether it is tied."""
    sizes = {"d_model": 64, "d_kv": 16, "d_ff": 96, "num_layers": 2, "num_heads": 4, "vocab_size": 96}
    return tiny._seeded(hf.UMT5ForConditionalGeneration, hf.UMT5Config(**sizes, tie_word_embeddings=True))


def dense(family):
    """A dense model with its head, by the name of its family."""
    own = {"masked": masked, "umt5": umt5}
    return own[family]() if family in own else tiny.FAMILIES[family].loud_model()


def inputs(family):
    if family == "masked":
        return {"input_ids": tiny.tokens()}
    return tiny.FAMILIES["t5" if family == "umt5" else family].inputs()


def logits(model, family):
    with torch.no_grad():
        return model(**inputs(family)).logits


def readers(model):
    return [module for module in model.modules() if isinstance(module, TiedEmbedding)]


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
    assert model.config.tie_word_embeddings is True  # what some families ask, to scale what goes in


def test_outputs_are_those_of_the_dequantized_model_bit_for_bit_in_the_embedding(family):
    model = quantize_model(dense(family), CONFIG)
    found = logits(model, family)
    plain = dequantize_model(copy.deepcopy(model))
    assert type(plain.get_output_embeddings()) is nn.Linear
    assert plain.get_output_embeddings().weight is plain.get_input_embeddings().weight
    assert plain.all_tied_weights_keys
    assert not readers(plain)
    torch.testing.assert_close(found, logits(plain, family), rtol=1e-4, atol=1e-4)


def test_outputs_are_near_the_dense_models(family):
    """Without its salient weights a model this small is far off, but not by a factor."""
    before, after = logits(dense(family), family), logits(quantize_model(dense(family), CONFIG), family)
    assert 0.7 < float(after.norm() / before.norm()) < 1.4
    assert float(torch.cosine_similarity(after.flatten(), before.flatten(), 0)) > 0.9


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
    with pytest.raises(ValueError, match=r"load the model with its head [(]LlamaForCausalLM"):
        hf.AutoModel.from_pretrained(tmp_path)


def test_an_untied_models_file_loads_for_another_task(tmp_path):
    model = quantize_model(dense("llama-untied"), CONFIG)
    model.save_pretrained(tmp_path)
    again = hf.AutoModel.from_pretrained(tmp_path)
    assert tiny.different_tensors(again, model.model) == []


def test_a_state_dict_does_not_say_what_is_tied_and_is_refused(tmp_path):
    model = quantize_model(dense("llama-untied"), CONFIG)
    model.save_pretrained(tmp_path)
    config = hf.AutoConfig.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="loads from a folder, not from a state dict"):
        hf.LlamaForCausalLM.from_pretrained(None, config=config, state_dict=model.state_dict())


def test_a_head_on_disk_is_an_error_and_not_memory_as_it_is(tmp_path):
    quantize_model(dense("llama-tied"), CONFIG).save_pretrained(tmp_path)
    places = {"device_map": {"model": "cpu", "lm_head": "disk"}, "offload_folder": tmp_path / "off"}
    model = hf.LlamaForCausalLM.from_pretrained(tmp_path, **places)
    with pytest.raises(ValueError, match="keep the two on one device"):
        logits(model, "llama-tied")


@pytest.mark.parametrize("name", ["lm_head", "embed_tokens"])
def test_keeping_the_head_dense_and_quantizing_it_is_a_contradiction(name):
    with pytest.raises(ValueError, match=f"keeps (model.)?{name} dense: which is it"):
        quantize_model(dense("llama-tied"), SVDQConfig(lm_head=True, modules_to_not_convert=[name]))


def test_a_name_instead_of_a_model_is_told_what_to_call():
    with pytest.raises(ValueError, match="load it first"):
        quantize_model("some/model", CONFIG)
    with pytest.raises(ValueError, match="read_footprint"):
        footprint("folder")


def test_a_damaged_head_is_refused_before_anything_is_changed():
    model = dense("llama-untied")
    with torch.no_grad():
        model.lm_head.weight[3, 4] = torch.nan
    with pytest.raises(ValueError, match="lm_head: weight has a NaN"):
        quantize_model(model, CONFIG)
    assert not any(isinstance(module, SVDQLinear) for module in model.modules())


def test_a_scale_that_is_a_number_is_not_rounded_to_the_dtype_of_the_rows():
    model = tiny._seeded(
        hf.PLBartForConditionalGeneration,
        hf.PLBartConfig(**tiny._TWO_STACKS, **tiny._TOKENS, max_position_embeddings=40, scale_embedding=True),
    ).bfloat16()
    ids = torch.tensor([[3, 7]])
    scale = model.model.shared.embed_scale
    quantize_model(model, CONFIG)
    rows = model.get_output_embeddings().dequantize()[ids].bfloat16()
    assert torch.equal(model.model.shared(ids), rows * scale)


def test_a_copy_reads_its_own_head():
    model = quantize_model(dense("llama-tied"), CONFIG)
    again = copy.deepcopy(model)
    assert readers(again)[0].head is again.lm_head
    assert again.lm_head is not model.lm_head


def test_a_model_without_a_head_says_so_before_anything_is_changed():
    model = tiny.bert()
    with pytest.raises(ValueError, match="BertModel has no output head over a vocabulary"):
        quantize_model(model, CONFIG)
    assert not any(isinstance(module, SVDQLinear) for module in model.modules())


def test_an_id_beyond_the_vocabulary_is_an_error_as_it_is_of_a_dense_embedding():
    model = quantize_model(dense("llama-tied"), CONFIG)
    for wrong in (96, -1):
        with pytest.raises(IndexError):
            model.model.embed_tokens(torch.tensor([wrong]))


def test_lm_head_is_true_or_false():
    with pytest.raises(ValueError, match="lm_head='yes': must be true or false"):
        SVDQConfig(lm_head="yes")
    assert SVDQConfig.from_dict(CONFIG.to_dict()) == CONFIG
    assert SVDQConfig.paper(lm_head=True).format_version == 2


@pytest.mark.parametrize("saliency", ["awq", "pqi", "requant"])
def test_head_and_embedding_have_a_score_without_data_where_layers_have_one_with(saliency, tmp_path):
    both = {"k": 0.01, "lm_head": True, "embeddings": True}
    given = [{"input_ids": tiny.tokens()}]
    config = SVDQConfig(saliency=saliency, error_feedback=True, **both)
    model = quantize_model(tiny.llama(), config, given)
    plain = quantize_model(tiny.llama(), SVDQConfig(saliency="relative", **both))
    for name in ("lm_head", "model.embed_tokens"):
        assert tiny.different_tensors(model.get_submodule(name), plain.get_submodule(name)) == []
    assert tiny.different_tensors(model.model.layers[0].mlp, plain.model.layers[0].mlp)
    if saliency != "awq":  # one budget, of which head and embedding have what k says
        assert footprint(model).bits_per_weight == pytest.approx(footprint(plain).bits_per_weight, rel=1e-3)
    model.save_pretrained(tmp_path)
    assert tiny.different_tensors(hf.LlamaForCausalLM.from_pretrained(tmp_path), model) == []


def test_a_budget_between_what_layers_take_with_a_head_and_without_is_met():
    """A head has fewer scales of columns for a weight: with it all layers take fewer bits."""
    choices = {"k": 0, "saliency": "relative", "lm_head": True}
    least = footprint(quantize_model(tiny.llama(), SVDQConfig(**choices))).bits_per_weight
    alone = footprint(
        quantize_model(tiny.llama(), SVDQConfig(**choices | {"lm_head": False}))
    ).bits_per_weight
    assert abs(alone - least) > 0.01
    config = SVDQConfig(saliency="requant", lm_head=True, target_bits=(least + max(least, alone)) / 2 + 0.005)
    model = quantize_model(tiny.llama(), config, [{"input_ids": tiny.tokens()}])
    assert footprint(model).bits_per_weight == pytest.approx(config.target_bits, abs=0.01)


def test_one_scale_a_matrix_takes_magnitude_in_a_head():
    config = SVDQConfig.paper(k=9, saliency="awq", lm_head=True)
    model = quantize_model(tiny.llama(), config, [{"input_ids": tiny.tokens()}])
    plain = quantize_model(tiny.llama(), config.replace(saliency="magnitude"))
    assert tiny.different_tensors(model.lm_head, plain.lm_head) == []


def test_the_card_tells_the_score_of_the_head(tmp_path):
    model = quantize_model(tiny.llama(), SVDQConfig.calibrated(lm_head=True), [{"input_ids": tiny.tokens()}])
    model.save_pretrained(tmp_path)
    assert "`awq`; `relative` in head, embedding and experts" in model_card(tmp_path)


@pytest.mark.parametrize("saliency", ["awq", "pqi", "requant"])
def test_a_budget_is_met_with_a_head_of_which_data_tells_nothing(saliency):
    config = SVDQConfig(saliency=saliency, lm_head=True, target_bits=5.5)
    model = quantize_model(tiny.llama(), config, [{"input_ids": tiny.tokens()}])
    assert footprint(model).bits_per_weight == pytest.approx(5.5, abs=0.01)
    assert next(layer.k for layer in footprint(model).layers if layer.name == "lm_head") > 0


def test_a_head_that_the_files_do_not_have_is_refused(tmp_path):
    hf.LlamaModel(tiny.llama().config).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"lm_head: the checkpoint has no weights for it.*leave lm_head out"):
        hf.LlamaForCausalLM.from_pretrained(tmp_path, quantization_config=SVDQConfig(k=4, lm_head=True))
