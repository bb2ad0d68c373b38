"""Unit of a streamed run: one output and the bytes of the input it is made of, a copy or a weight's parts.

All experts of a layer are one weight. A file has them as one tensor, or as one for each expert and matrix, or
for each half of it. Which tensor becomes what, and in which order, is what transformers' loader would do;
anything else is `Unstreamable`. Not here: quantizing it (`checkpoint.streaming.shard`).
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor
from transformers.core_model_loading import dot_natural_key

from svdq_hf.checkpoint.streaming.byte_ranges import Place, as_tensor, read_bytes, size_of
from svdq_hf.format.names import WeightName
from svdq_hf.format.parts import PartSpec
from svdq_hf.integrations.transformers.checkpoint_headers import Checkpoint, HeaderEntry
from svdq_hf.integrations.transformers.expert_conversions import is_merge, is_transpose
from svdq_hf.quantize.expert_stream import joined
from svdq_hf.quantize.footprint import Footprint


class Unstreamable(Exception):
    """Why a model must be quantized in memory.

    Attributes:
        footprint: sizes of the quantized model, where they are known.
    """

    footprint: Footprint | None = None


@dataclass(frozen=True)
class Unit:
    """What is made of one tensor of the input, or of several: a copy (cast where dtypes differ), or parts.

    Attributes:
        places: read in this order; for experts, for each the pieces of its matrix, one below the other.
        outputs: shape and dtype by name in files; those of a weight in the order of `parts`.
        weight: name and shape of the weight in the model; None: a copy.
        parts: names of the weight's parts.
        transposed: whether the dense model has the weight as `[in, out]`.
        turned: whether the files have it transposed compared with the dense model.
        bias_of: of a copy that is the bias of a quantized layer, the layer's name: its values are checked.
    """

    places: tuple[Place, ...]
    outputs: Mapping[str, PartSpec]
    weight: WeightName | None = None
    parts: tuple[str, ...] = ()
    transposed: bool = False
    turned: bool = False
    bias_of: str = ""

    @property
    def size(self) -> int:
        """Bytes of the outputs."""
        return sum(map(size_of, self.outputs.values()))

    @property
    def input_size(self) -> int:
        """Bytes that are read."""
        return sum(place.size for place in self.places)

    def matrices(self, read: Callable[[Place], Tensor] = read_bytes) -> Iterator[Tensor]:
        """The weight's matrix, or those of its experts in turn, each read when its turn comes.

        Args:
            read: reads the bytes `[size]`, uint8, of a place.

        Yields:
            Matrices as the dense model has them: `[out, in]`, or `[in, out]` where `transposed`.
        """
        experts = self.weight.shape[:-2] if self.weight is not None else ()
        pieces = len(self.places) // (experts[0] if experts else 1)
        for first in range(0, len(self.places), pieces):
            matrix = joined([as_tensor(read(p), p) for p in self.places[first : first + pieces]])
            yield matrix.T if self.turned else matrix


def expert_places(
    weight: WeightName, checkpoint: Checkpoint, places: Mapping[str, Place], *, transposed: bool
) -> tuple[tuple[Place, ...], bool]:
    """Where the matrices of all experts are in the files.

    Args:
        weight: the experts' weight in the model.
        checkpoint: headers of the input files by the model's names.
        places: of the input tensors, by their names in files.
        transposed: whether the dense model has the matrices as `[in, out]`.

    Returns:
        The places, in the order of `Unit.places`, and whether the files have the matrices transposed
        compared with the dense model.

    Raises:
        Unstreamable: they are of several dtypes or of float64, which the loader would round; an expert is
            missing; or the loader does more than join or transpose them.
    """
    entries = checkpoint.sources.get(weight.name, [])
    dtypes = {str(entry.dtype).removeprefix("torch.") for entry in entries}
    if len(dtypes) > 1 or "float64" in dtypes:
        raise Unstreamable(f"{weight.name} is {' and '.join(sorted(dtypes))} in the files")
    dense = weight.dense_shape(transposed=transposed)
    conversions = {id(entry.conversion): entry.conversion for entry in entries}
    conversion = next(iter(conversions.values()), None)
    if len(conversions) == 1 and conversion is not None and is_merge(conversion):
        kinds = [_of_pattern(pattern, entries) for pattern in conversion.source_patterns]
        if _fit(kinds, dense):
            return tuple(places[entry.name] for expert in zip(*kinds, strict=True) for entry in expert), False
    elif len(entries) == 1 and (conversion is None or is_transpose(conversion)):
        found = entries[0].shape == dense
        if found or (conversion is not None and entries[0].shape == (dense[0], dense[2], dense[1])):
            return _cut(places[entries[0].name]), not found
    raise Unstreamable(f"it has {weight.name}, which its files do not have expert by expert")


def _of_pattern(pattern: str, entries: Sequence[HeaderEntry]) -> list[HeaderEntry]:
    """The experts' tensors of one pattern, in the loader's order."""
    return sorted(
        (entry for entry in entries if entry.pattern == pattern),
        key=lambda entry: dot_natural_key(entry.name),
    )


def _fit(kinds: Sequence[Sequence[HeaderEntry]], dense: tuple[int, ...]) -> bool:
    """Whether pieces (for each kind those of all experts) join to a stack of the shape `dense`."""
    shapes = [{entry.shape for entry in kind} for kind in kinds]
    if any(len(kind) != dense[0] for kind in kinds) or any(len(shape) != 1 for shape in shapes):
        return False
    pieces = [next(iter(shape)) for shape in shapes]
    wide = all(len(shape) == 2 and shape[1] == dense[2] for shape in pieces)
    return wide and sum(shape[0] for shape in pieces) == dense[1]


def _cut(place: Place) -> tuple[Place, ...]:
    """The places of a tensor's slices along its first dimension."""
    count, *shape = place.shape
    size = place.size // count
    starts = range(place.start, place.start + place.size, size)
    return tuple(place._replace(shape=tuple(shape), start=start, size=size) for start in starts)
