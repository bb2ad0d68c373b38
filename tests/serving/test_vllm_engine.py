"""A real vLLM engine serves our folders: what it answers is what transformers answers with the same folder.

Where `SVDQ_VLLM_PYTHON` names the Python of an environment with vLLM (docs/vllm.md makes one). The model is
a tiny random one, or the folder in `SVDQ_VLLM_MODEL`. Answers are compared in float32.
"""

import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from places import EXAMPLES, HELPERS
from served import TIE, VOCABULARY, adapted, check_answers, folder_of, loaded, misses, prompts

sys.path.insert(0, str(EXAMPLES))
from vllm_server import PYTHON, VllmServer, environment  # examples are no package

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not os.environ.get(PYTHON), reason=f"no vLLM engine: {PYTHON} is not set"),
]
COUNT, TOKENS = 24, 24
OPTIONS = ("--dtype", "float32", "--enforce-eager", "--max-model-len", "512")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    mine = os.environ.get("SVDQ_VLLM_MODEL")
    return Path(mine) if mine else folder_of(tmp_path_factory.mktemp("served"), tie=True, lm_head=True)


@pytest.fixture(scope="module")
def model(folder):
    return loaded(folder)


@pytest.fixture(scope="module")
def asked(model) -> list[list[int]]:
    return prompts(COUNT, model.config.vocab_size)


@pytest.fixture(scope="module")
def server(folder):
    with VllmServer(folder, *OPTIONS) as running:
        yield running


@pytest.fixture(scope="module")
def answers(server, asked) -> list[list[int]]:
    return [server.complete(prompt, TOKENS)["token_ids"] for prompt in asked]


def test_greedy_answers_are_those_of_transformers(answers, model, asked):
    equal = check_answers(model, asked, answers, TOKENS)
    print(f"{equal} of {COUNT} answers equal token for token")


def test_32_requests_at_once(server, model, asked):
    many = (asked * 2)[:32]
    with ThreadPoolExecutor(32) as threads:
        told = list(threads.map(lambda prompt: server.complete(prompt, TOKENS)["token_ids"], many))
    check_answers(model, many, told, TOKENS)


def test_streamed_pieces_are_the_answer(server, asked, answers):
    for prompt, answer in zip(asked[:3], answers, strict=False):
        pieces = list(server.stream(prompt, TOKENS))
        assert len(pieces) > 1
        assert [token for piece in pieces for token in piece["token_ids"] or []] == answer
        assert "".join(piece["text"] for piece in pieces) == server.complete(prompt, TOKENS)["text"]


def test_cancelled_request_ends_and_others_go_on(server, asked, answers):
    stream = server.stream(asked[0], 400)
    for _ in range(3):
        next(stream)
    assert server.metric("vllm:num_requests_running") == 1
    stream.close()
    end = time.monotonic() + 30
    while server.metric("vllm:num_requests_running") and time.monotonic() < end:
        time.sleep(0.1)
    assert server.metric("vllm:num_requests_running") == 0
    assert server.metric("vllm:generation_tokens_total") > 0
    assert server.complete(asked[1], TOKENS)["token_ids"] == answers[1]


def test_stop_and_start_again(server, folder, asked, answers):
    """The last test of this server."""
    server.stop()
    assert not server.answers()
    with VllmServer(folder, *OPTIONS) as again:
        assert again.complete(asked[0], TOKENS)["token_ids"] == answers[0]


BOUND = {"VLLM_CPU_OMP_THREADS_BIND": "0|1"}
"""A core for each of two processes."""

KINDS = {
    "layers": {},
    "head": {"lm_head": True},
    "head, embedding": {"lm_head": True, "embeddings": True},
    "embedding": {"embeddings": True},
    "3 bits": {"bits": 3, "lm_head": True, "tie": True},
    "8 bits": {"bits": 8, "lm_head": True},
    "one column scale": {"column_scale": False},
    "budget": {"target_bits": 6.0},
}


def offline(folder: Path, requests: list[dict], **variables: str) -> list:
    """What the engine answers without a server, in one process for all models."""
    asked, told = folder / "asked.json", folder / "told.json"
    asked.write_text(json.dumps(requests))
    program = [os.environ[PYTHON], str(HELPERS / "vllm_offline.py"), str(asked), str(told)]
    done = subprocess.run(program, env=environment(**variables), capture_output=True, text=True, timeout=540)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(told.read_text())


def request(folder: Path, asked: list[list[int]], **engine: object) -> dict:
    fixed = {"dtype": "float32", "enforce_eager": True, "max_model_len": 256}
    return {"engine": {"model": str(folder), **fixed, **engine}, "prompts": asked, "tokens": TOKENS}


def test_what_can_be_quantized_is_served(tmp_path):
    folders = [folder_of(tmp_path / name.replace(" ", "_"), **choices) for name, choices in KINDS.items()]
    asked = prompts(COUNT, VOCABULARY)
    told = offline(tmp_path, [request(one, asked) for one in folders], VLLM_ENABLE_V1_MULTIPROCESSING="0")
    for one, answers in zip(folders, told, strict=True):
        assert not isinstance(answers, str), (one.name, answers)
        print(one.name, check_answers(loaded(one), asked, answers, TOKENS), "of", COUNT, "equal")


@pytest.mark.parametrize("choices", [{}, {"lm_head": True, "tie": True}], ids=["layers", "tied head"])
def test_two_processes_share_a_model(tmp_path, choices):
    folder = folder_of(tmp_path / "model", **choices)
    asked = prompts(COUNT, VOCABULARY)
    [told] = offline(tmp_path, [request(folder, asked, tensor_parallel_size=2)], **BOUND)
    assert not isinstance(told, str), told
    check_answers(loaded(folder), asked, told, TOKENS)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing:FutureWarning")  # PEFT's own
@pytest.mark.parametrize("choices", [{}, {"lm_head": True, "tie": True}], ids=["layers", "tied head"])
def test_adapter_on_packed_layers(tmp_path, choices):
    folder = folder_of(tmp_path / "model", **choices)
    model = adapted(folder, tmp_path / "adapter")
    asked = prompts(COUNT, VOCABULARY)
    wanted = {**request(folder, asked, enable_lora=True), "adapter": str(tmp_path / "adapter")}
    [told] = offline(tmp_path, [wanted], VLLM_ENABLE_V1_MULTIPROCESSING="0")
    assert not isinstance(told, str), told
    check_answers(model, asked, told, TOKENS)
    plain = loaded(folder)
    assert max(float(misses(plain, *pair).max()) for pair in zip(asked, told, strict=True)) > TIE
