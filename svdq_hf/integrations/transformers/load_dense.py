"""DenseLoad: a dense checkpoint, quantized while it is loaded, tensor by tensor.

The linear layers and experts become packed as they come out of the file; the output head and the input
embedding, which may be one matrix, are loaded dense and quantized at the end. Not here: the conversion of one
tensor (`integrations.transformers.quantize_op`), a quantized checkpoint
(`integrations.transformers.load_packed`).
"""

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from svdq_hf.config import SVDQConfig
from svdq_hf.integrations.transformers.checkpoint_headers import Checkpoint, stored_weights
from svdq_hf.integrations.transformers.expert_conversions import without_stacking
from svdq_hf.integrations.transformers.file_names import unconverted
from svdq_hf.integrations.transformers.header_checks import check_dense, check_source
from svdq_hf.integrations.transformers.inference_mode import make_trainable, trainable_tensors
from svdq_hf.integrations.transformers.load import Load, declare
from svdq_hf.integrations.transformers.load_progress import LoadProgress, tell
from svdq_hf.integrations.transformers.patches import load_exactly
from svdq_hf.integrations.transformers.quantize_op import SVDQQuantize, module_of
from svdq_hf.nn.embedding import SVDQEmbedding, TiedEmbedding
from svdq_hf.nn.expert_layouts import layout_of, stacks_of
from svdq_hf.quantize.budget import spend
from svdq_hf.quantize.convert import check_layer_k, is_spread, replace_layers
from svdq_hf.quantize.embedding import Embedding, chosen_embedding, find_embedding, quantize_embedding
from svdq_hf.quantize.head import Head, chosen_head, dense_names, quantize_head, tied_now
from svdq_hf.quantize.selection import layers_to_convert


class DenseLoad(Load):
    """A dense checkpoint that is being quantized while it is loaded."""

    remedy = (
        "The checkpoint is damaged or does not fit its config.json; where a layer is to start anew, "
        "modules_to_not_convert keeps it dense"
    )

    def __init__(self, saved: SVDQConfig, files: Iterable[str | Path]) -> None:
        super().__init__(saved, files)
        self.head: Head | None = None
        self.table: Embedding | None = None
        self.partners: set[str] = set()
        """Names of tensors that come out of the same tensor of a file as a weight to quantize."""
        self.failures: list[ValueError] = []
        """Errors of layers, raised by `finish`; raised earlier, each would be a mere line in a log."""
        self.progress: LoadProgress | None = None
        self.undo: Callable[[], None] = lambda: None
        """Undoes `load_exactly`."""

    @staticmethod
    def check_environment(config: SVDQConfig, device_map: Any) -> None:
        """Refuse configs and device maps with which a model cannot be quantized while it is loaded.

        Args:
            config: how it is quantized.
            device_map: as given to `from_pretrained`.

        Raises:
            ValueError: the config needs data, or modules are offloaded to disk.
        """
        if config.data_needs:
            raise config.no_data()
        if config.activations is not None:
            raise ValueError(
                f"activations={config.activations} rotates the whole model, which is not done while it is "
                "loaded: load it dense, then quantize_model(model, config), or `svdq quantize`"
            )
        devices = device_map if isinstance(device_map, dict) else {}
        places = [name for name, device in devices.items() if device == "disk"]
        if places:
            raise ValueError(
                f"device_map puts {places} on disk, which cannot be quantized while loading: load and "
                "save_pretrained() the quantized model first, then load that with this device_map"
            )

    def prepare(self, model: PreTrainedModel) -> None:
        """See `Load.prepare`."""
        checkpoint, _ = self.read(model)
        chosen = layers_to_convert(model, self.config)
        if checkpoint.entries:
            check_dense(checkpoint, chosen)
        self.head = chosen_head(model, self.config) if self.config.lm_head else None
        self.table = chosen_embedding(model, self.config, self.head)
        dense = {name: dense_names(model, name) for name in self._ends()}
        if checkpoint.entries:
            for name, choice in self._ends().items():
                check_source(checkpoint, name, dense[name], choice)
        self.config = self._planned(model, checkpoint, chosen)
        ends = {one.name: one.module for one in (self.head, self.table) if one is not None}
        exact = loaded_exactly({**chosen, **ends}, dense, checkpoint)
        replace_layers(model, chosen, self.config)
        self.note_packed(model, checkpoint)
        weights = {stored.key("weight") for stored in self.packed}
        self.partners = {name for group in checkpoint.partners if weights & set(group) for name in group}
        self.undo = load_exactly(model, weights, weights.union(*dense.values()) - exact)

    def _ends(self) -> dict[str, str]:
        """The config key that selects the head, and the embedding, by the module's name."""
        pairs = ((self.head, "lm_head"), (self.table, "embeddings"))
        return {one.name: choice for one, choice in pairs if one is not None}

    def _planned(
        self, model: PreTrainedModel, checkpoint: Checkpoint, chosen: Mapping[str, nn.Module]
    ) -> SVDQConfig:
        """The config with its budget spent."""
        modules = {name: module for name, module in chosen.items() if layout_of(module) is None}
        modules |= {one.name: one.module for one in (self.head, self.table) if one is not None}
        check_layer_k(modules, self.config)
        return spend(stored_weights(model, modules, checkpoint, self.config), self.config, {})

    def conversions(self, conversions: list[Any]) -> list[Any]:
        """The family's conversions, with experts one by one where the files have them so."""
        plain = unconverted(conversions, self.packed)
        return [c if c in plain else without_stacking(c) for c in conversions]

    def wants(self, model: PreTrainedModel, name: str) -> bool:
        """Whether a tensor is a weight to quantize, or comes out of the same tensor of the files as one."""
        return module_of(model, name) is not None or name in self.partners

    def operation(self) -> SVDQQuantize:
        """See `Load.operation`."""
        if self.progress is None:
            self.progress = LoadProgress(len(self.packed))
        return SVDQQuantize(self.config, self.failures, self.progress)

    def finish(self, model: PreTrainedModel) -> SVDQConfig:
        """Quantize head and embedding as well. The codes were just made, so their values are not checked.

        Args:
            model: the loaded model.

        Returns:
            The config that the model is saved with.

        Raises:
            ValueError: a layer could not be quantized or was not filled; it is named.
        """
        self.undo()
        if self.progress is not None:
            self.progress.close()
        if self.failures:
            raise ValueError(str(self.failures[0])) from self.failures[0]
        self.check(model)
        make_trainable(model)
        with trainable_tensors():
            self._quantize_ends(model)
        tell(model, self.files)
        return declare(model, self.saved.replace(layer_k=self.config.layer_k))

    def _quantize_ends(self, model: PreTrainedModel) -> None:
        """Quantize the head and the input embedding, which are loaded dense.

        Which modules share them is known only now: transformers unties tensors that the files hold twice with
        different values.
        """
        if self.head is not None:
            self.head = tied_now(model, self.head)
        if self.table is not None:
            self.table = find_embedding(model)
        else:
            self.table = chosen_embedding(model, self.config, self.head)
        if not self._ends():
            return
        if is_spread(model):
            choice = next(iter(self._ends().values()))
            raise ValueError(
                f"{choice}=True needs the model on one device while it is quantized: load it without "
                "device_map, save_pretrained() it, and load that with one"
            )
        if self.head is not None:
            quantize_head(model, self.head, self.config)
        if self.table is not None:
            quantize_embedding(model, self.table, self.config)
        for module in model.modules():
            reader = module.reader if isinstance(module, SVDQEmbedding) else module
            if isinstance(reader, TiedEmbedding):
                reader.dtype = model.config.dtype


def loaded_exactly(
    chosen: Mapping[str, nn.Module], dense: Mapping[str, list[str]], checkpoint: Checkpoint
) -> set[str]:
    """Names of weights that need not be forced to FP32 while loading.

    Salient weights must be the checkpoint's own values, so weights are normally loaded in FP32. Where
    checkpoint and model have the same dtype no rounding happens, and an FP32 copy of a head or of all experts
    is avoided.

    Args:
        chosen: the modules to quantize, by name.
        dense: for each of them that may be tied, names in the checkpoint under which its weight may be.
        checkpoint: headers of the files.

    Returns:
        Names of tensors in the model.
    """
    exact: set[str] = set()
    for name, module in chosen.items():
        if layout_of(module) is None:
            weights = {f"{name}.weight": (dense.get(name, [f"{name}.weight"]), module.weight.dtype)}
        else:
            found = (stored.key("weight") for stored in stacks_of(name, module))
            weights = {key: ([key], getattr(module, key.rpartition(".")[2]).dtype) for key in found}
        for names, dtype in weights.values():
            entries = [checkpoint.entries[one] for one in names if one in checkpoint.entries]
            if entries and all(entry.dtype == dtype for entry in entries):
                exact.update(names)
    return exact
