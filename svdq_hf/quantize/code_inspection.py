"""Inspection of a model's code: which modules behave like linear layers, and which weights other code reads.

Works without knowing the model's family. A subclass of `nn.Linear` may be one in all but name. And some
families cast a layer's input to `self.proj.weight.dtype`, or multiply by `self.proj.weight` themselves: with
a packed weight that would turn the input into integers, or meet no matrix. Such layers must stay dense. Not
here: a read that names no layer (`module.weight` in a loop), which is not seen; the choice itself
(`quantize.selection`).
"""

import dis
import inspect
from collections.abc import Callable, Iterable
from functools import cache
from types import CodeType

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

GUARDS = {"is_floating_point", "int8"}
"""Names by which a method shows that it knows of packed weights (T5, Gemma 4)."""
NOT_RUN = {"__init__", "_init_weights"}
"""Methods that a loaded model does not go through."""
VARIABLE = ("LOAD_FAST", "LOAD_DEREF")
"""Instructions that load a variable, by the start of their names."""


def is_linear(module: nn.Module) -> bool:
    """Whether a module is a linear layer, or of a subclass that computes the same (Falcon's)."""
    if type(module) in (nn.Linear, Conv1D):
        return True
    plain = {"weight", "bias"}.issuperset(name for name, _ in module.named_parameters())
    if not isinstance(module, nn.Linear) or not plain or any(True for _ in module.buffers()):
        return False
    return type(module).forward is nn.Linear.forward or _answers_as_linear(module)


def _answers_as_linear(module: nn.Linear) -> bool:
    """Whether a module computes `x @ weight.T + bias`, tried with small random tensors as its parameters."""
    with torch.no_grad(), torch.device("cpu"):  # where the model itself is being made on "meta"
        random = torch.Generator().manual_seed(0)
        x, weight, bias = (torch.randn(*shape, generator=random) for shape in ((2, 3, 8), (4, 8), (4,)))
        own = {"weight": weight} | ({} if module.bias is None else {"bias": bias})
        try:
            answer = torch.func.functional_call(module, own, (x,))
        except (AttributeError, IndexError, NotImplementedError, RuntimeError, TypeError, ValueError):
            return False  # it takes another input, so it is no linear layer; the type of the error varies
        expected = F.linear(x, **own)
        same = isinstance(answer, Tensor) and answer.shape == expected.shape
        return same and torch.allclose(answer, expected)


def layers_read(model: nn.Module, among: Callable[[nn.Module], bool] = is_linear) -> list[str]:
    """Names of the layers whose weight other code reads, as a matrix or for its dtype.

    Args:
        model: the model.
        among: which modules are meant; by default the linear layers.

    Returns:
        Their names, sorted.
    """
    names = [name for name, module in model.named_modules() if among(module)]
    found = set()
    for prefix, module in model.named_modules():
        inside = f"{prefix}." if prefix else ""
        for path, whole in _reads(type(module)):  # type: ignore[arg-type]  # mypy doubts that a class can be hashed
            if whole:
                found.add(inside + path)
            else:
                found |= {name for name in names if name.startswith(inside) and name.endswith(f".{path}")}
    return sorted(found.intersection(names))


@cache
def _reads(kind: type) -> frozenset[tuple[str, bool]]:
    """The modules whose weight a class's methods read: their paths, and whether those start at `self`.

    A layer that is also called normally is read on a separate code path (a fused CUDA kernel, Bloom's
    slices). Taking that path with a packed weight is an error, and no reason to keep the layer dense
    everywhere.
    """
    methods = inspect.getmembers(kind, inspect.isfunction)
    codes = [inspect.unwrap(method).__code__ for name, method in methods if name not in NOT_RUN]
    reading = [code for code in codes if "weight" in code.co_names]  # the others are many
    unguarded = [code for code in reading if GUARDS.isdisjoint(code.co_names)]
    cast = _owners(_attributes(unguarded), lambda use: use == "dtype")
    matrix = _owners(_attributes(reading), lambda use: use not in ("dtype", "device"))
    called = {(path, whole) for path, whole in _attributes(codes) if whole} if matrix else set()
    return frozenset(cast | (matrix - called))


def _owners(reads: set[tuple[str, bool]], wanted: Callable[[str], bool]) -> set[tuple[str, bool]]:
    """The modules whose weight is used in a wanted way; an attribute of a variable may be of any module."""
    owners = set()
    for path, whole in reads:
        owner, found, use = f"{path}.".partition(".weight.")
        if found and wanted(use.partition(".")[0]) and (whole or "." in owner):
            owners.add((owner, whole))
    return owners


def _attributes(codes: Iterable[CodeType]) -> set[tuple[str, bool]]:
    """The attributes that methods load, as dotted paths, and whether each path starts at `self`."""
    return {read for code in codes for read in _loads(code)}


@cache  # most methods of a class are its bases', hundreds of them
def _loads(code: CodeType) -> frozenset[tuple[str, bool]]:
    found: set[tuple[str, bool]] = set()
    path: list[str] | None = None
    of_self = False
    for step in dis.get_instructions(code):
        if step.opname in ("LOAD_ATTR", "LOAD_METHOD") and path is not None:
            path.append(step.argval)
            continue
        if path:
            found.add((".".join(path), of_self))
        variables = step.argval if isinstance(step.argval, tuple) else (step.argval,)  # two at once in 3.13
        path = [] if step.opname.startswith(VARIABLE) else None
        of_self = bool(variables) and variables[-1] == "self"
    return frozenset(found)
