"""Mapping of a streamed run: which tensors of the input files each output is made of.

Not here: the order and size of the files that are written (`checkpoint.streaming.plan`).
"""

from collections.abc import Mapping
from dataclasses import replace

from torch import Tensor
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion
from transformers.modeling_utils import remove_tied_weights_from_state_dict

from svdq_hf.checkpoint.streaming.byte_ranges import DTYPE_NAMES, Place
from svdq_hf.checkpoint.streaming.unit import Unit, Unstreamable, expert_places
from svdq_hf.format.names import WeightName
from svdq_hf.format.parts import PartSpec
from svdq_hf.integrations.transformers.checkpoint_headers import Checkpoint
from svdq_hf.nn.embedding import TiedEmbedding
from svdq_hf.nn.inventory import packed_weights, svdq_experts, svdq_layers


class _Mapping:
    """A planned model and its input files; lookups are prepared once for all tensors."""

    def __init__(self, model: PreTrainedModel, checkpoint: Checkpoint, places: Mapping[str, Place]) -> None:
        self.model, self.checkpoint, self.places = model, checkpoint, places
        self.layers = dict(svdq_layers(model))
        self.experts = dict(svdq_experts(model))
        self.readers = head_readers(model)
        self.state: dict[str, Tensor] = model.state_dict(keep_vars=True)
        self.aliases = self._aliases()

    def _aliases(self) -> dict[str, list[str]]:
        """All names of each tensor: its ties, and for a head's weight the embeddings that read it."""
        same: dict[int, list[str]] = {}
        for name, tensor in self.state.items():
            same.setdefault(id(tensor), []).append(name)
        found = {name: list(same[id(tensor)]) for name, tensor in self.state.items()}
        for reader, head in self.readers.items():
            found.setdefault(f"{head}.weight", []).append(f"{reader}.weight")
        return found

    def unit_of(self, weight: WeightName) -> Unit:
        """The unit of a quantized weight, or of all experts of a layer; its outputs are added later."""
        if len(weight.shape) == 3:
            transposed = self.experts[weight.name.rpartition(".")[0]].layout.transposed
            found, turned = expert_places(weight, self.checkpoint, self.places, transposed=transposed)
            return Unit(found, {}, weight, transposed=transposed, turned=turned)
        place = self.whole(weight.key("weight"))
        return Unit((place,), {}, weight, transposed=self.layers[weight.name].transposed)

    def layer_of_bias(self, name: str) -> str:
        """The quantized layer, or experts, of which a tensor is a bias; empty: of none."""
        layer, _, own = name.rpartition(".")
        packed = layer in self.layers or layer in self.experts
        return layer if packed and own.endswith("bias") else ""

    def whole(self, name: str) -> Place:
        """Where the one tensor of the files is that becomes `name` in the model."""
        entries = self.checkpoint.entries
        known = (
            name if name in entries else next((o for o in self.aliases.get(name, ()) if o in entries), name)
        )
        entry = entries.get(known)
        if entry is None or not entry.whole:
            why = "which the files do not hold" if entry is None else "made of a tensor that is joined or cut"
            raise Unstreamable(f"it has {name}, {why}")
        return self.places[entry.name]

    def check_sources(self) -> None:
        """Refuse two tensors that become one, ties to compare, and unknown dtypes."""
        known = {*self.state, *(f"{name}.weight" for name in self.readers)}
        known -= {stored.name for stored, _, _ in packed_weights(self.model) if len(stored.shape) == 3}
        for name, entries in self.checkpoint.sources.items():
            if len(entries) > 1 and name in known:
                one = entries[0].name
                raise Unstreamable(f"several tensors of its files become one of the model ({one} is one)")
        for one, other in (self.model.all_tied_weights_keys or {}).items():
            if one in self.checkpoint.entries and other in self.checkpoint.entries:
                raise Unstreamable(f"{one} and {other} are tied and both in the files: they must be compared")
        for place in self.places.values():
            if place.dtype not in DTYPE_NAMES.values():
                raise Unstreamable(f"{place.name} is {place.dtype}")


def make_units(model: PreTrainedModel, checkpoint: Checkpoint, places: Mapping[str, Place]) -> list[Unit]:
    """The units to make, in the order of the model.

    Args:
        model: the quantized model on the meta device.
        checkpoint: headers of the input files by the model's names.
        places: of the input tensors, by their names in files.

    Raises:
        Unstreamable: a tensor that would be saved is not made of one tensor of the files.
    """
    mapping = _Mapping(model, checkpoint, places)
    mapping.check_sources()
    parts = {weight.key(part): (weight, part) for weight, found, _ in packed_weights(model) for part in found}
    units: dict[str, Unit] = {}
    for stored, name in saved_tensors(model).items():
        spec = PartSpec(tuple(mapping.state[name].shape), mapping.state[name].dtype)
        if name in parts:
            weight, part = parts[name]
            unit = units.get(weight.name) or mapping.unit_of(weight)
            outputs = {**unit.outputs, stored: spec}
            units[weight.name] = replace(unit, outputs=outputs, parts=(*unit.parts, part))
            continue
        place = mapping.whole(name)
        if spec.shape != place.shape:
            raise Unstreamable(f"{name} is {list(spec.shape)}, and {list(place.shape)} in the files")
        units[name] = Unit((place,), {stored: spec}, bias_of=mapping.layer_of_bias(name))
    return list(units.values())


def saved_tensors(model: PreTrainedModel) -> dict[str, str]:
    """The tensors that `save_pretrained` writes, tied ones once.

    Args:
        model: the quantized model on the meta device.

    Returns:
        Name in the model by name in files.

    Raises:
        Unstreamable: saving would join tensors, or the model's class overrides `save_pretrained`.
    """
    if type(model).save_pretrained is not PreTrainedModel.save_pretrained:
        raise Unstreamable(f"{type(model).__name__} has a save_pretrained of its own")
    state = model.state_dict()
    for name in model._keys_to_ignore_on_save or ():
        state.pop(name, None)
    state = remove_tied_weights_from_state_dict(state, model)
    names = {id(tensor): name for name, tensor in state.items()}
    stored = revert_weight_conversion(model, state)
    joined = [name for name, tensor in stored.items() if id(tensor) not in names]
    if joined or len(stored) != len(state):
        raise Unstreamable(f"its files join or cut tensors ({joined[0] if joined else 'one is gone'})")
    return {name: names[id(tensor)] for name, tensor in stored.items()}


def head_readers(model: PreTrainedModel) -> dict[str, str]:
    """Embeddings without a tensor, since they read the rows of a quantized head.

    Args:
        model: the quantized model.

    Returns:
        Name of the head by name of the embedding.
    """
    heads = {id(layer): name for name, layer in svdq_layers(model)}
    modules = model.named_modules()
    return {name: heads[id(module.head)] for name, module in modules if isinstance(module, TiedEmbedding)}
