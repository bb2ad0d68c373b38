"""Export of a quantized folder to a dense checkpoint that every engine reads.

llama.cpp's converter reads it, too. The weights are those that the quantized model computes with: exporting
restores no precision, only the common format. Like `quantize_checkpoint`, it leaves a complete folder or
none.
"""

from pathlib import Path

import torch
from torch import nn

from svdq_hf.checkpoint.companion_files import copy_companions
from svdq_hf.checkpoint.folders import A_SOURCE, check_target, put_in_place
from svdq_hf.checkpoint.load import load_complete
from svdq_hf.checkpoint.source import Source
from svdq_hf.checkpoint.unfinished import work_folder
from svdq_hf.config import SVDQConfig
from svdq_hf.config.choices import COMPUTE_DTYPES, QUANT_METHOD
from svdq_hf.core.arguments import checked_arguments
from svdq_hf.format.files import REPORT_FILE, folder_bytes
from svdq_hf.hub.readme import README, base_metadata, merge, read_text

DTYPES = COMPUTE_DTYPES

_CARD = """\
## {dtype} weights, dequantized by svdq_hf

A quantized model ({bits} bits, `svdq`), written as a plain checkpoint: nothing is needed to load it. Its
weights are the quantized model's, rounded to {dtype}; what quantizing lost is not back.
"""


@checked_arguments(folder=A_SOURCE, dtype="such as 'bfloat16'")
def export_dense(folder: str | Path | Source, out: str | Path, dtype: str = "bfloat16") -> int:
    """Write a quantized model into a folder, dense.

    Args:
        folder: of a model that svdq has quantized, or its name on the Hub.
        out: folder to write; must not exist, or be empty.
        dtype: of all weights, one of `DTYPES`.

    Returns:
        Bytes of the written safetensors files.

    Raises:
        TypeError: an argument is of a wrong type (`WrongKind`, which is a ValueError as well).
        ValueError: the folder holds no model that svdq has quantized, or not all of its tensors, or some that
            its class does not know; a file is damaged; `out` exists and is not empty, or cannot be replaced;
            the dtype is none of `DTYPES`; or a weight is larger than float16 can hold.
        OSError: another run is at work for `out`.
    """
    target = Path(out).absolute()
    if dtype not in DTYPES:
        raise ValueError(f"dtype={dtype!r}: must be one of {DTYPES}")
    check_target(out)
    source = Source.resolve(folder, packed=True)
    _check_ours(source)
    _ = source.places  # all files are there and whole, or the one that is not is named
    source.check()
    with work_folder(out) as work:
        model, _ = load_complete(source.kind, source.folder, heads=False)
        model.dequantize(getattr(torch, dtype))
        model.to(getattr(torch, dtype))
        _check_finite(model, dtype)
        model.save_pretrained(work)
        source.check_written(work)
        copy_companions(source.folder, work)
        (work / REPORT_FILE).unlink(missing_ok=True)
        (work / README).write_text(_card(source, dtype), encoding="utf-8")
        put_in_place(work, target)
    return folder_bytes(target)


def _check_ours(source: Source) -> None:
    """Refuse a folder that svdq has not quantized."""
    stored = source.stored.get("quantization_config")
    method = stored.get("quant_method") if isinstance(stored, dict) else None
    if method != QUANT_METHOD:
        what = f"quantized by {method!r}, not by svdq" if method else "not quantized: it is dense already"
        raise ValueError(f"{source.folder}: the model is {what}; export takes what `svdq quantize` wrote")


def _check_finite(model: nn.Module, dtype: str) -> None:
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise ValueError(f"{name} has weights that {dtype} cannot hold; take bfloat16 or float32")


def _card(source: Source, dtype: str) -> str:
    """The exported folder's README.md; license, language and base model are the quantized model's."""
    metadata = base_metadata(read_text(source.folder / README, "replace"), None)
    bits = SVDQConfig.from_dict(source.stored["quantization_config"]).bits
    section = _CARD.format(dtype=dtype, bits=bits)
    return merge("", {"library_name": "transformers", **metadata}, section)
