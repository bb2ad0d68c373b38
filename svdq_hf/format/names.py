"""Tensor names of a stored weight: the weight's own name, and the names of its parts made of it.

A linear layer's parts are its module's: `fc.weight`, `fc.salient_rows`. All experts of a layer are a stack,
which has the name of the dense parameter, and so have its packed codes: `experts.gate_up_proj`; its other
parts have that name and `_`: `experts.gate_up_proj_salient_rows`. Why the same name: a loader that knows no
packed weights meets a shape mismatch and stops, where a missing name would be filled at random. Why `_`:
transformers renames and cuts what begins with `experts.gate_up_proj.`, and leaves longer names alone.
Not here: the shapes (`format.parts`), and names in files that differ from the model's
(`integrations.transformers.file_names`).
"""

from typing import NamedTuple

from svdq_hf.format.parts import ALL_PARTS, PartSpec, Scheme, part_specs, stack_specs

_MARK = "salient_rows"


class WeightName(NamedTuple):
    """Name and shape of a weight: of a linear layer, `[out, in]`, or of all experts, `[experts, out, in]`.

    >>> WeightName("fc", (8, 64)).key("weight"), WeightName("experts.up_proj", (4, 8, 64)).key("levels")
    ('fc.weight', 'experts.up_proj_levels')
    """

    name: str
    shape: tuple[int, ...]

    def key(self, part: str) -> str:
        """The tensor name of one part.

        Args:
            part: one of `ALL_PARTS`.
        """
        return part_key(self.name, part, stacked=len(self.shape) == 3)

    def dense_shape(self, *, transposed: bool) -> tuple[int, ...]:
        """Shape of the dense tensor.

        Args:
            transposed: whether the dense tensor is stored as `[in, out]`.
        """
        *experts, out, in_features = self.shape
        return (*experts, *((in_features, out) if transposed else (out, in_features)))

    def specs(self, scheme: Scheme) -> dict[str, PartSpec]:
        """Shape and dtype of each stored part under a scheme."""
        *experts, out, in_features = self.shape
        if experts:
            return stack_specs(experts[0], out, in_features, scheme)
        return part_specs(out, in_features, scheme)

    def all_keys(self) -> list[str]:
        """The tensor names of all parts that it may have."""
        return [self.key(part) for part in ALL_PARTS]


def part_key(name: str, part: str, *, stacked: bool) -> str:
    """The tensor name of a part of a weight.

    Args:
        name: of the weight.
        part: one of `ALL_PARTS`.
        stacked: whether the weight is a stack of experts.
    """
    if not stacked:
        return f"{name}.{part}"
    return name if part == "weight" else f"{name}_{part}"


def weight_of_part(key: str) -> tuple[str, bool] | None:
    """The weight to which a tensor of salient rows belongs.

    Args:
        key: name of a tensor.

    Returns:
        The weight's name and whether it is a stack of experts; None where the tensor is no `salient_rows`.

    >>> [weight_of_part(key) for key in ("fc.salient_rows", "experts.up_proj_salient_rows", "fc.bias")]
    [('fc', False), ('experts.up_proj', True), None]
    """
    for mark in (f".{_MARK}", f"_{_MARK}"):
        if key.endswith(mark):
            return key.removesuffix(mark), mark[0] == "_"
    return None


def is_salient_values(key: str) -> bool:
    """Whether a tensor of this name holds the values of salient weights.

    >>> is_salient_values("fc.salient_values"), is_salient_values("experts.up_proj_salient_values")
    (True, True)
    """
    return key.endswith((".salient_values", "_salient_values")) or key == "salient_values"
