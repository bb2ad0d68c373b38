"""Packed states: their size, what rounding may lose, and that a row depends on no other."""

import pytest
import torch
from torch import Tensor

from svdq_hf.core.rotation import rotate
from svdq_hf.core.state_codes import StateFormat, decode, encode, group_of, outlier_channels

HEADS = (8, 16, 64, 80, 128, 256)
FORMS = [StateFormat(bits) for bits in (2, 3, 4, 8)] + [
    StateFormat(bits, outliers=True) for bits in (2, 3, 4)
]
OCTAVE = 2**0.125
"""A step is at most so many times the least that would do."""


def states(head_dim: int, seed: int = 0) -> Tensor:
    """Of two sequences, three heads, ten tokens; one channel is large."""
    made = torch.randn(2, 3, 10, head_dim, generator=torch.Generator().manual_seed(seed))
    made[..., 3] *= 30
    return made


def there_and_back(dense: Tensor, form: StateFormat) -> Tensor:
    channels = outlier_channels(dense) if form.outliers else None
    packed = encode(dense, form, channels)
    assert packed.dtype == torch.uint8
    assert packed.shape == (*dense.shape[:-1], form.row_bytes(dense.shape[-1]))
    return decode(packed, dense.shape[-1], form, channels)


@pytest.mark.parametrize(
    ("form", "head_dim"),
    [(form, head_dim) for form in FORMS for head_dim in HEADS if head_dim % 16 == 0 or not form.outliers],
    ids=str,
)
def test_turned_values_are_at_most_a_step_away(form, head_dim):
    dense = states(head_dim)
    group = group_of(head_dim)
    power = min(64, group & -group)
    lost = rotate((dense - there_and_back(dense, form)).unflatten(-1, (-1, power))).flatten(-2)
    turned = rotate(dense.unflatten(-1, (-1, power))).flatten(-2).unflatten(-1, (-1, group))
    least, most = turned.aminmax(dim=-1, keepdim=True)
    step = OCTAVE * torch.maximum((most - least) / (2**form.bits - 1), turned.abs().amax(-1, True) / 127)
    bound = step if not form.outliers else step.amax()  # taking the coarse part out makes groups smaller
    assert (lost.unflatten(-1, (-1, group)).abs() <= 1.01 * bound).all()


def test_bits_with_everything():
    """Of 64 values: 4 bits each, 8 coarse codes of 4 bits, and three bytes of scales."""
    assert StateFormat(4, outliers=True).bits_per_value(64) == 4 + 8 * 4 / 64 + 3 * 8 / 64 == 4.875
    assert StateFormat(4).bits_per_value(256) == 4 + 2 * 8 / 64
    assert StateFormat(8).bits_per_value(128) == 8.25
    assert StateFormat(4, outliers=True).bits_per_value(80) == pytest.approx(4.8)


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_a_row_depends_on_no_other(form):
    dense = states(64)
    channels = outlier_channels(dense) if form.outliers else None
    whole = encode(dense, form, channels)
    by_pieces = [encode(piece, form, channels) for piece in dense.split([1, 6, 3], -2)]
    assert torch.equal(whole, torch.cat(by_pieces, -2))
    assert torch.equal(
        decode(whole[1:, :, 4:], 64, form, channels), decode(whole, 64, form, channels)[1:, :, 4:]
    )


def test_an_outlier_channel_costs_the_others_little():
    """Its coarse part is taken out: what is left is as small as they are."""
    dense = states(64)
    dense[..., 3] *= 10  # 300 times the others; what is left of it is up to 300 / 7 / 2
    usual = torch.arange(64) != 3
    errors = [
        (there_and_back(dense, form) - dense)[..., usual].norm()
        for form in (StateFormat(4), StateFormat(4, outliers=True))
    ]
    assert errors[1] < errors[0] / 5


def test_outlier_channels_are_the_largest_of_each_head():
    dense = torch.ones(2, 2, 5, 16)
    dense[:, 0, :, 9], dense[:, 0, :, 2], dense[:, 1, :, 0], dense[:, 1, :, 15] = 9, -5, 4, 7
    assert outlier_channels(dense).tolist() == [[9, 2], [15, 0]]


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_zeros_stay_zeros(form):
    assert there_and_back(torch.zeros(1, 1, 2, 64), form).abs().max() == 0


@pytest.mark.parametrize("size", [1e-4, 1.0, 300.0, 30000.0])
def test_equal_values_and_all_sizes_are_reached(size):
    """A constant turns into one spike; the relative error of both is that of 8 bits of range."""
    dense = torch.full((1, 1, 1, 64), size)
    torch.testing.assert_close(there_and_back(dense, StateFormat(8)), dense, rtol=0.02, atol=0.005 * size)
    spread = size * torch.linspace(-1, 1, 64).view(1, 1, 1, 64)
    torch.testing.assert_close(there_and_back(spread, StateFormat(8)), spread, rtol=0, atol=0.08 * size)


def test_strided_and_half_precision_states_are_packed_like_others():
    dense = states(64).bfloat16()
    form = StateFormat(4)
    strided = dense.transpose(1, 2).contiguous().transpose(1, 2)
    assert torch.equal(encode(strided, form, None), encode(dense.float(), form, None))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 1e30])
@pytest.mark.parametrize("channel", [3, 40])
@pytest.mark.parametrize("form", FORMS, ids=str)
def test_what_no_step_reaches_is_refused(form, channel, value):
    """One such value among others, in an outlier channel or beside them."""
    dense = states(64)
    channels = outlier_channels(dense) if form.outliers else None
    dense[1, 2, 7, channel] = value
    with pytest.raises(OverflowError, match="the largest is 30048"):
        encode(dense, form, channels)


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_the_range_that_the_page_promises_is_packed(form):
    """Values of one size make the largest turned ones: a spike, or two of either sign."""
    size = {2: 11_000, 3: 26_000, 4: 56_000, 8: 470_000}[form.bits]
    apart = torch.ones(64)
    apart[1::2] = 0
    for dense in (size * torch.ones(64), -size * torch.ones(64), size * apart, size * (1 - 2 * apart)):
        lost = there_and_back(dense.view(1, 1, 1, 64), form) - dense
        assert lost.norm() < 0.4 * dense.norm()
    with pytest.raises(OverflowError):
        there_and_back(1.1 * size * torch.ones(1, 1, 1, 64), form)
