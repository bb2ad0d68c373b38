"""Quantization of the weight of a layer with integer activations: its columns outside and in the subspace.

Not here: one weight by itself (`quantize.weight`), the module (`nn.integer_linear`).
"""

from dataclasses import replace

from torch import Tensor

from svdq_hf.calibration.inputs import InputStatistics
from svdq_hf.config import SVDQConfig
from svdq_hf.core.activations import SUBSPACE_BITS, Activations
from svdq_hf.format.subspace import arranged_weight, joined
from svdq_hf.quantize.weight import check_weight, quantize_weight


def quantize_integer_weight(
    weight: Tensor, config: SVDQConfig, name: str, inputs: InputStatistics | None = None
) -> tuple[dict[str, Tensor], dict[str, float]]:
    """Quantize a weight for integer activations.

    Args:
        weight: `[out, in]`, of a plain float dtype.
        config: of the whole model, with `activations`.
        name: of the layer, for what it does with its inputs and for errors.
        inputs: statistics of the layer's inputs, for error feedback.

    Returns:
        The stored parts by name (see `part_specs`), and the facts measured: `relative_error`.

    Raises:
        ValueError: see `quantize_weight`.
    """
    check_weight(name, weight)
    layer = config.of_layer(name)
    scheme, ordered = layer.scheme, layer.scheme.activations or Activations()
    arranged = ordered.arranged(weight.float())
    low, high = scheme.columns(weight.shape[1])
    plain = layer.replace(activations=None, subspace=0.0, basis=None, layer_inputs=None)
    parts, _ = quantize_weight(arranged[:, :low], plain, name, _part(inputs, ordered, slice(0, low)))
    if high:
        fine = plain.replace(bits=SUBSPACE_BITS, levels="linear", group_size="row", error_feedback=False)
        inside, _ = quantize_weight(arranged[:, low:], fine, name)
        parts = joined(parts, inside, high)
    error = arranged - arranged_weight(parts, weight.shape[1], scheme)
    total = float(arranged.double().norm())
    return parts, {"relative_error": float(error.double().norm()) / total if total else 0.0}


def _part(inputs: InputStatistics | None, ordered: Activations, columns: slice) -> InputStatistics | None:
    """The statistics of some columns of the arranged inputs, as far as error feedback needs them."""
    if inputs is None or inputs.gram is None:
        return None
    gram = ordered.arranged(ordered.arranged(inputs.gram).T)[columns, columns].contiguous()
    return replace(inputs, gram=gram, square_sum=gram.diagonal().double(), sensitivity=None)
