"""Blocks are those of ggml: its own package dequantizes them to what was meant, and finds them no worse."""

import gguf
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from svdq_hf.core.levels import TABLES
from svdq_hf.core.rounding import expand, quantize
from svdq_hf.integrations.gguf.block_types import ALL, IQ4_NL, IQ4_NL_GRID, fitted, with_feedback

every_type = pytest.mark.parametrize("kind", ALL, ids=lambda kind: kind.name)
OWN = {"Q5_0", "Q8_0"}
"""What gguf's package quantizes itself."""


def dequantized(kind, data):
    return torch.from_numpy(gguf.quants.dequantize(data.numpy(), gguf.GGMLQuantizationType[kind.name]))


def relative_error(found, weight):
    return float((found - weight).norm() / weight.norm())


@every_type
def test_name_number_and_sizes_are_those_of_ggml(kind):
    of_ggml = gguf.GGMLQuantizationType[kind.name]
    assert (int(of_ggml), gguf.GGML_QUANT_SIZES[of_ggml]) == (kind.number, (kind.columns, kind.bytes))


def test_a_block_of_iq4_nl_by_hand():
    """Two bytes of scale 1.0, then code i and code i + 16 in a byte."""
    table = torch.tensor(TABLES[4]["iq4_nl"], dtype=torch.float32)
    row = torch.cat([table, table.flip(0)]).unsqueeze(0)
    expected = [0x00, 0x3C, *((15 - code) << 4 | code for code in range(16))]
    assert IQ4_NL.encoded(row)[0].tolist() == expected
    assert torch.equal(dequantized(IQ4_NL, IQ4_NL.encoded(row)), row)


def test_iq4_nl_stands_for_its_codes_and_scales():
    weight = torch.randn(7, 96)
    found = quantize(weight, IQ4_NL_GRID)
    table = torch.tensor(TABLES[4]["iq4_nl"], dtype=torch.float32)
    meant = table[found.codes.long() + 8] * expand(found.scale, 32, 96)
    assert torch.equal(dequantized(IQ4_NL, IQ4_NL.encoded(weight)), meant)


LLAMA_CPPS_ERROR = {"IQ4_NL": 0.0760, "Q5_0": 0.0427, "Q6_K": 0.0177, "Q8_0": 0.0054}
"""Of normal weights, by `ggml_quantize_chunk` of llama-cpp-python 0.3.36."""


@every_type
def test_less_error_than_by_llama_cpp(kind):
    weight = torch.randn(200, 512) * 0.02
    error = relative_error(dequantized(kind, kind.encoded(weight)), weight)
    assert 0.9 * LLAMA_CPPS_ERROR[kind.name] < error < LLAMA_CPPS_ERROR[kind.name]


@pytest.mark.parametrize("name", sorted(OWN))
def test_no_worse_than_the_package_itself(name):
    kind = next(one for one in ALL if one.name == name)
    weight = torch.randn(100, 256)
    own = gguf.quants.quantize(weight.numpy(), gguf.GGMLQuantizationType[name])
    error = relative_error(dequantized(kind, torch.from_numpy(own)), weight)
    assert relative_error(dequantized(kind, kind.encoded(weight)), weight) <= error


@every_type
@given(scale=st.sampled_from([0.0, 1e-6, 1.0, 1e4]), seed=st.integers(0, 99))
def test_zeros_stay_and_nothing_is_beyond_its_block(kind, scale, seed):
    weight = torch.randn(3, 256, generator=torch.Generator().manual_seed(seed)) * scale
    weight[1] = 0
    found = dequantized(kind, kind.encoded(weight))
    assert torch.equal(found[1], torch.zeros(256))
    assert torch.isfinite(found).all()
    assert found.abs().max() <= weight.abs().max() * 1.2


@pytest.mark.parametrize("most", [16, 32])
def test_whole_numbers_that_fit_are_found_exactly(most):
    codes = torch.randint(-most, most, (50, 32)).float()
    codes[:, 0] = -most
    assert torch.equal(fitted(codes * 0.25, most), torch.full((50,), 0.25))
    assert torch.equal(fitted(codes * -0.25, most), torch.full((50,), -0.25))


def test_feedback_loses_less_of_the_outputs():
    torch.manual_seed(0)
    torch.manual_seed(0)
    weight, inputs = torch.randn(48, 96), torch.randn(500, 96) @ torch.randn(96, 96)
    gram = inputs.T @ inputs
    plain, fed = (dequantized(IQ4_NL, data) for data in (IQ4_NL.encoded(weight), with_feedback(weight, gram)))
    lost = [float(((found - weight) @ inputs.T).norm()) for found in (plain, fed)]
    assert lost[1] < 0.8 * lost[0]
