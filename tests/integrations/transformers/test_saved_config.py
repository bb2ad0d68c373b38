"""Models of which a part is quantized, saved: they load bit for bit, or are refused in time."""

import json

import pytest
import tiny_models as tiny
import torch
import transformers as hf
from torch import nn
from transformers import AutoModel, BertModel, PreTrainedConfig, PreTrainedModel

from svdq_hf import SVDQConfig, SVDQLinear, dequantize_model, footprint, quantize_model, read_footprint
from svdq_hf.integrations.transformers import patches

CONFIG = SVDQConfig(k=9)
NARROW = {"hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 2}
"""Layers of 32 columns: their packed bytes have the shape of the dense weight."""


class OuterConfig(PreTrainedConfig):
    model_type = "outer-of-a-test"

    def __init__(self, backbone=None, **kwargs):
        self.backbone = backbone
        self.hidden_size = (backbone or {}).get("hidden_size", 64)
        super().__init__(**kwargs)


class Outer(PreTrainedModel):
    """Somebody's own model around a backbone."""

    config_class = OuterConfig
    base_model_prefix = "outer"

    def __init__(self, config):
        super().__init__(config)
        self.backbone = BertModel._from_config(hf.BertConfig(**config.backbone), attn_implementation="eager")
        self.neck = nn.Sequential(nn.Linear(config.hidden_size, 16), nn.ReLU(), nn.Linear(16, 8))
        self.post_init()

    def forward(self, ids):
        return self.neck(self.backbone(ids).pooler_output)


class Twice(PreTrainedModel):
    """Around that: the backbone is two levels down; and a second model beside it."""

    config_class = OuterConfig

    def __init__(self, config):
        super().__init__(config)
        self.inner, self.other = Outer(config), Outer(config)
        self.post_init()

    def forward(self, ids):
        return self.inner(ids) + self.other(ids)


def made(kind=Outer, **sizes):
    torch.manual_seed(0)
    return kind(OuterConfig(backbone=tiny.bert_config(**sizes).to_dict())).eval()


def encoder_decoder(encoder=None, **sizes):
    torch.manual_seed(0)
    decoder = hf.BertLMHeadModel(tiny.bert_config(is_decoder=True, add_cross_attention=True, **sizes))
    return hf.EncoderDecoderModel(
        encoder=encoder or BertModel(tiny.bert_config(**sizes)), decoder=decoder
    ).eval()


def part_of(name, config=CONFIG):
    def quantized(model):
        quantize_model(model.get_submodule(name), config)
        return model

    return quantized


MODELS = {
    "own": lambda **sizes: part_of("backbone")(made(**sizes)),
    "encoder": lambda **sizes: encoder_decoder(
        quantize_model(BertModel(tiny.bert_config(**sizes)), CONFIG), **sizes
    ),
    "decoder": lambda **sizes: part_of("decoder")(encoder_decoder(**sizes)),
    "modules": lambda **sizes: part_of("neck", SVDQConfig(k=3, compute_dtype="float32"))(made(**sizes)),
    "twice": lambda **sizes: part_of("inner.backbone")(made(Twice, **sizes)),
    "two parts": lambda **sizes: part_of("other.backbone", SVDQConfig(k=4))(
        part_of("inner.backbone")(made(Twice, **sizes))
    ),
}


def answer(model):
    """Of dense weights torch's product depends on where they lie in memory, so they are moved first."""
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()
    ids = torch.tensor([[3, 0, 3, 7]])
    with torch.no_grad():
        if isinstance(model, hf.EncoderDecoderModel):
            return model(input_ids=ids, decoder_input_ids=ids).logits
        return model(ids)


def read(folder):
    return json.loads((folder / "config.json").read_text())


@pytest.mark.parametrize("sizes", [{}, NARROW], ids=["wide", "narrow"])
@pytest.mark.parametrize("kind", MODELS)
def test_a_model_with_a_quantized_part_loads_bit_for_bit(kind, sizes, tmp_path):
    model = MODELS[kind](**sizes)
    before = answer(model)
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    assert torch.equal(answer(again), before)
    assert tiny.different_tensors(model, again) == []
    assert [one.name for one in footprint(again).layers] == [one.name for one in footprint(model).layers]
    assert len(read_footprint(tmp_path).layers) == len(footprint(model).layers)
    again.save_pretrained(tmp_path / "again")
    assert torch.equal(answer(type(model).from_pretrained(tmp_path / "again")), before)


def test_transformers_loads_packed_bytes_as_weights(tmp_path):
    model = MODELS["own"](**NARROW)
    patches.OWN_SAVE(model, tmp_path)
    assert not torch.allclose(answer(Outer.from_pretrained(tmp_path)), answer(model), atol=1e-3)


def test_saving_leaves_the_model_as_it_was(tmp_path):
    model = MODELS["own"]()
    before = dict(model.__dict__)
    model.save_pretrained(tmp_path)
    assert model.__dict__ == before
    assert not hasattr(model.config, "quantization_config")
    dense = dequantize_model(model)
    dense.save_pretrained(tmp_path / "dense")
    assert "quantization_config" not in read(tmp_path / "dense")
    assert torch.equal(answer(Outer.from_pretrained(tmp_path / "dense")), answer(dense))


def test_the_config_is_that_of_the_part(tmp_path):
    part_of("backbone", SVDQConfig(k=9, saliency="relative", seed=4))(model := made())
    model.save_pretrained(tmp_path)
    stored = read(tmp_path)["quantization_config"]
    assert (stored["k"], stored["saliency"], stored["seed"]) == (9, "relative", 4)
    assert "layer_k" not in stored or stored["layer_k"] is None


def test_a_part_of_a_quantized_model_is_saved_by_itself(tmp_path):
    whole = quantize_model(tiny.llama(), CONFIG)
    whole.model.save_pretrained(tmp_path)
    again = AutoModel.from_pretrained(tmp_path)
    assert tiny.different_tensors(whole.model, again) == []
    assert isinstance(again.layers[0].mlp.up_proj, SVDQLinear)
    assert not hasattr(whole.model, "hf_quantizer")


def test_a_model_whose_only_quantized_part_became_dense_is_saved_dense(tmp_path):
    whole = quantize_model(tiny.llama(), CONFIG)
    dequantize_model(whole.model)
    whole.save_pretrained(tmp_path)
    assert "quantization_config" not in read(tmp_path)
    assert tiny.different_tensors(whole, type(whole).from_pretrained(tmp_path)) == []


OTHERS = {
    "bits": SVDQConfig(k=9, bits=3),
    "group_size": SVDQConfig(k=9, group_size=16),
    "compute_dtype": SVDQConfig(k=9, compute_dtype="bfloat16"),
}


@pytest.mark.parametrize("what", OTHERS)
def test_two_parts_of_two_kinds_are_refused(what, tmp_path):
    model = part_of("other.backbone", OTHERS[what])(part_of("inner.backbone")(made(Twice)))
    with pytest.raises(ValueError, match=rf"inner\S+ has {what} \S+ and other\S+ has .*dequantize_model"):
        model.save_pretrained(tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_part_of_another_kind_put_into_a_quantized_model_is_refused(tmp_path):
    model, other = quantize_model(made(), CONFIG), part_of("backbone", OTHERS["bits"])(made())
    model.backbone = other.backbone
    with pytest.raises(ValueError, match=r"backbone\S+ has bits 3 and neck\S+ has 4"):
        model.save_pretrained(tmp_path / "out")


def test_a_part_of_another_k_put_into_a_quantized_model_is_saved(tmp_path):
    model, other = quantize_model(made(), CONFIG), part_of("backbone", SVDQConfig(k=3))(made())
    model.backbone = other.backbone
    model.save_pretrained(tmp_path)
    assert torch.equal(answer(Outer.from_pretrained(tmp_path)), answer(model))


def test_parts_that_differ_in_how_they_were_fitted_are_not(tmp_path):
    model = part_of("other.backbone", SVDQConfig(k=9, scale="absmax"))(part_of("inner.backbone")(made(Twice)))
    model.save_pretrained(tmp_path)
    assert torch.equal(answer(Twice.from_pretrained(tmp_path)), answer(model))


def test_packed_ends_of_a_part_are_refused_where_they_could_not_be_found(tmp_path):
    model = made()
    model.get_input_embeddings = lambda: None
    part_of("backbone", SVDQConfig(k=9, embeddings=True))(model)
    with pytest.raises(
        ValueError, match=r"backbone.embeddings.word_embeddings is a packed embedding, and not"
    ):
        model.save_pretrained(tmp_path / "out")
    whole = quantize_model(tiny.llama(tie_word_embeddings=True), SVDQConfig(k=9, lm_head=True))
    with pytest.raises(ValueError, match="embed_tokens reads its rows from a packed matrix that is not this"):
        whole.model.save_pretrained(tmp_path / "out")


def test_packed_ends_of_a_part_are_found_where_the_whole_says_so(tmp_path):
    model = made()
    Outer.get_input_embeddings = lambda self: self.backbone.get_input_embeddings()
    try:
        part_of("backbone", SVDQConfig(k=9, embeddings=True))(model)
        model.save_pretrained(tmp_path)
        assert torch.equal(answer(Outer.from_pretrained(tmp_path)), answer(model))
    finally:
        del Outer.get_input_embeddings
