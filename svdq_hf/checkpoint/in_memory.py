"""Quantizing a folder's model in memory: where it cannot be streamed, or must run first.

Not here: writing it (`checkpoint.quantize`), the quantizing itself (`integrations.transformers.in_memory`).
"""

import logging
from collections.abc import Iterable
from typing import Any

import torch

from svdq_hf.checkpoint.accounting import listed
from svdq_hf.checkpoint.load import load_complete
from svdq_hf.checkpoint.source import Source
from svdq_hf.config import SVDQConfig
from svdq_hf.integrations.transformers.in_memory import quantize_model

logger = logging.getLogger(__name__)


def checked_batches(config: SVDQConfig, batches: Iterable[Any] | None) -> Iterable[Any] | None:
    """The batches, refused where they are missing or of no use, before anything is read.

    Args:
        config: how the model is quantized.
        batches: calibration batches; None: there are none.

    Raises:
        ValueError: the config needs data and there is none, or there is data that it does not need.
    """
    if batches is None and config.needs_batches:
        raise config.no_data()
    if batches is not None and config.synthetic:
        raise config.no_use()
    if batches is not None and not config.runs_dense:
        raise ValueError(
            "batches are given, and nothing in this config needs data: take SVDQConfig.calibrated(), "
            "error_feedback=True or saliency='awq', or leave them out"
        )
    return batches


def quantized_in_memory(
    source: Source, config: SVDQConfig, batches: Iterable[Any] | None = None, dtype: str | None = None
) -> Any:
    """A folder's model, quantized in memory; one that needs batches, given or synthetic, runs dense first.

    Args:
        source: the folder.
        config: how the model is quantized.
        batches: calibration batches, where the config needs data.
        dtype: of what stays dense; None: as in the files.

    Raises:
        ValueError: see `load_complete` and `quantize_model`.
    """
    named = config.modules_to_not_convert or ()
    loading: dict[str, Any] = {"quantization_config": config, "dtype": dtype or "auto"}
    choices = {} if config.runs_dense else loading
    model, new = load_complete(source.kind, source.folder, named=named, **choices)
    if new:
        logger.warning(
            "%s: %s not in its files, and random in the quantized model: train it", source, listed(new)
        )
    if config.runs_dense:
        model = quantize_model(model, config, batches)
        if dtype is not None:  # not before: salient weights are those of the files
            model = model.to(getattr(torch, dtype))
    return model
