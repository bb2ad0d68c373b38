"""Speed and memory of a tiny model in a process of its own, and how what goes wrong there is told."""

import os
import signal

import pytest
from tiny_models import bert, llama

from svdq_hf import SVDQConfig, quantize_model
from svdq_hf.evaluation.speed.measure import measure_speed
from svdq_hf.evaluation.speed.memory import STATUS
from svdq_hf.evaluation.speed.process import ModelProcess


def test_a_quantized_causal_model(tmp_path):
    model = quantize_model(llama(hidden_size=256, intermediate_size=512, vocab_size=2048), SVDQConfig(k=8))
    model.save_pretrained(tmp_path)
    facts = measure_speed(tmp_path, dtype="bfloat16", prompt_tokens=16, new_tokens=4, threads=1)
    assert facts.prompt_tokens == 16
    assert facts.prefill_tokens_per_second > 0
    assert facts.decode_tokens_per_second is not None
    assert facts.decode_tokens_per_second > 0
    assert facts.load_seconds > 0
    assert set(facts.to_dict()) == set(vars(facts))
    if STATUS.is_file():  # Linux
        assert 0 < facts.run_peak_anonymous_bytes <= facts.run_peak_bytes
        assert 0 < facts.load_peak_anonymous_bytes <= facts.load_peak_bytes < 200e6


def test_a_process_answers_on_after_an_error_and_an_encoder_does_not_decode(tmp_path):
    bert().save_pretrained(tmp_path)
    with ModelProcess(threads=1) as process:
        with pytest.raises(ValueError, match=r"^no model is loaded$"):
            process.ask("prefill", tokens=8)
        with pytest.raises(ValueError, match=r"^/not/there: no such folder .*"):
            process.ask("load", folder="/not/there")
        process.ask("load", folder=str(tmp_path))
        assert process.ask("decode", prompt_tokens=8, new_tokens=4) == {"tokens": None, "seconds": None}
        assert process.ask("prefill", tokens=1000)["tokens"] == 38  # of 40 positions
        os.kill(process.pid, signal.SIGKILL)
        with pytest.raises(ValueError, match="was killed, most often since memory ran out"):
            process.ask("prefill", tokens=8)


@pytest.mark.parametrize(
    ("choices", "told"),
    [
        ({"dtype": "int8"}, "dtype='int8': must be one of"),
        ({"prompt_tokens": 0}, "prompt_tokens=0: must be at least 1"),
        ({"new_tokens": 1}, "new_tokens=1: must be at least 2"),
        ({"threads": 0}, "threads=0: must be at least 1, or None"),
        ({"new_tokens": "8"}, "new_tokens='8'"),
    ],
)
def test_what_is_refused_before_a_process_is_started(choices, told):
    with pytest.raises(ValueError, match=told):
        measure_speed("anywhere", **choices)
