import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pairwise import pairwise

from svdq_hf.core import rounding
from svdq_hf.core.grid import Grid
from svdq_hf.core.packing import RANGES, unpack
from svdq_hf.core.rounding import quantize
from svdq_hf.core.saliency import score
from svdq_hf.core.topk import salient_count, top_positions
from svdq_hf.format.checks import check_parts
from svdq_hf.format.decode import dense_blocks, reconstruct, take_rows
from svdq_hf.format.encode import decompose, relative_error
from svdq_hf.format.parts import PartSpec, Scheme, part_specs

GROUP_SIZES = [8, 64, 128, "row", "tensor"]
RULES = ["mse", "absmax", "sigma"]
every_grid = pytest.mark.parametrize("size", GROUP_SIZES)
every_rule = pytest.mark.parametrize("rule", RULES)


def at(rows, columns):
    return torch.tensor(rows, dtype=torch.int32), torch.tensor(columns, dtype=torch.int32)


def by_magnitude(weight, scheme):
    rows, columns = top_positions(weight.abs(), salient_count(scheme.k, *weight.shape))
    return decompose(weight, rows, columns, scheme)


def assert_promises_hold(weight, parts, scheme):
    """Shapes and dtypes as promised, salient weights bit for bit, the others within their step."""
    out, in_features = weight.shape
    specs = part_specs(out, in_features, scheme)
    assert {name: PartSpec(tuple(part.shape), part.dtype) for name, part in parts.items()} == specs
    check_parts(parts, in_features, scheme)

    dense = reconstruct(parts, in_features, scheme)
    assert dense.dtype == torch.float32
    salient = torch.zeros(out, in_features, dtype=torch.bool)
    salient[parts["salient_rows"].long(), parts["salient_columns"].long()] = True
    assert torch.equal(dense[salient].view(torch.int32), weight[salient].view(torch.int32))

    codes = unpack(parts["weight"], in_features)
    scale = parts["weight_scale"].double()
    step = scale[:, torch.arange(in_features) // scheme.grid.columns(in_features)].abs().expand(weight.shape)
    error = (dense.double() - weight).abs()
    # Half a step where nothing is clipped; float32 rounds up to 8 steps (4 bits) twice: 2**-20.
    lowest, highest = RANGES[scheme.grid.bits]
    inside = ~salient & (codes > lowest) & (codes < highest)
    assert (error[inside] <= (0.5 + 2.0 ** (scheme.grid.bits - 24)) * step[inside]).all()
    # Clipped or not, never farther away than zero is.
    assert (error <= weight.abs() * (1 + 2.0**-20)).all()


def end_to_end(weight, scheme, *, saliency="svd", rank=8):
    group = scheme.grid.columns(weight.shape[1])
    scores = score(saliency, weight, {"rank": rank, "seed": 0, "group": group}).scores
    return decompose(weight, *top_positions(scores, salient_count(scheme.k, *weight.shape)), scheme)


@given(
    st.tuples(st.integers(1, 6), st.integers(1, 140)),
    st.builds(Grid, st.sampled_from(GROUP_SIZES), st.sampled_from(RULES), bits=st.sampled_from(list(RANGES))),
    st.one_of(st.integers(0, 900), st.floats(0.001, 0.999)),
    st.sampled_from(["normal", "heavy", "sparse", "constant", "steps"]),
    st.integers(0, 2**32),
)
def test_any_weight_keeps_the_promises(shape, grid, k, kind, seed):
    generator = torch.Generator().manual_seed(seed)
    normal = torch.randn(shape, generator=generator)
    weight = {
        "normal": normal,
        "heavy": normal**5,
        "sparse": torch.where(torch.rand(shape, generator=generator) < 0.9, 0.0, normal),
        "constant": normal[:, :1].repeat(1, shape[1]),
        "steps": normal.sign() * torch.arange(shape[1]),
    }[kind] + 0.0  # 0 + -0 is 0: the sign of a zero is the one thing that a sum does not keep
    scheme = Scheme(k, grid)
    assert_promises_hold(weight, by_magnitude(weight, scheme), scheme)


SPECIAL = {
    "one entry": lambda: torch.tensor([[-0.3]]),
    "one column": lambda: torch.randn(9, 1),
    "constant rows": lambda: torch.randn(9, 1).repeat(1, 80),
    "zero rows": lambda: torch.randn(9, 80) * (torch.arange(9) % 2).unsqueeze(1),
    "zeros": lambda: torch.zeros(9, 80),
    "huge outlier": lambda: torch.randn(9, 80).index_put_(
        (torch.tensor(4), torch.tensor(79)), torch.tensor(1e38)
    ),
    "huge": lambda: torch.randn(9, 80) * 1e37,
    "tiny": lambda: torch.randn(9, 80) * 2.0**-100,
    "not a whole group": lambda: torch.randn(9, 65),
    "less than a group": lambda: torch.randn(9, 5),
}


@pytest.mark.parametrize(("case", "size", "rule"), pairwise(list(SPECIAL), GROUP_SIZES, RULES))
def test_special_weights_keep_the_promises(case, size, rule):
    weight = SPECIAL[case]() + 0.0  # + 0.0: no negative zeros
    for k in (0, 1, 7, 10**6):  # the last: every weight is salient
        scheme = Scheme(k, Grid(size, rule))
        assert_promises_hold(weight, by_magnitude(weight, scheme), scheme)


@pytest.mark.parametrize("rank", [1, 8, 64])
@pytest.mark.parametrize("shape", [(5, 70), (70, 5)])
def test_a_rank_beyond_the_layer_keeps_the_promises(shape, rank):
    weight, scheme = torch.randn(shape), Scheme(11)
    assert_promises_hold(weight, end_to_end(weight, scheme, rank=rank), scheme)


@every_grid
def test_a_huge_outlier_kept_salient_costs_the_others_nothing(size):
    weight, scheme = torch.randn(9, 80), Scheme(1, Grid(size))
    weight[4, 7] = 0
    plain = by_magnitude(weight, Scheme(0, Grid(size)))
    weight[4, 7] = 1e38
    parts = by_magnitude(weight, scheme)
    assert torch.equal(parts["weight"], plain["weight"])
    assert torch.equal(parts["weight_scale"], plain["weight_scale"])


@every_grid
@pytest.mark.parametrize("rule", ["mse", "absmax"])
def test_fitting_after_taking_out_leaves_less_error_than_fitting_before(size, rule):
    weight, grid = torch.randn(16, 128), Grid(size, rule)
    chosen = torch.rand(16, 128) < 0.1
    weight[chosen] *= 30
    rows, columns = (index.int() for index in chosen.nonzero(as_tuple=True))
    parts = decompose(weight, rows, columns, Scheme(rows.numel(), grid))
    after = (reconstruct(parts, 128, Scheme(rows.numel(), grid)) - weight)[~chosen]
    codes, scale, _ = quantize(weight, grid)  # the salient weights still in, and only then put aside
    dense = codes * scale.float()[:, torch.arange(128) // grid.columns(128)]
    before = (dense - weight)[~chosen]
    # The outliers are thirty times the rest and 4 bits reach seven steps: fitted with them in, the
    # rest is mostly less than half a step. Four in squared error is far below what is seen.
    assert 4 * after.square().sum() < before.square().sum()


def test_the_sum_of_both_parts_is_worked_out_by_hand():
    weight = torch.tensor([[7.0, -100.0, 1.0, -3.0], [0.5, 3.5, -1.5, 0.25]])
    scheme = Scheme(1, Grid(8, "absmax"))
    parts = decompose(weight, *at([0], [1]), scheme)
    assert parts["weight_scale"].tolist() == [[1.0], [0.5]]
    assert unpack(parts["weight"], 4).tolist() == [[7, 0, 1, -3], [1, 7, -3, 0]]  # half a step: to even
    assert parts["salient_values"].tolist() == [-100.0]
    assert reconstruct(parts, 4, scheme).tolist() == [[7.0, -100.0, 1.0, -3.0], [0.5, 3.5, -1.5, 0.0]]
    # 0.25 is lost, of a weight whose square is 49 + 10000 + 1 + 9 + 0.25 + 12.25 + 2.25 + 0.0625.
    assert relative_error(weight, parts, scheme) == pytest.approx(0.25 / 10073.8125**0.5, rel=1e-6)


@every_rule
@pytest.mark.parametrize("size", [size for size in GROUP_SIZES if size != "tensor"])
@pytest.mark.parametrize("in_features", [5, 64, 70, 200])
def test_a_stack_is_the_concatenation_of_its_parts(in_features, size, rule):
    top, bottom = torch.randn(3, in_features), torch.randn(4, in_features)
    scheme = Scheme(6, Grid(size, rule))
    one, other = by_magnitude(top, scheme), by_magnitude(bottom, scheme)
    joined = {name: torch.cat([one[name], other[name]]) for name in one}
    joined["salient_rows"][6 - len(joined["salient_rows"]) :] += 3
    stacked = decompose(
        torch.cat([top, bottom]), joined["salient_rows"], joined["salient_columns"], Scheme(12, scheme.grid)
    )
    for name, part in stacked.items():
        assert torch.equal(part, joined[name]), name
    both = reconstruct(joined, in_features, scheme)
    assert torch.equal(both[:3], reconstruct(one, in_features, scheme))
    assert torch.equal(both[3:], reconstruct(other, in_features, scheme))


@pytest.mark.parametrize("size", GROUP_SIZES)
def test_a_row_slice_of_the_parts_is_the_row_slice_of_the_weight(size, split):
    _, parts, scheme = split(9, 130, 20, group_size=size)
    inside = (parts["salient_rows"] >= 2) & (parts["salient_rows"] < 6)
    sliced = {
        "weight": parts["weight"][2:6],
        "weight_scale": parts["weight_scale"][2:6] if size != "tensor" else parts["weight_scale"],
        "salient_values": parts["salient_values"][inside],
        "salient_rows": parts["salient_rows"][inside] - 2,
        "salient_columns": parts["salient_columns"][inside],
    }
    assert torch.equal(reconstruct(sliced, 130, scheme), reconstruct(parts, 130, scheme)[2:6])


@every_rule
@every_grid
@pytest.mark.parametrize("in_features", [5, 64, 70, 129, 200])
def test_reconstruct_reads_the_bytes_as_the_format_says(
    in_features, size, rule, split, dense_by_hand, device
):
    weight, parts, scheme = split(6, in_features, 9, group_size=size, scale=rule, device=device)
    by_hand = dense_by_hand(parts, in_features, scheme.grid.columns(in_features))
    dense = reconstruct(parts, in_features, scheme).cpu().numpy()
    np.testing.assert_allclose(dense, by_hand, rtol=2.0**-24, atol=0)  # scale times code in float32
    error = np.linalg.norm(weight.cpu().numpy() - by_hand) / np.linalg.norm(weight.cpu().numpy())
    assert relative_error(weight, parts, scheme) == pytest.approx(error, rel=1e-5)  # float32 differences


def test_blocks_reuse_one_buffer_and_never_hold_the_weight(split, monkeypatch):
    _, parts, scheme = split(40, 130, 50)
    whole = reconstruct(parts, 130, scheme)
    monkeypatch.setattr(rounding, "WORKING_SET", 7 * 192)
    pieces, buffers = [], set()
    for rows, block in dense_blocks(parts, 130, 64):
        assert block.shape == (rows.stop - rows.start, 130)
        assert block.untyped_storage().nbytes() <= 4 * 7 * 192
        buffers.add(block.untyped_storage().data_ptr())
        pieces.append(block.clone())
    assert len(pieces) == 6  # 40 rows in sevens
    assert len(buffers) == 1
    assert torch.equal(torch.cat(pieces), whole)


def test_more_rows_than_a_block_of_the_usual_size(split, dense_by_hand, device):
    _, parts, scheme = split(300, 1100, 500, device=device)
    assert len(list(dense_blocks(parts, 1100, 64))) == 2
    dense = reconstruct(parts, 1100, scheme).cpu().numpy()
    np.testing.assert_array_equal(dense, dense_by_hand(parts, 1100, 64))  # 8 bits times 4 are exact


def test_relative_error_of_zeros_is_zero_and_of_huge_weights_a_number(split):
    scheme = Scheme(0, Grid(64))
    assert relative_error(torch.zeros(3, 70), by_magnitude(torch.zeros(3, 70), scheme), scheme) == 0.0
    weight = torch.randn(3, 70)
    expected = relative_error(weight, by_magnitude(weight, scheme), scheme)
    for power in (-100, 120):
        scaled = weight * 2.0**power
        # Divided by its largest entry, each weight is rounded anew.
        found = relative_error(scaled, by_magnitude(scaled, scheme), scheme)
        assert found == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    ("out", "in_features", "scheme", "shapes"),
    [
        (8, 96, Scheme(3), [(8, 64), (8, 2), (3,)]),
        (8, 64, Scheme(3, Grid(8)), [(8, 32), (8, 8), (3,)]),
        (8, 65, Scheme(0.01, Grid(128)), [(8, 64), (8, 1), (5,)]),
        (8, 65, Scheme(0, Grid("row")), [(8, 64), (8, 1), (0,)]),
        (8, 65, Scheme(10**9, Grid("tensor")), [(8, 64), (1, 1), (520,)]),
        (8, 65, Scheme(3, Grid(bits=3)), [(8, 2, 24), (8, 2), (3,)]),
        (8, 64, Scheme(3, Grid(bits=8)), [(8, 1, 64), (8, 1), (3,)]),
    ],
)
def test_part_specs(out, in_features, scheme, shapes):
    packed, scale, salient = shapes
    scale_dtype = torch.bfloat16 if isinstance(scheme.grid.group_size, int) else torch.float32
    assert part_specs(out, in_features, scheme) == {
        "weight": (packed, torch.int8),
        "weight_scale": (scale, scale_dtype),
        "salient_values": (salient, torch.float32),
        "salient_rows": (salient, torch.int32),
        "salient_columns": (salient, torch.int32),
    }


def put(name, index, value):
    """Damage: one entry of one part."""

    def damage(parts):
        parts[name][index] = value

    return damage


def replace(name, change):
    """Damage: a part put in place of another."""

    def damage(parts):
        parts[name] = change(parts[name])

    return damage


def swap_first_positions(parts):
    for name in ("salient_rows", "salient_columns"):
        parts[name][:2] = parts[name][:2].flip(0)


def repeat_first_position(parts):
    for name in ("salient_rows", "salient_columns"):
        parts[name][1] = parts[name][0]


def code_at_a_salient_position(parts):
    row, column = int(parts["salient_rows"][2]), int(parts["salient_columns"][2])
    byte = 32 * (column // 64) + column % 32
    # Zero is the nibble 8, the top bit: flipping the lowest one makes it 9, the code 1.
    parts["weight"][row, byte] ^= 1 if column % 64 < 32 else 1 << 4


NAMES = ["weight", "weight_scale", "salient_values", "salient_rows", "salient_columns"]
WRONG = {
    **{f"{name} missing": (lambda parts, name=name: parts.pop(name), f"{name} is missing") for name in NAMES},
    **{f"{name} None": (replace(name, lambda part: None), f"{name} is missing") for name in NAMES},
    **{
        f"{name} of another dtype": (
            replace(name, lambda part: part.double()),
            rf"{name} is .* torch.float64",
        )
        for name in NAMES
    },
    "weight too narrow": (replace("weight", lambda part: part[:, :32]), r"weight is \[5, 32\] torch.int8"),
    "weight_scale too wide": (
        replace("weight_scale", lambda part: part.repeat(1, 2)),
        r"weight_scale is \[5, 4\] torch.bfloat16, where the config says \[5, 2\] torch.bfloat16",
    ),
    "salient_values too few": (replace("salient_values", lambda part: part[1:]), r"salient_values is \[5\]"),
    "salient_rows too many": (
        replace("salient_rows", lambda part: part.repeat(2)),
        r"salient_rows is \[12\] torch.int32, where the config says \[6\] torch.int32",
    ),
    "scale NaN": (put("weight_scale", (1, 1), torch.nan), "weight_scale has a NaN or an infinity"),
    "scale infinite": (put("weight_scale", (1, 1), torch.inf), "weight_scale has a NaN or an infinity"),
    "salient NaN": (put("salient_values", 0, torch.nan), "salient_values has a NaN or an infinity"),
    "salient infinite": (put("salient_values", 0, -torch.inf), "salient_values has a NaN or an infinity"),
    "row negative": (put("salient_rows", 0, -1), r"salient_rows has -1, which is not in 0\.\.4"),
    "row too large": (put("salient_rows", -1, 5), r"salient_rows has 5, which is not in 0\.\.4"),
    "column negative": (put("salient_columns", 0, -3), r"salient_columns has -3, which is not in 0\.\.69"),
    # 70 is inside the packed row, in its padding.
    "column in the padding": (put("salient_columns", 0, 70), r"salient_columns has 70, .* not in 0\.\.69"),
    "positions unsorted": (swap_first_positions, "out of order, or one is there twice"),
    "position twice": (repeat_first_position, "out of order, or one is there twice"),
    "code at a salient position": (code_at_a_salient_position, "not zero at a salient position"),
    # The last byte's high nibble is code 127 of a row of 70.
    "code in the padding": (put("weight", (3, -1), 0x78), "not zero in its padding"),
}


@pytest.mark.parametrize("case", WRONG)
def test_damaged_parts_are_refused(case, split):
    _, parts, scheme = split(5, 70, 6)
    check_parts(parts, 70, scheme)
    damage, message = WRONG[case]
    parts = {name: part.clone() for name, part in parts.items()}
    damage(parts)
    with pytest.raises(ValueError, match=message):
        check_parts(parts, 70, scheme)


def inverted_code_at_a_salient_position(parts):
    row, column = int(parts["salient_rows"][0]), int(parts["salient_columns"][0])
    # code i of a block has its lowest bit in byte i % 16 (3 bits) or byte i (8 bits)
    size = parts["weight"].shape[2]
    place = column % 64 % 16 if size == 24 else column % 64
    parts["weight"][row, column // 64, place] ^= -1


OTHER = {
    "code at a salient position": (inverted_code_at_a_salient_position, "not zero at a salient position"),
    # The last byte has the code 127 of a row of 70, or its top bit.
    "code in the padding": (put("weight", (3, 1, -1), 5), "not zero in its padding"),
    "a block missing": (replace("weight", lambda part: part[:, :1]), r"weight is \[5, 1, .*says \[5, 2, "),
    "flat": (replace("weight", lambda part: part.flatten(1)), r"weight is \[5, .*says \[5, 2, "),
    "bytes": (replace("weight", lambda part: part.view(torch.uint8)), r"weight is .* torch.uint8"),
}


@pytest.mark.parametrize("bits", [3, 8])
@pytest.mark.parametrize("case", OTHER)
def test_damaged_parts_of_other_bits_are_refused(case, bits, split):
    _, parts, scheme = split(5, 70, 6, bits=bits)
    check_parts(parts, 70, scheme)
    damage, message = OTHER[case]
    damage(parts)
    with pytest.raises(ValueError, match=message):
        check_parts(parts, 70, scheme)


def test_a_byte_that_is_no_code_of_8_bits_is_refused(split):
    _, parts, scheme = split(5, 70, 0, bits=8)
    parts["weight"][2, 0, 7] = -128
    with pytest.raises(ValueError, match="weight has the code -128, where codes of 8 bits are -127 and more"):
        check_parts(parts, 70, scheme)


def test_levels_of_3_bits_without_zero_are_refused(split):
    _, parts, scheme = split(5, 70, 6, bits=3, levels="normal")
    assert parts["levels"].tolist() == [-127, -80, -49, -23, 0, 27, 57, 97]
    parts["levels"][4] = 2
    with pytest.raises(ValueError, match="levels has 2 for code zero, which must be 0"):
        check_parts(parts, 70, scheme)


@pytest.mark.parametrize("bits", [3, 8])
def test_rows_of_other_bits_are_taken_out_as_they_are(bits, split):
    _, parts, scheme = split(9, 70, 20, bits=bits)
    rows = torch.tensor([7, 0, 7, 3])
    dense = reconstruct(parts, 70, scheme)
    assert torch.equal(reconstruct(take_rows(parts, rows), 70, scheme), dense[rows])


def test_a_part_of_another_scheme_is_refused(split):
    _, parts, _ = split(5, 70, 6)
    for other in (Scheme(6, Grid("row")), Scheme(6, Grid(8)), Scheme(6, Grid("tensor"))):
        with pytest.raises(ValueError, match=r"weight_scale is .*, where the config says"):
            check_parts(parts, 70, other)
    with pytest.raises(ValueError, match=r"salient_values is \[6\].* says \[7\]"):
        check_parts(parts, 70, Scheme(7))


def test_weight_without_dimensions_is_refused():
    with pytest.raises(ValueError, match="weight is \\[\\]"):
        check_parts({"weight": torch.tensor(1, dtype=torch.int8)}, 4, Scheme())


def test_rows_are_taken_of_parts_that_are_not_contiguous(split):
    _, parts, scheme = split(5, 70, 4)
    spread = {**parts, "salient_rows": torch.stack([parts["salient_rows"]] * 2, 1)[:, 0]}
    rows = torch.tensor([4, 0, 4])
    assert torch.equal(reconstruct(take_rows(spread, rows), 70, scheme), reconstruct(parts, 70, scheme)[rows])
