"""The model of a folder, loaded with nothing made up.

`from_pretrained` makes a tensor that no file holds at random, and says so in its log. Who goes on to train
wants that of a new head. A command that writes a checkpoint wants it of nothing else.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel
from transformers.quantizers.quantizers_utils import should_convert_module

from svdq_hf.checkpoint.accounting import listed
from svdq_hf.format.files import REMEDY


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
