"""Which way round does a file keep its experts, `[out, in]` or `[in, out]`?

Where a family has files of both kinds, transformers looks at the shape of the parameter that is loaded and
transposes what does not fit. Packed experts have not the shape of dense ones, so they are asked for that.
"""

from typing import Any

from torch import Tensor
from transformers.core_model_loading import Transpose, WeightConverter

from svdq_hf.experts import SVDQExperts


class TransposeExperts(Transpose):  # type: ignore[misc]  # transformers ships no types
    """`Transpose(check_dims=True)` for a parameter that is packed, or is not."""

    def convert(
        self,
        input_dict: dict[str, Any],
        source_patterns: list[str],
        target_patterns: list[str],
        **kwargs: Any,
    ) -> dict[str, Tensor]:
        """The tensor as the dense parameter has it."""
        path, _, leaf = kwargs["full_layer_name"].rpartition(".")
        module = kwargs["model"].get_submodule(path)
        if not isinstance(module, SVDQExperts):
            return super().convert(input_dict, source_patterns, target_patterns, **kwargs)  # type: ignore[no-any-return]
        value = next(iter(input_dict.values()))
        tensor = value[0] if isinstance(value, list) else value
        if tuple(tensor.shape) != module.dense_shape(leaf):
            tensor = tensor.transpose(self.dim0, self.dim1)  # each expert becomes contiguous by itself
        return {self.get_target_pattern(input_dict, source_patterns, target_patterns): tensor}


def as_dense(conversion: Any) -> Any:
    """A conversion that asks packed experts for their dense shape, where it asks for a shape at all."""
    checks = isinstance(conversion, WeightConverter) and any(
        isinstance(op, Transpose) and op.check_dims for op in conversion.operations
    )
    if checks:
        conversion.operations = [
            TransposeExperts(op.dim0, op.dim1, check_dims=True)
            if isinstance(op, Transpose) and op.check_dims
            else op
            for op in conversion.operations
        ]
    return conversion
