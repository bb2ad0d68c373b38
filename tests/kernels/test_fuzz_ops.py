"""Ops with arguments that make no sense: right, or one error that says what is wrong; for a while.

The answers are compared with a dense weight in float64. See also tests/scenarios/test_fuzz.py.
"""

from typing import Any

import mutations
import pytest
import torch
from fuzzing import for_a_while, near, refused, weight_of
from hypothesis import strategies as st
from torch import Tensor

from svdq_hf.core.grid import Grid
from svdq_hf.core.topk import top_positions
from svdq_hf.format.encode import decompose
from svdq_hf.format.parts import Scheme, StoredWeight
from svdq_hf.kernels import embedding_op, experts_op, linear_op  # noqa: F401  # define torch.ops.svdq

pytestmark = pytest.mark.slow

OUT, IN, EXPERTS = 5, 70, 3

GRIDS = [
    Grid(group_size=32, levels="normal", column_scale=True, scale_bits=8),
    Grid(group_size=32, levels="normal", column_scale=True, scale_bits=8, bits=3),
    Grid(group_size=64, bits=8),
    Grid(group_size="tensor", scale="absmax"),
    Grid(group_size=8),
]


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
