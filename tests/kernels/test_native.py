"""The native library: every path against float64 and the reference; threads, bad input, its absence."""

import ctypes
import logging
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from svdq_hf.core.packing import pack
from svdq_hf.format.decode import reconstruct
from svdq_hf.format.parts import StoredWeight
from svdq_hf.kernels import cpu, reference
from svdq_hf.kernels import linear_op as op
from svdq_hf.kernels.native import library as native

HERE = Path(__file__).parent
SOURCE = Path(native.__file__).parent
PATHS = range(native.best_path() + 1)
GRIDS = [
    {"group_size": 32, "levels": "normal", "column_scale": True, "scale_bits": 8},
    {"group_size": 64, "levels": "normal", "column_scale": True, "scale_bits": 8},
    {"group_size": 64},
    {"group_size": 128, "scale_bits": 8},
    {"group_size": "row"},
    {"group_size": "tensor", "scale": "absmax"},
    {"group_size": 32, "levels": "normal", "column_scale": True, "scale_bits": 8, "bits": 3},
    {"group_size": 64, "bits": 3},
    {"group_size": 32, "scale_bits": 8, "bits": 8},
    {"group_size": "row", "column_scale": True, "bits": 8},
]
SHAPES = [(1, 64), (5, 70), (33, 129), (100, 200), (18, 1100)]
needs_library = pytest.mark.skipif(native.library() is None, reason="no C compiler built the native library")
pytestmark = needs_library


def stored(parts):
    return StoredWeight.of(parts)


@pytest.fixture(params=PATHS, ids=lambda path: ("plain", "avx2", "avx512")[path])
def path(request):
    return request.param


def test_it_was_built_here():
    """Where there is a compiler, a build that fails is not optional."""
    assert shutil.which("cc") is None or native.library() is not None


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize(("out", "in_features"), SHAPES)
def test_a_dequantized_block_is_the_references_bit_for_bit(out, in_features, grid, path, split):
    _, parts, scheme = split(out, in_features, 9, **grid)
    group = scheme.grid.columns(in_features)
    blocks = [block.clone() for _, block in cpu.dense_blocks(stored(parts), in_features, group, path)]
    assert torch.equal(torch.cat(blocks), reconstruct(parts, in_features, scheme))


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize(("out", "in_features"), SHAPES)
def test_the_product_is_exact_to_float32(out, in_features, grid, path, split):
    _, parts, scheme = split(out, in_features, 9, **grid)
    weight, bias = reconstruct(parts, in_features, scheme).double(), torch.randn(out)
    for tokens in (1, 2, 3, 8, 9, 12, 13, 16, 17, 40, 65):
        x = torch.randn(tokens, in_features)
        y = cpu.linear_on(path, x, stored(parts), bias, in_features, scheme.grid.columns(in_features))
        size = x.double().abs() @ weight.abs().T + bias.abs()
        # Each weight was rounded up to three times before, each product and sum is once: 2**-24 each.
        allowed = (in_features + 5) * 2.0**-24 * size
        assert ((y - (x.double() @ weight.T + bias)).abs() <= allowed).all(), tokens


@pytest.mark.parametrize("tokens", [3, 50, 70])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("amx", [False, True], ids=["no AMX", "AMX"])
def test_narrow_activations_are_summed_in_float32_and_rounded_once(
    amx, dtype, tokens, path, split, monkeypatch
):
    """All but many bfloat16 tokens where there is AMX: the test after this one is of those."""
    monkeypatch.setattr(cpu, "has_amx", lambda: amx)
    if cpu.way(tokens, dtype, path, amx) == cpu.BFLOAT16_ROWS:
        tokens = cpu.FEW_TOKENS
    _, parts, scheme = split(20, 300, 9)
    x = torch.randn(tokens, 300).to(dtype)
    narrow, wide = (
        cpu.linear_on(path, each, stored(parts), None, 300, scheme.grid.columns(300))
        for each in (x, x.float())
    )
    assert torch.equal(narrow, wide.to(dtype))


def test_where_there_is_amx_many_bfloat16_tokens_are_multiplied_as_the_reference_does(
    path, split, monkeypatch
):
    """It cannot be timed here; what it computes can be checked anywhere."""
    _, parts, scheme = split(20, 300, 9)
    x, bias, group = torch.randn(50, 300).bfloat16(), torch.randn(20), scheme.grid.columns(300)
    monkeypatch.setattr(cpu, "has_amx", lambda: True)
    found = cpu.linear_on(path, x, stored(parts), bias, 300, group)
    assert torch.equal(found, reference.linear(x, stored(parts), bias.bfloat16(), 300, group))


WAYS = [  # tokens, dtype, on PLAIN, AVX2, AVX512, without AMX and with it
    (16, torch.bfloat16, "DDD", "DDD"),
    (17, torch.bfloat16, "RDD", "BBB"),
    (16, torch.float32, "DDD", "DDD"),
    (17, torch.float32, "RDD", "RDD"),
    (17, torch.float16, "RDD", "RDD"),
    (64, torch.float32, "RDD", "RDD"),
    (65, torch.float32, "RRD", "RRD"),
    (65, torch.bfloat16, "RRD", "BBB"),
]


@pytest.mark.parametrize(("tokens", "dtype", "without", "with_amx"), WAYS, ids=str)
def test_the_way_to_a_product_is_chosen_by_tokens_dtype_path_and_amx(tokens, dtype, without, with_amx):
    assert cpu.way(64, torch.float32, native.AVX512, False, bits=8) == cpu.DECODED
    assert cpu.way(65, torch.float32, native.AVX512, False, bits=8) == cpu.ROWS
    letters = {cpu.DECODED: "D", cpu.ROWS: "R", cpu.BFLOAT16_ROWS: "B"}
    paths = (native.PLAIN, native.AVX2, native.AVX512)
    for amx, expected in ((False, without), (True, with_amx)):
        assert "".join(letters[cpu.way(tokens, dtype, path, amx)] for path in paths) == expected
        # the path that rounds few tokens is above the exact ones
        assert cpu.way(tokens, dtype, native.AVX512 + 1, amx) == cpu.way(tokens, dtype, native.AVX512, amx)


def test_gradients_are_those_of_the_reference(split):
    _, parts, scheme = split(33, 129, 9, **GRIDS[0])
    gradient, group = torch.randn(2, 3, 33), scheme.grid.columns(129)
    found = cpu.input_gradient(gradient, stored(parts), 129, group)
    torch.testing.assert_close(found, reference.input_gradient(gradient, stored(parts), 129, group))


@pytest.mark.parametrize("tokens", [1, 8, 40])
def test_one_thread_and_two_and_a_second_run_give_the_same_bits(tokens, path, split):
    _, parts, scheme = split(300, 200, 50, **GRIDS[0])
    x, threads = torch.randn(tokens, 200), torch.get_num_threads()
    found = []
    try:
        for number in (1, 2, 2):
            torch.set_num_threads(number)
            found.append(cpu.linear_on(path, x, stored(parts), None, 200, scheme.grid.columns(200)))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[1], found[2])


def test_one_token_gives_the_same_bits_alone_and_among_eight(split):
    _, parts, scheme = split(20, 300, 9, **GRIDS[0])
    x = torch.randn(8, 300)
    group = scheme.grid.columns(300)
    together = cpu.linear(x, stored(parts), None, 300, group)
    alone = [cpu.linear(x[i : i + 1], stored(parts), None, 300, group) for i in range(8)]
    assert torch.equal(together, torch.cat(alone))


IN_A_PROCESS_OF_ITS_OWN = """
import os, re, torch
from svdq_hf.kernels.native import library as native
assert native.library() is not None and native.parallel_of_torch() is not None
loaded = re.findall(r"\\S*lib[gi]?omp\\S*", open("/proc/self/maps").read())
print(len({os.path.realpath(file) for file in loaded}))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="Linux alone lists them in /proc")
def test_it_runs_on_the_openmp_that_torch_has_loaded_and_brings_none():
    done = subprocess.run([sys.executable, "-c", IN_A_PROCESS_OF_ITS_OWN], capture_output=True, text=True)
    assert (done.stdout.strip(), done.stderr) == ("1", "")


def wrong(parts, **changes):
    return stored({**parts, **changes})


def test_parts_that_would_be_read_beyond_their_end_are_refused(split):
    _, parts, scheme = split(5, 70, 4, **GRIDS[0])
    x, group = torch.randn(3, 70), scheme.grid.columns(70)
    for name, part in parts.items():
        damaged = [part[:-1], part.repeat(2, *[1] * (part.ndim - 1)), part.double()]
        damaged += [part.repeat_interleave(2, -1)[..., ::2]]
        for bad in damaged:
            if name == "weight" and bad.dtype == part.dtype and bad.is_contiguous():
                continue  # of another number of rows: then the other parts do not fit
            with pytest.raises(ValueError, match="not what the format stores"):
                op.linear(x, *wrong(parts, **{name: bad}), None, 70, group)


@pytest.mark.parametrize("tokens", [1, 40])
@pytest.mark.parametrize("name", ["salient_columns", "salient_rows"])
@pytest.mark.parametrize("value", [70, -1])
def test_a_position_that_does_not_exist_is_an_error(name, value, tokens, split):
    _, parts, scheme = split(5, 70, 4, **GRIDS[0])
    position = parts[name].clone()
    position[2] = value
    with pytest.raises(ValueError, match="position is out of range"):
        list(cpu.dense_blocks(wrong(parts, **{name: position}), 70, scheme.grid.columns(70)))
    with pytest.raises(ValueError, match="position is out of range"):
        cpu.linear(
            torch.randn(tokens, 70), wrong(parts, **{name: position}), None, 70, scheme.grid.columns(70)
        )


@pytest.mark.parametrize("tokens", [1, 40])
def test_positions_out_of_order_are_an_error_and_not_left_out(tokens, path, split):
    _, parts, scheme = split(100, 70, 40, **GRIDS[0])
    backwards = wrong(parts, salient_rows=parts["salient_rows"].flip(0))
    if tokens == 1 or path != native.PLAIN:
        with pytest.raises(ValueError, match="out of order"):
            cpu.linear_on(path, torch.randn(tokens, 70), backwards, None, 70, scheme.grid.columns(70))
    with pytest.raises(ValueError, match="out of order"):
        list(cpu.dense_blocks(backwards, 70, scheme.grid.columns(70), path))


def test_a_tensor_that_starts_at_an_odd_byte_is_an_error(split):
    _, parts, scheme = split(5, 70, 4)
    shifted = torch.empty(17, dtype=torch.int8)[1:].numpy().view("float32")
    odd = torch.from_numpy(shifted)
    with pytest.raises(ValueError, match="clone"):
        cpu.linear(torch.randn(1, 70), wrong(parts, salient_values=odd), None, 70, scheme.grid.columns(70))


def test_small_groups_and_doubles_are_computed_by_the_reference():
    x, codes = torch.randn(2, 64), torch.zeros(5, 64, dtype=torch.int8)
    packed = pack(codes)

    def why_not(x, packed, in_features, group):
        return cpu.supports(x, StoredWeight(packed, *[torch.empty(0)] * 4), in_features, group)

    assert why_not(x, packed, 64, 32) is None
    assert why_not(x[:, :24], packed, 24, 24) is None  # a whole row
    assert why_not(x, packed, 64, 16) == "groups of 16 are no multiples of 32 columns, nor whole rows"
    assert why_not(x.double(), packed, 64, 32) == "activations are torch.float64, and it sums in float32"
    assert why_not(x, pack(codes, 3), 64, 32) is None
    assert why_not(x, pack(codes, 8), 64, 32) is None


@pytest.fixture
def without_library(monkeypatch, tmp_path):
    """As where the package was installed without a compiler."""
    native.library.cache_clear()
    monkeypatch.setattr(native, "__file__", str(tmp_path / "__init__.py"))
    yield tmp_path
    native.library.cache_clear()


def test_without_the_library_everything_runs_and_one_line_says_what_it_costs(
    without_library, split, dense_by_hand, caplog
):
    _, parts, scheme = split(5, 70, 4)
    x, group = torch.randn(3, 70), scheme.grid.columns(70)
    with caplog.at_level(logging.WARNING):
        found = [op.linear(x, *stored(parts), None, 70, group) for _ in range(2)]
    assert torch.equal(found[0], reference.linear(x, stored(parts), None, 70, group))
    assert torch.equal(found[0], found[1])
    lines = [record.message for record in caplog.records]
    assert len(lines) == 1
    assert "several times slower" in lines[0]
    assert "C compiler" in lines[0]


@pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler")
def test_a_library_of_another_release_is_left_alone(without_library, caplog):
    source, built = without_library / "old.c", without_library / "_svdq.so"
    source.write_text("long svdq_abi(void) { return 0; }\n")
    subprocess.run(["cc", "-shared", "-fPIC", "-o", built, source], check=True)
    with caplog.at_level(logging.WARNING):
        assert native.library() is None
    assert "_svdq.so is of another release (0, not" in caplog.text
    assert ctypes.CDLL(str(built)).svdq_abi() == 0


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("gcc") is None, reason="no gcc, whose sanitizers this needs")
def test_sanitizers_see_no_byte_beyond_a_buffer_and_nothing_undefined(tmp_path):
    program = tmp_path / "check"
    flags = ["-g1", "-O1", "-std=gnu11", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
    built = subprocess.run(
        ["gcc", *flags, f"-I{SOURCE}", str(HERE / "check_native.c"), "-lm", "-o", str(program)],
        capture_output=True,
        text=True,
    )
    if "cannot find" in built.stderr:
        pytest.skip("gcc has no sanitizers here")
    assert built.returncode == 0, built.stderr
    # leaks: the memory that a thread keeps between calls is meant to stay
    environment = {**os.environ, "ASAN_OPTIONS": "detect_leaks=0", "LD_PRELOAD": ""}
    done = subprocess.run([str(program)], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    assert int(done.stdout) == 630 * (native.fast_path() + 1)


@pytest.mark.skipif(shutil.which("gcc") is None, reason="no gcc, which builds the check")
def test_threads_that_come_late_are_left_alone_for_a_while(tmp_path):
    program = tmp_path / "check"
    command = ["gcc", "-O0", "-std=gnu11", f"-I{SOURCE}", str(HERE / "check_threads.c"), "-o", str(program)]
    built = subprocess.run([*command, "-lm", "-lpthread"], capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    done = subprocess.run([str(program)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    assert int(done.stdout) > 250
