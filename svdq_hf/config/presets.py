"""Presets: named sets of choices, as class methods of SVDQConfig and for `--preset`."""

from typing import TYPE_CHECKING, Any, NamedTuple, Self

from svdq_hf.config.choices import VERSION_1


class Preset(NamedTuple):
    """Choices that belong together, and a line of help."""

    changes: dict[str, Any]
    help: str
    needs_data: bool = False
    """Whether it needs calibration batches."""
    runs_dense: bool = False
    """Whether the dense model is run or rotated first, which is not done while loading."""


PRESETS = {
    "best": Preset(
        {"k": 0.0018, "saliency": "relative"},
        "the least loss without data in seconds to minutes, at about 4.5 bits per weight",
    ),
    "small": Preset(
        {"k": 0.0009, "saliency": "relative", "group_size": 64},
        "the same at about 4.28 bits per weight",
    ),
    "calibrated": Preset(
        {"k": 0.0005, "saliency": "awq", "group_size": 64, "error_feedback": True},
        "for those who have data, at 4.21 to 4.24 bits per weight",
        needs_data=True,
        runs_dense=True,
    ),
    "self_calibrated": Preset(
        {"k": 0.0018, "saliency": "requant", "error_feedback": "synthetic"},
        "calibration on text that the model writes itself, for causal models: the least loss of all without "
        "data, in minutes to hours, at about 4.5 bits per weight",
        runs_dense=True,
    ),
    "resq": Preset(
        {"activations": 4, "subspace": 0.125, "k": 0, "column_scale": False},
        "activations in 4 bits too, rotated (Llama, Qwen, Mistral); better with data",
        runs_dense=True,
    ),
    "paper": Preset(
        {"group_size": "tensor", "scale": "absmax", **VERSION_1},
        "the reading of arXiv 2512.01343: one absmax scale per matrix, to compare with",
    ),
}


class PresetMethods:
    """The presets as class methods of a config."""

    if TYPE_CHECKING:  # whoever inherits them takes choices

        def __init__(self, **choices: Any) -> None: ...

    @classmethod
    def paper(cls, k: int | float = 256, **choices: Any) -> Self:
        """The reading of arXiv 2512.01343: one absmax scale per matrix, rank 8, every layer but the head.

        Args:
            k: salient weights per layer.
            **choices: other choices, as for `SVDQConfig`.

        Raises:
            ValueError: see `SVDQConfig`.

        Source: arXiv 2512.01343.

        >>> from svdq_hf import SVDQConfig
        >>> SVDQConfig.paper(k=64).group_size
        'tensor'
        """
        return cls(**{"k": k, **PRESETS["paper"].changes, **choices})

    @classmethod
    def best(cls, **choices: Any) -> Self:
        """The least loss without data in seconds to minutes, at about 4.5 bits per weight.

        The size is that of layers 384 wide and wider.

        >>> from svdq_hf import SVDQConfig
        >>> SVDQConfig.best().saliency
        'relative'
        """
        return cls(**{**PRESETS["best"].changes, **choices})

    @classmethod
    def small(cls, **choices: Any) -> Self:
        """The least loss without data in seconds to minutes, at about 4.28 bits per weight.

        The size is that of layers 384 wide and wider.

        >>> from svdq_hf import SVDQConfig
        >>> SVDQConfig.small().group_size
        64
        """
        return cls(**{**PRESETS["small"].changes, **choices})

    @classmethod
    def resq(cls, **choices: Any) -> Self:
        """Weights and activations in 4 bits, in the eighth of the axes that varies most in 8 (ResQ).

        Use: `quantize_model(model, SVDQConfig.resq(), batches)`, or without batches, for models whose
        residual stream can be rotated: Llama, Qwen2, Qwen3, Mistral and the like.

        >>> from svdq_hf import SVDQConfig
        >>> SVDQConfig.resq().activations, SVDQConfig.resq().subspace
        (4, 0.125)

        Source: arXiv 2412.14363.
        """
        return cls(**{**PRESETS["resq"].changes, **choices})

    @classmethod
    def calibrated(cls, **choices: Any) -> Self:
        """For those who have data, at 4.21 to 4.24 bits per weight (in layers 384 wide and wider).

        Use: `quantize_model(model, SVDQConfig.calibrated(), batches)`.

        >>> from svdq_hf import SVDQConfig
        >>> SVDQConfig.calibrated().data_needs
        ['input_gram', 'input_norm']
        """
        return cls(**{**PRESETS["calibrated"].changes, **choices})

    @classmethod
    def self_calibrated(cls, **choices: Any) -> Self:
        """Calibration on text that the model writes itself, for causal models, at about 4.5 bits per weight.

        ReQuant picks the salient weights by the loss on that text, and error feedback makes good what
        rounding lost: the least loss of all without data. It takes minutes to hours, and the memory of the
        dense model and of a backward pass over 512 tokens. Models that are not causal are refused.

        Use: `quantize_model(model, SVDQConfig.self_calibrated())`.

        Source: arXiv 2410.17170 (self-calibration), 2503.01901 (ReQuant).

        >>> from svdq_hf import SVDQConfig
        >>> SVDQConfig.self_calibrated().needs_batches, SVDQConfig.self_calibrated().runs_dense
        (False, True)
        """
        return cls(**{**PRESETS["self_calibrated"].changes, **choices})
