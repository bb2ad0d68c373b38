"""The Walsh-Hadamard transform: orthogonal, symmetric, flat, and its own inverse, of every order."""

import pytest
import torch

from svdq_hf.core.rotation import hadamard, rotate

ORDERS = (1, 2, 3, 5, 12, 43, 64, 80, 96, 128, 256, 576, 1536)


@pytest.mark.parametrize("n", ORDERS)
def test_it_is_symmetric_and_orthogonal(n):
    matrix = hadamard(n)
    assert torch.equal(matrix, matrix.T) or torch.allclose(matrix, matrix.T, atol=1e-15)
    torch.testing.assert_close(matrix @ matrix, torch.eye(n, dtype=torch.float64), atol=1e-13, rtol=0)


@pytest.mark.parametrize("n", ORDERS)
def test_no_entry_is_large(n):
    """So one large coordinate is spread over all; of powers of two, evenly."""
    sizes = hadamard(n).abs() * n**0.5
    assert sizes.max() <= 2**0.5 + 1e-9
    if n & (n - 1) == 0:
        assert (sizes - 1).abs().max() < 1e-12


@pytest.mark.parametrize("n", ORDERS)
@pytest.mark.parametrize(
    ("dtype", "bound"), [(torch.float64, 1e-13), (torch.float32, 1e-5), (torch.bfloat16, 2e-2)]
)
def test_rotate_is_the_product_and_its_own_inverse(n, dtype, bound):
    x = torch.randn(2, 3, n, dtype=torch.float64, generator=torch.Generator().manual_seed(n)).to(dtype)
    turned = rotate(x)
    assert turned.dtype == dtype
    torch.testing.assert_close(turned.double(), x.double() @ hadamard(n), atol=4 * bound, rtol=bound)
    torch.testing.assert_close(rotate(turned), x, atol=4 * bound, rtol=bound)


def test_a_strided_and_an_empty_input():
    x = torch.randn(4, 64, 3).transpose(1, 2)
    torch.testing.assert_close(rotate(x), rotate(x.contiguous()))
    assert rotate(torch.zeros(0, 64)).shape == (0, 64)


def test_an_outlier_is_spread_and_lengths_stay():
    x = torch.full((1, 576), 0.01)
    x[0, 7] = 100.0
    turned = rotate(x)
    assert turned.abs().max() < 100 * (2 / 576) ** 0.5 + 0.5
    torch.testing.assert_close(turned.norm(), x.norm())


@pytest.mark.parametrize("n", [4099, 2 * 4097, 49999 * 64])
def test_an_order_with_a_large_odd_part_is_refused(n):
    with pytest.raises(ValueError, match=f"n={n}: its odd part is .* up to 4096"):
        rotate(torch.zeros(1, n))


def test_an_order_below_one_is_refused():
    with pytest.raises(ValueError, match="n=0"):
        hadamard(0)
