"""Weight conversions (transformers' `ConversionOps`) for fused experts that are quantized while loading.

transformers stacks all experts of a layer into one dense `[experts, out, in]` tensor before quantizing.
These hand them on one expert at a time, so that peak memory is one expert, and transpose them where a
family has files of both orientations. (transformers compares shapes for that, and packed experts have
other ones.) Experts that are packed in the files are loaded as they are. Not here: quantizing
(`integrations.transformers.quantize_op`).
"""

from typing import Any

from torch import Tensor
from transformers.core_model_loading import (
    Concatenate,
    ConversionOps,
    MergeModulelist,
    Transpose,
    WeightConverter,
)

from svdq_hf.nn.experts import SVDQExperts
from svdq_hf.quantize.expert_stream import Pieces, fit_together


def without_stacking(conversion: WeightConverter) -> WeightConverter:
    """A conversion that makes dense experts, reduced to what quantizing needs; changed in place.

    Args:
        conversion: transformers' converter.
    """
    operations = list(conversion.operations)
    if is_merge(conversion):
        conversion.operations = [MergeExperts(operations)]
    else:
        conversion.operations = [TransposeExperts(op) if _checks(op) else op for op in operations]
    return conversion


def is_merge(conversion: WeightConverter) -> bool:
    """Whether a conversion only stacks tensors of single experts (several patterns: one below the other)."""
    kinds = [type(op) for op in conversion.operations]
    plain = kinds in ([MergeModulelist], [MergeModulelist, Concatenate])
    if not plain or len(conversion.target_patterns) > 1:
        return False
    return all(op.dim == dim for op, dim in zip(conversion.operations, (0, 1), strict=False))


def is_transpose(conversion: WeightConverter) -> bool:
    """Whether a conversion only swaps the last two of three dimensions, where the model's experts need it."""
    operations = conversion.operations
    plain = len(operations) == 1 and _checks(operations[0])
    return plain and {operations[0].dim0, operations[0].dim1} == {1, 2}


def _checks(op: ConversionOps) -> bool:
    return type(op) is Transpose and op.check_dims


def _experts(kwargs: dict[str, Any]) -> SVDQExperts | None:
    """The packed experts that are being loaded; None: they stay dense."""
    path = kwargs["full_layer_name"].rpartition(".")[0]
    module = kwargs["model"].get_submodule(path)
    return module if isinstance(module, SVDQExperts) else None


class MergeExperts(ConversionOps):  # type: ignore[misc]  # transformers ships no types
    """Replacement of transformers' stacking of experts: gives `Pieces` for packed experts.

    Args:
        operations: transformers' operations, used for experts that stay dense.
    """

    def __init__(self, operations: list[ConversionOps]) -> None:
        self.operations = operations

    def convert(
        self,
        input_dict: dict[str, Any],
        source_patterns: list[str],
        target_patterns: list[str],
        **kwargs: Any,
    ) -> dict[str, Any]:
        """Collect the tensors of all experts.

        Args:
            input_dict: by source pattern, tensors `[rows, in]` of all experts; emptied.
            source_patterns: of the converter.
            target_patterns: of the converter.
            **kwargs: further arguments that transformers passes.

        Returns:
            By target pattern, `Pieces` for packed experts, otherwise the result of the operations.
        """
        sources = [input_dict[source] for source in source_patterns if source in input_dict]
        if _experts(kwargs) is not None and len(target_patterns) == 1 and fit_together(sources):
            input_dict.clear()  # that the pieces be the only ones
            return {target_patterns[0]: Pieces(sources)}
        for op in self.operations:  # they stay dense; or it is an error, which is transformers' to tell
            input_dict = op.convert(
                input_dict, source_patterns=source_patterns, target_patterns=target_patterns, **kwargs
            )
        return input_dict


class TransposeExperts(Transpose):  # type: ignore[misc]
    """`Transpose(check_dims=True)` that compares with the dense shape of packed experts."""

    def __init__(self, op: Transpose) -> None:
        super().__init__(op.dim0, op.dim1, check_dims=True)

    def convert(
        self,
        input_dict: dict[str, Any],
        source_patterns: list[str],
        target_patterns: list[str],
        **kwargs: Any,
    ) -> dict[str, Tensor]:
        """Transpose a tensor where its shape is not that of the dense parameter.

        Args:
            input_dict: by source pattern, one tensor `[experts, out, in]` or `[experts, in, out]`.
            source_patterns: of the converter.
            target_patterns: of the converter.
            **kwargs: further arguments that transformers passes.

        Returns:
            By target pattern, the tensor as the dense parameter has it.
        """
        experts = _experts(kwargs)
        if experts is None:
            return super().convert(input_dict, source_patterns, target_patterns, **kwargs)  # type: ignore[no-any-return]
        value = next(iter(input_dict.values()))
        tensor = value[0] if isinstance(value, list) else value
        if tuple(tensor.shape) != experts.dense_shape(kwargs["full_layer_name"].rpartition(".")[2]):
            tensor = tensor.transpose(self.dim0, self.dim1)  # each expert becomes contiguous by itself
        return {self.get_target_pattern(input_dict, source_patterns, target_patterns): tensor}
