"""Native decoding of packed states: bit for bit as plain torch, on every path, and where it is missing."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from svdq_hf.core.state_codes import StateFormat, decode, encode, outlier_channels
from svdq_hf.kernels.native import library as native
from svdq_hf.kernels.native import states as native_states

FORMS = [StateFormat(bits) for bits in (2, 3, 4, 8)] + [
    StateFormat(bits, outliers=True) for bits in (2, 3, 4)
]
PATHS = range(min(native.best_path(), native.AVX2) + 1)
FILL = 7.0
"""What is in the dense tensor before; it must stay behind the packed tokens."""


def packed_states(form: StateFormat, head_dim: int, tokens: int = 77):
    torch.manual_seed(head_dim)
    dense = torch.randn(2, 3, tokens, head_dim)
    dense[..., 5] *= 20
    channels = outlier_channels(dense) if form.outliers else None
    return encode(dense, form, channels), channels


@pytest.mark.skipif(native_states.decoding() is None, reason="no C compiler built the native library")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("head_dim", [64, 192, 1024])
@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("path", PATHS)
def test_native_is_torch_bit_for_bit(path, form, head_dim, dtype):
    packed, channels = packed_states(form, head_dim)
    for part in (packed, packed[:, :, 5:], packed[:, :, :0], packed[:, :, 3:4]):  # views, as after a crop
        count = part.shape[-2]
        dense = torch.full((2, 3, count + 4, head_dim), FILL, dtype=dtype)
        assert native_states._supports(dense, part)
        native_states.decode_into(dense, part, form, channels, path)
        assert torch.equal(dense[:, :, :count], decode(part, head_dim, form, channels).to(dtype))
        assert (dense[:, :, count:] == FILL).all()


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_threads_share_the_tokens(threads):
    form = StateFormat(4, outliers=True)
    packed, channels = packed_states(form, 64, tokens=400)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        dense = torch.empty(2, 3, 400, 64)
        native_states.decode_into(dense, packed, form, channels)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(dense, decode(packed, 64, form, channels))


@pytest.mark.parametrize(
    ("head_dim", "dtype"),
    [(80, torch.float32), (16, torch.bfloat16), (64, torch.float16), (2048, torch.float32)],
)
def test_what_the_library_does_not_take_torch_does(head_dim, dtype):
    form = StateFormat(4, outliers=True)
    packed, channels = packed_states(form, head_dim)
    dense = torch.full((2, 3, 80, head_dim), FILL, dtype=dtype)
    assert not native_states._supports(dense, packed)
    native_states.decode_into(dense, packed, form, channels)
    assert torch.equal(dense[:, :, :77], decode(packed, head_dim, form, channels).to(dtype))
    assert (dense[:, :, 77:] == FILL).all()


def test_batches_that_are_not_evenly_apart_are_for_torch():
    form = StateFormat(4)
    packed, _ = packed_states(form, 64)
    every_other = packed.repeat_interleave(2, 0)[::2]
    dense = torch.empty(2, 3, 77, 64)
    assert not native_states._supports(dense, every_other)
    native_states.decode_into(dense, every_other, form, None)
    assert torch.equal(dense, decode(packed, 64, form, None))


def test_without_the_library_or_with_an_older_one(monkeypatch):
    form = StateFormat(4, outliers=True)
    packed, channels = packed_states(form, 64)
    for loaded in (None, object()):
        monkeypatch.setattr(native, "library", lambda loaded=loaded: loaded)
        native_states.decoding.cache_clear()
        dense = torch.empty(2, 3, 77, 64)
        native_states.decode_into(dense, packed, form, channels)
        assert native_states.decoding() is None
        assert torch.equal(dense, decode(packed, 64, form, channels))
    native_states.decoding.cache_clear()


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("gcc") is None, reason="no gcc, whose sanitizers this needs")
def test_sanitizers_see_no_byte_beyond_a_buffer_and_nothing_undefined(tmp_path):
    program = tmp_path / "check"
    flags = ["-g", "-O1", "-std=gnu11", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
    source = Path(native.__file__).parent
    check = Path(__file__).parent / "check_states.c"
    built = subprocess.run(
        ["gcc", *flags, f"-I{source}", str(check), "-lm", "-o", str(program)], capture_output=True, text=True
    )
    if "cannot find" in built.stderr:
        pytest.skip("gcc has no sanitizers here")
    assert built.returncode == 0, built.stderr
    done = subprocess.run([program], capture_output=True, text=True, env={**os.environ, "LD_PRELOAD": ""})
    assert done.returncode == 0, done.stdout + done.stderr
    assert int(done.stdout) == 4 * 3 * 8 * 4 * (1 + 7 + 8 + 65)
