"""Load: one model being loaded from files, from the creation of its modules to the last tensor.

The common part of a quantized checkpoint (`integrations.transformers.load_packed`) and a dense one
(`integrations.transformers.load_dense`). A load is created when transformers is about to read weights, and
holds what must be known until the last of them is there. Not here: transformers' hooks
(`integrations.transformers.quantizer`).
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from svdq_hf.config import SVDQConfig
from svdq_hf.format.metadata import numbers, tags
from svdq_hf.format.names import WeightName
from svdq_hf.integrations.transformers.checkpoint_headers import Checkpoint, read_checkpoint
from svdq_hf.integrations.transformers.file_names import config_in_files, keep_own_names
from svdq_hf.integrations.transformers.load_checks import check_filled
from svdq_hf.integrations.transformers.quantize_op import SVDQQuantize
from svdq_hf.nn.inventory import packed_weights, svdq_experts, svdq_layers
from svdq_hf.quantize.embedding import input_table
from svdq_hf.quantize.selection import linear_layers, weights_of


class Load(ABC):
    """One model that is being loaded: `prepare`, then for each tensor `wants`, then `finish`.

    Args:
        saved: the config that the model will have, with `layer_k` by names in files.
        files: paths of the checkpoint's files; none where a state dict is loaded.
    """

    remedy: str
    """End of the error for a layer that the files do not fill."""

    def __init__(self, saved: SVDQConfig, files: Iterable[str | Path]) -> None:
        self.saved = saved
        self.config = saved
        """`saved` with `layer_k` by the model's names."""
        self.files = list(files)
        self.packed: list[WeightName] = []
        """The packed weights of the model."""

    @abstractmethod
    def prepare(self, model: PreTrainedModel) -> None:
        """Put empty quantized modules into a model on the meta device.

        Raises:
            ValueError: files, config and model do not fit together; it names the layer.
        """

    @abstractmethod
    def conversions(self, conversions: list[Any]) -> list[Any]:
        """The family's weight conversions, adapted to packed weights."""

    @abstractmethod
    def wants(self, model: PreTrainedModel, name: str) -> bool:
        """Whether a tensor of the files is to be quantized.

        Args:
            model: the model.
            name: of the tensor in the model.
        """

    @abstractmethod
    def operation(self) -> SVDQQuantize:
        """The load-time conversion from dense tensors to stored parts."""

    @abstractmethod
    def finish(self, model: PreTrainedModel) -> SVDQConfig:
        """Check what was loaded, and quantize what is left.

        Args:
            model: the loaded model.

        Returns:
            The config that the model is saved with.

        Raises:
            ValueError: a layer was not filled, or could not be quantized; it is named.
        """

    def check(self, model: PreTrainedModel) -> None:
        """Refuse layers that the files did not fill.

        Raises:
            ValueError: it names the layer.
        """
        check_filled(model, self.remedy)
        for _, layer in svdq_layers(model):
            if layer.salient_values.numel() == 0 and layer.salient_values.requires_grad:
                layer.salient_values.requires_grad_(False)  # nothing to train, and FSDP stumbles over it

    def read(self, model: PreTrainedModel) -> tuple[Checkpoint, dict[str, nn.Module]]:
        """The headers of the files, and the model's modules that may be packed, by name."""
        layers = linear_layers(model) | input_table(model, self.saved)
        known = [stored for name, layer in layers.items() for stored in weights_of(name, layer)]
        return read_checkpoint(model, known, self.files), layers

    def note_packed(self, model: PreTrainedModel, checkpoint: Checkpoint) -> None:
        """Record the packed weights of a model, and give its layers the facts in the headers."""
        for stored, parts, facts in packed_weights(model):
            self.packed.append(stored)
            facts.update(numbers(checkpoint.facts.get(stored.name, {})))
            for tensor in parts.values():
                # A family's own initialisation may reach for weights by name, and not know packed ones.
                tensor._is_hf_initialized = True  # type: ignore[attr-defined]


def declare(model: PreTrainedModel, config: SVDQConfig) -> SVDQConfig:
    """Prepare a quantized model for saving: names in files, tags.

    Args:
        model: changed in place.
        config: its config.

    Returns:
        The config that it is saved with.
    """
    if any(svdq_experts(model)):
        config = config.with_experts()
    keep_own_names(model)
    model.add_model_tags(tags(config.bits))  # for the card that push_to_hub writes
    return config_in_files(model, config)
