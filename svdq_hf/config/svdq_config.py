"""SVDQConfig: every choice of the user, validated, as transformers wants a quantization config.

Not here: what each may be (`validation`), what they do (`saliency`, `grid`, `decompose`), registration
(`quantizer`).
"""

import copy
from typing import Any, Literal

import torch
from transformers.utils.quantization_config import QuantizationConfigMixin

from svdq_hf.config.choices import (
    QUANT_METHOD,
    SYNTHETIC,
    check_choices,
    check_stored,
    check_together,
    dtype_name,
)
from svdq_hf.core.grid import Grid, GroupSize, ScaleRule
from svdq_hf.core.levels import Levels
from svdq_hf.core.release import VERSION, how_to_install
from svdq_hf.core.saliency import check_name, data_needs, no_data, saliency_names
from svdq_hf.format.parts import EXPERTS_VERSION, Scheme

REQUIRES = (
    f"the Python package svdq_hf, {VERSION} or newer ({how_to_install()}), "
    "then `import svdq_hf` before from_pretrained"
)
"""Stored in config.json, where a user looks whose transformers does not know the method."""

VERSION_1: dict[str, Any] = {"levels": "linear", "column_scale": False, "scale_bits": 16}
"""What was no choice yet in files of format version 1."""

ErrorFeedback = bool | Literal["synthetic"]

_SINCE_2 = (*VERSION_1, "error_feedback", "lm_head")
_NOT_STORED = ("damping", "compute")
_SINCE_4 = ("target_bits", "layer_k", "embeddings")


class SVDQConfig(QuantizationConfigMixin):  # type: ignore[misc]  # transformers ships no types
    """Quantize linear layers to 4 bits (or 3, or 8) and keep the k most salient weights of each in FP32.

    k: salient weights per layer: a count, or a share of the layer's weights (a float below 1).
    rank: rank of the principal structure that the score "svd" looks at.
    saliency: the score that picks them: "svd", "magnitude", "relative", "random"; "awq" and "spqr",
        which need batches (`quantize_model`); or your own (`register_saliency`).
    bits: of a code: 4, 3 or 8.
    group_size: columns that share a scale (8, 16, 32, 64 or a multiple of 64), "row" or "tensor".
    scale: how scales are fitted: "mse" (least squared error), "absmax", or "sigma" (clip at
        `clip_sigma` standard deviations).
    levels: what the codes stand for: "normal" (those that lose least of normal weights) or "linear" (-8..7,
        as the paper's). None: "normal"; of 8 bits, which have no other, "linear".
    column_scale: whether each column has a scale of its own too; scores see the matrix without it.
    scale_bits: of a group's scale: 8 (with a factor for each row) or 16.
    error_feedback: whether the weights that are not rounded yet make good what rounding lost, as in GPTQ;
        needs batches, or "synthetic" ones, made of no data (both: `quantize_model`).
    lm_head: whether the output head is quantized too, without error feedback; an embedding tied to it reads
        its packed rows.
    embeddings: whether the input embedding is quantized too, row by row, in parts of its own. Where it is
        tied to the output head, that is lm_head's to say.
    target_bits: stored bits per weight, as `footprint` counts them, instead of `k`: spent where they lower
        the layers' errors most.
    layer_k: k of single layers, by name; `target_bits` ends in it. Layers that it does not name have `k`.
    modules_to_not_convert: names to keep dense, *added* to the defaults: output head, tied weights,
        everything outside the base model, layers of fewer than 8 rows. A name matches from the
        start, as a regular expression, or as a suffix.
    compute_dtype: dtype the layers compute in ("float32", ...); None: that of their input.
    seed: of anything random.
    damping: of error feedback: the share of the inputs' mean square that is added to their Gram matrix beside
        GPTQ's 0.01, the larger the less it is trusted. None: 0, of synthetic batches 1. For texts of
        another kind than the model will read 1 is better. No file holds it.
    compute: "exact", or "fast": CPU kernels may round the activations of a few tokens to 16 bits. A choice of
        who runs the model, so no file holds it; of a loaded model `set_compute` changes it.

    Raises:
        ValueError: an unknown key, a wrong type or an impossible value; it names all three.

    >>> SVDQConfig(k=256).to_dict()["group_size"]
    32
    >>> SVDQConfig.from_dict({"quant_method": "svdq", "k": 0.01}).k
    0.01
    """

    def __init__(
        self,
        k: int | float = 256,
        rank: int = 8,
        saliency: str = "svd",
        bits: Literal[3, 4, 8] = 4,
        group_size: GroupSize = 32,
        scale: ScaleRule = "mse",
        clip_sigma: float = 2.5,
        levels: Levels | None = None,
        column_scale: bool = True,
        scale_bits: Literal[16, 8] = 8,
        error_feedback: ErrorFeedback = False,
        lm_head: bool = False,
        embeddings: bool = False,
        target_bits: float | None = None,
        layer_k: dict[str, int] | None = None,
        modules_to_not_convert: list[str] | None = None,
        compute_dtype: str | torch.dtype | None = None,
        seed: int = 0,
        damping: float | None = None,
        compute: Literal["exact", "fast"] = "exact",
        **stored: Any,
    ) -> None:
        check_stored(stored, _choices())
        self.quant_method = QUANT_METHOD
        self.k = k
        self.rank = rank
        self.saliency = saliency
        self.bits = bits
        self.group_size = group_size
        self.scale = scale
        self.clip_sigma = clip_sigma
        # The levels of a table have 8 bits themselves, so 8 bits of code leave no choice.
        self.levels: Levels = ("linear" if bits == 8 else "normal") if levels is None else levels
        self.column_scale = column_scale
        self.scale_bits = scale_bits
        self.error_feedback = error_feedback
        self.lm_head = lm_head
        self.embeddings = embeddings
        self.target_bits = target_bits
        self.layer_k = layer_k
        names = modules_to_not_convert
        self.modules_to_not_convert = list(names) if isinstance(names, tuple) else names
        self.compute_dtype: Any = compute_dtype
        self.seed = seed
        self.damping = damping
        self.compute = compute
        self._check(from_file="format_version" in stored)
        self.compute_dtype = dtype_name(compute_dtype)
        self.format_version = self._oldest_version()
        if stored.get("format_version", 0) >= EXPERTS_VERSION:
            self.say_experts()

    @classmethod
    def paper(cls, k: int | float = 256, **choices: Any) -> "SVDQConfig":
        """The reading of arXiv 2512.01343: one absmax scale per matrix, rank 8, all but the head.

        >>> SVDQConfig.paper(k=64).group_size
        'tensor'
        """
        return cls(**{"k": k, "group_size": "tensor", "scale": "absmax", **VERSION_1, **choices})

    @classmethod
    def best(cls, **choices: Any) -> "SVDQConfig":
        """The least loss without data at about 4.5 bits per weight (in layers 384 wide and wider).

        >>> SVDQConfig.best().saliency
        'relative'
        """
        return cls(**{"k": 0.0018, "saliency": "relative", **choices})

    @classmethod
    def small(cls, **choices: Any) -> "SVDQConfig":
        """The least loss without data at about 4.28 bits per weight (in layers 384 wide and wider).

        >>> SVDQConfig.small().group_size
        64
        """
        return cls(**{"k": 0.0009, "saliency": "relative", "group_size": 64, **choices})

    @classmethod
    def calibrated(cls, **choices: Any) -> "SVDQConfig":
        """For those who have data: `quantize_model(model, SVDQConfig.calibrated(), batches)`; ~4.25 bits.

        >>> SVDQConfig.calibrated().data_needs
        ['input_gram', 'input_norm']
        """
        data = {"saliency": "awq", "error_feedback": True}
        return cls(**{"k": 0.0005, "group_size": 64, **data, **choices})

    @property
    def synthetic(self) -> bool:
        """Whether the batches that are needed are made, not given."""
        return self.error_feedback == SYNTHETIC

    @property
    def extra_damping(self) -> float:
        """`damping`; where nobody chose, synthetic batches are trusted less than real ones."""
        return float(self.synthetic) if self.damping is None else float(self.damping)

    @property
    def data_needs(self) -> list[str]:
        """What only batches can give, of `saliency.NEEDS`; empty where the model need not be run."""
        feedback = ["input_gram"] if self.error_feedback else []
        return sorted({*feedback, *self._score_needs})

    @property
    def _score_needs(self) -> list[str]:
        known = self.saliency in saliency_names()  # a stored model's author may have had a score of his own
        return data_needs(self.saliency) if known else []

    def no_data(self) -> ValueError:
        """The error for a config that needs batches, where there are none and the model cannot be run."""
        if self.synthetic:
            return ValueError(
                "error_feedback 'synthetic' runs the dense model: load it dense and call "
                "quantize_model(model, config)"
            )
        of_score = data_needs(self.saliency)
        if of_score:
            return no_data(f"saliency {self.saliency!r}", of_score)
        return no_data("error_feedback", self.data_needs, "; or, without data, error_feedback='synthetic'")

    @property
    def scheme(self) -> Scheme:
        """How one weight is stored under this config."""
        return Scheme(self.k, self._grid)

    def of_layer(self, name: str) -> "SVDQConfig":
        """The config of one layer: `k` is that layer's own.

        >>> SVDQConfig(k=256, layer_k={"head": 3}).of_layer("head").k
        3
        """
        if self.layer_k is None:
            return self
        return self.changed(k=self.layer_k.get(name, self.k), layer_k=None, target_bits=None)

    def changed(self, **choices: Any) -> "SVDQConfig":
        """A copy with other choices, which are not checked again."""
        config = copy.copy(self)
        config.__dict__.update(choices)
        return config

    def _oldest_version(self) -> int:
        """The oldest version of the format that can say what these choices store."""
        if self.embeddings or self.target_bits is not None or self.layer_k is not None:
            return 4
        return max(2 if self.lm_head else 1, self.scheme.format_version)

    @property
    def _grid(self) -> Grid:
        return Grid(
            self.group_size,
            self.scale,
            self.clip_sigma,
            self.levels,
            self.column_scale,
            self.scale_bits,
            self.bits,
        )

    def say_experts(self) -> None:
        """Note that the model has quantized experts, which only a new version of the format can say."""
        self.format_version = max(self.format_version, EXPERTS_VERSION)

    @property
    def torch_compute_dtype(self) -> torch.dtype | None:
        """`compute_dtype` as torch's own."""
        return None if self.compute_dtype is None else getattr(torch, self.compute_dtype)

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """The config of a stored dict; `kwargs` that are choices of ours go before it, checked."""
        choices = {key: kwargs.pop(key) for key in list(kwargs) if key in _choices()}
        if config_dict.get("format_version") == 1:  # when these were no choice
            config_dict = {**VERSION_1, **config_dict}
        config = cls(**{**config_dict, **choices})
        return (config, kwargs) if return_unused_kwargs else config

    def update(self, **kwargs: Any) -> dict[str, Any]:
        """Change choices, checked; returns the keys that are none."""
        choices = {key: kwargs.pop(key) for key in list(kwargs) if key in _choices()}
        if "target_bits" in choices:
            choices.setdefault("layer_k", None)  # what is there was another budget's
        unsaid = {name: getattr(self, name) for name in _NOT_STORED}
        self.__dict__ = SVDQConfig.from_dict({**self.to_dict(), **unsaid, **choices}).__dict__
        return kwargs

    def to_dict(self) -> dict[str, Any]:
        """All choices that a file holds, and the format's version, as JSON can hold them."""
        choices = super().to_dict()
        later = [] if self.format_version >= 4 else [*_SINCE_4]  # older releases refuse keys they do not know
        if self.format_version == 1:
            later += _SINCE_2
        choices = {name: value for name, value in choices.items() if name not in (*later, *_NOT_STORED)}
        return {**choices, "requires": REQUIRES}

    def __eq__(self, other: object) -> bool:
        same = isinstance(other, SVDQConfig) and self.to_dict() == other.to_dict()
        return same and all(getattr(self, name) == getattr(other, name) for name in _NOT_STORED)

    __hash__ = None  # type: ignore[assignment]  # mutable, as every transformers config is

    def _check(self, *, from_file: bool) -> None:
        check_choices(vars(self))
        check_together(vars(self), self._score_needs)
        self._grid  # noqa: B018  # checks itself
        if not from_file:  # a stored model loads where its author's own score is not known
            check_name(self.saliency)


def _choices() -> list[str]:
    """The names of what a user can choose."""
    return [name for name in SVDQConfig.__init__.__annotations__ if name not in ("stored", "return")]
