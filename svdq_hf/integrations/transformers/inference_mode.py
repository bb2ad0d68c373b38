"""Quantization inside `torch.inference_mode()`: its tensors must train and be saved like any others.

Tensors that are created in that mode are excluded from autograd for ever. So quantizing leaves the mode for a
while, and tensors that a loader has created in it are copied.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


@contextmanager
def trainable_tensors() -> Iterator[None]:
    """Context manager: new tensors are normal ones, even inside `torch.inference_mode()`."""
    if not torch.is_inference_mode_enabled():
        yield
        return
    with torch.inference_mode(False), torch.no_grad():
        yield


def make_trainable(model: nn.Module) -> None:
    """Replace tensors of a model that were created in inference mode by copies; tied ones stay tied."""
    made: dict[int, Tensor] = {}
    with trainable_tensors():
        for module in model.modules():
            for tensors in (module._parameters, module._buffers):
                for name, tensor in tensors.items():
                    if tensor is not None and tensor.is_inference():
                        if id(tensor) not in made:
                            made[id(tensor)] = _copy(tensor)
                        tensors[name] = made[id(tensor)]  # type: ignore[assignment]


def _copy(tensor: Tensor) -> Tensor:
    copy = tensor.detach().clone()
    return nn.Parameter(copy, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else copy
