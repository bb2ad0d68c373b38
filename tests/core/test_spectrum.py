"""The penalty's gradient against autograd, PCDR by hand, and the figures of activations."""

import pytest
import torch

from svdq_hf.core.spectrum import (
    decay_factors,
    decay_penalty,
    dominance,
    kurtosis,
    least_count,
    outlier_ratio,
    stable_rank,
)
from svdq_hf.core.svd import principal

SHAPES = [(24, 40), (40, 24), (300, 310)]
"""The last is decomposed by block Krylov, the others exactly."""


def spiked(shape, dtype=torch.float32):
    """A matrix whose three largest singular values stand apart."""
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.linalg.qr(torch.randn(n, 3, generator=generator)).Q for n in shape)
    noise = 0.02 * torch.randn(shape, generator=generator)
    return ((left * torch.tensor([9.0, 5.0, 3.0])) @ right.T + noise).to(dtype)


@pytest.mark.parametrize("power", [1, 2, 3.5])
@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_gradient_is_that_of_autograd_through_the_svd(shape, count, power):
    weight = spiked(shape, torch.float64).requires_grad_()
    penalty = 0.1 / (power + 1) * torch.linalg.svdvals(weight)[:count].pow(power + 1).sum()
    (expected,) = torch.autograd.grad(penalty, weight)
    found = principal(weight.detach(), 3)
    left, right = decay_factors(found, count, 0.1, power)
    error = ((left.double() @ right.double().T) - expected).norm() / expected.norm()
    assert error < 1e-6
    assert decay_penalty(found.s[:count], 0.1, power) == pytest.approx(penalty.item(), rel=1e-6)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_start_from_older_triplets_finds_the_new_ones(shape):
    weight = spiked(shape)
    older = principal(weight, 8)
    moved = weight + 0.01 * torch.randn(shape, generator=torch.Generator().manual_seed(1))
    found = principal(moved, 3, start=older)
    exact = principal(moved, 3, method="exact")
    assert (found.matrix() - exact.matrix()).norm() < 1e-4 * exact.matrix().norm()


def test_the_share_of_an_output_is_that_of_its_parts():
    weight = torch.diag(torch.tensor([4.0, 2.0, 1.0]))
    rotation = torch.tensor([[1.0, 1.0, 0.0], [1.0, -1.0, 0.0], [0.0, 0.0, 1.0]]) / 2**0.5
    found = principal(rotation @ weight, 2, method="exact")
    x = torch.tensor([[1.0, 1.0, 0.0]])  # parts of the first output: 4 and 2, over the root of 2
    shares = dominance(found, x, torch.tensor([0]), (x @ (rotation @ weight).T)[:, 0])
    torch.testing.assert_close(shares, torch.tensor([4 / 6, 1.0]))


def test_larger_outputs_weigh_more_and_none_is_no_division_by_zero():
    found = principal(torch.eye(4), 1, method="exact")
    x = torch.stack([found.v[:, 0], found.v[:, 0]])
    unit = int(found.u[:, 0].abs().argmax())
    part = float(found.s[0] * found.u[unit, 0])
    outputs = torch.tensor([part, 1e6])  # all of the first, next to nothing of the second
    assert float(dominance(found, x, torch.tensor([unit, unit]), outputs)) < 1e-5
    nothing = dominance(found, torch.zeros(1, 4), torch.tensor([0]), torch.zeros(1))
    assert nothing.tolist() == [0.0]


@pytest.mark.parametrize(("tau", "count"), [(0.0, 1), (0.2, 1), (0.3, 2), (0.9, 3), (0.91, 0)])
def test_the_least_count_reaches_tau(tau, count):
    assert least_count(torch.tensor([0.2, 0.5, 0.9]), tau) == count


def test_figures_of_activations():
    values = torch.randn(200_000, generator=torch.Generator().manual_seed(0))
    assert kurtosis(values) == pytest.approx(3, abs=0.1)  # standard error: sqrt(24 / n) = 0.011
    assert outlier_ratio(values) == pytest.approx(float(values.abs().max()) / 0.6745, rel=0.02)
    assert outlier_ratio(torch.zeros(3)) == float("inf")
    assert kurtosis(torch.ones(3)) == 0
    assert stable_rank(torch.zeros(2, 2), 0.0) == 0
