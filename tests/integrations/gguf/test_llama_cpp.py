"""llama.cpp itself loads what is written, and computes what transformers does with the same file.

llama-cpp-python is compiled when it is installed, which takes minutes, so the tests do not ask for it.
"""

import ctypes

import numpy as np
import pytest
import tiny_gguf
import torch

from svdq_hf import quantize_gguf

llama_cpp = pytest.importorskip("llama_cpp")

INPUTS_IN_8_BITS = 0.02
"""llama.cpp rounds the inputs of a layer to 8 bits, in blocks of 32; of eight layers 0.007 was measured."""


@pytest.fixture(scope="module")
def backend():
    quiet = llama_cpp.llama_log_callback(lambda *told: None)
    llama_cpp.llama_log_set(quiet, ctypes.c_void_p(0))
    llama_cpp.llama_backend_init()
    return quiet


def logits(path, tokens):
    """Logits `[tokens, vocabulary]` by llama.cpp."""
    model = llama_cpp.llama_model_load_from_file(str(path).encode(), llama_cpp.llama_model_default_params())
    chosen = llama_cpp.llama_context_default_params()
    chosen.n_ctx, chosen.n_threads, chosen.n_threads_batch = 64, 1, 1
    context = llama_cpp.llama_init_from_model(model, chosen)
    batch = llama_cpp.llama_batch_init(len(tokens), 0, 1)
    batch.n_tokens = len(tokens)
    for place, token in enumerate(tokens):
        batch.token[place], batch.pos[place], batch.logits[place] = token, place, 1
        batch.n_seq_id[place], batch.seq_id[place][0] = 1, 0
    assert llama_cpp.llama_decode(context, batch) == 0
    size = (len(tokens), tiny_gguf.VOCABULARY)
    found = np.ctypeslib.as_array(llama_cpp.llama_get_logits(context), size).copy()
    llama_cpp.llama_free(context)
    llama_cpp.llama_model_free(model)
    return torch.from_numpy(found)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("width", [64, 256])
def test_llama_cpp_computes_what_transformers_does(backend, tied, width, tmp_path):
    """A width of 256 has its output in Q6_K; four heads that share values have those in Q5_0."""
    model = tiny_gguf.llama(spread=0.3, hidden_size=width, num_key_value_heads=1, num_hidden_layers=8)
    dropped = ["output.weight"] if tied else []
    source = tiny_gguf.write(model, tmp_path / "in.gguf", drop=dropped)
    quantize_gguf(source, tmp_path / "out.gguf")
    tokens = list(range(1, 41))
    expected = tiny_gguf.logits(tmp_path / "out.gguf", torch.tensor([tokens]))[0]
    found = logits(tmp_path / "out.gguf", tokens)
    assert (found - expected).norm() < INPUTS_IN_8_BITS * expected.norm()
