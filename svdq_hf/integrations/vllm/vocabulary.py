"""Method of the vLLM plugin for output heads and embeddings, of which each device keeps a share of the rows.

Not all of vLLM's models say a head's or an embedding's name, so what comes from the files decides: packed
parts; a dense weight, which is left to vLLM's own method; or nothing. Nothing comes for an embedding that is
one matrix with the head, since files have that once, under the head's name: it then reads the head's rows.
Imported by vLLM only. Not here: linear layers (`integrations.vllm.linear_method`).
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, UnquantizedEmbeddingMethod

from svdq_hf.format.parts import Scheme, part_specs
from svdq_hf.format.slices import StoredMatrix, slice_rows
from svdq_hf.integrations.vllm.linear_method import FusedPart, SVDQLinearMethod
from svdq_hf.kernels import embedding_op as _embedding_op  # noqa: F401  # defines torch.ops.svdq.embedding


class SVDQVocabularyMethod(SVDQLinearMethod):
    """Loads a device's rows of a head or an embedding; computes logits, and looks rows up.

    Args:
        scheme: how the matrix is stored.
        heads: the model's output heads; this method adds a layer that is one.
    """

    def __init__(self, scheme: Scheme, heads: list[nn.Module]) -> None:
        super().__init__(scheme)
        self.heads = heads

    def create_weights(self, layer: Any, *sizes: Any, **attributes: Any) -> None:
        """Register a name for each stored tensor, as for a linear layer."""
        super().create_weights(layer, *sizes, **attributes)
        layer.svdq_dense = None
        if isinstance(layer, ParallelLMHead):
            self.heads.append(layer)

    def _take(
        self, layer: Any, part: str, place: nn.Parameter, loaded: Tensor, shard: FusedPart = None
    ) -> None:
        if part != "weight" or not loaded.is_floating_point():
            return super()._take(layer, part, place, loaded, shard)
        mine = loaded[_rows_of_device(layer, loaded.shape[0])]
        padded = mine.new_zeros(layer.num_embeddings_per_partition, mine.shape[1], dtype=layer.params_dtype)
        padded[: mine.shape[0]] = mine
        layer.svdq_dense = padded

    def _share(self, layer: Any, shard: FusedPart, stored: StoredMatrix) -> StoredMatrix:
        rows = _rows_of_device(layer, stored.out_features)
        return stored if len(rows) == stored.out_features else slice_rows(stored, rows)

    def process_weights_after_loading(self, layer: Any) -> None:
        """Decide, by what has come, how the layer is computed.

        Raises:
            ValueError: a tensor is missing; or nothing has come for an embedding, and there is no head in
                this process.
        """
        device = layer.weight.device
        if layer.svdq_shards:
            super().process_weights_after_loading(layer)
        else:
            for name in part_specs(1, 1, self.scheme):
                delattr(layer, name)
            if layer.svdq_dense is not None:
                return _leave_to_vllm(layer, device)
            self._check_there_is_a_head(layer)
        layer.weight = torch.empty(0, dtype=layer.params_dtype, device=device)  # adapters look at these

    def _check_there_is_a_head(self, layer: Any) -> None:
        if len(self.heads) != 1 or self.heads[0] is layer:
            raise ValueError(
                f"{layer.prefix or type(layer).__name__}: the files have no weight for it, and this process "
                f"{len(self.heads)} output heads whose rows it could read; serve without pipeline parallelism"
            )

    def tie_weights(self, layer: Any, embed_tokens: nn.Module) -> nn.Module:
        """The embedding itself in place of a head for which the files have no tensors.

        Args:
            layer: the head.
            embed_tokens: the embedding that is the same matrix.
        """
        self.heads.remove(layer)
        return embed_tokens

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """The logits of the device's tokens.

        Args:
            layer: vLLM's layer.
            x: `[..., in]`.
            bias: `[padded]`, or None.

        Returns:
            `[..., padded]`: those of the tokens, and zeros where vLLM pads the vocabulary.
        """
        logits = super().apply(layer, x)
        missing = layer.num_embeddings_per_partition - logits.shape[-1]
        if missing:
            logits = functional.pad(logits, (0, missing))
        return logits if bias is None else logits + bias.to(logits.dtype)

    def embedding(self, layer: Any, ids: Tensor) -> Tensor:
        """The rows of tokens, the layer's own or the head's.

        Args:
            layer: vLLM's layer.
            ids: `[...]`, counted from the device's first token.

        Returns:
            `[..., in]`, of the model's dtype.
        """
        source: Any = layer if hasattr(layer, "svdq_layers") else self.heads[0]
        [matrix] = source.svdq_layers
        stored, _ = matrix.stored_and_bias()
        rows: Tensor = torch.ops.svdq.embedding(
            ids, *stored, matrix.in_features, matrix.group, layer.params_dtype
        )
        return rows


def _leave_to_vllm(layer: Any, device: torch.device) -> None:
    """Make a layer for which a dense weight has come one of vLLM's own."""
    layer.weight = nn.Parameter(layer.svdq_dense.to(device), requires_grad=False)
    layer.svdq_dense, layer.quant_method = None, UnquantizedEmbeddingMethod()
    layer.quant_method.process_weights_after_loading(layer)


def _rows_of_device(layer: Any, total: int) -> Tensor:
    """The rows, of a matrix of `total`, that belong to the device's tokens; `[rows]`, int64."""
    if total != layer.org_vocab_size:
        raise ValueError(
            f"{layer.prefix or type(layer).__name__}: {total} rows, where the model's config says "
            f"{layer.org_vocab_size}"
        )
    mine = layer.shard_indices
    return torch.arange(mine.org_vocab_start_index, mine.org_vocab_end_index)
