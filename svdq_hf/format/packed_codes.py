"""PackedCodes: the frozen parameter that holds a layer's packed codes, and says so when it is to train.

torch's own error, "only Tensors of floating point dtype can require gradients", names no layer and no remedy
to somebody who unfreezes a block in a loop. To torch it is a parameter as any other: where something makes
another of it (a pickle, FSDP) that is a plain one, and computes the same.
"""

from typing import Any

from torch import Tensor, nn

REMEDY = (
    "mark_trainable(model) lets the salient weights, biases and norms train; in a loop, take the parameters "
    "of which parameter.is_floating_point()"
)


class PackedCodes(nn.Parameter):
    """Packed codes, int8, of which nothing requires a gradient.

    Args:
        data: the codes, `[out, ...]`, or `[experts, out, ...]`.
        requires_grad: False; what copies parameters gives it.
    """

    layer: str = "a quantized layer"
    """Name of the layer in its model."""

    def __new__(cls, data: Tensor, requires_grad: bool = False) -> "PackedCodes":
        """A parameter that shares the memory of `data`."""
        codes: PackedCodes = super().__new__(cls, data, False)
        codes.requires_grad_(requires_grad)
        return codes

    @property
    def requires_grad(self) -> bool:
        """False."""
        return False

    @requires_grad.setter
    def requires_grad(self, wanted: bool) -> None:
        self.requires_grad_(wanted)

    def requires_grad_(self, mode: bool = True) -> "PackedCodes":
        """Stay frozen.

        Args:
            mode: whether gradients are wanted.

        Raises:
            ValueError: they are; it names the layer and what can train.
        """
        if mode:
            raise ValueError(f"{self.layer}: packed codes are integers and cannot train; {REMEDY}")
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> "PackedCodes":
        """A copy that has the layer's name.

        Args:
            memo: of `copy.deepcopy`.
        """
        copied: PackedCodes = super().__deepcopy__(memo)  # type: ignore[no-untyped-call]
        copied.layer = self.layer
        return copied
