"""Layout of the scales of a quantized weight: which columns share a scale, which levels codes stand for.

`w ~ scale * level(code) * column_scale`: one scale for each group of a row, for each row, or for the whole
matrix; sixteen levels (of 4 bits); and, if the grid has it, one scale for each column, taken out beforehand.

Sources: absmax is the rule of arXiv 2512.01343 section 3 and sigma its clipped variant; the scale's sign as
part of the search is llama.cpp's Q4_0 (the side with the largest weight gets the code -8, of which there is
one more); a second axis of scales is SINQ's (arXiv 2509.22944). Not here: the rules themselves
(`core.scales`), which weights are left out (`core.topk`), and how codes are stored (`core.packing`).
"""

from dataclasses import dataclass
from typing import Literal

import torch

from svdq_hf.core.grid_values import (
    BITS,
    GROUP_SIZES,
    SCALE_BITS,
    SCALE_RULES,
    ForeignLevels,
    GroupSize,
    Levels,
    ScaleRule,
    is_amount,
    is_group_size,
    is_one_of,
    require,
)
from svdq_hf.core.levels import TABLES


@dataclass(frozen=True)
class Grid:
    """How the scales of a matrix are laid out and fitted.

    Attributes:
        group_size: columns that share a scale (8, 16, 32, 64 or a multiple of 64), or "row", or "tensor".
        scale: the rule that fits a scale to a group of weights.
        clip_sigma: where the rule "sigma" clips, in standard deviations.
        levels: what codes stand for: the code itself ("linear"), or a level of a table ("normal"; "iq4_nl",
            which is for GGUF files, whose scales are float16).
        column_scale: whether each column has a scale as well.
        scale_bits: bits of a group's scale: 16, or 8 with a further 16-bit scale for each row.
        bits: bits of a code: 3, 4 or 8.

    Raises:
        ValueError: an impossible value; it names the attribute and what is allowed.
    """

    group_size: GroupSize = 64
    scale: ScaleRule = "mse"
    clip_sigma: float = 2.5
    levels: Levels | ForeignLevels = "linear"
    column_scale: bool = False
    scale_bits: Literal[16, 8] = 16
    bits: Literal[3, 4, 8] = 4

    def __post_init__(self) -> None:
        bits, of_bits = self.bits, tuple(TABLES.get(self.bits, ())) if type(self.bits) is int else ()
        levels = f"one of {list(of_bits)} where bits is {bits}"
        require(is_group_size(self.group_size), "group_size", self.group_size, GROUP_SIZES)
        require(self.scale in SCALE_RULES, "scale", self.scale, f"one of {list(SCALE_RULES)}")
        require(is_one_of(bits, BITS), "bits", bits, f"one of {list(BITS)}")
        require(self.levels in of_bits, "levels", self.levels, levels)
        require(is_one_of(self.scale_bits, SCALE_BITS), "scale_bits", self.scale_bits, "8 or 16")
        require(type(self.column_scale) is bool, "column_scale", self.column_scale, "true or false")
        require(is_amount(self.clip_sigma), "clip_sigma", self.clip_sigma, "a number above 0")

    def columns(self, in_features: int) -> int:
        """Columns that share a scale in a row of `in_features` (all of them for "row" and "tensor")."""
        return min(self.group_size, in_features) if isinstance(self.group_size, int) else in_features

    def scale_shape(self, out: int, in_features: int) -> tuple[int, int]:
        """Shape of the scales of a weight `[out, in]`: `[out, ceil(in / group)]`, `[out, 1]` or `[1, 1]`."""
        if self.group_size == "tensor":
            return 1, 1
        return out, -(-in_features // self.columns(in_features))

    @property
    def scale_dtype(self) -> torch.dtype:
        """bfloat16 (float32's range in 16 bits) or int8 for groups; float32 where scales are few."""
        if self.levels == "iq4_nl":
            return torch.float16
        if not isinstance(self.group_size, int):
            return torch.float32
        return torch.int8 if self.row_scale else torch.bfloat16

    @property
    def table(self) -> tuple[int, ...]:
        """The levels of all codes, from the lowest on."""
        return TABLES[self.bits][self.levels]

    @property
    def row_scale(self) -> bool:
        """Whether the groups' scales are int8, in units of a bfloat16 scale of their row."""
        return isinstance(self.group_size, int) and self.scale_bits == 8
