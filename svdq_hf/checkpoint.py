"""A model's folder -> a quantized model's folder, complete or not there at all.

The work is done in a hidden folder beside the target, which is renamed when everything in it is
written, so that a kill or a full disk leaves nothing that looks whole. Only safetensors are read and
no code of the model's author is run. Not here: quantizing without building the model.
"""

import json
import os
import re
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub import snapshot_download
from transformers import AutoConfig, AutoModel, PreTrainedModel

from svdq_hf.card import write_card
from svdq_hf.config import SVDQConfig
from svdq_hf.convert import linear_layers, unmatched
from svdq_hf.footprint import Footprint, footprint
from svdq_hf.hub import explained
from svdq_hf.inplace import quantize_model
from svdq_hf.readme import README, read_text

REPORT_FILE = "svdq_report.json"
NAMES_SHOWN = 6
COMPANIONS = (".json", ".txt", ".model", ".jinja")
"""Tokenizers, processors, pooling and prompts: copied beside the quantized weights."""


def quantize_checkpoint(model: str | Path, out: str | Path, config: SVDQConfig) -> Footprint:
    """Quantize a model, given by folder or Hub name, into the folder `out`; what it weighs then.

    Raises:
        ValueError: `out` is there and not empty; the model is quantized already, has no safetensors
            file, needs code of its own, or is refused by `from_pretrained`.
        OSError: the disk is full, or the model is not there.
    """
    target = Path(out).absolute()
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ValueError(f"{out} is there already and not empty; name another folder or remove it")
    source = local_folder(model)
    model_class = _model_class(source)
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{target.name}.", dir=target.parent) as hidden:
        work = Path(hidden) / "model"
        quantized = _quantized(model_class, source, config)
        quantized.save_pretrained(work)
        _copy_companions(source, work)
        result = footprint(quantized)
        (work / REPORT_FILE).write_text(json.dumps(result.to_dict(), indent=1) + "\n")
        name = None if Path(model).is_dir() else str(model)
        write_card(work, base_model=name, base_card=read_text(source / README, "replace"))
        if target.exists():
            target.rmdir()  # empty, or this fails and nothing is lost
        os.rename(work, target)
    return result


def local_folder(model: str | Path) -> Path:
    """The folder of a model: itself, or a copy of the Hub's, without code and pickles.

    Raises:
        ValueError: neither a folder nor a name that the Hub could have.
        OSError: the Hub does not have it, or cannot be reached.
    """
    if Path(model).is_dir():
        return Path(model)
    name = str(model)
    if name.count("/") > 1 or name.startswith(("/", "./", "../", "~")):
        raise ValueError(f"{name}: no such folder (and not a Hub name, which is user/model)")
    told = name if "/" in name else f"{name} (no such folder is here)"
    patterns = ["*.safetensors", README, *(f"*{suffix}" for suffix in COMPANIONS)]
    with explained(told):
        return Path(snapshot_download(name, allow_patterns=patterns))


def check_names(folder: str | Path, config: SVDQConfig) -> None:
    """Refuse names of modules to keep dense that match nothing; the model is built without weights.

    Quantizing itself only warns: a config may be meant for many models, a command line is for one.

    Raises:
        ValueError: a name matches no linear layer of the model in `folder`; see also `quantize_checkpoint`.
    """
    if not config.modules_to_not_convert:
        return
    names = list(linear_layers(_empty_model(Path(folder))))
    unknown = unmatched(names, config)
    if unknown:
        kinds: dict[str, str] = {}  # layers that differ by a number only are one kind
        for name in names:
            kinds.setdefault(re.sub(r"\d+", "#", name), name)
        shown = list(kinds.values())[:NAMES_SHOWN]
        raise ValueError(
            f"{', '.join(map(repr, unknown))} matches no linear layer of {folder}; there are "
            f"{', '.join(shown)}{', ...' if len(shown) < len(names) else ''}"
        )


def folder_bytes(folder: str | Path) -> int:
    """Bytes of the safetensors files in a folder."""
    return sum(file.stat().st_size for file in Path(folder).glob("*.safetensors"))


def _model_class(source: Path) -> Any:
    """The transformers class that the folder's config.json names."""
    if not (source / "config.json").is_file():
        raise ValueError(f"{source}: no config.json is there; is it the folder of a model?")
    if not any(source.glob("*.safetensors")):
        raise ValueError(f"{source}: no *.safetensors file is there; pickled weights are not read")
    config = AutoConfig.from_pretrained(source, local_files_only=True)
    stored = getattr(config, "quantization_config", None)
    if stored is not None:
        method = stored.get("quant_method") if isinstance(stored, dict) else stored
        raise ValueError(f"{source}: quantized already, by {method!r}; quantize the original model")
    for name in config.architectures or []:
        candidate = getattr(transformers, name, None)
        if isinstance(candidate, type) and issubclass(candidate, PreTrainedModel):
            return candidate
    return AutoModel


def _quantized(model_class: Any, source: Path, config: SVDQConfig) -> Any:
    """The quantized model; one that makes its own batches runs dense first, so it is loaded whole."""
    choices = {} if config.synthetic else {"quantization_config": config}
    model = model_class.from_pretrained(source, use_safetensors=True, local_files_only=True, **choices)
    return quantize_model(model, config) if config.synthetic else model


def _empty_model(source: Path) -> Any:
    """The model of a folder, on the meta device."""
    model_class = _model_class(source)
    config = AutoConfig.from_pretrained(source, local_files_only=True)
    build = model_class.from_config if model_class is AutoModel else model_class
    with torch.device("meta"):
        return build(config)


def _copy_companions(source: Path, target: Path) -> None:
    """Copy small files that are not weights, and that saving has not written itself."""
    for file in source.rglob("*"):
        place = target / file.relative_to(source)
        wanted = file.suffix in COMPANIONS and not file.name.endswith(".index.json")
        hidden = any(part.startswith(".") for part in file.relative_to(source).parts)
        if wanted and not hidden and file.is_file() and not place.exists():
            place.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, place)
