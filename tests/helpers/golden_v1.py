"""The weights of the golden file of format version 1, derived by hand; version 4 has them as well."""

import torch
from places import ROOT

GOLDEN = ROOT / "tests" / "format" / "golden" / "format_v1.safetensors"

OUT, IN, K = 3, 70, 2

# As config.json of a model of version 1 holds them; never to be changed either.
STORED = {"quant_method": "svdq", "format_version": 1, "bits": 4, "k": K, "rank": 8, "saliency": "magnitude"}

CONFIGS = {
    "groups": STORED | {"group_size": 64, "scale": "mse"},
    "tensor": STORED | {"group_size": "tensor", "scale": "absmax"},
}


def nibble(row, column):
    """Row 0: 0..15 over and over, one ahead in columns 32..63. Rows 1 and 2 count in threes and fives."""
    return (column * (2 * row + 1) + (1 if 32 <= column < 64 else 0)) % 16


def code(name, row, column):
    """Every group has the code -8 and an odd one, so that no other codes are proportional to it."""
    value = nibble(row, column) - 8
    return value if name == "groups" else max(value, -7)  # absmax does not use -8


def scale(name, row, column):
    return 2.0 ** -(3 + row + column // 64) if name == "groups" else 2.0**-3


def weight(name):
    """Multiples of powers of two, all exact in 4 bits, and two large entries that are not."""
    values = [[code(name, r, c) * scale(name, r, c) for c in range(IN)] for r in range(OUT)]
    values[0][40], values[2][69] = 100.25, -3000.0
    return torch.tensor(values)
