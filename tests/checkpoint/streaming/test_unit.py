"""Fused experts are streamed one at a time, whichever way the files have them, or it is said why not."""

import math
from pathlib import Path

import pytest
import tiny_experts
import torch
import transformers as hf
from streamed import CONFIG, check, edit_config, edit_tensors, files, memory_only
from tiny_experts import qwen3_vl_moe
from tiny_models import mixtral, mixtral_config
from transformers.core_model_loading import Concatenate, MergeModulelist, Transpose, WeightConverter

import svdq_hf.checkpoint.estimate
import svdq_hf.checkpoint.streaming.shard
import svdq_hf.quantize.weight
from svdq_hf import SVDQConfig
from svdq_hf.checkpoint.estimate import estimate_checkpoint
from svdq_hf.checkpoint.quantize import quantize_checkpoint
from svdq_hf.checkpoint.streaming.byte_ranges import Place
from svdq_hf.checkpoint.streaming.unit import Unstreamable, expert_places
from svdq_hf.checkpoint.unfinished import unfinished_folder
from svdq_hf.format.names import WeightName
from svdq_hf.integrations.transformers.checkpoint_headers import Checkpoint, HeaderEntry

SIZE = "20KB"
IN_ALL = 16
"""Matrices of experts in the tiny Mixtral: two layers, two stacks of four."""


@pytest.fixture
def source(tmp_path: Path) -> Path:
    mixtral().save_pretrained(tmp_path / "dense")
    return tmp_path / "dense"


def quantized_names(monkeypatch: pytest.MonkeyPatch, stop_at: int | None = None) -> list[str]:
    """Names of the experts that are quantized from now on; an interrupt comes at one of them."""
    names: list[str] = []
    real = svdq_hf.quantize.weight.quantize_weight

    def counted(weight, config, name):
        if len(names) == stop_at:
            raise KeyboardInterrupt
        names.append(name)
        return real(weight, config, name)

    monkeypatch.setattr(svdq_hf.quantize.weight, "quantize_weight", counted)
    return names


def test_the_tenth_expert_comes_after_the_second(tmp_path):
    torch.manual_seed(0)
    hf.MixtralForCausalLM(mixtral_config(num_local_experts=12)).save_pretrained(
        tmp_path / "dense", max_shard_size="100KB"
    )
    check(tmp_path)


@pytest.mark.parametrize("turned", [False, True], ids=["out-in", "in-out"])
def test_a_file_of_either_orientation_is_streamed(turned, tmp_path):
    qwen3_vl_moe().save_pretrained(tmp_path / "dense")

    def turn(tensors: dict[str, torch.Tensor]) -> None:
        for name in [name for name in tensors if ".experts." in name]:
            tensors[name] = tensors[name].transpose(1, 2).contiguous()

    if turned:
        edit_tensors(tmp_path / "dense", turn)
    check(tmp_path)


@pytest.mark.parametrize("family", ["mixtral", "gpt-oss"])
@pytest.mark.parametrize(("stored", "said"), [("float16", "bfloat16"), ("float32", "bfloat16")])
def test_experts_are_quantized_from_the_precision_of_the_files(family, stored, said, tmp_path):
    tiny_experts.build(family).to(getattr(torch, stored)).save_pretrained(tmp_path / "dense")
    edit_config(tmp_path / "dense", dtype=said)
    check(tmp_path)


def test_experts_of_a_layer_that_the_model_does_not_have_are_dropped_by_name(tmp_path):
    tiny_experts.build("deepseek-v3").save_pretrained(tmp_path / "dense")  # its last layer predicts more
    more = {f"model.layers.2.mlp.experts.{expert}.up_proj.weight": torch.ones(96, 64) for expert in range(2)}
    edit_tensors(tmp_path / "dense", lambda tensors: tensors.update(more))
    check(tmp_path, drop=("model.layers.2",))


def test_an_expert_is_read_when_the_one_before_it_is_done(source, tmp_path, monkeypatch):
    names, real = quantized_names(monkeypatch), svdq_hf.checkpoint.streaming.shard.read_pieces

    def read(place, piece):
        names.append(place.name)
        return real(place, piece)

    monkeypatch.setattr(svdq_hf.checkpoint.streaming.shard, "read_pieces", read)
    quantize_checkpoint(source, tmp_path / "out", CONFIG)
    stack, file = "model.layers.1.mlp.experts.gate_up_proj", "model.layers.1.block_sparse_moe.experts"
    start = names.index(f"{file}.0.w1.weight")
    assert names[start : start + 12] == [
        name
        for expert in range(4)
        for name in (f"{file}.{expert}.w1.weight", f"{file}.{expert}.w3.weight", f"{stack}, expert {expert}")
    ]


# What stays in memory.


def test_experts_of_several_dtypes_are_quantized_in_memory(tmp_path, caplog):
    mixtral().bfloat16().save_pretrained(tmp_path / "dense")
    name = "model.layers.1.block_sparse_moe.experts.2.w3.weight"
    edit_tensors(tmp_path / "dense", lambda tensors: tensors.update({name: tensors[name].float()}))
    memory_only(tmp_path, "layers.1.mlp.experts.gate_up_proj is bfloat16 and float32 in the files", caplog)


def test_experts_that_the_loader_rounds_are_quantized_in_memory(tmp_path, caplog):
    mixtral().double().save_pretrained(tmp_path / "dense")
    memory_only(tmp_path, r"experts\.\w+ is float64 in the files", caplog)


def test_experts_that_stay_dense_are_joined_in_memory(source, tmp_path, caplog):
    config = SVDQConfig(k=4, modules_to_not_convert=["experts"])
    memory_only(tmp_path, "several tensors of its files become one", caplog, config)


STACK = WeightName("experts.up_proj", (2, 6, 4))
JOIN = WeightConverter(["a.*.x", "a.*.y"], "experts.up_proj", [MergeModulelist(dim=0), Concatenate(dim=1)])
TURN = WeightConverter("a.t", "experts.up_proj", [Transpose(1, 2, check_dims=True)])
ALWAYS = WeightConverter("a.t", "experts.up_proj", [Transpose(1, 2)])


def entries(
    *found: tuple[str, tuple[int, ...]], conversion: WeightConverter | None = JOIN
) -> list[HeaderEntry]:
    """Tensors of a file by name and shape; a piece's name ends as its pattern does."""
    return [
        HeaderEntry(name, shape, torch.float32, "file", conversion, f"a.*.{name[-1]}" if conversion else None)
        for name, shape in found
    ]


def found_places(sources: list[HeaderEntry]) -> tuple[tuple[Place, ...], bool]:
    checkpoint = Checkpoint(sources={STACK.name: sources})
    sizes = {entry.name: 4 * math.prod(entry.shape) for entry in sources}
    places = {e.name: Place("file", e.name, "F32", e.shape, 100, sizes[e.name]) for e in sources}
    return expert_places(STACK, checkpoint, places, transposed=False)


GATE, UP = (2, 4), (4, 4)
PAIRS = (("a.0.x", GATE), ("a.1.x", GATE), ("a.0.y", UP), ("a.1.y", UP))


def test_pieces_are_read_expert_by_expert():
    found, turned = found_places(entries(*PAIRS))
    assert [place.name for place in found] == ["a.0.x", "a.0.y", "a.1.x", "a.1.y"]
    assert not turned


@pytest.mark.parametrize(("shape", "conversion"), [((2, 6, 4), None), ((2, 6, 4), TURN), ((2, 4, 6), TURN)])
def test_one_tensor_is_read_slice_by_slice(shape, conversion):
    found, turned = found_places(entries(("a.t", shape), conversion=conversion))
    assert [(place.shape, place.start, place.size) for place in found] == [
        (shape[1:], 100, 96),
        (shape[1:], 196, 96),
    ]
    assert turned == (shape == (2, 4, 6))


@pytest.mark.parametrize(
    "sources",
    [
        [],
        entries(*PAIRS[:2]),
        entries(*PAIRS[:3]),
        entries(*PAIRS, ("a.2.x", GATE), ("a.2.y", UP)),
        entries(("a.0.x", GATE), ("a.1.x", UP), ("a.0.y", UP), ("a.1.y", GATE)),
        entries(("a.0.x", UP), ("a.1.x", UP), ("a.0.y", UP), ("a.1.y", UP)),
        entries(*PAIRS) + entries(("a.t", (2, 6, 4)), conversion=None),
        entries(("a.t", (2, 6, 4)), ("b.t", (2, 6, 4)), conversion=None),
        entries(("a.t", (2, 4, 6)), conversion=None),
        entries(("a.t", (2, 4, 6)), conversion=ALWAYS),
        entries(("a.t", (2, 5, 6)), conversion=TURN),
    ],
    ids=[
        "none",
        "half of each expert",
        "one piece less",
        "one expert more",
        "two heights of one kind",
        "too high",
        "pieces and all of them",
        "all of them twice",
        "the other way round",
        "turned always",
        "another shape",
    ],
)
def test_files_that_do_not_give_surely_all_experts_are_not_streamed(sources):
    with pytest.raises(Unstreamable, match=r"experts\.up_proj, which its files do not have expert by expert"):
        found_places(sources)


# What is wrong with them, and what becomes of a run that was cut off.


def test_a_missing_expert_is_told_as_in_memory(source, tmp_path):
    def drop(tensors: dict[str, torch.Tensor]) -> None:
        for name in [name for name in tensors if "layers.1" in name and ".experts.3." in name]:
            del tensors[name]

    edit_tensors(source, drop)
    with pytest.raises(ValueError, match=r"experts\.3\.w1\.weight is missing: .*gate_up_proj would be \[3, "):
        quantize_checkpoint(source, tmp_path / "out", CONFIG)


def test_a_bad_expert_is_named(source, tmp_path):
    name = "model.layers.1.block_sparse_moe.experts.2.w3.weight"
    edit_tensors(source, lambda tensors: tensors[name][3, 4].fill_(torch.nan))
    with pytest.raises(ValueError, match=r"experts\.gate_up_proj, expert 2: weight has a NaN"):
        quantize_checkpoint(source, tmp_path / "out", CONFIG)
    assert {file.name for file in tmp_path.iterdir()} == {"dense"}


def cut_off(source: Path, out: Path) -> None:
    """Cut a run off within the last stack."""
    with pytest.MonkeyPatch.context() as patched:
        quantized_names(patched, IN_ALL - 2)
        with pytest.raises(KeyboardInterrupt):
            quantize_checkpoint(source, out, CONFIG, shard_size=SIZE)
    assert unfinished_folder(out).is_dir()


def test_run_cut_off_within_a_stack_makes_that_stack_again(source, tmp_path, monkeypatch):
    quantize_checkpoint(source, tmp_path / "whole", CONFIG, shard_size=SIZE)
    cut_off(source, tmp_path / "out")
    names = quantized_names(monkeypatch)
    quantize_checkpoint(source, tmp_path / "out", CONFIG, shard_size=SIZE)
    assert len(names) == 4
    assert files(tmp_path / "out") == files(tmp_path / "whole")


def test_an_expert_that_has_changed_is_refused_by_name(source, tmp_path):
    cut_off(source, tmp_path / "out")
    name = "model.layers.0.block_sparse_moe.experts.1.w3.weight"
    edit_tensors(source, lambda tensors: tensors[name][0, 0].add_(1))
    with pytest.raises(ValueError, match=r"experts\.1\.w3\.weight is not what it was .*--restart"):
        quantize_checkpoint(source, tmp_path / "out", CONFIG, shard_size=SIZE)


@pytest.mark.slow
def test_workers_make_the_same_stacks(source, tmp_path):
    quantize_checkpoint(source, tmp_path / "one", CONFIG, shard_size=SIZE)
    quantize_checkpoint(source, tmp_path / "two", CONFIG, shard_size=SIZE, workers=2)
    assert files(tmp_path / "one") == files(tmp_path / "two")


def test_estimate_samples_an_expert_and_counts_them_all(source, tmp_path, monkeypatch):
    monkeypatch.setattr(svdq_hf.checkpoint.estimate, "peak_memory", lambda: 10**6)
    told = estimate_checkpoint(source, tmp_path / "out", CONFIG)
    assert told.in_memory is None
    assert any("experts" in name for name in told.sampled)
    packed = max(layer.stored_bytes for layer in told.footprint.layers if layer.experts is not None)
    assert told.memory_bytes == 10**6 + packed
    seconds = lambda unit, config: math.prod(unit.weight.shape[-2:]) / 1e6  # noqa: E731
    monkeypatch.setattr(svdq_hf.checkpoint.estimate, "_seconds", seconds)
    again = estimate_checkpoint(source, tmp_path / "out", CONFIG)
    assert again.seconds == pytest.approx(again.footprint.weights / 1e6)
