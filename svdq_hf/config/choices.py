"""Table of the choices of SVDQConfig: one row each for checks, stored keys, options and the docs page.

Imports neither torch nor transformers, so that `svdq --help` is fast. Not here: the signature, which
`SVDQConfig.__init__` writes out for editors (a test compares it with this table), what a row is
(`config.choice_row`), and what the values do (`core`, `format`).
"""

from typing import Any

from svdq_hf.config.choice_row import FLAG, Check, Choice, Option, is_count
from svdq_hf.core.grid_values import (
    BITS,
    GROUP_SIZES,
    SCALE_BITS,
    SCALE_RULES,
    is_amount,
    is_group_size,
    is_one_of,
)

QUANT_METHOD = "svdq"
SYNTHETIC = "synthetic"
DATA = "data"
"""What the command line calls `error_feedback=True`."""
ACTIVATION_BITS = (4, 8)
BASES = ("data", "weights")
HADAMARD = "hadamard"
"""What a layer does with its inputs that multiplies them by a Hadamard matrix."""
COMPUTE = ("exact", "fast")
CACHE_BITS = (8, 4.5, 4, 3.5, 3, 2.5, 2)
"""Bits a value of the KV cache, without scales."""
COMPUTE_DTYPES = ("float32", "bfloat16", "float16")


EVERY = ("quantize", "demo", "evaluate")
"""The commands that quantize."""


def dtype_name(dtype: Any) -> str | None:
    """A dtype as a config writes it; a torch dtype and its name give the same.

    >>> dtype_name("float32")
    'float32'
    """
    return None if dtype is None else str(dtype).removeprefix("torch.")


def number(text: str) -> int | float:
    """Parse k: digits are a count, anything else a share.

    >>> number("64"), number("0.01")
    (64, 0.01)
    """
    return int(text) if text.lstrip("-").isdigit() else float(text)


def columns(text: str) -> int | str:
    """Parse a group size: digits are a number of columns, anything else "row" or "tensor".

    >>> columns("64"), columns("row")
    (64, 'row')
    """
    return int(text) if text.isdigit() else text


def _one_of(*values: Any) -> Check:
    return Check(lambda value: is_one_of(value, values), f"one of {list(values)}")


def _is_share(value: object) -> bool:
    return isinstance(value, float) and 0 < value < 1


def _are_names(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(name, str) for name in value)


def _are_inputs(value: object) -> bool:
    if not isinstance(value, dict):
        return value is None
    told = [one == HADAMARD or (is_count(one) and one > 0) for one in value.values()]
    return all(told) and _are_names(list(value))


_A_SUBSPACE = "a share from 0 to 0.5"
_K = Check(lambda k: is_count(k) or _is_share(k), "an int from 0 on, or a float between 0 and 1")
_SEED = Check(lambda seed: is_count(seed) and seed < 2**63, "an int from 0 to 2**63 - 1")
_FEEDBACK = Check(lambda on: type(on) is bool or on == SYNTHETIC, "true, false or 'synthetic'")
_BUDGET = Check(lambda bits: bits is None or is_amount(bits), "None or a number of bits above 0")
_LAYER_K = Check(lambda of: of is None or isinstance(of, dict), "None or k by the layer's name")
_NAMES = Check(lambda of: of is None or _are_names(of), "None or a list of names")
_DAMPING = Check(
    lambda it: it is None or is_one_of(it, (0, 0.0)) or is_amount(it), "None or a number from 0 on"
)
_DTYPE = Check(lambda of: dtype_name(of) in (None, *COMPUTE_DTYPES), f"None or one of {COMPUTE_DTYPES}")

CHOICES: dict[str, Choice] = {
    "k": Choice(
        256,
        _K,
        "salient weights per layer, or per matrix of an expert: a count, or a share of its weights below 1",
        option=Option(number),
    ),
    "rank": Choice(
        8,
        Check(lambda rank: is_count(rank) and rank > 0, "an int from 1 on"),
        "rank of the principal structure that svd looks at",
        option=Option(int),
    ),
    "saliency": Choice(
        "svd",
        Check(lambda name: isinstance(name, str), "the name of a score"),
        "the score that picks them: svd, magnitude, relative or random",
    ),
    "bits": Choice(
        4,
        _one_of(*BITS),
        "of a weight that is not salient: 4, 3 or 8",
        of="grid",
        option=Option(int, values=BITS),
    ),
    "group_size": Choice(
        32,
        Check(is_group_size, GROUP_SIZES),
        "columns that share a scale: 8, 16, 32, a multiple of 64, row or tensor",
        of="grid",
        option=Option(columns),
    ),
    "scale": Choice(
        "mse",
        _one_of(*SCALE_RULES),
        "how scales are fitted: mse, absmax or sigma",
        of="grid",
        option=Option(values=SCALE_RULES),
    ),
    "clip_sigma": Choice(
        2.5,
        Check(is_amount, "a number above 0"),
        "standard deviations at which the scale sigma clips",
        of="grid",
        option=Option(float),
    ),
    "levels": Choice(
        None,  # depends on the bits: see `completed` of `config.chosen`
        _one_of("linear", "normal"),
        "what the codes stand for: normal or linear",
        since=2,
        before="linear",
        of="grid",
        option=Option(values=("linear", "normal")),
    ),
    "column_scale": Choice(
        True, FLAG, "each column has a scale of its own too", since=2, before=False, of="grid"
    ),
    "scale_bits": Choice(
        8,
        Check(lambda bits: is_one_of(bits, SCALE_BITS), "8 or 16"),
        "of a group's scale: 8 or 16",
        since=2,
        before=16,
        of="grid",
        option=Option(int, values=SCALE_BITS),
    ),
    "error_feedback": Choice(
        False,
        _FEEDBACK,
        "later columns make good what rounding lost, as in GPTQ",
        since=2,
        option=Option(
            values=(DATA, SYNTHETIC),
            more="with --calibration's data, or with batches that the model makes, which takes minutes",
            commands=("quantize", "evaluate"),
        ),
    ),
    "lm_head": Choice(
        False, FLAG, "the output head is quantized too", since=2, of="files", option=Option(commands=EVERY)
    ),
    "embeddings": Choice(
        False,
        FLAG,
        "the input embedding is quantized too",
        since=4,
        of="files",
        option=Option(commands=EVERY),
    ),
    "target_bits": Choice(
        None,
        _BUDGET,
        "stored bits per weight, spent layer by layer instead of k",
        since=4,
        of="files",
        option=Option(float, commands=EVERY),
    ),
    "layer_k": Choice(
        None, _LAYER_K, "k of single layers, by name; others have k", since=4, of="files", option=None
    ),
    "activations": Choice(
        None,
        Check(lambda bits: bits is None or is_one_of(bits, ACTIVATION_BITS), "None, 4 or 8"),
        "bits of the layers' inputs, which are rounded too: 4 or 8; the model is rotated for that",
        since=5,
        of="files",
        option=Option(int, values=ACTIVATION_BITS, commands=("quantize",)),
    ),
    "subspace": Choice(
        0.0,
        Check(lambda share: is_one_of(share, (0, 0.0)) or (_is_share(share) and share <= 0.5), _A_SUBSPACE),
        "share of the axes that activations and weights keep 8 bits in, those of most variance",
        since=5,
        of="files",
        option=Option(float, commands=("quantize",)),
    ),
    "basis": Choice(
        None,
        Check(lambda basis: basis is None or is_one_of(basis, BASES), f"None or one of {list(BASES)}"),
        "what tells these axes: data or weights (data where there is some)",
        since=5,
        of="files",
        option=Option(values=BASES, commands=("quantize",)),
    ),
    "layer_inputs": Choice(
        None,
        Check(_are_inputs, "None, or a count of heads or 'hadamard' by the end of a layer's name"),
        "what single layers do with their inputs before rounding them",
        since=5,
        of="files",
        option=None,
    ),
    "modules_to_not_convert": Choice(
        None,
        _NAMES,
        "more modules to keep dense, by name",
        option=Option(name="--skip", repeats=True, more="may be given again", commands=EVERY),
    ),
    "compute_dtype": Choice(
        None, _DTYPE, "dtype the layers compute in", option=Option(values=COMPUTE_DTYPES)
    ),
    "seed": Choice(0, _SEED, "of anything random", option=Option(int)),
    "damping": Choice(
        None,
        _DAMPING,
        "of error feedback: how little the batches are trusted, from 0 on",
        stored=False,
        option=Option(float, commands=("quantize", "evaluate")),
    ),
    "compute": Choice(
        "exact",
        Check(lambda compute: compute in COMPUTE, f"one of {COMPUTE}"),
        "exact, or fast: CPU kernels may round the activations of a few tokens to 16 bits",
        stored=False,
        option=None,
    ),
}
"""In the order of the signature. To add a choice: a row here, the signature, a row of docs/choices.md."""

VERSION_1: dict[str, Any] = {
    name: row.before for name, row in CHOICES.items() if row.of == "grid" and row.since > 1
}
"""The values that files of format version 1 imply, where the choice is newer."""


def part_of_grid() -> list[str]:
    """Names of the choices that `Grid` is made of."""
    return [name for name, row in CHOICES.items() if row.of == "grid"]


def stored_in(version: int) -> list[str]:
    """Names of the choices that files of a format version hold; older releases refuse keys they do not know.

    >>> "lm_head" in stored_in(1), "lm_head" in stored_in(2), "compute" in stored_in(4)
    (False, True, False)
    """
    return [name for name, row in CHOICES.items() if row.stored and row.since <= version]


def not_stored() -> list[str]:
    """Names of the choices that no file holds."""
    return [name for name, row in CHOICES.items() if not row.stored]
