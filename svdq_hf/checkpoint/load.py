"""Loading of a folder's model without random tensors.

`from_pretrained` initializes a tensor that no file holds at random, and says so in its log. For somebody who
goes on to train a new head that is wanted. A command that writes a checkpoint must allow nothing else.
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
    """Load a model and refuse tensors that would be random.

    Args:
        kind: the class; its `from_pretrained` is called.
        source: folder of the model.
        heads: whether a head outside the base model may be new; an output embedding may not.
        named: modules that the user keeps dense, which may be new as well.
        **choices: further arguments of `from_pretrained`.

    Returns:
        The model, and the names of its tensors that are new.

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
    """Tensors that files need not hold: those that are never saved, and integer buffers (counters, masks)."""
    state = model.state_dict()
    counted = {name for name, _ in model.named_buffers() if name in state and not _is_float(state[name])}
    return counted | set(model._keys_to_ignore_on_save or ())


def _is_float(tensor: Any) -> bool:
    return bool(tensor.is_floating_point() or tensor.is_complex())


def _is_new_head(model: PreTrainedModel, key: str) -> bool:
    """Whether a tensor is outside the base model and not part of an output embedding."""
    base = model.base_model
    output = model.get_output_embeddings()
    kept = [name for name, module in model.named_modules() if module is base or module is output]
    return not any(not name or key.startswith(f"{name}.") for name in kept)


def _is_named(key: str, named: Iterable[str]) -> bool:
    patterns = list(named)
    return bool(patterns) and not should_convert_module(key.rpartition(".")[0], patterns)
