"""Damaged files: loaded, quantized or exported right, or one error that says what is wrong; nothing else.

Never a crash, a hang, a number that was not computed, or a tensor that is silently another. Each test runs
for its share of SVDQ_FUZZ_SECONDS (`make fuzz`: ten minutes).
"""

import io
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import mutations
import pytest
import tiny_models as tiny
import torch
import transformers as hf
from fuzzing import for_a_while, near, refused, weight_of
from hypothesis import strategies as st
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from svdq_hf import SVDQConfig, SVDQLinear, quantize_model, read_footprint
from svdq_hf.cli.command import main
from svdq_hf.format.parts import PARTS, StoredWeight
from svdq_hf.nn.inventory import svdq_layers

TOLD = (ValueError, TypeError, OSError, SafetensorError)

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A dense model, one in several files, and two quantized ones."""
    root = tmp_path_factory.mktemp("whole")
    config = SVDQConfig(k=9)
    tiny.bert().save_pretrained(root / "dense")
    tiny.llama().save_pretrained(root / "sharded", max_shard_size="100KB")
    quantize_model(tiny.bert(), config).save_pretrained(root / "packed")
    head = config.replace(lm_head=True, embeddings=True)
    quantize_model(tiny.llama(), head).save_pretrained(root / "packed-sharded", max_shard_size="60KB")
    return {folder.name: folder for folder in root.iterdir()}


@contextmanager
def damaged(whole: Path, draw: mutations.Draw) -> Iterator[tuple[Path, str]]:
    """A copy with one file damaged, and which."""
    names = sorted(file.name for file in whole.iterdir() if file.suffix in (".json", ".safetensors"))
    name = draw(st.sampled_from([one for one in names if one != "generation_config.json"]))
    with TemporaryDirectory() as folder:
        source = Path(shutil.copytree(whole, Path(folder, "source")))
        file = source / name
        if name == "config.json":
            file.write_text(damaged_config(draw, json.loads(file.read_text())), errors="surrogatepass")
        elif file.suffix == ".json":
            text = mutations.json_text(draw, json.loads(file.read_text()))
            file.write_text(text, errors="surrogatepass")
        else:
            file.write_bytes(mutations.data(draw, file.read_bytes()))
        yield source, name


def damaged_config(draw: mutations.Draw, config: dict[str, Any]) -> str:
    """A config.json; our own part of it may hold anything, the model's no number that is a huge model."""
    own = config.get("quantization_config")
    if own is not None and draw(st.booleans()):
        return json.dumps(config).replace(json.dumps(own), mutations.json_text(draw, own))
    return mutations.json_text(draw, config, mutations.SMALL)


def command(*arguments: str) -> tuple[int, str]:
    """The exit code and what was said on standard error."""
    said = io.StringIO()
    with redirect_stderr(said), redirect_stdout(io.StringIO()):
        code = main(arguments)
    return code, said.getvalue()


def told_in_a_line(source: Path, code: int, said: str) -> bool:
    """Whether a command has refused; then it has said why, and left nothing."""
    if code == 0:
        return False
    lines = [line for line in said.splitlines() if line.startswith("svdq ")]
    assert code == 1, said
    assert len(lines) == 1, said
    assert len(lines[0]) > 20, said
    assert [one.name for one in source.parent.iterdir()] == ["source"]
    return True


def test_quantize_of_damaged_files(folders: dict[str, Path]) -> None:
    def one(draw: mutations.Draw) -> None:
        with damaged(folders[draw(st.sampled_from(["dense", "sharded"]))], draw) as (source, _):
            out = source.parent / "out"
            if told_in_a_line(source, *command("quantize", str(source), str(out), "--k=4", "--json")):
                return
            stored = tensors_of(out)
            assert all(map(finite, (one for key, one in stored.items() if key.endswith(PARTS[1:]))))
            for name, tensor in tensors_of(source).items():
                if name not in stored:
                    assert name.startswith(("bert.", "model.")), name
                elif stored[name].dtype == tensor.dtype:
                    assert same_bits(stored[name], tensor), name

    for_a_while(one, 0.25)


def test_export_and_inspect_of_damaged_files(folders: dict[str, Path]) -> None:
    def one(draw: mutations.Draw) -> None:
        with damaged(folders[draw(st.sampled_from(["packed", "packed-sharded"]))], draw) as (source, _):
            told_in_a_line(source, *command("inspect", str(source)))
            out = source.parent / "out"
            if not told_in_a_line(source, *command("export", str(source), str(out), "--json")):
                assert all(map(finite, tensors_of(out).values()))

    for_a_while(one, 0.25)


def test_loading_of_damaged_files(folders: dict[str, Path]) -> None:
    classes = {"packed": hf.BertModel, "packed-sharded": hf.LlamaForCausalLM}

    def one(draw: mutations.Draw) -> None:
        kind = draw(st.sampled_from(sorted(classes)))
        with damaged(folders[kind], draw) as (source, name):
            refused(lambda: read_footprint(source), TOLD)
            anything = (Exception,) if name == "config.json" else TOLD  # transformers reads it, too
            model = refused(lambda: classes[kind].from_pretrained(source), anything)
            if model is not None:
                check_loaded(model, source)

    for_a_while(one, 0.25)


def tensors_of(folder: Path) -> dict[str, Tensor]:
    return {
        name: one for file in sorted(folder.glob("*.safetensors")) for name, one in load_file(file).items()
    }


def finite(tensor: Tensor) -> bool:
    return bool(torch.isfinite(tensor).all())


def same_bits(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors hold the same bytes: a NaN of the source is what it is."""
    return torch.equal(*(each.detach().reshape(-1).view(torch.uint8) for each in (one, other)))


def check_loaded(model: Any, source: Path) -> None:
    """Every quantized layer holds what the files hold, finite, and computes with it."""
    stored = tensors_of(source)
    for name, layer in svdq_layers(model):
        parts = {part: one for part in PARTS if (one := getattr(layer, part)) is not None}
        for part, tensor in parts.items():
            assert same_bits(tensor, stored[f"{name}.{part}"]), (name, part)
            assert finite(tensor), (name, part)
        if type(layer) is not SVDQLinear:  # an embedding takes ids
            continue
        x = torch.randn(2, layer.in_features)
        weight = weight_of(StoredWeight.of(parts), layer.in_features, layer.group)
        near(layer(x).detach(), x, weight, layer.bias)
