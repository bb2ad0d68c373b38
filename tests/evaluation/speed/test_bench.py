"""A model's variants side by side: which there are, rounds, ratios, and what is not measured."""

import pytest
from near_process import NearProcess
from tiny_models import bert, llama

from svdq_hf import SVDQConfig, quantize_model
from svdq_hf.evaluation.speed import bench
from svdq_hf.evaluation.speed.bench import BenchRequest, run_bench
from svdq_hf.evaluation.speed.bench_result import Measured
from svdq_hf.evaluation.speed.peers import PEERS
from svdq_hf.evaluation.speed.variants import NEEDS_DENSE, WORDS, variants


@pytest.fixture(autouse=True)
def near(monkeypatch):
    monkeypatch.setattr(bench, "ModelProcess", NearProcess)


@pytest.fixture
def quantized(tmp_path):
    quantize_model(llama(), SVDQConfig(k=4)).save_pretrained(tmp_path / "quantized")
    return tmp_path / "quantized"


def test_a_quantized_causal_model_beside_itself_dense(quantized):
    said = []
    result = run_bench(BenchRequest(quantized, tokens=(4, 8), seconds=0, only=WORDS[:3]), said.append)
    assert result.kind == "LlamaForCausalLM"
    assert result.figures == ["decode", "4", "8"]
    assert list(result.variants) == ["svdq", "fp32", "bf16"]
    assert result.rounds == 1
    for word, one in result.variants.items():
        assert all(len(one.rates[figure]) == 1 for figure in result.figures)
        assert (one.load_seconds is None) == (word != "svdq")  # dense, it is made of the quantized one
    assert result.ratios("fp32") == dict.fromkeys(result.figures, 1.0)
    assert set(result.shares) == {"prefill", "decode"}
    assert result.paths[0]["ways"].keys() == {"1", "4", "8"}
    assert result.parameters == llama().num_parameters()
    assert said == [*(f"loading {one.name}" for one in result.variants.values()), "round 1"]
    told = result.to_dict()["variants"]["svdq"]
    assert told["times_dense_fp32"] == result.ratios("svdq")


def test_a_dense_encoder_is_quantized_on_the_way_and_does_not_decode(tmp_path):
    bert().save_pretrained(tmp_path)
    request = BenchRequest(tmp_path, tokens=(4,), seconds=0, only=("svdq", "fp32"), config=SVDQConfig(k=7))
    result = run_bench(request)
    assert result.figures == ["4"]
    assert result.shares["decode"] is None
    assert {name: one.load_seconds is not None for name, one in result.variants.items()} == {
        "svdq": True,
        "fp32": True,
    }
    assert result.paths


def test_rounds_are_begun_while_there_is_time(quantized, monkeypatch):
    clock = iter(range(100))
    monkeypatch.setattr(bench.time, "perf_counter", lambda: next(clock))
    running = bench._Running(BenchRequest(quantized), None, lambda text: None)
    assert running.rounds(2.5) == 2  # a third would end after them


def test_a_variant_that_does_not_fit_into_memory_is_told(quantized, monkeypatch):
    monkeypatch.setattr(bench, "free_memory", lambda: 1000)
    result = run_bench(BenchRequest(quantized, tokens=(4,), seconds=0, only=WORDS[:2]))
    assert list(result.variants) == ["svdq"]
    assert result.missing["dense FP32"].startswith("needs 0.0 GB of memory")
    assert result.ratios("svdq") == {}


def test_a_variant_that_fails_is_told_and_the_own_model_is_an_error(quantized, monkeypatch):
    real = NearProcess.ask

    def ask(self, do, **given):
        if do == "load" and given.get("dtype") == "bfloat16":
            raise ValueError("no bfloat16 here")
        return real(self, do, **given)

    monkeypatch.setattr(NearProcess, "ask", ask)
    result = run_bench(BenchRequest(quantized, tokens=(4,), seconds=0, only=WORDS[:3]))
    assert result.missing == {"dense bfloat16": "no bfloat16 here"}
    for file in quantized.glob("*.safetensors"):
        file.write_bytes(b"damaged")
    with pytest.raises(Exception, match=r"model\.safetensors"):
        run_bench(BenchRequest(quantized, tokens=(4,), only=("svdq",)))


def test_variants_of_a_quantized_folder_with_and_without_the_dense_one(tmp_path, monkeypatch):
    for word, peer in PEERS.items():
        monkeypatch.setitem(PEERS, word, peer._replace(package="json"))  # as if it were installed
    without = {one.word: one for one in variants(tmp_path, "svdq", None, None)}
    assert set(without) == set(WORDS)
    assert without["fp32"].load["dequantize"]
    assert without["nf4"].missing == NEEDS_DENSE
    beside = {one.word: one for one in variants(tmp_path, "svdq", tmp_path / "dense", None)}
    assert [one.missing for one in beside.values()] == [None] * 5
    assert beside["fp32"].load == {"folder": str(tmp_path / "dense"), "dtype": "float32"}
    others = {one.word: one for one in variants(tmp_path, "bitsandbytes", None, None)}
    assert others["svdq"].name == "bitsandbytes, as saved"
    assert others["fp32"].missing == NEEDS_DENSE
    with pytest.raises(ValueError, match="only='awq': must be one of"):
        variants(tmp_path, None, None, SVDQConfig(), ("awq",))


def test_a_ratio_is_the_median_of_the_rounds_own():
    one = Measured("one", None, None, None, {"8": [1.0, 10.0, 100.0]})
    two = Measured("two", None, None, None, {"8": [1.0, 5.0, 500.0], "64": []})
    assert one.rate("8") == 10
    assert one.ratio("8", two) == 1.0
    assert one.ratio("64", two) is None
    assert two.rate("64") is None


@pytest.mark.parametrize(
    ("choices", "told"),
    [
        ({"tokens": ()}, "tokens"),
        ({"tokens": (0,)}, "tokens"),
        ({"seconds": -1}, "seconds=-1"),
        ({"threads": 0}, "threads=0"),
    ],
)
def test_impossible_numbers(choices, told):
    with pytest.raises(ValueError, match=told):
        BenchRequest("model", **choices)
