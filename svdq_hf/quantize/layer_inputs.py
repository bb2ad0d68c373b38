"""Which statistics of a model's inputs a config needs, and who makes the batches for them.

Not here: how they are collected (`calibration.inputs`), and what is done with them (`prepared`).
"""

from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

from svdq_hf.calibration.inputs import InputStatistics, collect_inputs
from svdq_hf.calibration.synthetic import synthetic_batches
from svdq_hf.config import SVDQConfig


def collect_for(
    model: nn.Module, layers: Mapping[str, nn.Module], config: SVDQConfig, batches: Iterable[Any] | None
) -> dict[str, InputStatistics]:
    """The statistics that `config` needs of `layers`; empty where it needs no data.

    Raises:
        ValueError: data is needed and `batches` is None, or the opposite; the model does not run on batches
            made without data; see also `collect_inputs` and `synthetic_batches`.
    """
    needs = config.data_needs
    if config.synthetic:
        if batches is not None:
            raise ValueError("error_feedback 'synthetic' makes its batches: leave yours out, or say True")
        batches = synthetic_batches(model, seed=config.seed)
        model = getattr(model, "base_model", model)  # heads stay dense: their outputs are not needed
    if not needs and batches is not None:
        raise ValueError(f"saliency {config.saliency!r} needs no data: leave the batches out")
    if not needs:
        return {}
    if batches is None:
        raise config.no_data()
    try:
        return collect_inputs(model, layers, batches, gram="input_gram" in needs)
    except (AttributeError, TypeError) as error:
        if not config.synthetic:
            raise
        raise ValueError(  # CLIP, say: its forward takes pictures too, which its signature does not tell
            f"{type(model).__name__} does not run on token ids alone ({error}): call quantize_model(model, "
            "config, batches) with batches of your own and error_feedback=True"
        ) from error
