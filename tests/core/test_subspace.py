"""Subspaces: of all of a size, the leading eigenvectors' holds the most energy; mixing leaves it there."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from svdq_hf.core.subspace import channel_axes, energy, mixed, principal_axes, subspace_columns

seeds = st.integers(0, 2**32 - 1)


def drawn_covariance(seed, size, heads=()):
    """Of vectors with a few large channels and a few large directions."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(*heads, 3 * size, size, dtype=torch.float64, generator=generator)
    x = x * torch.randn(size, dtype=torch.float64, generator=generator).exp().square()
    x = x @ torch.randn(*heads, size, size, dtype=torch.float64, generator=generator)
    return x.mT @ x


@given(seeds, st.sampled_from([16, 24, 64]), st.data())
def test_the_subspace_holds_at_least_the_energy_of_any_eighth_of_the_channels(seed, size, data):
    covariance, columns = drawn_covariance(seed, size), subspace_columns(size, 1 / 8)
    generator = torch.Generator().manual_seed(seed)
    found = float(energy(covariance, mixed(principal_axes(covariance), columns, generator), columns))
    largest = float(energy(covariance, channel_axes(covariance), columns))
    channels = data.draw(st.lists(st.integers(0, size - 1), min_size=columns, max_size=columns, unique=True))
    any_other = float(covariance.diagonal()[channels].sum() / covariance.trace())
    assert found >= largest - 1e-12 >= any_other - 2e-12


@given(seeds, st.sampled_from([(16, 8), (24, 8), (24, 0)]))
def test_mixed_axes_are_orthogonal_and_span_what_they_spanned(seed, sizes):
    size, columns = sizes
    covariance = drawn_covariance(seed, size, heads=(2,))
    axes = principal_axes(covariance)
    basis = mixed(axes, columns, torch.Generator().manual_seed(seed))
    eye = torch.eye(size, dtype=torch.float64).expand(2, -1, -1)
    torch.testing.assert_close(basis.mT @ basis, eye, rtol=0, atol=1e-12)
    last, before = basis[..., size - columns :], axes[..., size - columns :]
    torch.testing.assert_close(last @ last.mT, before @ before.mT, rtol=0, atol=1e-12)


def test_the_random_rotations_are_of_their_seed():
    axes = torch.eye(16, dtype=torch.float64)
    one, again, other = (mixed(axes, 8, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2))
    assert torch.equal(one, again)
    assert not torch.equal(one, other)


def test_channel_axes_are_the_channels_by_their_variance():
    axes = channel_axes(torch.diag(torch.tensor([3.0, 1.0, 2.0])))
    assert (torch.tensor([30.0, 10.0, 20.0], dtype=torch.float64) @ axes).tolist() == [10.0, 20.0, 30.0]


@pytest.mark.parametrize("columns", [9, 64, 576, 4096])
@pytest.mark.parametrize("share", [0.01, 1 / 8, 0.5])
def test_a_subspace_is_a_multiple_of_eight_near_its_share(columns, share):
    found = subspace_columns(columns, share)
    assert found % 8 == 0 < found
    assert abs(found - columns * share) <= 8


@pytest.mark.parametrize(("columns", "share"), [(8, 1 / 8), (1, 0.01), (16, 0.99)])
def test_a_subspace_that_leaves_nothing_is_refused(columns, share):
    with pytest.raises(ValueError, match=f"of {columns} columns would be .*, which leaves none"):
        subspace_columns(columns, share)
