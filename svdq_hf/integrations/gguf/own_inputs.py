"""Inputs of a GGUF file's matrices, without data: the model writes text itself, run by transformers.

For error feedback. Not here: the text (`calibration.synthetic`), and the feedback (`core.error_feedback`).
"""

from typing import Any

import torch
from torch import Tensor, nn

from svdq_hf.calibration.inputs import collect_inputs
from svdq_hf.calibration.synthetic import synthetic_batches
from svdq_hf.integrations.gguf.mixture import QUANTIZED
from svdq_hf.integrations.gguf.model_file import ModelFile

WITHOUT = "leave error feedback out"


def input_grams(model: ModelFile) -> dict[str, Tensor]:
    """Gram matrices of what the matrices of a file's layers receive while the model writes.

    Args:
        model: the file.

    Returns:
        `X^T X` `[in, in]`, float32, by the name of the matrix in the file.

    Raises:
        ValueError: transformers cannot read the file, or has other names than llama.cpp for its layers.
    """
    runnable = _loaded(model)
    layers = _layers(model, runnable)
    watched = {name: layer for name, layer in layers.items() if _source_of(name, layers) == name}
    seen = collect_inputs(runnable, watched, synthetic_batches(runnable), gram=True)
    return {name: gram for name in layers if (gram := seen[_source_of(name, layers)].gram) is not None}


SAME_INPUTS = {"attn_k": "attn_q", "attn_v": "attn_q", "ffn_up": "ffn_gate"}
"""Matrices that read what another one reads, in every architecture that has both."""


def _source_of(name: str, layers: dict[str, nn.Module]) -> str:
    """The matrix whose inputs are watched for another: itself, or the one that reads the same."""
    layer, what, _ = name.rsplit(".", 2)
    other = f"{layer}.{SAME_INPUTS.get(what, what)}.weight"
    return other if other in layers else name


def _loaded(model: ModelFile) -> Any:
    """The model as transformers computes it, in float32."""
    from transformers import AutoModelForCausalLM

    folder, name = model.path.absolute().parent, model.path.name
    try:
        return AutoModelForCausalLM.from_pretrained(folder, gguf_file=name, dtype=torch.float32)
    except (ValueError, KeyError, OSError, NotImplementedError, ImportError) as error:
        text = " ".join(str(error).split())[:200]
        raise ValueError(f"{model.path}: transformers cannot run it ({text}); {WITHOUT}") from error


def _layers(model: ModelFile, runnable: nn.Module) -> dict[str, nn.Module]:
    """The linear layers of a model, by the names of their weights in the file."""
    import gguf

    numbers = {name: number for number, name in gguf.MODEL_ARCH_NAMES.items()}
    names = gguf.get_tensor_name_map(numbers[model.architecture], model.first_count("block_count"))
    found: dict[str, nn.Module] = {}
    for path, module in runnable.named_modules():
        if isinstance(module, nn.Linear):
            stored = f"{names.get_name(path)}.weight"
            if stored in model.tensors and QUANTIZED.fullmatch(stored):
                found[stored] = module
    if not found:
        raise ValueError(f"{model.path}: none of its layers is known to transformers by name; {WITHOUT}")
    return found
