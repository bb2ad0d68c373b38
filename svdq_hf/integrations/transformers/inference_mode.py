"""Quantizing inside of `torch.inference_mode()`: what is made there must train and be saved like any other.

Tensors that are made in that mode are no part of autograd for ever. So quantizing leaves it for a while, and
what a loader has made in it is copied.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


@contextmanager
def trainable_tensors() -> Iterator[None]:
    """Make plain tensors in the block, without gradients, also inside of `torch.inference_mode()`."""
    if not torch.is_inference_mode_enabled():
        yield
        return
    with torch.inference_mode(False), torch.no_grad():
        yield


def make_trainable(model: nn.Module) -> None:
    """Replace the tensors of a model that were made in inference mode by copies; what is tied stays tied."""
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
