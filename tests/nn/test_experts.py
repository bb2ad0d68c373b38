"""Fused experts are really in few bits: every family, there and back, each expert as a layer of its own."""

import copy
import pickle
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import tiny_experts
import tiny_models as tiny
import torch
import transformers as hf
from safetensors import safe_open
from torch import Tensor, nn

import svdq_hf.quantize.input_statistics
from svdq_hf import SVDQConfig, dequantize_model, footprint, quantize_model, read_footprint
from svdq_hf.calibration.synthetic import synthetic_batches
from svdq_hf.format.parts import part_specs
from svdq_hf.kernels import experts_op as kernel
from svdq_hf.nn.expert_layouts import layout_of
from svdq_hf.nn.experts import SVDQExperts
from svdq_hf.nn.inventory import packed_weights, svdq_experts
from svdq_hf.quantize.weight import quantize_weight

pytestmark = pytest.mark.oldest

CONFIG = SVDQConfig(k=32)


class Case(NamedTuple):
    """One family: dense, quantized on the fly, what that one saved, and a dense copy of the quantized one."""

    name: str
    folder: Path
    source: hf.PreTrainedModel
    quantized: hf.PreTrainedModel
    reloaded: hf.PreTrainedModel
    dequantized: hf.PreTrainedModel
    loading_info: list[dict[str, Any]]


@pytest.fixture(scope="module", params=tiny_experts.FAMILIES)
def case(request, tmp_path_factory) -> Case:
    folder, source = tmp_path_factory.mktemp(request.param), tiny_experts.build(request.param)
    source.save_pretrained(folder / "dense")
    load = type(source).from_pretrained
    quantized, first = load(folder / "dense", quantization_config=CONFIG, output_loading_info=True)
    quantized.save_pretrained(folder / "quantized")
    reloaded, second = load(folder / "quantized", output_loading_info=True)
    dequantized = load(folder / "quantized").dequantize()
    dequantized.set_experts_implementation("eager")
    return Case(request.param, folder, source, quantized, reloaded, dequantized, [first, second])


def fused(model: nn.Module) -> dict[str, nn.Module]:
    return {name: module for name, module in model.named_modules() if layout_of(module) is not None}


def keys(folder: Path) -> set[str]:
    with safe_open(folder / "model.safetensors", "pt") as file:
        return set(file.keys())


def as_matrix(weight: Tensor, module: nn.Module) -> Tensor:
    """`[out, in]` of one expert."""
    layout = layout_of(module)
    return weight.T if layout is not None and layout.transposed else weight


def test_all_weights_of_experts_are_quantized(case):
    layers = [
        layer for layer in read_footprint(case.folder / "quantized").layers if layer.experts is not None
    ]
    dense = sum(p.numel() for m in fused(case.source).values() for p in m.parameters() if p.ndim == 3)
    assert sum(layer.weights for layer in layers) == dense > 0  # 100 %; asked are 95
    for layer in layers:
        specs = part_specs(layer.out, layer.in_features, CONFIG.scheme)
        bits = sum(8 * torch.Size(shape).numel() * dtype.itemsize for shape, dtype in specs.values())
        assert layer.bits_per_weight == bits / (layer.out * layer.in_features)
    assert not fused(case.quantized)


def test_loading_says_nothing(case):
    assert [tiny.problems(info) for info in case.loading_info] == [{}, {}]


def test_each_expert_is_stored_as_a_linear_layer_would_be(case):
    for name, dense in fused(case.source).items():
        experts = case.quantized.get_submodule(name)
        for matrix in experts.stacks:
            stack = experts.stack(matrix)
            for expert in (0, tiny_experts.EXPERTS - 1):
                weight = as_matrix(getattr(dense, matrix)[expert].detach(), dense)
                parts, _ = quantize_weight(weight, CONFIG, name)
                assert parts.keys() == stack.keys() == part_specs(*weight.shape, CONFIG.scheme).keys()
                assert all(torch.equal(parts[part], stack[part][expert]) for part in parts)


def test_in_memory_is_what_on_the_fly_is(case):
    model = quantize_model(copy.deepcopy(case.source), CONFIG)
    assert tiny.different_tensors(model, case.quantized) == []
    ours, theirs = (
        {one.stored.name: one.facts for one in packed_weights(m)} for m in (model, case.quantized)
    )
    assert ours == theirs


def test_reloads_bit_for_bit(case):
    assert tiny.different_tensors(case.reloaded, case.quantized) == []
    output = tiny_experts.output(case.quantized)
    assert torch.equal(tiny_experts.output(case.reloaded), output)
    facts = [
        {one.stored.name: one.facts for one in packed_weights(m)} for m in (case.reloaded, case.quantized)
    ]
    assert facts[0] == facts[1]
    assert all(0 < fact["relative_error"] < 0.1 for fact in facts[0].values())


def test_answers_as_its_dense_copy_does(case):
    ours, theirs = tiny_experts.output(case.quantized), tiny_experts.output(case.dequantized)
    assert float((ours - theirs).abs().max()) <= 1e-5 * float(theirs.abs().max())
    assert not torch.equal(theirs, tiny_experts.output(case.source))


def test_dequantized_experts_are_of_their_own_class_and_near(case):
    found = fused(case.dequantized)
    for name, dense in fused(case.source).items():
        assert type(found[name]) is type(dense)
        assert found[name].state_dict().keys() == dense.state_dict().keys()
        for matrix in layout_of(dense).matrices:
            weight, near = getattr(dense, matrix).detach(), getattr(found[name], matrix).detach()
            fact = case.quantized.get_submodule(name).facts[matrix]["relative_error"]
            assert float((weight - near).norm() / weight.norm()) == pytest.approx(fact, rel=1e-4)


def test_dequantized_files_have_the_keys_of_the_original(case, tmp_path):
    case.dequantized.save_pretrained(tmp_path)
    assert keys(tmp_path) == keys(case.folder / "dense")
    again = type(case.source).from_pretrained(tmp_path)
    assert tiny.different_tensors(again, case.dequantized) == []


def test_folder_and_memory_agree_on_bytes(case):
    ours, theirs = footprint(case.quantized), read_footprint(case.folder / "quantized")
    assert ours.to_dict()["totals"] == theirs.to_dict()["totals"]
    assert ours.total_bytes == sum(tensor.nbytes for tensor in case.quantized.state_dict().values())


def test_copies_answer_alike(case):
    output = tiny_experts.output(case.quantized)
    for model in (copy.deepcopy(case.quantized), pickle.loads(pickle.dumps(case.quantized))):
        assert tiny.different_tensors(model, case.quantized) == []
        assert torch.equal(tiny_experts.output(model), output)


def test_salient_values_and_all_else_of_experts_train(case):
    """Against autograd through the dense copy, in float64."""
    ours, theirs = copy.deepcopy(case.quantized).double(), copy.deepcopy(case.dequantized).double()
    inputs = {"input_ids": tiny.tokens()}
    for model in (ours, theirs):
        first = model(**inputs)[0]
        (first * torch.linspace(-1, 1, first.numel(), dtype=first.dtype).view_as(first)).sum().backward()
    for name, experts in svdq_experts(ours):
        dense = theirs.get_submodule(name)
        for matrix in experts.stacks:
            stack, gradient = experts.stack(matrix), getattr(dense, matrix).grad
            found = getattr(experts, f"{matrix}_salient_values").grad
            assert found.abs().max() > 0
            for expert in range(tiny_experts.EXPERTS):
                rows, columns = stack["salient_rows"][expert], stack["salient_columns"][expert]
                wanted = as_matrix(gradient[expert], dense)[rows.long(), columns.long()]
                assert torch.allclose(
                    found[expert], wanted.float(), rtol=1e-3, atol=1e-5 * float(wanted.abs().max())
                )
        for bias in ("gate_up_proj_bias", "down_proj_bias"):
            if hasattr(dense, bias):
                assert torch.allclose(
                    getattr(experts, bias).grad, getattr(dense, bias).grad, rtol=1e-3, atol=1e-8
                )
    embedding, other = ours.get_input_embeddings().weight.grad, theirs.get_input_embeddings().weight.grad
    assert torch.allclose(embedding, other, rtol=1e-3, atol=1e-5 * float(other.abs().max()))


def test_only_experts_that_were_hit_are_decoded(monkeypatch):
    model = quantize_model(tiny_experts.build("mixtral"), CONFIG)
    _, experts = next(svdq_experts(model))
    linear, decoded = kernel.linear, []

    def counted(x, weight, *others):
        decoded.append((x.shape[0], weight.data_ptr()))
        return linear(x, weight, *others)

    monkeypatch.setattr(kernel, "linear", counted)
    chosen = torch.tensor([[2, 1], [2, 1], [2, 0]])
    experts(torch.randn(3, 64), chosen, torch.full((3, 2), 0.5))
    first = [experts.gate_up_proj[expert].data_ptr() for expert in range(4)]
    assert [(count, first.index(place)) for count, place in decoded if place in first] == [
        (1, 0),
        (2, 1),
        (3, 2),
    ]
    assert len(decoded) == 6


def test_llama4_decodes_no_expert_for_tokens_that_did_not_choose_it(monkeypatch):
    model = quantize_model(tiny_experts.build("llama4"), CONFIG)
    _, experts = next(svdq_experts(model))
    dense = fused(dequantize_model(copy.deepcopy(model)))["model.layers.0.feed_forward.experts"]
    x = torch.randn(4, 5, 64)
    x[0] = x[2] = 0  # nobody's
    x[3, :4] = 0
    linear, decoded = kernel.linear, []
    monkeypatch.setattr(kernel, "linear", lambda x, *others: (decoded.append(len(x)), linear(x, *others))[1])
    flat = x.view(20, 64)
    assert torch.allclose(experts(flat), dense(flat), rtol=1e-4, atol=1e-6)
    assert decoded == [5, 1, 5, 1]


def test_index_beyond_the_experts_is_nobodys_token():
    model = quantize_model(tiny_experts.build("gpt-oss"), CONFIG)
    _, experts = next(svdq_experts(model))
    x, weights = torch.randn(3, 64), torch.rand(3, 2)
    alone = experts(
        x, torch.tensor([[0, 1], [3, 2], [1, 3]]), weights * torch.tensor([[1, 0], [1, 1], [0, 0.0]])
    )
    some = experts(x, torch.tensor([[0, 4], [3, 2], [4, 4]]), weights)
    assert torch.allclose(some, alone, atol=1e-6)
    assert some[2].abs().max() == 0


def test_no_token_at_all():
    model = quantize_model(tiny_experts.build("mixtral"), CONFIG)
    _, experts = next(svdq_experts(model))
    nothing = torch.empty(0, 2, dtype=torch.long)
    assert experts(torch.empty(0, 64), nothing, nothing.float()).shape == (0, 64)


def test_step37_is_known_by_its_name():
    from transformers.models.step3p7.modeling_step3p7 import Step3p7Experts

    config = hf.MixtralConfig(hidden_size=64, moe_intermediate_size=96, num_local_experts=4)
    dense = Step3p7Experts(config, swiglu_limit=0.5)
    with torch.no_grad():
        for parameter in dense.parameters():
            parameter.normal_(0, 0.2)
    model = quantize_model(nn.Sequential(dense, nn.Linear(64, 64)), CONFIG)
    inputs = torch.randn(7, 64), torch.stack([torch.randperm(4)[:2] for _ in range(7)]), torch.rand(7, 2)
    ours, back = model[0](*inputs), dequantize_model(model)[0]
    assert type(back) is Step3p7Experts
    assert torch.allclose(ours, back(*inputs), rtol=1e-4, atol=1e-6)


# Dtypes, devices, compilation.


def test_a_cast_leaves_what_is_stored_as_it_is(tmp_path):
    model = quantize_model(tiny_experts.build("gpt-oss"), CONFIG)
    before = copy.deepcopy(dict(svdq_experts(model)))
    model.to(torch.bfloat16)
    for name, experts in svdq_experts(model):
        parts = before[name].parts()
        assert all(
            torch.equal(part, parts[key]) and part.dtype == parts[key].dtype
            for key, part in experts.parts().items()
        )
        assert experts.gate_up_proj_bias.dtype == torch.bfloat16
    exact = tiny_experts.output(quantize_model(tiny_experts.build("gpt-oss"), CONFIG))
    assert tiny.cosine(tiny_experts.output(model), exact) > 0.999


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", ["mixtral", "gpt-oss"])
def test_experts_are_quantized_from_the_files_precision(family, stored, tmp_path):
    source = tiny_experts.build(family).to(stored)
    source.save_pretrained(tmp_path)
    model = type(source).from_pretrained(tmp_path, quantization_config=CONFIG, dtype=torch.bfloat16)
    wanted = dict(svdq_experts(quantize_model(source, CONFIG)))
    for name, experts in svdq_experts(model):
        parts = wanted[name].parts()
        assert all(torch.equal(part, parts[key]) for key, part in experts.parts().items())


def test_autocast_has_the_output_in_its_own_dtype():
    model = quantize_model(tiny_experts.build("mixtral"), CONFIG)
    _, experts = next(svdq_experts(model))
    inputs = torch.randn(3, 64), torch.tensor([[2, 1], [2, 1], [2, 0]]), torch.rand(3, 2)
    with torch.autocast("cpu", torch.bfloat16):
        y = experts._product("gate_up_proj", inputs[0], torch.tensor([0, 3, 3, 3]), None)
        assert y.dtype == torch.bfloat16
        assert tiny.cosine(experts(*inputs).flatten().float(), experts(*inputs).flatten().float()) > 0.999


@pytest.mark.parametrize("family", ["mixtral", "gpt-oss", "llama4"])
def test_is_one_graph_when_compiled(family):
    model = quantize_model(tiny_experts.build(family), CONFIG)
    inputs = {"input_ids": tiny.tokens()}
    with torch.no_grad():
        eager = model(**inputs).logits
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")(**inputs).logits
    assert torch.allclose(compiled, eager, rtol=1e-5, atol=1e-5)


def test_the_ops_keep_their_contract():
    model = quantize_model(tiny_experts.build("mixtral"), CONFIG)
    _, experts = next(svdq_experts(model))
    parts = list(experts.stack("down_proj").values())
    named = experts.stack("down_proj")
    stored = [named.get(part) for part in kernel.PARTS]
    stored[2] = stored[2].clone().requires_grad_()
    assert len(parts) == len([part for part in stored if part is not None])
    x = torch.randn(5, 96, requires_grad=True)
    ends = torch.tensor([2, 2, 4, 5])
    checks = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(
        torch.ops.svdq.expert_linear.default, (x, *stored, ends, 96, 32, False), test_utils=checks
    )
    gradient = torch.randn(5, 64, requires_grad=True)
    torch.library.opcheck(
        torch.ops.svdq.expert_input_gradient.default,
        (gradient, *stored, ends, 96, 32, False),
        test_utils=checks,
    )


def test_part_of_a_model_may_be_on_disk(tmp_path):
    model = quantize_model(tiny_experts.build("mixtral"), CONFIG)
    model.save_pretrained(tmp_path / "quantized")
    names = ("model.embed_tokens", "model.layers.0", "model.norm", "model.rotary_emb", "lm_head")
    places = {**dict.fromkeys(names, "cpu"), "model.layers.1": "disk"}
    offloaded = type(model).from_pretrained(
        tmp_path / "quantized", device_map=places, offload_folder=tmp_path / "offload", offload_buffers=True
    )
    assert any(part.is_meta for part in offloaded.model.layers[1].mlp.experts.parts().values())
    assert torch.equal(tiny_experts.output(offloaded), tiny_experts.output(model))
    with pytest.raises(ValueError, match=r"model\.layers\.1\..* is on disk"):
        offloaded.dequantize()


# What stays dense, and what is said.


@pytest.mark.parametrize(
    "pattern",
    ["experts", "down_proj", r"model\.layers\.\d+\.mlp", r"model\.layers\.\d+\.mlp\.experts\.gate_up_proj"],
)
def test_names_keep_experts_dense(pattern, caplog):
    source = tiny_experts.build("mixtral")
    model = quantize_model(copy.deepcopy(source), SVDQConfig(k=32, modules_to_not_convert=[pattern]))
    assert not any(svdq_experts(model))
    assert caplog.messages == []
    assert model.config.quantization_config.format_version == 2
    for name, module in fused(source).items():
        assert tiny.different_tensors(model.get_submodule(name), module) == []


def test_experts_of_one_layer_may_stay_dense(tmp_path):
    config = SVDQConfig(k=32, modules_to_not_convert=["model.layers.0.mlp.experts"])
    source = tiny_experts.build("mixtral")
    source.save_pretrained(tmp_path / "dense")
    model = type(source).from_pretrained(tmp_path / "dense", quantization_config=config)
    assert [name for name, _ in svdq_experts(model)] == ["model.layers.1.mlp.experts"]
    model.save_pretrained(tmp_path / "quantized")
    again, info = type(source).from_pretrained(tmp_path / "quantized", output_loading_info=True)
    assert tiny.problems(info) == {}
    assert tiny.different_tensors(again, model) == []
    again.dequantize().save_pretrained(tmp_path / "back")
    assert keys(tmp_path / "back") == keys(tmp_path / "dense")


def test_routers_stay_dense():
    for family in ("mixtral", "qwen2-moe", "gpt-oss"):
        source = tiny_experts.build(family)
        routers = {
            n: m for n, m in source.named_modules() if "Router" in type(m).__name__ or n.endswith("_gate")
        }
        before = copy.deepcopy(routers)
        model = quantize_model(source, CONFIG)
        assert routers
        for name, router in before.items():
            assert type(model.get_submodule(name)) is type(router)
            assert tiny.different_tensors(model.get_submodule(name), router) == []


def test_unknown_classes_stay_dense_and_are_named(caplog):
    sizes = {"hidden_size": 64, "ffn_hidden_size": 96, "expert_ffn_hidden_size": 96, "vocab_size": 96}
    counts = {"num_layers": 1, "num_attention_heads": 4, "n_routed_experts": 4, "zero_expert_num": 1}
    sizes |= {**counts, **tiny_experts.LATENT, "head_dim": 16, "moe_topk": 2}
    model = quantize_model(hf.LongcatFlashForCausalLM(hf.LongcatFlashConfig(**sizes)), CONFIG)
    assert not any(svdq_experts(model))
    assert caplog.messages == [
        "fused experts of a class that svdq_hf does not know stay dense: LongcatFlashExperts: 1 modules, "
        "model.layers.0.mlp.experts"
    ]


@pytest.mark.parametrize(
    ("choices", "saliency"), [({"error_feedback": True}, "svd"), ({"saliency": "awq"}, "relative")]
)
def test_data_does_not_reach_experts_and_a_warning_says_so(choices, saliency, caplog):
    data = SVDQConfig(k=32, group_size=32, **choices)
    model = quantize_model(tiny_experts.build("mixtral"), data, [tiny.tokens()])
    told = f"without data, by saliency '{saliency}' and without error feedback: 2 modules, model.layers.0"
    assert told in caplog.text
    config = SVDQConfig(k=32, group_size=32, saliency=saliency)
    plain = quantize_model(tiny_experts.build("mixtral"), config)
    for (_, ours), (_, theirs) in zip(svdq_experts(model), svdq_experts(plain), strict=True):
        assert tiny.different_tensors(ours, theirs) == []
    assert tiny.different_tensors(model.model.layers[0].self_attn, plain.model.layers[0].self_attn)


@pytest.mark.parametrize("saliency", ["awq", "pqi", "requant"])
def test_experts_alone_need_no_data(saliency, monkeypatch):
    monkeypatch.setattr(svdq_hf.quantize.input_statistics, "synthetic_batches", None)
    config = SVDQConfig(k=8, saliency=saliency, modules_to_not_convert=["self_attn"])
    model = quantize_model(tiny_experts.build("mixtral"), config.replace(error_feedback="synthetic"))
    plain = quantize_model(tiny_experts.build("mixtral"), config.replace(saliency="relative"))
    assert tiny.different_tensors(model, plain) == []


def test_a_mixture_of_experts_is_calibrated_on_its_own_words(monkeypatch):
    few = partial(synthetic_batches, tokens=400)
    monkeypatch.setattr(svdq_hf.quantize.input_statistics, "synthetic_batches", few)
    model = quantize_model(tiny_experts.build("mixtral"), SVDQConfig.self_calibrated())
    assert len(list(svdq_experts(model))) == 2
    counts = [layer.k for layer in footprint(model).layers if "self_attn" in layer.name]
    assert len(set(counts)) > 1  # chosen for the whole model at once


def test_frozen_experts_stay_frozen_and_others_train():
    source = tiny_experts.build("mixtral")
    source.model.layers[0].mlp.experts.requires_grad_(False)
    model = quantize_model(source, CONFIG)
    trained = [experts.gate_up_proj_salient_values.requires_grad for _, experts in svdq_experts(model)]
    assert trained == [False, True]


def test_shows_what_it_is():
    model = quantize_model(tiny_experts.build("gpt-oss"), CONFIG)
    text = str(next(experts for _, experts in svdq_experts(model))).splitlines()
    assert text[0] == (
        "SVDQExperts(GptOssExperts, gate_up_proj=[4, 192, 64], down_proj=[4, 64, 96], "
        "k=[32, 32], group_size=32)"
    )
    with pytest.raises(ValueError, match="Linear is no class of fused experts"):
        SVDQExperts(nn.Linear(64, 64))


@pytest.mark.parametrize(
    "choices", [{"bits": 3}, {"bits": 8}, {"k": 0}, {"group_size": "tensor", "scale_bits": 16}], ids=str
)
def test_other_choices_come_back_too(choices, tmp_path):
    model = quantize_model(tiny_experts.build("gpt-oss"), SVDQConfig(**{"k": 32, **choices}))
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    assert tiny.different_tensors(again, model) == []
    assert read_footprint(tmp_path).bits_per_weight == footprint(model).bits_per_weight
    dense = copy.deepcopy(model).dequantize()
    dense.set_experts_implementation("eager")
    assert torch.allclose(tiny_experts.output(model), tiny_experts.output(dense), rtol=1e-4, atol=1e-4)
