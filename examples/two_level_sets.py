"""Would a second set of levels pay, chosen for each group by a spare bit of its scale?

    python examples/two_level_sets.py [MODEL --layer 12]

As llama.cpp's relatives (IQ4_KS) and Four-Over-Six do. Groups of 32 weights, column scales taken out, in the
default's sixteen levels or in two sets trained together on normal groups (Lloyd's algorithm: each group takes
the set, size and sign of least error, then each level becomes the mean of what rounds to it). Squared errors
over squared weights, in thousandths; scales are not rounded. Not here: a format that stores it.
"""

import argparse
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import safe_open
from torch import Tensor

from svdq_hf.core.column_scale import column_scale
from svdq_hf.core.levels import TABLES, TOP

GROUP = 32
GROUPS = 3000
"""Groups that an error is taken over: it scatters by 1 / sqrt(3000 * 32), 0.3 %."""
NORMAL = torch.tensor(TABLES[4]["normal"]) / TOP
CLIPS = torch.linspace(0.70, 1.12, 15).tolist()
"""Sizes tried: what the largest weight of a group is in units of its scale."""


class Assigned(NamedTuple):
    """What groups `[groups, 32]` round to: codes, likewise; set, scale and squared error, `[groups]`."""

    codes: Tensor
    which: Tensor
    scale: Tensor
    error: Tensor


def assign(groups: Tensor, sets: list[Tensor], signs: tuple[int, ...]) -> Assigned:
    """Each group by the set, size and sign of least squared error."""
    top = groups.abs().amax(1).clamp_min(1e-9)
    found: Assigned | None = None
    for number, levels in enumerate(sets):
        for clip in (clip * sign for clip in CLIPS for sign in signs):
            codes = torch.bucketize(groups / (clip * top)[:, None], (levels[1:] + levels[:-1]) / 2)
            error = (levels[codes] * (clip * top)[:, None] - groups).square().sum(1)
            tried = Assigned(codes, torch.full_like(error, number), clip * top, error)
            found = tried if found is None else lesser(found, tried)
    if found is None:
        raise ValueError("sets and signs: none to try; give at least one of each")
    return found


def lesser(one: Assigned, two: Assigned) -> Assigned:
    """Of two roundings the better one for each group."""
    better = two.error < one.error
    whole = torch.where(better[:, None], two.codes, one.codes)
    rest = (torch.where(better, new, old) for old, new in zip(one[1:], two[1:], strict=True))
    return Assigned(whole, *rest)


def trained(groups: Tensor, sets: list[Tensor], signs: tuple[int, ...], rounds: int = 8) -> list[Tensor]:
    """The sets after Lloyd's rounds; what is zero stays zero, as salient weights need it."""
    for _ in range(rounds):
        found = assign(groups, sets, signs)
        sets = [means(groups, found, number, levels) for number, levels in enumerate(sets)]
    return sets


def means(groups: Tensor, found: Assigned, number: int, levels: Tensor) -> Tensor:
    """The levels of one set that fit what rounds to them best."""
    mine = found.which == number
    scale = found.scale[mine][:, None].expand(-1, groups.shape[1]).flatten()
    codes, weights = found.codes[mine].flatten(), groups[mine].flatten()
    along = torch.zeros_like(levels).index_add_(0, codes, weights * scale)
    square = torch.zeros_like(levels).index_add_(0, codes, scale * scale)
    fitted = torch.where(square > 0, along / square.clamp_min(1e-12), levels)
    return torch.where(levels == 0, levels, fitted).sort().values


def lost(groups: Tensor, sets: list[Tensor], signs: tuple[int, ...]) -> float:
    """Squared error over squared weights."""
    return float(assign(groups, sets, signs).error.sum() / groups.square().sum())


def samples(folder: Path, layer: int) -> dict[str, Tensor]:
    """Groups of each matrix of a layer, without their column scales."""
    found = {}
    with safe_open(folder / "model.safetensors", "pt") as file:
        names = file.keys()
        for name in (name for name in names if f".layers.{layer}." in name and "proj" in name):
            weight = file.get_tensor(name).float()
            groups = (weight / column_scale(weight).float()).reshape(-1, GROUP)
            chosen = torch.randperm(len(groups), generator=torch.Generator().manual_seed(0))[:GROUPS]
            found[name.rpartition(f".{layer}.")[2]] = groups[chosen]
    return found


def main() -> None:
    """Read the command line and print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", type=Path, nargs="?", help="a folder with one file of weights")
    parser.add_argument("--layer", type=int, default=12)
    given = parser.parse_args()
    torch.manual_seed(0)
    seen, normal = torch.randn(2, GROUPS, GROUP)
    even = torch.arange(-8, 8) / 8
    two = trained(seen, [NORMAL, 0.6 * NORMAL + 0.4 * even], (1, -1))
    bits = trained(seen, [NORMAL, 0.6 * NORMAL + 0.4 * even], (1,))
    kinds = {"the default's levels": ([NORMAL], (1, -1)), "two sets": (two, (1, -1)),
             "two sets, in the sign's place": (bits, (1,))}  # fmt: skip
    print(f"second set: {(two[1] * TOP).round().int().tolist()}\n\n| groups of | {' | '.join(kinds)} |")
    print("|" + " --- |" * (1 + len(kinds)))
    for name, groups in {
        "normal": normal,
        **(samples(given.model, given.layer) if given.model else {}),
    }.items():
        errors = [f"{1e3 * lost(groups, *kind):.2f}" for kind in kinds.values()]
        print(f"| {name} | {' | '.join(errors)} |", flush=True)


if __name__ == "__main__":
    main()
