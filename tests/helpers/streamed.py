"""Streamed checkpoints beside those that from_pretrained and save_pretrained give: the same bytes."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from svdq_hf import SVDQConfig
from svdq_hf.checkpoint.quantize import quantize_checkpoint
from svdq_hf.checkpoint.source import Source
from svdq_hf.checkpoint.streaming.plan import make_plan
from svdq_hf.checkpoint.streaming.unit import Unstreamable

CONFIG = SVDQConfig(k=4)


def contents(folder: Path) -> tuple[dict[str, tuple[str, list[int], bytes]], set[str | None]]:
    """Each tensor's dtype, shape and bytes, and what the headers say was measured."""
    tensors, facts = {}, set()
    for file in folder.glob("*.safetensors"):
        with safe_open(file, framework="pt") as opened:
            facts.add(json.dumps(opened.metadata(), sort_keys=True))
            for name in opened.keys():  # noqa: SIM118
                part, tensor = opened.get_slice(name), opened.get_tensor(name)
                data = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
                assert name not in tensors
                tensors[name] = (part.get_dtype(), part.get_shape(), data)
    return tensors, facts


def same(streamed: Path, saved: Path) -> None:
    """Assert that a streamed folder is what `save_pretrained` wrote."""
    ours, theirs = contents(streamed), contents(saved)
    assert ours[0].keys() == theirs[0].keys()
    assert [name for name in ours[0] if ours[0][name] != theirs[0][name]] == []
    assert ours[1] == theirs[1]
    assert len(ours[1]) == 1
    for file in saved.glob("*.json"):
        told, expected = json.loads((streamed / file.name).read_text()), json.loads(file.read_text())
        if file.name.endswith(".index.json"):  # where the cuts are is another matter
            assert told["weight_map"].keys() == expected["weight_map"].keys()
            assert told["metadata"] == expected["metadata"]
        else:
            assert told == expected


def check(
    folder: Path, size: str = "1GB", *, drop: tuple[str, ...] = (), config: SVDQConfig = CONFIG
) -> None:
    """Assert that `folder / "dense"` is streamed, and that it is the same then. drop: see `Source`."""
    source = Source.resolve(folder / "dense", drop=drop)
    make_plan(source, config, 10**9)  # or it would be Unstreamable
    quantize_checkpoint(source, folder / "ours", config, shard_size=size)
    loaded = source.kind.from_pretrained(folder / "dense", quantization_config=config)
    loaded.save_pretrained(folder / "theirs", max_shard_size=size)
    same(folder / "ours", folder / "theirs")


def edit_config(folder: Path, **changes: object) -> None:
    """Change keys of config.json; None removes one."""
    file = folder / "config.json"
    config = {**json.loads(file.read_text()), **changes}
    file.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))


def edit_tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def memory_only(
    folder: Path, words: str, caplog: pytest.LogCaptureFixture, config: SVDQConfig = CONFIG
) -> None:
    """Assert that a model is not streamed, that one line says why, and that it is quantized all the same."""
    source = Source.resolve(folder / "dense")
    with pytest.raises(Unstreamable, match=words):
        make_plan(source, config, 10**9)
    quantize_checkpoint(source, folder / "ours", config)
    told = [record.getMessage() for record in caplog.records if "not streamed" in record.getMessage()]
    assert len(told) == 1
    assert told[0].startswith(f"{folder / 'dense'} is quantized in memory, not streamed: ")
    torch.manual_seed(0)
    loaded = source.kind.from_pretrained(folder / "dense", quantization_config=config)
    loaded.save_pretrained(folder / "theirs")
    assert contents(folder / "ours")[0].keys() == contents(folder / "theirs")[0].keys()


def files(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}
