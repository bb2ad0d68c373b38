"""Typed values of a config, and what follows from them: the storage scheme, whether data is needed.

Not here: how they are given, checked and stored (`config.svdq_config`).
"""

from collections.abc import Mapping
from functools import cache
from typing import Any, Literal

import torch

from svdq_hf.config.choices import HADAMARD, SYNTHETIC, part_of_grid
from svdq_hf.config.layer_inputs import LayerInput
from svdq_hf.core.activations import Activations
from svdq_hf.core.grid import Grid
from svdq_hf.core.grid_values import GroupSize, Levels, ScaleRule
from svdq_hf.core.saliency import BY_LOSS, data_needs, no_data, saliency_names
from svdq_hf.format.parts import Scheme

ErrorFeedback = bool | Literal["synthetic"]


class Chosen:
    """A value for each row of `choices.CHOICES`; the base class of SVDQConfig."""

    k: int | float
    rank: int
    saliency: str
    bits: Literal[3, 4, 8]
    group_size: GroupSize
    scale: ScaleRule
    clip_sigma: float
    levels: Levels
    column_scale: bool
    scale_bits: Literal[16, 8]
    error_feedback: ErrorFeedback
    lm_head: bool
    embeddings: bool
    target_bits: float | None
    layer_k: dict[str, int] | None
    activations: Literal[4, 8] | None
    subspace: float
    basis: Literal["data", "weights"] | None
    layer_inputs: dict[str, LayerInput] | None
    modules_to_not_convert: list[str] | None
    compute_dtype: str | None
    seed: int
    damping: float | None
    compute: Literal["exact", "fast"]

    @property
    def synthetic(self) -> bool:
        """Whether calibration batches are made by the model instead of being given."""
        return self.error_feedback == SYNTHETIC

    @property
    def extra_damping(self) -> float:
        """`damping`; where it is None, 1 for synthetic batches (they are trusted less) and 0 otherwise."""
        return float(self.synthetic) if self.damping is None else float(self.damping)

    @property
    def data_needs(self) -> list[str]:
        """What only batches can give, of `saliency.NEEDS`; empty where the model need not be run."""
        feedback = ["input_gram"] if self.error_feedback else []
        return sorted({*feedback, *score_data(self.saliency)})

    @property
    def plain_score(self) -> str:
        """The score that takes this one's place where nothing is known of a matrix's inputs or of the loss.

        With one scale for a matrix no weight is large beside its group, but beside the matrix.
        """
        if not score_data(self.saliency):
            return self.saliency
        return "magnitude" if self.group_size == "tensor" else "relative"

    @property
    def follows_loss(self) -> bool:
        """Whether the score asks what rounding costs a loss, so that batches must give one."""
        return not set(BY_LOSS).isdisjoint(score_data(self.saliency))

    @property
    def needs_batches(self) -> bool:
        """Whether batches must be given: what they tell is needed, and the model makes none itself."""
        return bool(self.data_needs) and not self.synthetic

    @property
    def runs_dense(self) -> bool:
        """Whether the dense model is in memory first, to be run or rotated; then batches are of use."""
        return bool(self.data_needs) or self.activations is not None

    def no_use(self) -> ValueError:
        """The error for batches that are given beside a config whose model makes them."""
        return ValueError(
            "error_feedback 'synthetic' makes its batches: leave yours out, or say error_feedback=True"
        )

    def no_data(self) -> ValueError:
        """The error for a config that needs batches, where there are none and the model cannot be run."""
        if self.synthetic:
            return ValueError(
                "error_feedback 'synthetic', which SVDQConfig.self_calibrated() has too, runs the dense "
                "model: load it dense and call quantize_model(model, config), or run `svdq quantize`"
            )
        of_score = data_needs(self.saliency)
        if of_score:
            own = "the model, a causal one," if self.follows_loss else "the model"
            instead = f"; or, without data, error_feedback='synthetic': {own} makes the batches"
            return no_data(f"saliency {self.saliency!r}", of_score, instead)
        return no_data("error_feedback", self.data_needs, "; or, without data, error_feedback='synthetic'")

    @property
    def scheme(self) -> Scheme:
        """How one weight is stored under this config."""
        grid = _grid(tuple((name, getattr(self, name)) for name in part_of_grid()))
        return Scheme(self.k, grid, self._activations)

    @property
    def _activations(self) -> Activations | None:
        """How a layer rounds its inputs; of a config for one layer (`of_layer`), as that layer does."""
        if self.activations is None:
            return None
        own = (self.layer_inputs or {}).get("", 1)
        if own == HADAMARD:  # which has no axes of more variance than others
            return Activations(self.activations, hadamard=True)
        return Activations(self.activations, self.subspace, heads=int(own))

    @property
    def torch_compute_dtype(self) -> torch.dtype | None:
        """`compute_dtype` as a torch dtype."""
        return None if self.compute_dtype is None else getattr(torch, self.compute_dtype)


@cache
def _grid(values: tuple[tuple[str, Any], ...]) -> Grid:
    return Grid(**dict(values))


def score_data(saliency: str) -> list[str]:
    """The data that a score needs; nothing for an unregistered one.

    A stored model may name a score of its author's that is not known here; it loads without that score.
    """
    return data_needs(saliency) if saliency in saliency_names() else []


def completed(choices: Mapping[str, Any]) -> dict[str, Any]:
    """The choices with derived values filled in, and with lists and dicts copied.

    Args:
        choices: a value for each row of `CHOICES`, by name.
    """
    names, layers, levels = (choices[name] for name in ("modules_to_not_convert", "layer_k", "levels"))
    inputs = choices["layer_inputs"]
    return {
        **choices,
        "layer_inputs": dict(inputs) if isinstance(inputs, dict) else inputs,
        "modules_to_not_convert": list(names) if isinstance(names, tuple | list) else names,
        "layer_k": dict(layers) if isinstance(layers, dict) else layers,
        # The levels of a table have 8 bits themselves, so 8 bits of code leave no choice.
        "levels": ("linear" if choices["bits"] == 8 else "normal") if levels is None else levels,
    }
