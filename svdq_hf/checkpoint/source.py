"""The model in a folder: of which class it is, and loaded with nothing made up.

`from_pretrained` makes a tensor that no file holds at random, and says so in its log. Who goes on to train
wants that of a new head. A command that writes a checkpoint wants it of nothing else.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig, AutoModel, PreTrainedModel
from transformers.quantizers.quantizers_utils import should_convert_module

from svdq_hf.format.files import REMEDY

NAMES_SHOWN = 3


def model_class(source: Path) -> Any:
    """The transformers class that the folder's config.json names.

    Raises:
        ValueError: it holds an adapter, has no config.json or no safetensors file, or is quantized already.
    """
    check_no_adapter(source)
    if not (source / "config.json").is_file():
        raise ValueError(f"{source}: no config.json is there; is it the folder of a model?")
    if not any(source.glob("*.safetensors")):
        kind = "GGUF files" if any(source.glob("*.gguf")) else "pickled weights"
        raise ValueError(f"{source}: no *.safetensors file is there; {kind} are not read")
    config = AutoConfig.from_pretrained(source, local_files_only=True)
    stored = getattr(config, "quantization_config", None)
    if stored is not None:
        method = stored.get("quant_method") if isinstance(stored, dict) else stored
        raise ValueError(f"{source}: quantized already, by {method!r}; quantize the original model")
    return named_class(config.architectures)


def check_no_adapter(source: Path) -> None:
    """Refuse the folder of an adapter, which `from_pretrained` would put on top of the model.

    Raises:
        ValueError: adapter_config.json is there.
    """
    if (source / "adapter_config.json").is_file():
        raise ValueError(
            f"{source}: holds a LoRA adapter (adapter_config.json); merge it (merge_and_unload()), save "
            "the model into a folder of its own, and quantize that"
        )


def named_class(architectures: object) -> Any:
    """The first transformers class of a list of names; AutoModel where none is one, or it is no list."""
    for name in architectures if isinstance(architectures, list) else ():
        candidate = getattr(transformers, name, None) if isinstance(name, str) else None
        if isinstance(candidate, type) and issubclass(candidate, PreTrainedModel):
            return candidate
    return AutoModel


def load_complete(
    kind: Any, source: Path, *, heads: bool = True, named: Iterable[str] = (), **choices: Any
) -> tuple[Any, list[str]]:
    """The model of a folder, by the class `kind` and `from_pretrained`, and names of what is random there.

    choices: those of `from_pretrained`.
    heads: whether a head outside of the base model may be new; an output embedding may not.
    named: modules that the user has asked to keep dense, and which may be new as well.

    Raises:
        ValueError: a tensor is not in the files; and what `from_pretrained` raises.
    """
    told: tuple[Any, dict[str, Any]] = kind.from_pretrained(
        source, use_safetensors=True, local_files_only=True, output_loading_info=True, **choices
    )
    model, info = told
    made = sorted(set(info["missing_keys"]) - _made_by_code(model))
    bad = [key for key in made if not (heads and _is_new_head(model, key)) and not _is_named(key, named)]
    if bad:
        raise ValueError(f"{source}: {listed(bad)} not in its files, and would be random; {REMEDY}")
    return model, made


def _made_by_code(model: PreTrainedModel) -> set[str]:
    """Tensors that no file need hold: those that are never saved; counters and masks, no weights."""
    state = model.state_dict()
    counted = {name for name, _ in model.named_buffers() if name in state and not _is_float(state[name])}
    return counted | set(model._keys_to_ignore_on_save or ())


def _is_float(tensor: Any) -> bool:
    return bool(tensor.is_floating_point() or tensor.is_complex())


def _is_new_head(model: PreTrainedModel, key: str) -> bool:
    """Whether a tensor is outside of the base model, and no row of an output vocabulary."""
    base = model.base_model
    output = model.get_output_embeddings()
    kept = [name for name, module in model.named_modules() if module is base or module is output]
    return not any(not name or key.startswith(f"{name}.") for name in kept)


def _is_named(key: str, named: Iterable[str]) -> bool:
    patterns = list(named)
    return bool(patterns) and not should_convert_module(key.rpartition(".")[0], patterns)


def listed(names: list[str]) -> str:
    """The first few names, with their verb.

    >>> listed(["a"]), listed(["a", "b", "c", "d"])
    ('a is', 'a, b, c and 1 more are')
    """
    more = len(names) - NAMES_SHOWN
    shown = ", ".join(names[:NAMES_SHOWN]) + (f" and {more} more" if more > 0 else "")
    return f"{shown} {'is' if len(names) == 1 else 'are'}"


def empty_model(source: Path) -> Any:
    """The model of a folder, on the meta device."""
    kind = model_class(source)
    config = AutoConfig.from_pretrained(source, local_files_only=True)
    build = kind.from_config if kind is AutoModel else kind
    with torch.device("meta"):
        return build(config)
