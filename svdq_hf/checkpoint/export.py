"""A quantized folder -> a plain 16-bit checkpoint that every engine reads, llama.cpp's converter among them.

The weights are those that the quantized model computes with: exporting gives back no precision, only the
common format. Written like `quantize_checkpoint`: complete or not there at all.
"""

import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import nn

from svdq_hf.checkpoint.companion_files import copy_companions
from svdq_hf.checkpoint.folders import REPORT_FILE, check_target, put_in_place
from svdq_hf.checkpoint.source import check_no_adapter, load_complete, named_class
from svdq_hf.checkpoint.streaming.byte_ranges import tensor_places
from svdq_hf.config import SVDQConfig
from svdq_hf.config.choices import COMPUTE_DTYPES, QUANT_METHOD
from svdq_hf.format.files import REMEDY, folder_bytes
from svdq_hf.hub.client import local_folder
from svdq_hf.hub.readme import README, base_metadata, merge, read_text

DTYPES = COMPUTE_DTYPES

_CARD = """\
## {dtype} weights, dequantized by svdq_hf

A quantized model ({bits} bits, `svdq`), written as a plain checkpoint: nothing is needed to load it. Its
weights are the quantized model's, rounded to {dtype}; what quantizing lost is not back.
"""


def export_dense(folder: str | Path, out: str | Path, dtype: str = "bfloat16") -> int:
    """Write the quantized model in `folder`, or on the Hub, into the folder `out`, dense; returns its bytes.

    Raises:
        ValueError: the folder holds no model that svdq has quantized, or not all of its tensors; a file is
            damaged; `out` is there and not empty; the dtype is none of `DTYPES`; or a weight is more than
            float16 can hold.
    """
    target = Path(out).absolute()
    if dtype not in DTYPES:
        raise ValueError(f"dtype={dtype!r}: must be one of {DTYPES}")
    check_target(out)
    source = local_folder(folder)
    config = _stored_config(source)
    tensor_places(source)  # all files are there and whole, or the one that is not is named
    model, _ = load_complete(named_class(config.get("architectures")), source, heads=False)
    model.dequantize(getattr(torch, dtype))
    model.to(getattr(torch, dtype))
    _check_finite(model, dtype)
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{target.name}.", dir=target.parent) as hidden:
        work = Path(hidden) / "model"
        model.save_pretrained(work)
        copy_companions(source, work)
        (work / REPORT_FILE).unlink(missing_ok=True)
        (work / README).write_text(_card(source, config, dtype), encoding="utf-8")
        put_in_place(work, target)
    return folder_bytes(target)


def _stored_config(source: Path) -> dict[str, Any]:
    """The config.json of a folder that svdq has quantized."""
    check_no_adapter(source)
    file = source / "config.json"
    if not file.is_file():
        raise ValueError(f"{source}: no config.json is there; is it the folder of a model?")
    try:
        config: dict[str, Any] = dict(json.loads(file.read_text()).items())
    except (ValueError, AttributeError, RecursionError) as error:
        raise ValueError(f"{file}: damaged ({error!r}); {REMEDY}") from error
    stored = config.get("quantization_config")
    method = stored.get("quant_method") if isinstance(stored, dict) else None
    if method != QUANT_METHOD:
        what = f"quantized by {method!r}, not by svdq" if method else "not quantized: it is dense already"
        raise ValueError(f"{source}: the model is {what}; export takes what `svdq quantize` wrote")
    return config


def _check_finite(model: nn.Module, dtype: str) -> None:
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise ValueError(f"{name} has weights that {dtype} cannot hold; take bfloat16 or float32")


def _card(source: Path, config: dict[str, Any], dtype: str) -> str:
    """The exported folder's README.md; license, language and base model are the quantized model's."""
    metadata = base_metadata(read_text(source / README, "replace"), None)
    bits = SVDQConfig.from_dict(config["quantization_config"]).bits
    section = _CARD.format(dtype=dtype, bits=bits)
    return merge("", {"library_name": "transformers", **metadata}, section)
