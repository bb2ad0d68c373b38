"""What more than one test module needs: the devices present, a seed, and stored parts to look at."""

from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import settings
from skips import pytest_addoption, pytest_sessionfinish, pytest_terminal_summary  # noqa: F401  # its hooks
from torch import Tensor
from transformers.utils import logging as hf_logging

from svdq_hf.core.grid import Grid
from svdq_hf.core.topk import salient_count, top_positions
from svdq_hf.format.encode import decompose
from svdq_hf.format.parts import Scheme

# derandomize: the same examples on every run, so that CI fails on a change and not on luck.
settings.register_profile("svdq", deadline=None, derandomize=True, database=None, max_examples=60)
settings.load_profile("svdq")

# The matrices here are small: threads that wait for each other cost more than they bring, above all
# beside other test processes.
torch.set_num_threads(1)

DEVICES = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _progress_bar_as_before() -> Iterator[None]:
    """The command line switches it off, for the whole process."""
    yield
    hf_logging.enable_progress_bar()


class Split(NamedTuple):
    weight: Tensor
    parts: dict[str, Tensor]
    scheme: Scheme


@pytest.fixture
def split() -> Callable[..., Split]:
    """A random weight `[out, in]`, its stored parts (salient: the k largest) and their scheme."""

    def make(out: int, in_features: int, k: int | float = 4, *, device: str = "cpu", **grid: object) -> Split:
        weight = torch.randn(out, in_features).to(device)
        scheme = Scheme(k, Grid(**grid))
        rows, columns = top_positions(weight.abs(), salient_count(k, out, in_features))
        return Split(weight, decompose(weight, rows, columns, scheme), scheme)

    return make


@pytest.fixture
def dense_by_hand() -> Callable[[Mapping[str, Tensor], int, int], np.ndarray]:
    """The weight in float64 from the raw bytes, by the format's text alone: no code of the package."""

    def dense(parts: Mapping[str, Tensor], in_features: int, group: int) -> np.ndarray:
        codes = _codes_by_hand(parts["weight"].detach().cpu().numpy(), in_features)
        column = np.arange(in_features)
        by_name = {name: part.detach().cpu().double().numpy() for name, part in parts.items()}
        if "levels" in parts:
            codes = by_name["levels"][codes.astype(int) + len(by_name["levels"]) // 2]
        weight = codes * by_name["weight_scale"][:, column // group]
        if "row_scale" in parts:
            weight *= by_name["row_scale"][:, None]
        if "column_scale" in parts:
            weight *= by_name["column_scale"]
        values, rows, columns = (
            parts[f"salient_{name}"].detach().cpu().numpy() for name in ("values", "rows", "columns")
        )
        for value, row, at in zip(values, rows, columns, strict=True):
            assert weight[row, at] == 0
            weight[row, at] = value
        return weight

    return dense


def _codes_by_hand(packed: np.ndarray, in_features: int) -> np.ndarray:
    """Codes in float64: of 4 bits as a matrix of bytes, of 3 and 8 in blocks of 24 and 64 bytes."""
    block, place = np.divmod(np.arange(in_features), 64)
    unsigned = packed.view(np.uint8)
    if packed.ndim == 2:
        byte = unsigned[:, 32 * block + place % 32]
        return np.where(place < 32, byte & 15, byte >> 4).astype(np.float64) - 8
    if packed.shape[2] == 64:
        return packed[:, block, place].astype(np.float64)
    low = (unsigned[:, block, place % 16] >> (2 * (place // 16))) & 3
    top = (unsigned[:, block, 16 + place % 8] >> (place // 8)) & 1
    return (low + 4 * top).astype(np.float64) - 4
