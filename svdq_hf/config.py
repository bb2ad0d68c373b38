"""SVDQConfig: every choice of the user, validated, as transformers wants a quantization config.

Not here: what the choices do (`saliency`, `grid`, `decompose`), registration (`quantizer`).
"""

import difflib
from typing import Any

import torch
from transformers.utils.quantization_config import QuantizationConfigMixin

from svdq_hf.decompose import FORMAT_VERSION, Scheme
from svdq_hf.grid import Grid, GroupSize, ScaleRule
from svdq_hf.saliency import check_name

QUANT_METHOD = "svdq"
REQUIRES = "pip install svdq_hf, then `import svdq_hf` before from_pretrained"
"""Stored in config.json, where a user looks whose transformers does not know the method."""

COMPUTE_DTYPES = ("float32", "bfloat16", "float16")
_STORED_ONLY = ("quant_method", "format_version", "requires")


class SVDQConfig(QuantizationConfigMixin):  # type: ignore[misc]  # transformers ships no types
    """Quantize linear layers to 4 bits and keep the k most salient weights of each in FP32.

    k: salient weights per layer: a count, or a share of the layer's weights (a float below 1).
    rank: rank of the principal structure that the score "svd" looks at.
    saliency: the score that picks them: "svd", "magnitude", "relative", "random"; "awq" and "spqr",
        which need batches (`quantize_model`); or your own (`register_saliency`).
    bits: 4.
    group_size: columns that share a scale (8, 16, 32, 64 or a multiple of 64), "row" or "tensor".
    scale: how scales are fitted: "mse" (least squared error), "absmax", or "sigma" (clip at
        `clip_sigma` standard deviations).
    modules_to_not_convert: names to keep dense, *added* to the defaults: output head, tied weights,
        everything outside the base model, layers of fewer than 8 rows. A name matches from the
        start, as a regular expression, or as a suffix.
    compute_dtype: dtype the layers compute in ("float32", ...); None: that of their input.
    seed: of anything random.

    Raises:
        ValueError: an unknown key, a wrong type or an impossible value; it names all three.

    >>> SVDQConfig(k=256).to_dict()["group_size"]
    64
    >>> SVDQConfig.from_dict({"quant_method": "svdq", "k": 0.01}).k
    0.01
    """

    def __init__(
        self,
        k: int | float = 256,
        rank: int = 8,
        saliency: str = "svd",
        bits: int = 4,
        group_size: GroupSize = 64,
        scale: ScaleRule = "mse",
        clip_sigma: float = 2.5,
        modules_to_not_convert: list[str] | None = None,
        compute_dtype: str | torch.dtype | None = None,
        seed: int = 0,
        **stored: Any,
    ) -> None:
        _check_stored(stored)
        self.quant_method = QUANT_METHOD
        self.format_version = stored.get("format_version", FORMAT_VERSION)
        self.k = k
        self.rank = rank
        self.saliency = saliency
        self.bits = bits
        self.group_size = group_size
        self.scale = scale
        self.clip_sigma = clip_sigma
        names = modules_to_not_convert
        self.modules_to_not_convert = list(names) if isinstance(names, tuple) else names
        self.compute_dtype = _dtype_name(compute_dtype)
        self.seed = seed
        self._check(from_file="format_version" in stored)

    @classmethod
    def paper(cls, k: int | float = 256, **choices: Any) -> "SVDQConfig":
        """The reading of arXiv 2512.01343: one absmax scale per matrix, rank 8, all but the head.

        >>> SVDQConfig.paper(k=64).group_size
        'tensor'
        """
        return cls(**{"k": k, "group_size": "tensor", "scale": "absmax", **choices})

    @property
    def scheme(self) -> Scheme:
        """How one weight is stored under this config."""
        return Scheme(self.k, Grid(self.group_size, self.scale, self.clip_sigma))

    @property
    def torch_compute_dtype(self) -> torch.dtype | None:
        """`compute_dtype` as torch's own."""
        return None if self.compute_dtype is None else getattr(torch, self.compute_dtype)

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """The config of a stored dict; `kwargs` that are choices of ours go before it, checked."""
        choices = {key: kwargs.pop(key) for key in list(kwargs) if key in _choices()}
        config = cls(**{**config_dict, **choices})
        return (config, kwargs) if return_unused_kwargs else config

    def update(self, **kwargs: Any) -> dict[str, Any]:
        """Change choices, checked; returns the keys that are none."""
        choices = {key: kwargs.pop(key) for key in list(kwargs) if key in _choices()}
        self.__dict__ = SVDQConfig(**{**self.to_dict(), **choices}).__dict__
        return kwargs

    def to_dict(self) -> dict[str, Any]:
        """All choices and the format's version, as JSON can hold them."""
        return {**super().to_dict(), "requires": REQUIRES}

    def __eq__(self, other: object) -> bool:
        return isinstance(other, SVDQConfig) and self.to_dict() == other.to_dict()

    __hash__ = None  # type: ignore[assignment]  # mutable, as every transformers config is

    def _check(self, *, from_file: bool) -> None:
        share = isinstance(self.k, float) and 0 < self.k < 1
        _require(share or _is_count(self.k), "k", self.k, "an int from 0 on, or a float between 0 and 1")
        _require(_is_count(self.rank) and self.rank > 0, "rank", self.rank, "an int from 1 on")
        _require(_is_count(self.seed) and self.seed < 2**63, "seed", self.seed, "an int from 0 to 2**63 - 1")
        _require(type(self.bits) is int and self.bits == 4, "bits", self.bits, "4")
        _require(isinstance(self.saliency, str), "saliency", self.saliency, "the name of a score")
        names = self.modules_to_not_convert
        listed = isinstance(names, list) and all(isinstance(name, str) for name in names)
        _require(names is None or listed, "modules_to_not_convert", names, "None or a list of names")
        Grid(self.group_size, self.scale, self.clip_sigma)  # checks itself
        if not from_file:  # a stored model loads where its author's own score is not known
            check_name(self.saliency)


def _check_stored(stored: dict[str, Any]) -> None:
    """Refuse a format this release cannot read, and keys that mean nothing."""
    version = stored.get("format_version", FORMAT_VERSION)
    if type(version) is not int or version < 1:
        raise ValueError(f"format_version={version!r}: must be an int from 1 on")
    if version > FORMAT_VERSION:
        raise ValueError(
            f"format_version={version}: this release of svdq_hf reads up to {FORMAT_VERSION}; "
            "`pip install --upgrade svdq_hf` for one that reads it"
        )
    method = stored.get("quant_method", QUANT_METHOD)
    if method != QUANT_METHOD:
        raise ValueError(f"quant_method={method!r}: must be {QUANT_METHOD!r}")
    known = _choices()
    for key, value in stored.items():
        if key not in _STORED_ONLY:
            close = difflib.get_close_matches(key.lower(), known, n=1)
            hint = f"; did you mean {close[0]!r}?" if close else ""
            raise ValueError(f"{key}={value!r}: SVDQConfig knows no such key, only {known}{hint}")


def _choices() -> list[str]:
    """The names of what a user can choose."""
    return [name for name in SVDQConfig.__init__.__annotations__ if name not in ("stored", "return")]


def _dtype_name(dtype: str | torch.dtype | None) -> str | None:
    name = str(dtype).removeprefix("torch.") if dtype is not None else None
    _require(
        name is None or name in COMPUTE_DTYPES,
        "compute_dtype",
        dtype,
        f"None or one of {COMPUTE_DTYPES}",
    )
    return name


def _is_count(value: object) -> bool:
    return type(value) is int and value >= 0


def _require(holds: bool, key: str, value: object, allowed: str) -> None:
    if not holds:
        raise ValueError(f"{key}={value!r}: must be {allowed}")
