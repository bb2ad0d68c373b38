"""Linear method of the vLLM plugin: loads a device's share of a quantized layer, and computes it.

vLLM's layers are several of the checkpoint's (q, k and v; gate and up) and a device's share of each. Every
tensor is kept as it comes from the file until a layer's parts are complete; then its share is cut out
(`format.slices`), and after loading the shares are joined. Imported by vLLM only. Not here: which layers
have it (`integrations.vllm.quantization_config`), heads and embeddings (`integrations.vllm.vocabulary`).
"""

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from vllm.model_executor.layers.linear import LinearMethodBase

from svdq_hf.format.checks import check_parts
from svdq_hf.format.parts import Scheme, part_specs
from svdq_hf.format.slices import StoredMatrix, slice_columns, slice_rows, stack_where_possible
from svdq_hf.integrations.vllm.layers import layers_of, linear_of

FusedPart = int | str | tuple[int, ...] | None
"""The fused layer's matrix that a tensor belongs to; a tuple: several in a row; None: all."""

_QKV = {"q": 0, "k": 1, "v": 2}


class SVDQLinearMethod(LinearMethodBase):  # type: ignore[misc]  # vLLM is not installed where mypy runs
    """Loads a device's share of a layer, and computes it with the op."""

    def __init__(self, scheme: Scheme) -> None:
        self.scheme = scheme

    def create_weights(
        self,
        layer: Any,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        """Register a name for each stored tensor: empty, since a share's size is known with its content."""
        layer.svdq_widths = (input_size_per_partition, input_size)
        layer.svdq_heights = output_partition_sizes
        layer.svdq_devices = output_size // sum(output_partition_sizes)  # that share the rows
        layer.svdq_shards = {}
        for name, spec in part_specs(sum(output_partition_sizes), input_size, self.scheme).items():
            place = nn.Parameter(torch.empty(0, dtype=spec.dtype), requires_grad=False)
            place.weight_loader = partial(self._take, layer, name)  # type: ignore[attr-defined]
            layer.register_parameter(name, place)

    def _take(
        self, layer: Any, part: str, place: nn.Parameter, loaded: Tensor, shard: FusedPart = None
    ) -> None:
        """Called by vLLM with each tensor of the file."""
        parts = layer.svdq_shards.setdefault(shard, {})
        parts[part] = loaded
        whole, total = layer.svdq_widths[1], len(part_specs(1, 1, self.scheme))
        if len(parts) == total:
            stored = StoredMatrix(parts, whole, self.scheme.grid)
            try:
                check_parts(parts, whole, stored.scheme)  # k may be the layer's own
            except ValueError as error:
                raise ValueError(f"{layer.prefix} ({shard}): {error}") from error
            layer.svdq_shards[shard] = self._share(layer, shard, stored)

    def _share(self, layer: Any, shard: FusedPart, stored: StoredMatrix) -> StoredMatrix:
        """A device's rows and columns of a matrix of the checkpoint."""
        width, whole = layer.svdq_widths
        if width != whole:
            stored = slice_columns(stored, layer.tp_rank * width, (layer.tp_rank + 1) * width)
        rows = rows_of_rank(layer, shard, stored.out_features)
        return stored if len(rows) == stored.out_features else slice_rows(stored, rows)

    def process_weights_after_loading(self, layer: Any) -> None:
        """Join the shares, and put them on the device of the layer.

        Raises:
            ValueError: a tensor is missing.
        """
        places = {shard: _places(layer, shard) for shard in layer.svdq_shards}
        order = sorted(places, key=places.__getitem__)
        pieces = [layer.svdq_shards[shard] for shard in order]
        came = [
            place
            for shard in order
            if isinstance(layer.svdq_shards[shard], StoredMatrix)
            for place in places[shard]
        ]
        if came != list(range(len(layer.svdq_heights))):
            raise ValueError(
                f"{layer.prefix} joins {len(layer.svdq_heights)} matrices, and the checkpoint has, with "
                f"all their tensors, {came}"
            )
        device = layer.weight.device
        for name in part_specs(1, 1, self.scheme):
            delattr(layer, name)
        layer.svdq_layers = layers_of(stack_where_possible(pieces)).to(device)
        layer.weight_packed = layer.svdq_layers[0].weight.detach()  # where adapters look for the device
        layer.svdq_shards = {}

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """`x @ W.T + bias` of the device's share.

        Args:
            layer: vLLM's layer.
            x: `[..., in]`.
            bias: `[out]`, or None.

        Returns:
            `[..., out]`.
        """
        return linear_of(layer.svdq_layers, x, bias)


def rows_of_rank(layer: Any, shard: FusedPart, total: int) -> Tensor:
    """The rows of a checkpoint's matrix that a device keeps.

    Args:
        layer: vLLM's layer.
        shard: which of the layer's matrices.
        total: rows of the matrix.

    Returns:
        Their numbers, `[rows]`, int64.

    Raises:
        ValueError: the matrix has another height than the layer.
    """
    heights = layer.svdq_heights
    replicas = [1] * len(heights)
    if len(heights) == 3 and hasattr(layer, "num_kv_head_replicas"):
        replicas[1:] = [layer.num_kv_head_replicas] * 2
    divided = layer.svdq_devices > 1
    rows, start = [], 0
    for one in _places(layer, shard):
        first = start + (layer.tp_rank // replicas[one] * heights[one] if divided else 0)
        rows.append(torch.arange(first, first + heights[one]))
        start += heights[one] * (layer.svdq_devices // replicas[one] if divided else 1)
    if start != total:
        raise ValueError(f"{layer.prefix} ({shard}): {total} rows, where the model's config says {start}")
    return torch.cat(rows)


def _places(layer: Any, shard: FusedPart) -> list[int]:
    """Positions, among the matrices that a layer joins, of those that a tensor belongs to."""
    if shard is None:
        return list(range(len(layer.svdq_heights)))
    if isinstance(shard, str):
        if shard not in _QKV:
            raise ValueError(f"{layer.prefix}: its part {shard!r} is none of {list(_QKV)}, which svdq serves")
        return [_QKV[shard]]
    return list(shard) if isinstance(shard, tuple) else [shard]
