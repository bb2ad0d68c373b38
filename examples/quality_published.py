"""Published roundings without data, by their formulas: what no package does here, or none does rightly.

Each takes a weight `[out, in]`, float32, and returns the bits that it stores and the weight that comes back.
Plain rounding as AutoRound's data-free mode does it, SINQ with the levels of NF4, HIGGS; the rotation that
HIGGS shares with trellis codes (`quality_trellis`). Not here: other packages' own code (`quality_peers`).
"""

import math
from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

Rounded = tuple[int, Tensor]
"""Stored bits, and the weight `[out, in]` that they stand for."""

NF4 = torch.tensor(
    [-1, -0.6961928, -0.52507305, -0.3949175, -0.28444138, -0.18477343, -0.09105004, 0, 0.0795803, 0.1609302,
     0.2461123, 0.33791524, 0.44070983, 0.562617, 0.72295684, 1],
    dtype=torch.float32,
)  # fmt: skip
"""Levels of arXiv 2305.14314, as bitsandbytes has them."""


def rtn(weight: Tensor, group: int) -> Rounded:
    """Rounding to nearest, asymmetric; where `group` does not divide the width, the last one is shorter."""
    parts = weight.split(group, 1)
    found = torch.cat([round_group(part) for part in parts], 1)
    return 4 * weight.numel() + 20 * len(weight) * len(parts), found


def round_group(weight: Tensor) -> Tensor:
    """Each last dimension rounded to 16 even steps: a 16-bit scale and a 4-bit zero point."""
    low, high = weight.amin(-1, keepdim=True).clamp_max(0), weight.amax(-1, keepdim=True).clamp_min(0)
    scale = ((high - low) / 15).clamp_min(1e-7).half().float()
    zero = (-low / scale).round().clamp(0, 15)
    codes = ((weight / scale).round() + zero).clamp(0, 15)
    return (codes - zero) * scale


def sinq_nf4(weight: Tensor, group: int) -> Rounded:
    """SINQ (arXiv 2509.22944) with the levels of NF4 about each group's mean, as its package has them.

    Stored: codes, a scale and a mean of 16 bits for each group, a scale of 16 bits for each column.
    """
    tiles = weight.unflatten(1, (-1, group)).transpose(0, 1)
    column, row = sinkhorn_scales(tiles)
    even = tiles / column / row
    mean = even.mean(2, keepdim=True)
    scale = (even - mean).abs().amax(2, keepdim=True).clamp_min(1e-4)
    shift = (mean / scale).half().float()
    levels = NF4[torch.bucketize((even / scale - shift).contiguous(), (NF4[1:] + NF4[:-1]) / 2)]
    found = (levels + shift) * (scale * row).half().float() * column.half().float()
    bits = 4 * weight.numel() + 32 * weight.numel() // group + 16 * weight.shape[1]
    return bits, found.transpose(0, 1).flatten(1)


def sinkhorn_scales(tiles: Tensor, steps: int = 16) -> tuple[Tensor, Tensor]:
    """Scales under which a tile's columns and rows are most alike in their standard deviation.

    Rows and columns are divided by their deviations in turn; the scales kept are those of the least ratio of
    the largest to the smallest deviation, and a tile in which that ratio rises stops. The bounds are the
    package's.

    Args:
        tiles: `[tiles, rows, columns]`.
        steps: most divisions.

    Returns:
        `[tiles, 1, columns]` and `[tiles, rows, 1]`.
    """
    column, row = torch.zeros_like(tiles[:, :1]), torch.zeros_like(tiles[:, :, :1])  # logarithms
    kept, goes_on = (column, row), torch.ones_like(tiles[:, :1, :1], dtype=torch.bool)
    least = torch.full(goes_on.shape, torch.inf)
    target = torch.minimum(*(part.clamp(1e-3, 1e3).amin((1, 2), keepdim=True) for part in deviations(tiles)))
    for _ in range(steps):
        parts = deviations(tiles / column.exp() / row.exp())
        found = imbalance(*parts)
        better = found <= least
        least = torch.minimum(least, found)
        kept = torch.where(better, column, kept[0]), torch.where(better, row, kept[1])
        goes_on = goes_on & better
        step = [(part.clamp(1e-3, 1e3) / (target + 1e-6)).clamp(0.7, 2).log() * goes_on for part in parts]
        column, row = ((log + part).clamp(-0.3, 10) for log, part in zip((column, row), step, strict=True))
    return kept[0].exp(), kept[1].exp()


def deviations(tiles: Tensor) -> tuple[Tensor, Tensor]:
    """Standard deviations of each tile's columns and rows."""
    return tiles.std(1, keepdim=True), tiles.std(2, keepdim=True)


def imbalance(columns: Tensor, rows: Tensor) -> Tensor:
    """The largest of each tile's deviations over the smallest, `[tiles, 1, 1]`."""
    both = torch.cat([columns.flatten(1), rows.flatten(1)], 1)
    return (both.amax(1) / both.amin(1).clamp_min(1e-12))[:, None, None]


def higgs(weight: Tensor) -> Rounded:
    """HIGGS (arXiv 2411.17525), p = 2 and n = 256: pairs of rotated weights to the nearest of 256 points."""
    grid = gaussian_grid()

    def to_points(rows: Tensor) -> Tensor:
        return grid[nearest(rows.reshape(-1, 2), grid)].view_as(rows)

    return 4 * weight.numel() + 16 * len(weight), rounded_after_rotation(weight, to_points)


@cache
def gaussian_grid(points: int = 256, samples: int = 1 << 16, rounds: int = 30) -> Tensor:
    """Points `[points, 2]` of least squared error for normal pairs: Lloyd's algorithm on a sample."""
    sample = torch.randn(samples, 2, generator=torch.Generator().manual_seed(0))
    grid = 2**0.5 * sample[:points]  # as dense as the best points are: the root of the normal density
    for _ in range(rounds):
        of = nearest(sample, grid)
        count = torch.bincount(of, minlength=points).clamp_min(1)
        grid = torch.zeros_like(grid).index_add_(0, of, sample) / count[:, None]
    return grid


def nearest(pairs: Tensor, grid: Tensor) -> Tensor:
    """Index of the nearest point of each pair, `[pairs]`."""
    half = grid.square().sum(1) / 2
    return torch.cat([(part @ grid.T - half).argmax(1) for part in pairs.split(1 << 14)])


def rounded_after_rotation(weight: Tensor, to_grid: Callable[[Tensor], Tensor]) -> Tensor:
    """A weight rounded in a rotated basis, each row in units of its own deviation (16 bits)."""
    basis = rotation(weight.shape[1])
    turned = weight @ basis
    scale = turned.square().mean(1, keepdim=True).sqrt().clamp_min(1e-7).half().float()
    return to_grid(turned / scale) * scale @ basis.T


@cache
def rotation(width: int) -> Tensor:
    """Random signs, then the Hartley transform: orthogonal `[width, width]`, all entries <= sqrt(2 / width).

    The papers take Hadamard's where the width has one; 576 and 640 do not as powers of two.
    """
    place = torch.arange(width)
    angle = (place[:, None] * place % width).double() * (2 * math.pi / width)
    signs = torch.randint(2, (width, 1), generator=torch.Generator().manual_seed(0)) * 2 - 1
    return ((angle.cos() + angle.sin()) / math.sqrt(width) * signs).float()
