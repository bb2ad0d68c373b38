"""llama.cpp's own roundings in the quality bench, where its library is installed."""

import sys

import pytest
import torch
from places import EXAMPLES

sys.path.insert(0, str(EXAMPLES))
import quality_gguf as theirs  # examples are no package


@pytest.fixture(autouse=True)
def _library():
    pytest.importorskip("llama_cpp")


@pytest.mark.parametrize(
    ("kind", "width", "bits", "error"),
    [
        ("IQ4_NL", 96, 4.5, 0.085),
        ("IQ4_XS", 512, 4.25, 0.085),
        ("IQ4_XS", 96, 4.5, 0.085),
        ("Q4_K", 512, 4.5, 0.08),
        ("Q4_K", 96, 5.5, 0.05),
        ("Q3_K", 512, 3.4375, 0.17),
        ("Q3_K", 96, 4.5, 0.085),
    ],
)
def test_bits_and_error_on_normal_weights(kind, width, bits, error):
    weight = torch.randn(64, width)
    stored, found = theirs.by_llama_cpp(weight, kind)
    assert stored == bits * weight.numel()
    assert error / 2 < float((found - weight).norm() / weight.norm()) < error


def test_it_is_the_rounding_of_ggufs_own_package():
    quants = pytest.importorskip("gguf").quants
    weight = torch.randn(8, 64)
    qtype = theirs.qtype("Q4_0")
    expected = quants.dequantize(quants.quantize(weight.numpy(), qtype), qtype)
    assert torch.equal(theirs.by_llama_cpp(weight, "Q4_0")[1], torch.from_numpy(expected))


def test_a_width_that_no_block_divides():
    with pytest.raises(ValueError, match="IQ4_NL has blocks of 32, which do not divide a width of 40"):
        theirs.by_llama_cpp(torch.zeros(2, 40), "Q3_K")
