"""Whatever folder a command is given: each of its tensors is written, packed, tied, or named; or it refuses.

SVDQ_EXAMPLES=500 draws that many folders for each command; the suite draws a few.
"""

import io
import json
import logging
import os
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from copy import deepcopy
from functools import cache, partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest.mock import patch

import pytest
import torch
import transformers as hf
from drawn_sources import FAMILIES, Drawn, computed, dense, sources, tensors_of
from hypothesis import HealthCheck, Phase, event, given, settings
from hypothesis import strategies as st
from torch import Tensor

from svdq_hf import SVDQConfig, quantize_model
from svdq_hf.calibration.synthetic import synthetic_batches
from svdq_hf.cli.command import main
from svdq_hf.format.parts import PARTS
from svdq_hf.quantize import input_statistics

EXAMPLES = int(os.environ.get("SVDQ_EXAMPLES", "15"))
LOST = 0.5
"""A weight of which more is wrong, of its norm, is not the same one: 3 bits lose 0.25, another 1.4."""

# Not shrunk: a draw is small and says what it is, and each try writes a model.
many = settings(
    max_examples=EXAMPLES, suppress_health_check=list(HealthCheck), phases=[Phase.explicit, Phase.generate]
)
few_tokens = partial(synthetic_batches, tokens=64)  # what is made of them is not at stake here
pytestmark = pytest.mark.slow

CHOICES = st.fixed_dictionaries(
    {
        "k": st.sampled_from([0, 4, 0.01]),
        "bits": st.sampled_from([4, 4, 3, 8]),
        "group_size": st.sampled_from([32, 8, 64]),
        "lm_head": st.sampled_from([False, False, True]),
        "embeddings": st.sampled_from([False, False, True]),
        "modules_to_not_convert": st.sampled_from(
            [None, None, ["lm_head"], [r".*\.1\..*"], ["dense", "up_proj"]]
        ),
    }
)


@given(drawn=sources(), choices=CHOICES)
@many
def test_quantize_streamed(drawn: Drawn, choices: dict[str, Any]) -> None:
    with drawn_folder(drawn) as folder:
        check_command(drawn, folder, ["quantize", *options(choices)], expected(drawn))


@given(drawn=sources(), choices=CHOICES)
@many
def test_quantize_in_memory(drawn: Drawn, choices: dict[str, Any]) -> None:
    with drawn_folder(drawn) as folder, patch.object(input_statistics, "synthetic_batches", few_tokens):
        command = ["quantize", "--error-feedback", "synthetic", *options(choices)]
        check_command(drawn, folder, command, expected(drawn))


@given(
    drawn=sources(dtype=st.just(torch.float32)),
    choices=CHOICES,
    dtype=st.sampled_from(["float32", "bfloat16"]),
)
@many
def test_export(drawn: Drawn, choices: dict[str, Any], dtype: str) -> None:
    model = quantized(drawn, choices)
    with TemporaryDirectory() as folder:
        source = Path(folder, "source")
        model.save_pretrained(source, max_shard_size="60KB" if drawn.shards else "1GB")
        drawn.spoil(source)
        whole, files = model.dequantize().state_dict(), tensors_of(source)
        plain = {name for name, one in files.items() if one.is_floating_point() and name in whole}
        whole |= {name: files[name] for name in plain}  # a tied tensor that is there twice, of another value
        values = {name: one.to(getattr(torch, dtype)) for name, one in whole.items()}
        check_command(drawn, source, ["export", "--dtype", dtype], values)


@given(family=st.sampled_from(sorted(FAMILIES)), choices=CHOICES, shards=st.booleans())
@many
def test_save_pretrained(family: str, choices: dict[str, Any], shards: bool) -> None:
    model = quantized(Drawn(family), choices)
    with TemporaryDirectory() as folder:
        model.save_pretrained(folder, max_shard_size="60KB" if shards else "1GB")
        check_values(
            Path(folder), dense(family, torch.float32).state_dict(), set(), tied(dense(family, torch.float32))
        )


# What was drawn.


@contextmanager
def drawn_folder(drawn: Drawn) -> Iterator[Path]:
    with TemporaryDirectory() as folder:
        drawn.write(Path(folder, "source"))
        yield Path(folder, "source")


def quantized(drawn: Drawn, choices: dict[str, Any]) -> Any:
    """The family's model, quantized; of a head or embedding that it has not, nothing is asked."""
    for without in ({}, {"lm_head": False}, {"lm_head": False, "embeddings": False}):
        try:
            return quantize_model(
                deepcopy(dense(drawn.family, drawn.dtype)), SVDQConfig(**{**choices, **without})
            )
        except ValueError as error:
            if not re.search("lm_head|embedding", str(error)):
                raise
    raise AssertionError(drawn)


def options(choices: dict[str, Any]) -> list[str]:
    """The same choices on the command line; names that fit nothing would be refused, so there are none."""
    flags = [f"--{name.replace('_', '-')}" for name in ("lm_head", "embeddings") if choices[name]]
    numbers = [f"--{name.replace('_', '-')}={choices[name]}" for name in ("k", "bits", "group_size")]
    return [*flags, *numbers]


def expected(drawn: Drawn) -> dict[str, Tensor]:
    """The weights that the folder's own model has."""
    model = dense(drawn.family, drawn.dtype)
    values = dict(model.state_dict())
    if drawn.twice == "other":
        stored = drawn_tensors(drawn)
        for one in model.all_tied_weights_keys or {}:
            if one in stored:
                values[one] = stored[one]
    return values


def drawn_tensors(drawn: Drawn) -> dict[str, Tensor]:
    with drawn_folder(drawn) as folder:
        return tensors_of(folder)


# What must be true.


def check_command(drawn: Drawn, folder: Path, command: list[str], values: dict[str, Tensor]) -> None:
    out = folder.parent / "out"
    dropped = ["--drop", drawn.stray] if drawn.stray and drawn.drop else []
    before = tensors_of(folder)
    code, told = run([command[0], str(folder), str(out), *command[1:], *dropped])
    event("refused" if code else "written")
    assert "SVDQ_TRACEBACK" not in told  # which says that nobody has foreseen it
    if code:
        assert code == 1, told
        assert not out.exists()
        assert [one.name for one in folder.parent.iterdir()] == ["source"]
        assert told.strip()
        return
    model = dense(drawn.family, drawn.dtype)
    check_names(drawn, before, set(tensors_of(out)), told)
    gone = {name for name in values if name in told}
    check_values(out, values, gone, tied(model))
    if drawn.dense_module:
        file = "2_Dense/model.safetensors"
        assert (out / file).read_bytes() == (folder / file).read_bytes()


def run(arguments: list[str]) -> tuple[int, str]:
    """The exit code, and all that was said: on standard error and in the logs."""
    said, handler = io.StringIO(), logging.StreamHandler()
    handler.setStream(said)
    logger = logging.getLogger("svdq_hf")
    logger.addHandler(handler)
    try:
        with redirect_stderr(said), redirect_stdout(io.StringIO()):
            code = main([*arguments, "--json"])
    finally:
        logger.removeHandler(handler)
    return code, said.getvalue()


def check_names(drawn: Drawn, before: Iterable[str], after: set[str], told: str) -> None:
    """Each tensor of the source's files is in the output's, or tied to one that is, or named."""
    model = dense(drawn.family, drawn.dtype)
    ties = tied(model)
    prefix = f"{model.base_model_prefix}."
    after = after | {f"{prefix}{name}" for name in after} | {name.removeprefix(prefix) for name in after}
    lost = {
        name
        for name in unpacked(one for one in before if drawn.added(one) or not converted(drawn.family))
        if name not in after | computed(model) and not ties.get(name, set()) & after and name not in told
    }
    assert not lost, (lost, told)


def unpacked(names: Iterable[str]) -> set[str]:
    """Names of tensors in files, the parts of a packed weight as one."""
    names = set(names)
    marks = [name.removesuffix("salient_rows") for name in names if name.endswith("salient_rows")]
    marks = [mark for mark in marks if f"{mark}salient_values" in names]
    whole = {f"{mark}{part}": mark for mark in marks for part in PARTS[1:]}
    return {re.sub("_$", "", re.sub(r"\.$", ".weight", whole.get(name, name))) for name in names}


def tied(model: hf.PreTrainedModel) -> dict[str, set[str]]:
    """The other names of each tensor that has several."""
    found: dict[str, set[str]] = {}
    for one, other in (model.all_tied_weights_keys or {}).items():
        found.setdefault(other, {other}).add(one)
    return {name: names for names in found.values() for name in names}


@cache
def converted(family: str) -> bool:
    """Whether the family's dense files have other names than the model: then `check_values` follows them."""
    model = dense(family, torch.float32)
    with TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        return not tensors_of(Path(folder)).keys() <= model.state_dict().keys()


def check_values(out: Path, values: dict[str, Tensor], gone: set[str], ties: dict[str, set[str]]) -> None:
    """The output loads with nothing made up, and each weight of the model is that of before."""
    stored = json.loads((out / "config.json").read_text())
    kind = getattr(hf, stored["architectures"][0], None) or module_class(stored["architectures"][0])
    model, info = kind.from_pretrained(out, output_loading_info=True, dtype="auto")
    assert {name for name in info["missing_keys"] if name not in gone} == set()
    assert not info["unexpected_keys"]
    packed = {name.rpartition(".")[0] for name in model.state_dict() if name.endswith("salient_rows")}
    if packed:
        model.dequantize()
    found, prefix = model.state_dict(), f"{kind.base_model_prefix}."
    for name, before in values.items():
        here = name if name in found else name.removeprefix(prefix)
        elsewhere = ties.get(name, set()) & {
            *found,
            *(f"{prefix}{one}" for one in found),
        }  # no file needs both
        if here in gone or name in gone or (here not in found and elsewhere):
            continue
        assert here in found, name
        after, before = found[here].float(), before.float()
        if torch.equal(after, before):
            continue
        assert {one.rpartition(".")[0] for one in {here} | ties.get(name, set())} & packed, name
        assert (after - before).norm() <= LOST * before.norm(), name


def module_class(name: str) -> Any:
    """A class that transformers does not show at its top."""
    return next(kind for family in FAMILIES if (kind := type(dense(family, torch.float32))).__name__ == name)
