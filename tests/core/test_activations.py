"""Activations in integers: order, rounding, and what both leave."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from svdq_hf.core.activations import Activations, round_tokens

SCHEMES = [
    Activations(4),
    Activations(4, 1 / 8),
    Activations(8, 1 / 8, heads=3),
    Activations(4, hadamard=True),
]


@pytest.mark.parametrize("scheme", SCHEMES, ids=repr)
def test_arranging_is_orthogonal_and_can_be_undone(scheme):
    x, weight = torch.randn(5, 96, dtype=torch.float64), torch.randn(7, 96, dtype=torch.float64)
    torch.testing.assert_close(scheme.restored(scheme.arranged(x)), x)
    product = scheme.arranged(x) @ scheme.arranged(weight).T
    torch.testing.assert_close(product, x @ weight.T)
    torch.testing.assert_close(scheme.arranged(x) @ weight.T, x @ scheme.restored(weight).T)


def test_the_subspace_is_the_end_of_each_head():
    scheme = Activations(4, 1 / 4, heads=2)
    assert scheme.columns(64) == (48, 16)
    ends = scheme.arranged(torch.arange(64))[48:].tolist()
    assert ends == [*range(24, 32), *range(56, 64)]


@given(st.integers(0, 2**32 - 1), st.sampled_from([4, 8]), st.floats(-3, 3), st.floats(-30, 30))
def test_a_rounded_token_loses_no_more_than_by_its_whole_range_and_zero_is_kept(seed, bits, offset, size):
    generator = torch.Generator().manual_seed(seed)
    x = (torch.randn(3, 40, generator=generator) + offset) * 2.0**size
    x[:, 7] = 0
    codes, scale, zero = round_tokens(x, bits)
    assert codes.dtype == zero.dtype == torch.int8
    least = -(2 ** (bits - 1))
    assert least <= int(codes.min()) <= int(codes.max()) < -least
    found = scale * (codes.float() - zero.float())
    assert not found[:, 7].any()
    step = (x.amax(-1) - x.amin(-1)) / (2**bits - 1)
    assert ((found - x).square().mean(-1).sqrt() <= 0.5 * step).all()


def test_an_outlier_is_clipped_where_that_loses_less():
    x = torch.randn(1, 2000)
    assert round_tokens(x, 4).scale < (x.max() - x.min()) / 15
    assert torch.equal(round_tokens(x, 8).scale[0, 0], (x.max() - x.min()) / 255)


def test_tokens_of_zeros_and_of_one_sign_are_rounded():
    x = torch.tensor([[0.0, 0.0, 0.0], [1.0, 2.0, 3.0], [-4.0, -1.0, -15.0]])
    codes, scale, zero = round_tokens(x, 4)
    found = scale * (codes.float() - zero.float())
    torch.testing.assert_close(found, x, rtol=0, atol=0.51)
    assert scale[0] == 0
    assert not found[0].any()


@pytest.mark.parametrize(
    ("scheme", "columns", "reason"),
    [
        (Activations(4, 1 / 8, heads=5), 64, "heads=5 does not divide the 64 columns"),
        (Activations(4, 1 / 8, heads=8), 64, r"subspace=0\.125 of 8 columns"),
        (Activations(4, 1 / 8, heads=65), 64, "heads=65 does not divide"),
        (Activations(4, hadamard=True), 49999, "n=49999: its odd part"),
    ],
)
def test_an_input_that_a_layer_cannot_have_is_refused(scheme, columns, reason):
    with pytest.raises(ValueError, match=reason):
        scheme.columns(columns)
