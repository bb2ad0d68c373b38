"""Agreement of scores with PQI: do cheaper scores choose the weights that the loss misses?

Not here: PQI itself (`quantize.sensitivity`), and the scores (`core.saliency`).
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from svdq_hf.calibration.inputs import InputStatistics, collect_inputs
from svdq_hf.calibration.pqi import Line, Loss, model_loss, walk
from svdq_hf.config import SVDQConfig
from svdq_hf.quantize.layer import matrix_of
from svdq_hf.quantize.rounding_lines import GradientSums, lines_of
from svdq_hf.quantize.sensitivity import pqi
from svdq_hf.quantize.sensitivity_result import TOP
from svdq_hf.quantize.weight import score_weight

TAYLOR, FISHER = "first-order Taylor", "squared gradient"
"""From the gradient at the dense weights: its size times the error of rounding; the empirical Fisher
information."""

SCORES = ("awq", "spqr", "svd", "magnitude", "relative", "random")
"""Those of `core.saliency` that are compared."""

SAMPLE = 1 << 16
"""Most weights of a layer whose ranks are correlated: its standard error is then 0.004."""

GRAMS = 1 << 28
"""Numbers in the Gram matrices that are kept at once; beyond that the batches are run again."""


@dataclass(frozen=True)
class ScoreAgreement:
    """How far one score agrees with PQI, over all layers together.

    Attributes:
        name: of the score.
        overlap: of the 0.5 % of each layer's weights that PQI puts first, the share that the score does, too.
        correlation: of ranks (Spearman's), the mean over the layers by their weights.
    """

    name: str
    overlap: float
    correlation: float


def score_agreement(
    model: nn.Module,
    layers: Mapping[str, nn.Module],
    config: SVDQConfig,
    batches: Sequence[Any],
    loss: Loss = model_loss,
) -> list[ScoreAgreement]:
    """Compare scores with the score "pqi": two from the gradient at the dense weights, and our own.

    Args:
        model: the dense model.
        layers: linear layers of it, by name.
        config: how they are rounded.
        batches: what the loss takes.
        loss: of a model and a batch.

    Returns:
        A row for each score, the largest overlap first.

    Raises:
        ValueError: see `calibration.pqi.walk` and `collect_inputs`.
    """
    rows: dict[str, _Agreement] = {}
    lines = lines_of(layers, config)
    sizes = pqi(model, lines, batches, loss)
    gradients = _from_gradients(model, lines, batches, loss)
    for name, score, values in chain(gradients, _from_inputs(model, layers, config, batches)):
        rows.setdefault(score, _Agreement()).add(sizes[name].flatten(), values.flatten().cpu())
    found = [row.result(score) for score, row in rows.items()]
    return sorted(found, key=lambda row: -row.overlap)


Scores = Iterator[tuple[str, str, Tensor]]
"""A layer's name, a score's name, and the scores `[out, in]`."""


def _from_gradients(
    model: nn.Module, lines: Mapping[str, Line], batches: Sequence[Any], loss: Loss
) -> Scores:
    first, squared = GradientSums(lines), GradientSums(lines)
    first_order = first.take(1.0)

    def take(name: str, gradient: Tensor, place: float) -> None:
        first_order(name, gradient, place)
        squared.take_square(name, gradient, place)

    for _ in walk(model, lines, batches, [0.0], take, loss):
        pass
    yield from ((name, TAYLOR, terms.abs()) for name, terms in first.terms().items())
    yield from ((name, FISHER, sums) for name, sums in squared.sums.items())


def _from_inputs(
    model: nn.Module, layers: Mapping[str, nn.Module], config: SVDQConfig, batches: Sequence[Any]
) -> Scores:
    for some in _portions(layers):
        seen = collect_inputs(model, some, batches, gram=True)
        for name, module in some.items():
            inputs = seen.pop(name)
            for score in SCORES:
                yield name, score, _scores(name, module, config.replace(saliency=score), inputs)


def _scores(name: str, module: nn.Module, config: SVDQConfig, inputs: InputStatistics) -> Tensor:
    return score_weight(matrix_of(module), config.replace(error_feedback=False), name, inputs).scores


def _portions(layers: Mapping[str, nn.Module]) -> Iterator[dict[str, nn.Module]]:
    """Layers whose Gram matrices are kept together."""
    some: dict[str, nn.Module] = {}
    size = 0
    for name, module in layers.items():
        more = matrix_of(module).shape[1] ** 2
        if some and size + more > GRAMS:
            yield some
            some, size = {}, 0
        some[name], size = module, size + more
    yield some


class _Agreement:
    """Sums over layers."""

    def __init__(self) -> None:
        self.both = self.chosen = self.weights = 0
        self.correlation = 0.0

    def add(self, pqi: Tensor, score: Tensor) -> None:
        """Add a layer, `[n]` of both."""
        k = max(1, round(TOP * pqi.numel()))
        mine, theirs = (values.topk(k).indices for values in (pqi, score))
        self.both += int(torch.isin(mine, theirs).sum())
        self.chosen += k
        every = -(-pqi.numel() // SAMPLE)
        self.correlation += pqi.numel() * rank_correlation(pqi[::every], score[::every])
        self.weights += pqi.numel()

    def result(self, name: str) -> ScoreAgreement:
        """The shares and means."""
        return ScoreAgreement(name, self.both / self.chosen, self.correlation / self.weights)


def rank_correlation(a: Tensor, b: Tensor) -> float:
    """Spearman's rank correlation of two lists `[n]`; equal values have the ranks in which they come.

    >>> rank_correlation(torch.tensor([1.0, 5.0, 9.0]), torch.tensor([-3.0, -2.0, -1.0]))
    1.0
    """
    ranks = torch.stack([values.argsort(stable=True).argsort() for values in (a, b)]).double()
    return float(torch.corrcoef(ranks)[0, 1]) if a.numel() > 1 else 0.0
