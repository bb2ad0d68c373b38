"""SVDQConfig: every choice of the user, checked, as the quantization config that transformers expects.

Not here: what each choice may be (`config.choices`, `config.checks`), presets (`config.presets`), what
choices imply (`config.chosen`) and do (`core`, `format`), registration (`integrations.registration`).
"""

import copy
from collections.abc import Mapping
from typing import Any, Literal, NoReturn

import torch
from transformers.utils.quantization_config import QuantizationConfigMixin

from svdq_hf.config.checks import check_choices, check_stored, check_together
from svdq_hf.config.choices import (
    CHOICES,
    QUANT_METHOD,
    VERSION_1,
    dtype_name,
    not_stored,
    stored_in,
)
from svdq_hf.config.chosen import Chosen, ErrorFeedback, completed, score_data
from svdq_hf.config.layer_inputs import LayerInput, input_of
from svdq_hf.config.presets import PresetMethods
from svdq_hf.core.grid_values import GroupSize, Levels, ScaleRule
from svdq_hf.core.release import VERSION, how_to_install
from svdq_hf.core.saliency import check_name
from svdq_hf.format.versions import EXPERTS_VERSION

REQUIRES = (
    f"the Python package svdq_hf, {VERSION} or newer ({how_to_install()}), "
    "then `import svdq_hf` before from_pretrained"
)
"""Stored in config.json, where users look whose transformers does not know "svdq"."""


class SVDQConfig(PresetMethods, Chosen, QuantizationConfigMixin):  # type: ignore[misc]  # transformers ships no types
    """Quantize linear layers to 4 bits (or 3, or 8) and keep the k most salient weights of each in FP32.

    A config does not change once it is made: `replace` makes another one. (`update` is what transformers
    calls.)

    Args:
        k: salient weights per layer: a count, or a share of the layer's weights (a float below 1).
        rank: rank of the principal structure that the score "svd" looks at.
        saliency: the score that picks them: "svd", "magnitude", "relative", "random"; "awq", "spqr", "pqi"
            and "requant", which need batches (`quantize_model`), yours or synthetic ones; or your own
            (`register_saliency`).
        bits: bits of a code: 4, 3 or 8.
        group_size: columns that share a scale (8, 16, 32, 64 or a multiple of 64), "row" or "tensor".
        scale: how scales are fitted: "mse" (least squared error), "absmax", or "sigma" (clip at
            `clip_sigma` standard deviations).
        clip_sigma: standard deviations at which the scale "sigma" clips.
        levels: what the codes stand for: "normal" (the levels that lose least of normal weights) or "linear"
            (-8..7, as in the paper). None: "normal"; with 8 bits, which have no other levels, "linear".
        column_scale: whether each column has a scale, too; data-free scores see the matrix without it.
        scale_bits: bits of a group's scale: 8 (with a factor for each row) or 16.
        error_feedback: whether the weights that are not rounded yet compensate for the error of rounding, as
            in GPTQ. True needs batches; "synthetic" lets the model make them without data. Both work with
            `quantize_model`.
        lm_head: whether the output head is quantized too, without error feedback and by a score that needs
            no data; an embedding tied to it reads the head's packed rows.
        embeddings: whether the input embedding is quantized too, row by row. Where it is tied to the output
            head, `lm_head` decides instead.
        target_bits: stored bits per weight, as `footprint` counts them, instead of `k`: spent where they
            lower the errors of the layers most.
        layer_k: k of single layers, by name; the result of `target_bits` is stored here. Layers that it does
            not name have `k`.
        activations: bits of the layers' inputs, which are rounded token by token: 4 or 8; None: they are not.
            The model is rotated first (`quantize_model`); `SVDQConfig.resq()` sets what goes with it.
        subspace: share of the axes in which activations and weights have 8 bits, those of most variance.
        basis: what tells these axes: "data" (batches) or "weights". None: batches where there are some;
            quantizing stores which it was.
        layer_inputs: what single layers do with their inputs before rounding them, by the end of their name:
            the number of heads in them, each with a subspace, or "hadamard". Quantizing stores it here.
        modules_to_not_convert: names to keep dense, *added* to the defaults: output head, tied weights,
            everything outside the base model, layers of fewer than 8 rows. A name matches from the
            start, as a part between dots, as a suffix, or as a regular expression.
        compute_dtype: dtype in which the layers compute ("float32", ...); None: the dtype of their input.
        seed: of anything random.
        damping: regularizes error feedback. `damping * mean(diag(X^T X))` is added to the diagonal of
            `X^T X`, on top of GPTQ's 0.01. 0 trusts the batches fully; 1 suits text of another kind than the
            model will see. None: 0 with your batches, 1 with synthetic ones. Not stored in files.
        compute: "exact", or "fast": CPU kernels may round the activations of a few tokens to 16 bits. Not
            stored in files, since whoever runs the model chooses; `set_compute` changes it in a loaded model.
        **stored: the keys of a config.json that are no choices.

    Raises:
        ValueError: an unknown key, a wrong type or an impossible value; it names all three.

    >>> SVDQConfig(k=256).to_dict()["group_size"]
    32
    >>> SVDQConfig.from_dict({"quant_method": "svdq", "k": 0.01}).k
    0.01
    """

    quant_method: str
    format_version: int

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
        activations: Literal[4, 8] | None = None,
        subspace: float = 0.0,
        basis: Literal["data", "weights"] | None = None,
        layer_inputs: dict[str, LayerInput] | None = None,
        modules_to_not_convert: list[str] | None = None,
        compute_dtype: str | torch.dtype | None = None,
        seed: int = 0,
        damping: float | None = None,
        compute: Literal["exact", "fast"] = "exact",
        **stored: Any,
    ) -> None:
        given = locals()
        check_stored(stored)
        choices = completed({name: given[name] for name in CHOICES})
        check_choices(choices)
        if "format_version" not in stored:  # a stored model loads where its author's own score is not known
            check_name(saliency)
        check_together(choices, score_data(saliency))
        self.__dict__.update(choices, quant_method=QUANT_METHOD, compute_dtype=dtype_name(compute_dtype))
        has_experts = stored.get("format_version", 0) >= EXPERTS_VERSION
        self.__dict__["format_version"] = max(self._oldest_version(), EXPERTS_VERSION if has_experts else 1)

    # Copies of this config.

    def replace(self, **choices: Any) -> "SVDQConfig":
        """A copy with some choices changed and all of them checked.

        Args:
            **choices: as for `SVDQConfig`. A new `target_bits` discards the `layer_k` of an earlier budget.

        Raises:
            ValueError: an unknown key, a wrong type or an impossible value.

        >>> SVDQConfig.small().replace(k=3).group_size
        64
        """
        if "target_bits" in choices:
            choices.setdefault("layer_k", None)
        own = {name: getattr(self, name) for name in CHOICES}
        config = type(self)(**{**own, **choices, "format_version": self.format_version})
        if "saliency" in choices:
            check_name(config.saliency)
        return config

    def with_experts(self) -> "SVDQConfig":
        """A copy for a model with quantized experts, whose files need format version 4."""
        own = {name: getattr(self, name) for name in CHOICES}
        return type(self)(**own, format_version=EXPERTS_VERSION)

    def of_layer(self, name: str) -> "SVDQConfig":
        """The config of one layer: `k` is the one that `layer_k` gives that layer.

        Args:
            name: of the layer.

        >>> SVDQConfig(k=256, layer_k={"head": 3}).of_layer("head").k
        3
        >>> SVDQConfig.resq(layer_inputs={"o_proj": 9}).of_layer("layers.0.o_proj").scheme.activations.heads
        9
        """
        if self.activations is not None:
            return self.replace(layer_inputs={"": input_of(name, self.layer_inputs or {})})
        if self.layer_k is None:
            return self
        return self.replace(k=self.layer_k.get(name, self.k), layer_k=None, target_bits=None)

    def without_data(self) -> "SVDQConfig":
        """The config of a matrix of whose inputs nothing is known: an output head, an embedding, an expert.

        Errors are not fed back, and a plain score takes the place of one that needs data.

        >>> SVDQConfig.calibrated().without_data().saliency, SVDQConfig(k=3).without_data().saliency
        ('relative', 'svd')
        """
        if not self.data_needs:
            return self
        return self.replace(saliency=self.plain_score, error_feedback=False)

    # Methods that transformers calls.

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """The config of a stored dict.

        Args:
            config_dict: the keys of a config.json.
            return_unused_kwargs: whether the keys of `kwargs` that are no choices are returned, too.
            **kwargs: choices in it replace the stored ones.

        Returns:
            The config, or the config and the unused keys.

        Raises:
            ValueError: an unknown key, a wrong type or an impossible value.
            TypeError: `config_dict` is no dict.
        """
        if not isinstance(config_dict, Mapping):
            raise TypeError(
                f"config_dict={config_dict!r}: must be a dict, as the quantization_config of a config.json is"
            )
        choices = {key: kwargs.pop(key) for key in list(kwargs) if key in CHOICES}
        if config_dict.get("format_version") == 1:  # when these were no choice
            config_dict = {**VERSION_1, **config_dict}
        config = cls(**{**config_dict, **choices})
        return (config, kwargs) if return_unused_kwargs else config

    def update(self, **kwargs: Any) -> dict[str, Any]:
        """Change choices in place, checked; transformers calls it.

        Args:
            **kwargs: choices, and other keys.

        Returns:
            The keys that are no choices.

        Raises:
            ValueError: a wrong type or an impossible value.
        """
        choices = {key: kwargs.pop(key) for key in list(kwargs) if key in CHOICES}
        self.__dict__.update(vars(self.replace(**choices)))
        return kwargs

    def to_dict(self) -> dict[str, Any]:
        """The choices that a file holds and the format version, in types that JSON has."""
        names = ["quant_method", "format_version", *stored_in(self.format_version)]
        choices = {name: copy.deepcopy(getattr(self, name)) for name in names}
        return {**choices, "requires": REQUIRES}

    def __eq__(self, other: object) -> bool:
        same = isinstance(other, SVDQConfig) and self.to_dict() == other.to_dict()
        return same and all(getattr(self, name) == getattr(other, name) for name in not_stored())

    __hash__ = None  # type: ignore[assignment]  # `update` changes it, as transformers wants

    def __setattr__(self, name: str, value: object) -> NoReturn:
        """Refuse: a model, a file and a plan may share this config.

        Raises:
            AttributeError: always.
        """
        raise AttributeError(
            f"{name}={value!r}: an SVDQConfig does not change; make another one with config.replace(...)"
        )

    def _oldest_version(self) -> int:
        """The oldest version of the format that can express these choices."""
        rows = {name: row for name, row in CHOICES.items() if row.of == "files"}
        asked = [row.since for name, row in rows.items() if getattr(self, name) != row.default]
        return max([self.scheme.format_version, *asked])
