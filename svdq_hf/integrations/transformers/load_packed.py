"""PackedLoad: a quantized checkpoint, loaded as it is, and refused where it contradicts its config.json.

The files decide which modules are packed. For the output head and the input embedding config.json
says so too, and the two must agree. Not here: a dense checkpoint (`integrations.transformers.load_dense`).
"""

from typing import Any

from torch import nn
from transformers import PreTrainedModel

from svdq_hf.config import SVDQConfig
from svdq_hf.integrations.transformers.checkpoint_headers import REMEDY, Checkpoint
from svdq_hf.integrations.transformers.file_names import layer_k_by_model_name, unconverted
from svdq_hf.integrations.transformers.header_checks import check_none_missing, stored_layers
from svdq_hf.integrations.transformers.load import Load, declare
from svdq_hf.integrations.transformers.load_checks import check_values
from svdq_hf.integrations.transformers.load_progress import LoadProgress
from svdq_hf.integrations.transformers.quantize_op import SVDQQuantize
from svdq_hf.nn.inventory import svdq_experts, svdq_layers
from svdq_hf.quantize.convert import check_layer_inputs, replace_layers
from svdq_hf.quantize.embedding import (
    Embedding,
    find_embedding,
    input_embedding,
    input_table,
    put_empty_embedding,
    reads_head,
)
from svdq_hf.quantize.head import Head, find_head, put_head
from svdq_hf.quantize.layer import empty_layer
from svdq_hf.quantize.selection import layers_to_convert


class PackedLoad(Load):
    """A quantized checkpoint that is being loaded."""

    remedy = REMEDY

    @staticmethod
    def check_environment(config: SVDQConfig, device_map: Any) -> None:
        """Nothing is refused: packed tensors may be on any device, also offloaded to disk."""

    def prepare(self, model: PreTrainedModel) -> None:
        """See `Load.prepare`."""
        checkpoint, layers = self.read(model)
        self.config = layer_k_by_model_name(checkpoint, self.saved)
        if checkpoint.entries:  # what a file holds is not for names to decide
            chosen = stored_layers(checkpoint, layers, self.config)
            check_none_missing(model, checkpoint, layers, self.config)
        else:
            chosen = layers_to_convert(model, self.config)
            check_layer_inputs(chosen, self.config)
        head = stored_head(model, checkpoint, self.config)
        table = stored_embedding(model, checkpoint, self.config, head)
        if head is not None:
            put_head(model, head, empty_layer(head.module, self.config.of_layer(head.name)))
        if table is not None:
            put_empty_embedding(model, table, self.config)
        ends = {one.name for one in (head, table) if one is not None}
        rest = {name: module for name, module in chosen.items() if name not in ends}
        replace_layers(model, rest, self.config)
        self.note_packed(model, checkpoint)

    def conversions(self, conversions: list[Any]) -> list[Any]:
        """The family's conversions without those that make experts: packed ones are loaded as they are."""
        return unconverted(conversions, self.packed)

    def wants(self, model: PreTrainedModel, name: str) -> bool:
        """False: every tensor is quantized or stays dense."""
        return False

    def operation(self) -> SVDQQuantize:
        """A conversion that is never used."""
        return SVDQQuantize(self.config, [], LoadProgress(0))

    def finish(self, model: PreTrainedModel) -> SVDQConfig:
        """Check the values as well, since the files may come from anybody.

        Args:
            model: the loaded model.

        Returns:
            The config that the model is saved with.

        Raises:
            ValueError: a layer was not filled, or its values are invalid; it is named.
        """
        self.check(model)
        _align(model)
        check_values(model)
        return declare(model, self.saved)


def _align(model: nn.Module) -> None:
    """Move tensors that do not start at a multiple of their dtype's size, which the CPU kernels refuse.

    Tensors lie in memory as they do in the file, and some writers do not pad its header.
    """
    for _, module in (*svdq_layers(model), *svdq_experts(model)):
        for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False)):
            if not tensor.is_meta and tensor.data_ptr() % tensor.element_size():
                tensor.data = tensor.data.clone()


def stored_head(model: PreTrainedModel, checkpoint: Checkpoint, config: SVDQConfig) -> Head | None:
    """The output head of a quantized checkpoint; None where it is dense.

    Args:
        model: the model, on the meta device.
        checkpoint: headers of the files.
        config: of the files.

    Raises:
        ValueError: the config and the files disagree, or the model has no place for a packed head.
    """
    output = getattr(model, "get_output_embeddings", lambda: None)()
    if not config.lm_head:
        _refuse_packed(model, checkpoint, output, "lm_head")
        return None
    if not checkpoint.entries:
        raise ValueError("a model of which lm_head is quantized loads from a folder, not from a state dict")
    embedding = model.get_input_embeddings()
    names = [name for name, module in model.named_modules() if module is embedding]
    if output is None and any(f"{name}.weight" in checkpoint.entries for name in names):
        return None  # loaded for something else, with an embedding of its own
    head = find_head(model, checkpoint.entries)
    if not _is_packed(checkpoint, head.name):
        raise ValueError(f"config.json says lm_head: true, the files hold {head.name} dense. {REMEDY}")
    return head


def stored_embedding(
    model: PreTrainedModel, checkpoint: Checkpoint, config: SVDQConfig, head: Head | None
) -> Embedding | None:
    """The input embedding of a quantized checkpoint that is packed by itself; None where it is not.

    Args:
        model: the model, on the meta device.
        checkpoint: headers of the files.
        config: of the files.
        head: the packed output head, if there is one.

    Raises:
        ValueError: the config says that it is dense, and the files hold it packed.
    """
    if not config.embeddings:
        _refuse_packed(model, checkpoint, input_embedding(model), "embeddings")
        return None
    packed = list(input_table(model, config))
    if checkpoint.entries:  # what a file holds is not for names to decide
        packed = [name for name in packed if _is_packed(checkpoint, name)]
    elif reads_head(model, head):
        packed = []
    return find_embedding(model, checkpoint.entries) if packed else None


def _is_packed(checkpoint: Checkpoint, name: str) -> bool:
    return f"{name}.salient_rows" in checkpoint.entries


def _refuse_packed(
    model: PreTrainedModel, checkpoint: Checkpoint, module: nn.Module | None, choice: str
) -> None:
    for name, one in model.named_modules():
        if one is module and _is_packed(checkpoint, name):
            raise ValueError(f"config.json says {choice}: false, the files hold {name} packed. {REMEDY}")
