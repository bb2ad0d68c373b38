"""Damaged files and arguments that make no sense: right, or one error that says what is wrong; nothing else.

Never a crash, a hang, a number that was not computed, or a tensor that is silently another. Each test runs
for its share of SVDQ_FUZZ_SECONDS (`make fuzz`: ten minutes), always from the same draws on.
"""

import faulthandler
import io
import json
import logging
import os
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import mutations
import pytest
import tiny_models as tiny
import torch
import transformers as hf
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from svdq_hf import SVDQConfig, SVDQLinear, quantize_model, read_footprint
from svdq_hf.cli.command import main
from svdq_hf.core.grid import Grid
from svdq_hf.core.topk import top_positions
from svdq_hf.format.decode import dense_blocks
from svdq_hf.format.encode import decompose
from svdq_hf.format.parts import PARTS, Scheme, StoredWeight
from svdq_hf.kernels import embedding_op, experts_op, linear_op  # noqa: F401  # define torch.ops.svdq
from svdq_hf.nn.inventory import svdq_layers

SECONDS = float(os.environ.get("SVDQ_FUZZ_SECONDS", "60"))
ROUND = 10
"""Draws between two looks at the clock."""
HANGS = 60
"""Seconds after which one input has hung; the slowest takes two."""
TOLD = (ValueError, TypeError, OSError, SafetensorError)
OUT, IN, EXPERTS = 5, 70, 3

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]


def for_a_while(try_one: Callable[[Any], None], share: float) -> None:
    """Call `try_one(draw)` with draws until the share of the time is over."""
    end, tried, rounds = time.monotonic() + SECONDS * share, 0, 0

    def one(data: Any) -> None:
        nonlocal tried
        tried += 1
        with in_time():
            try_one(data.draw)

    while time.monotonic() < end:
        rounds += 1
        choices = settings(
            max_examples=ROUND,
            derandomize=False,
            suppress_health_check=list(HealthCheck),
            phases=[Phase.generate],
        )
        seed(rounds)(choices(given(st.data())(one)))()
    print(f"{tried} inputs in {SECONDS * share:.0f} s")
    assert tried >= ROUND


@contextmanager
def in_time() -> Iterator[None]:
    """An input that takes too long is an error; where C does not come back, the process ends."""

    def told(*_: object) -> None:
        raise AssertionError(f"an input has taken {HANGS} seconds")

    before = signal.signal(signal.SIGALRM, told)
    signal.alarm(HANGS)
    faulthandler.dump_traceback_later(2 * HANGS, exit=True)
    try:
        yield
    finally:
        faulthandler.cancel_dump_traceback_later()
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


# Files.


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


def refused(call: Callable[[], Any], allowed: tuple[type[BaseException], ...]) -> Any:
    """What a call returns; None: it has raised what it may, and said something."""
    logging.disable(logging.ERROR)
    try:
        return call()
    except allowed as error:
        if isinstance(error, AssertionError) or not str(error).strip():
            raise
        return None
    finally:
        logging.disable(logging.NOTSET)


# Ops.

GRIDS = [
    Grid(group_size=32, levels="normal", column_scale=True, scale_bits=8),
    Grid(group_size=32, levels="normal", column_scale=True, scale_bits=8, bits=3),
    Grid(group_size=64, bits=8),
    Grid(group_size="tensor", scale="absmax"),
    Grid(group_size=8),
]


def weight_of(stored: StoredWeight, in_features: int, group: int) -> Tensor:
    """The dense weight, float64, in plain torch."""
    parts = {name: part.contiguous() for name, part in stored.as_dict().items()}
    parts["salient_values"] = parts["salient_values"].float()
    return torch.cat([block.double() for _, block in dense_blocks(parts, in_features, group)])


def near(y: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None = None, coarse: float = 1e-5) -> None:
    """Assert that `y` is `x @ weight.T + bias`, as near as its dtype allows."""
    wide = x.double()
    expected, size = wide @ weight.T, wide.abs() @ weight.abs().T
    if bias is not None:
        expected, size = expected + bias.double(), size + bias.double().abs()
    allowed = max(coarse, 8 * torch.finfo(y.dtype).eps) * size + torch.finfo(torch.float16).tiny
    assert bool(((y.double() - expected).abs() <= allowed).all())


def arguments(draw: mutations.Draw, name: str) -> list[Any]:
    """An op's arguments as they should be, of a random layer."""
    grid = draw(st.sampled_from(GRIDS))
    torch.manual_seed(draw(st.integers(0, 9)))
    weight = torch.randn(OUT, IN)
    parts = decompose(weight, *top_positions(weight.abs(), 4), Scheme(4, grid))
    if name.startswith("expert"):
        parts = {part: torch.stack([one] * EXPERTS) for part, one in parts.items()}
    tokens = draw(st.sampled_from([0, 1, 3, 20]))
    width = OUT if name.endswith("input_gradient") else IN
    first = torch.randint(OUT, (tokens,)) if name == "embedding" else torch.randn(tokens, width)
    last: dict[str, list[Any]] = {
        "linear": [torch.randn(OUT), IN, grid.columns(IN)],
        "input_gradient": [IN, grid.columns(IN)],
        "embedding": [IN, grid.columns(IN), torch.float32],
        "expert_linear": [torch.tensor([0, tokens // 2, tokens]), IN, grid.columns(IN), draw(st.booleans())],
    }
    return [first, *StoredWeight.of(parts), *last.get(name, last["expert_linear"])]


def check_answer(name: str, given: list[Any], y: Tensor) -> None:
    """Assert that an op's answer is what its arguments say."""
    first, stored, rest = given[0], StoredWeight(*given[1:9]), given[9:]
    if any(one.is_meta for one in given if isinstance(one, Tensor)):
        assert y.is_meta
        return
    assert bool(torch.isfinite(y).all())
    if not y.numel():  # nothing is asked of the weight
        return
    if name == "linear":
        near(y, first, weight_of(stored, *rest[1:3]), rest[0])
    elif name == "input_gradient":
        near(y, first, weight_of(stored, *rest[:2]).T)
    elif name == "embedding":
        rows = weight_of(stored, *rest[:2])[first.long()]
        assert torch.allclose(y.double(), rows, rtol=1e-2)
    else:
        ends, in_features, group, _ = rest
        start = 0
        for expert, end in enumerate(ends.tolist()):
            one = StoredWeight(*(None if part is None else part[expert] for part in stored))
            if end > start:  # else nothing is asked of its weight
                weight = weight_of(one, in_features, group)
                near(y[start:end], first[start:end], weight if name == "expert_linear" else weight.T)
            start = end
        assert not y[start:].any()


def test_ops_with_any_arguments() -> None:
    names = ("linear", "input_gradient", "embedding", "expert_linear", "expert_input_gradient")

    def one(draw: mutations.Draw) -> None:
        name = draw(st.sampled_from(names))
        given = arguments(draw, name)
        for at in draw(st.sets(st.integers(0, len(given) - 1), max_size=2)):
            given[at] = mutations.argument(draw, given[at])
        call = getattr(torch.ops.svdq, name)
        y = refused(lambda: call(*given), (ValueError, TypeError, IndexError, RuntimeError))
        if y is not None:
            check_answer(name, given, y)

    for_a_while(one, 0.25)
