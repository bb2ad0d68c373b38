"""embeddings=True: the input embedding in 4 bits, in parts of its own."""

import copy
import json

import pytest
import tiny_models as tiny
import torch
import transformers as hf
from safetensors.torch import load_file, save_file
from torch import nn

from svdq_hf import SVDQConfig, SVDQLinear, dequantize_model, footprint, quantize_model
from svdq_hf.nn.embedding import SVDQEmbedding, TiedEmbedding

CONFIG = SVDQConfig(k=16, rank=2, embeddings=True)
BOTH = SVDQConfig(k=16, rank=2, embeddings=True, lm_head=True)
IDS = torch.tensor([[3, 0, 3], [95, 7, 8]])


def encoder_of_t5():
    """Its `shared` embedding and the encoder's are one matrix, without a head."""
    sizes = {"d_model": 64, "d_kv": 16, "d_ff": 96, "num_layers": 2, "num_heads": 4, "vocab_size": 96}
    return tiny._seeded(hf.T5EncoderModel, hf.T5Config(**sizes))


def gemma3_base():
    """Its embedding multiplies the rows by a number."""
    return tiny.FAMILIES["gemma3"].loud_model().model


MODELS = {
    "bert": tiny.bert,
    "llama-untied": tiny.FAMILIES["llama-untied"].loud_model,
    "t5-encoder": encoder_of_t5,
    "gemma3-base": gemma3_base,
}


@pytest.fixture(params=MODELS)
def family(request):
    return request.param


def run(model):
    with torch.no_grad():
        return model(tiny.tokens())[0]


def test_rows_are_those_of_the_stored_matrix(family):
    dense = MODELS[family]()
    before = dense.get_input_embeddings().weight.detach().clone()
    model = quantize_model(dense, CONFIG)
    table = model.get_input_embeddings()
    assert isinstance(table, SVDQEmbedding)
    rows, scale = table.dequantize(), 8 if family == "gemma3-base" else 1
    torch.testing.assert_close(table(IDS), rows[IDS] * scale, rtol=1e-6, atol=0)
    assert float((rows - before).norm() / before.norm()) == pytest.approx(table.facts["relative_error"])
    assert table.facts["relative_error"] < 0.12
    kept = table.salient_rows.long(), table.salient_columns.long()
    assert torch.equal(rows[kept], before[kept])
    assert not any(part.requires_grad for part in table.parameters())


def test_loading_quantizing_saving_and_the_way_back_agree(family, tmp_path):
    dense = MODELS[family]()
    dense.save_pretrained(tmp_path / "dense")
    model = quantize_model(copy.deepcopy(dense), CONFIG)
    loaded = type(dense).from_pretrained(tmp_path / "dense", quantization_config=CONFIG)
    assert tiny.different_tensors(loaded, model) == []
    assert torch.equal(run(loaded), run(model))
    loaded.save_pretrained(tmp_path / "quantized")
    again = type(dense).from_pretrained(tmp_path / "quantized")
    assert tiny.different_tensors(again, model) == []
    assert torch.equal(run(again), run(model))
    assert footprint(again).to_dict() == footprint(model).to_dict()
    found = run(model)
    plain = dequantize_model(again)
    assert type(plain.get_input_embeddings()) is type(dense.get_input_embeddings())
    assert not any(isinstance(module, SVDQLinear | TiedEmbedding) for module in plain.modules())
    torch.testing.assert_close(run(plain), found, rtol=1e-4, atol=1e-4)
    plain.save_pretrained(tmp_path / "plain")
    assert load_file(tmp_path / "plain/model.safetensors").keys() == dense_keys(tmp_path / "dense")


def dense_keys(folder):
    return load_file(folder / "model.safetensors").keys()


def test_a_matrix_that_two_embeddings_share_is_stored_once():
    model = quantize_model(encoder_of_t5(), CONFIG)
    assert isinstance(model.shared, SVDQEmbedding)
    assert isinstance(model.encoder.embed_tokens, TiedEmbedding)
    assert model.encoder.embed_tokens.head is model.shared
    assert [name for name in model.state_dict() if "embed_tokens" in name] == []
    again = dequantize_model(model)
    assert again.encoder.embed_tokens.weight is again.shared.weight


def test_outputs_are_near_the_dense_models(family):
    before, after = run(MODELS[family]()), run(quantize_model(MODELS[family](), CONFIG))
    assert float(torch.cosine_similarity(after.flatten(), before.flatten(), 0)) > 0.9


def test_every_byte_is_counted_as_of_a_layer():
    with_table = footprint(quantize_model(tiny.bert(), CONFIG))
    without = footprint(quantize_model(tiny.bert(), SVDQConfig(k=16, rank=2)))
    [table] = [layer for layer in with_table.layers if layer.name == "embeddings.word_embeddings"]
    assert (table.out, table.in_features, table.k) == (96, 64, 16)
    assert without.total_bytes - with_table.total_bytes == 4 * 96 * 64 - table.stored_bytes


def test_it_is_said_in_config_json_and_written_as_version_4(tmp_path):
    quantize_model(tiny.bert(), CONFIG).save_pretrained(tmp_path)
    stored = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert (stored["embeddings"], stored["format_version"]) == (True, 4)
    assert "embeddings" not in SVDQConfig().to_dict()


def test_a_tied_matrix_is_the_heads_to_quantize():
    tied = tiny.FAMILIES["llama-tied"].loud_model
    with pytest.raises(ValueError, match=r"model\.embed_tokens and lm_head are one matrix: lm_head=True"):
        quantize_model(tied(), CONFIG)
    model = quantize_model(tied(), BOTH)
    assert tiny.different_tensors(model, quantize_model(tied(), SVDQConfig(k=16, rank=2, lm_head=True))) == []
    assert isinstance(model.model.embed_tokens, TiedEmbedding)


def test_a_tied_matrix_reloads_with_both_choices(tmp_path):
    dense = tiny.FAMILIES["llama-tied"].loud_model()
    dense.save_pretrained(tmp_path / "dense")
    model = hf.LlamaForCausalLM.from_pretrained(tmp_path / "dense", quantization_config=BOTH)
    model.save_pretrained(tmp_path / "quantized")
    again = hf.LlamaForCausalLM.from_pretrained(tmp_path / "quantized")
    assert tiny.different_tensors(again, model) == []
    assert torch.equal(run(again), run(model))


def test_an_untied_head_and_embedding_are_two_matrices(tmp_path):
    model = quantize_model(tiny.FAMILIES["llama-untied"].loud_model(), BOTH)
    assert isinstance(model.model.embed_tokens, SVDQEmbedding)
    assert isinstance(model.lm_head, SVDQLinear)
    model.save_pretrained(tmp_path)
    again = hf.LlamaForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(run(again), run(model))
    base = hf.LlamaModel.from_pretrained(tmp_path)
    assert tiny.different_tensors(base, model.model) == []


def test_an_embedding_packed_alone_does_not_load_into_a_tied_head(tmp_path):
    quantize_model(gemma3_base(), CONFIG).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="loads without the head: AutoModel"):
        hf.Gemma3ForCausalLM.from_pretrained(tmp_path)


def test_a_file_loads_for_another_task_with_a_new_head(tmp_path):
    model = quantize_model(tiny.bert(), CONFIG)
    model.save_pretrained(tmp_path)
    again = hf.BertForSequenceClassification.from_pretrained(tmp_path)
    assert tiny.different_tensors(again.bert, model) == []


def test_a_budget_counts_the_embedding_too():
    model = quantize_model(tiny.bert(), SVDQConfig(rank=2, target_bits=7, embeddings=True))
    found = footprint(model)
    assert 6.98 < found.bits_per_weight <= 7
    assert "embeddings.word_embeddings" in model.config.quantization_config.layer_k


@pytest.mark.parametrize("bits", [3, 8])
def test_other_bits(bits, tmp_path):
    model = quantize_model(tiny.bert(), SVDQConfig(k=16, rank=2, embeddings=True, bits=bits))
    model.save_pretrained(tmp_path)
    again = hf.BertModel.from_pretrained(tmp_path)
    assert torch.equal(run(again), run(model))


def test_a_cast_model_looks_up_in_its_dtype(tmp_path):
    dense = tiny.bert()
    dense.save_pretrained(tmp_path)
    model = hf.BertModel.from_pretrained(tmp_path, quantization_config=CONFIG, dtype=torch.bfloat16)
    table = model.get_input_embeddings()
    assert table(IDS).dtype == torch.bfloat16
    kept = table.salient_rows.long(), table.salient_columns.long()
    assert torch.equal(table.salient_values, dense.embeddings.word_embeddings.weight[kept])
    assert nn.Module.float(model).get_input_embeddings()(IDS).dtype == torch.float32


def test_it_trains_and_compiles_around_the_table():
    model = quantize_model(tiny.FAMILIES["llama-untied"].loud_model(), CONFIG)
    loss = model(tiny.tokens(), labels=tiny.tokens()).loss
    loss.backward()
    assert model.model.layers[0].mlp.up_proj.salient_values.grad.abs().sum() > 0
    table = model.get_input_embeddings()
    compiled = torch.compile(table, fullgraph=True, backend="eager")
    assert torch.equal(compiled(IDS), table(IDS))


def test_it_runs_from_disk(tmp_path):
    model = quantize_model(tiny.bert(), CONFIG)
    model.save_pretrained(tmp_path / "quantized")
    places = {"embeddings": "disk", "encoder": "cpu", "pooler": "cpu"}
    offloaded = hf.BertModel.from_pretrained(
        tmp_path / "quantized", device_map=places, offload_folder=tmp_path / "offload"
    )
    assert torch.equal(run(offloaded), run(model))


def test_a_copy_reads_its_own_parts():
    model = quantize_model(tiny.bert(), CONFIG)
    table = copy.deepcopy(model).get_input_embeddings()
    assert table.reader.head is table
    assert table is not model.get_input_embeddings()


def test_a_damaged_part_is_named(tmp_path):
    quantize_model(tiny.bert(), CONFIG).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["embeddings.word_embeddings.row_scale"]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"embeddings\.word_embeddings: row_scale is missing"):
        hf.BertModel.from_pretrained(tmp_path)


@pytest.mark.parametrize("family", ["vit", "clip"])
def test_a_model_without_such_an_embedding_says_so(family):
    model = tiny.FAMILIES[family].loud_model()
    with pytest.raises(
        ValueError, match=r"embeddings=True: the input embedding of \w+ is .*; leave embeddings"
    ):
        quantize_model(model, CONFIG)
    assert not any(isinstance(module, SVDQLinear) for module in model.modules())


def test_keeping_it_dense_and_quantizing_it_is_a_contradiction():
    with pytest.raises(ValueError, match=r"keeps embeddings.word_embeddings dense: which is it"):
        quantize_model(tiny.bert(), SVDQConfig(embeddings=True, modules_to_not_convert=["word_embeddings"]))


def test_a_nan_is_refused_before_anything_is_changed():
    model = tiny.bert()
    with torch.no_grad():
        model.embeddings.word_embeddings.weight[3, 4] = torch.nan
    with pytest.raises(ValueError, match=r"embeddings\.word_embeddings: weight has a NaN"):
        quantize_model(model, CONFIG)
    assert not any(isinstance(module, SVDQLinear) for module in model.modules())


def test_embeddings_is_true_or_false():
    with pytest.raises(ValueError, match=r"^embeddings='yes': must be true or false"):
        SVDQConfig(embeddings="yes")


def test_an_embedding_that_the_models_code_reads_is_refused():
    class Reader(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.words, self.up = torch.nn.Embedding(8, 64), torch.nn.Linear(64, 64)

        def get_input_embeddings(self):
            return self.words

        def forward(self, ids):
            return self.up(self.words(ids).to(self.words.weight.dtype))

    with pytest.raises(ValueError, match="reads the weight of words itself"):
        quantize_model(Reader(), SVDQConfig(k=4, embeddings=True))
