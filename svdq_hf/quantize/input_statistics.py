"""Input statistics for a config: which ones it needs, and whose batches they are collected on.

Not here: how they are collected (`calibration.inputs`), and how they are used (`quantize.prepared`).
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from svdq_hf.calibration.inputs import InputStatistics, collect_inputs, writes
from svdq_hf.calibration.synthetic import synthetic_batches
from svdq_hf.config import SVDQConfig
from svdq_hf.quantize.budget import BudgetItem, affordable, followed_budget, items_of
from svdq_hf.quantize.requant import ReQuant
from svdq_hf.quantize.rounding_lines import lines_of
from svdq_hf.quantize.sensitivity import pqi

LOSS_BATCHES = 4
"""Synthetic batches whose loss is followed, each of `synthetic.BATCH_TOKENS`: all 16 chose no better, and
passes back took most of the time (docs/results/pqi.md)."""


def collect_for(
    model: nn.Module,
    layers: Mapping[str, nn.Module],
    config: SVDQConfig,
    batches: Iterable[Any] | None,
    others: Mapping[str, nn.Module] | None = None,
) -> dict[str, InputStatistics]:
    """The input statistics that a config needs.

    Args:
        model: the dense model.
        layers: the layers to be quantized, by name.
        config: says whether data is needed, and of what kind.
        batches: the user's calibration batches; None: there are none.
        others: modules of whose inputs nothing is collected, and that share a budget.

    Returns:
        Statistics by the layer's name; empty where the config needs no data, or there is no layer.

    Raises:
        ValueError: data is needed and `batches` is None, or the opposite; the model does not run on batches
            made without data, or they give no loss for a score that follows one; see also `collect_inputs`
            and `synthetic_batches`.
    """
    needs, whole = config.data_needs, model
    if needs and not layers:  # but fused experts, of whose inputs nothing is collected
        return {}
    every = items_of({**layers, **(others or {})})
    if needs and config.target_bits is not None:
        affordable(every, config)  # which is refused before the work
    if config.synthetic:
        if batches is not None:
            raise config.no_use()
        check_loss(model, config)
        batches = synthetic_batches(model, seed=config.seed)
        model = getattr(model, "base_model", model)  # of heads nothing is collected
    if not needs and batches is not None:
        raise ValueError(f"saliency {config.saliency!r} needs no data: leave the batches out")
    if not needs:
        return {}
    if batches is None:
        raise config.no_data()
    given = list(batches) if config.follows_loss else batches
    try:
        seen = collect_inputs(model, layers, given, gram="input_gram" in needs)
        if config.follows_loss:
            followed = list(given)[: LOSS_BATCHES if config.synthetic else None]
            for name, scores in _scores_by_loss(whole, layers, config, followed, seen, every).items():
                seen[name].sensitivity = scores
        return seen
    except (AttributeError, TypeError) as error:
        if not config.synthetic:
            raise
        raise ValueError(  # CLIP, say: its forward takes pictures too, which its signature does not tell
            f"{type(model).__name__} does not run on token ids alone ({error}): call quantize_model(model, "
            "config, batches) with batches of your own and error_feedback=True"
        ) from error


def check_loss(model: nn.Module, config: SVDQConfig) -> None:
    """Refuse a score by the loss where the batches that the model would make give none, before any work.

    Args:
        model: dense, on any device.
        config: how it is quantized.

    Raises:
        ValueError: the model is no causal one; with the remedy.
    """
    if config.synthetic and config.follows_loss and not writes(model):
        raise ValueError(
            f"saliency {config.saliency!r} follows a loss, which without data only a causal model with its "
            f"head has (AutoModelForCausalLM), of the text it writes, and {type(model).__name__} is none: "
            "give batches with labels to quantize_model(model, config, batches) and error_feedback=True; or "
            "take SVDQConfig.best() (--preset best), for a model that reads token ids with "
            "error_feedback='synthetic' (--error-feedback synthetic)"
        )


def _scores_by_loss(
    model: nn.Module,
    layers: Mapping[str, nn.Module],
    config: SVDQConfig,
    batches: Sequence[Any],
    seen: Mapping[str, InputStatistics],
    every: Mapping[str, BudgetItem],
) -> dict[str, Tensor]:
    if "given_back" in config.data_needs:
        budget, _ = followed_budget(every, config, layers)
        return ReQuant(model, layers, config, batches, {} if config.synthetic else seen).order(budget)
    return pqi(model, lines_of(layers, config), batches)
