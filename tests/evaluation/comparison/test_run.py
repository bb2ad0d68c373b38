"""Whole comparisons of tiny models: each kind, the same model twice, and what cannot be compared."""

import json
import shutil
import subprocess
import sys

import letters
import pytest
import tiny_models as tiny
import torch
from letters import KINDS, QUICK
from transformers import (
    AutoModelForCausalLM,
    CLIPVisionConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    ViTConfig,
    ViTModel,
    WhisperFeatureExtractor,
)

from svdq_hf import SVDQConfig, quantize_model
from svdq_hf.evaluation import compare

QUICKLY = {"speed": False, "tokens": 150, "context": 32}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    for kind in KINDS:
        letters.saved(kind, folder / kind)
    return folder


@pytest.fixture
def text(tmp_path):
    file = tmp_path / "quick.txt"
    file.write_text(QUICK * 3)
    return file


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_model_has_changed_nothing_and_what_svdq_makes_is_near(kind, place, tmp_path):
    twin = shutil.copytree(place / kind, tmp_path / "twin")
    result = compare(place / kind, twin, SVDQConfig(k=4), **QUICKLY)
    json.dumps(result.to_dict())
    same, made = result.others
    quality = same.quality
    assert quality.same == (1, 1, 1)
    if quality.cosine is None:
        assert quality.kl == (0, 0, 0)
    else:
        assert quality.similarity == (0, 0, 0)
        assert quality.cosine.low == pytest.approx(1, abs=1e-12)
    assert quality.change in (None, (0, 0, 0))
    assert "the same answers" in same.verdict
    assert same.advice == []

    assert made.name == "svdq k=4"
    assert 0 < made.bytes < result.reference.bytes
    assert 4 < made.bits < 9
    distance = made.quality.kl or made.quality.similarity
    assert 0 < distance.low <= distance.value <= distance.high
    assert made.quality.same.value > 0.3
    assert (made.quality.loss is None) == (kind in ("labels", "token labels", "embeddings"))


def test_figures_are_those_of_the_two_models(place, text):
    """Loss and KL by hand, from both models over the same windows."""
    result = compare(place / "causal", SVDQConfig(k=4), text=text, **QUICKLY)
    dense = AutoModelForCausalLM.from_pretrained(place / "causal").eval()
    ours = quantize_model(AutoModelForCausalLM.from_pretrained(place / "causal"), SVDQConfig(k=4)).eval()
    tokenizer = letters.tokenizer()
    ids = tokenizer(text.read_text(), return_tensors="pt")["input_ids"][0, :150]
    loss, kl = 0.0, 0.0
    with torch.no_grad():
        for part in ids.split(31):
            window = torch.cat([torch.tensor([tokenizer.bos_token_id]), part])[None]
            before, after = (one(input_ids=window).logits[0, :-1].log_softmax(-1) for one in (dense, ours))
            loss -= float(after.gather(1, part[:, None]).sum())
            kl += float((before.exp() * (before - after)).sum())
    (found,) = result.others
    assert result.n == 150
    assert found.quality.loss == pytest.approx(loss / 150, rel=1e-5)
    assert found.quality.kl.value == pytest.approx(kl / 150, rel=0.02, abs=2e-6)
    assert found.quality.change.value == pytest.approx(found.quality.loss - result.reference.quality.loss)


def test_folders_and_models_in_memory_are_compared_alike(place, tmp_path, text):
    model = AutoModelForCausalLM.from_pretrained(place / "causal")
    other = quantize_model(AutoModelForCausalLM.from_pretrained(place / "causal"), SVDQConfig())
    other.save_pretrained(tmp_path / "mine")
    result = compare(model, other, tmp_path / "mine", SVDQConfig(), text=text, **QUICKLY)
    held, saved, made = result.others
    assert saved.quality == made.quality
    assert held.quality.kl.value == pytest.approx(made.quality.kl.value, rel=1e-3)
    assert (held.bytes, saved.bytes) == (None, made.bytes)
    assert (held.folder, saved.folder, made.folder) == (None, str(tmp_path / "mine"), None)


def test_a_quantized_reference_is_allowed_beside_others_and_noted(place, tmp_path, text):
    model = AutoModelForCausalLM.from_pretrained(place / "causal")
    quantize_model(model, SVDQConfig(bits=8)).save_pretrained(tmp_path / "eight")
    letters.tokenizer().save_pretrained(tmp_path / "eight")
    result = compare(tmp_path / "eight", place / "causal", text=text, **QUICKLY)
    note, few = result.notes
    assert few.startswith("The intervals rest on 5 independent parts")
    assert note.startswith("The reference, eight, is quantized itself;")
    assert result.others[0].quality.kl.value > 0
    assert result.others[0].advice == []


def test_loading_and_running_are_measured_of_each_folder(place, text, monkeypatch):
    from svdq_hf.evaluation.speed import measure

    asked = []
    monkeypatch.setattr(measure, "measure_speed", lambda folder: asked.append(folder) or len(asked))
    result = compare(place / "causal", SVDQConfig(), text=text, tokens=100, context=32)
    assert [one.speed for one in result.models] == [1, 2]
    assert asked[0] == place / "causal"
    assert asked[1].name == "made-1"
    assert not asked[1].exists()  # the folder made on the way is gone


def test_a_speech_model_hears_tones_or_recordings(tmp_path, monkeypatch):
    model = tiny.FAMILIES["whisper"].loud_model()
    folder = tmp_path / "whisper"
    model.save_pretrained(folder)
    letters.tokenizer().save_pretrained(folder)
    listen = WhisperFeatureExtractor(feature_size=8, chunk_length=1, hop_length=800, n_fft=1024)
    listen.save_pretrained(folder)
    monkeypatch.setattr("svdq_hf.evaluation.comparison.sound.can_read_aloud", lambda: False)
    result = compare(folder, SVDQConfig(k=4), speech=True, tokens=30, speed=False)
    assert result.measured_on.startswith("tones")
    assert result.others[0].quality.kl.value > 0
    assert result.others[0].quality.change is None
    with pytest.raises(ValueError, match="must be read aloud by espeak-ng"):
        compare(folder, SVDQConfig(), text=__file__)


def test_the_language_part_of_a_vision_text_model_is_compared(tmp_path):
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    pictures = CLIPVisionConfig(**sizes, image_size=16, patch_size=8)
    config = LlavaConfig(vision_config=pictures, text_config=tiny.llama_config(), image_token_index=95)
    LlavaForConditionalGeneration(config).save_pretrained(tmp_path / "llava")
    letters.tokenizer().save_pretrained(tmp_path / "llava")
    result = compare(tmp_path / "llava", SVDQConfig(k=4), **QUICKLY)
    assert result.counted == "tokens"
    assert result.others[0].quality.kl.value > 0


@pytest.mark.parametrize(
    ("kind", "choices", "message"),
    [
        ("causal", {"task": "rte"}, "--task: for classifiers of texts, and LlamaForCausalLM is none"),
        ("causal", {"speech": True}, "--speech: LlamaForCausalLM is no speech model"),
        ("causal", {"data": "somewhere"}, "--data: goes with --task, or with a speech model"),
        ("causal", {"text": "nowhere.txt"}, "--text nowhere.txt: no such file; leave it out"),
        ("causal", {"out": __file__}, "--out .*test_run.py is a file, no folder; name another folder"),
        ("causal", {"out": f"{__file__}/page"}, "--out .*test_run.py is a file, no folder"),
        ("causal", {"tokens": 1}, "tokens=1: must be a whole number from 2 on"),
        ("causal", {"context": 999}, "context 999: must be from 2 to 40"),
        ("causal", {"speech": True, "task": "rte"}, "--task and --speech: .* one thing at a time"),
        ("causal", {"card": True}, "--card: none of the compared models is a folder quantized by svdq"),
        ("causal", {"tokens": "100"}, "tokens='100' is a str"),
        ("causal", {"token": 100}, "unexpected keyword argument 'token'"),
        ("labels", {"task": "rt"}, "task 'rt': must be one of"),
    ],
)
def test_choices_that_do_not_fit_are_refused_in_one_line(kind, choices, message, place):
    with pytest.raises(ValueError, match=message) as refused:
        compare(place / kind, SVDQConfig(), **choices)
    assert "\n" not in str(refused.value)


def test_a_text_that_is_too_short_is_refused(place, tmp_path):
    (tmp_path / "short.txt").write_text("a")
    with pytest.raises(ValueError, match="the text has 1 tokens; at least 2 are needed"):
        compare(place / "causal", SVDQConfig(), text=tmp_path / "short.txt")
    (tmp_path / "short.txt").write_text("ab")
    with pytest.raises(ValueError, match="the text is too short"):
        compare(place / "masked", SVDQConfig(), text=tmp_path / "short.txt")


def test_models_that_answer_other_things_are_refused(place, tmp_path):
    with pytest.raises(ValueError, match=r"masked is a model of another kind \(masked\) than causal"):
        compare(place / "causal", place / "masked", **QUICKLY)
    other = shutil.copytree(place / "causal", tmp_path / "other")
    letters.tokenizer(shift=5).save_pretrained(other)
    with pytest.raises(ValueError, match="other: its tokenizer is another than that of"):
        compare(place / "causal", other, **QUICKLY)
    wider = KINDS["causal"][0](tiny.llama_config(vocab_size=97))
    wider.save_pretrained(tmp_path / "wider")
    with pytest.raises(ValueError, match="wider: it chooses among 97 answers, the reference among 96"):
        compare(place / "causal", tmp_path / "wider", **QUICKLY)
    torch.manual_seed(0)
    ViTModel(ViTConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64,
                       image_size=32)).save_pretrained(tmp_path / "pictures")  # fmt: skip
    with pytest.raises(ValueError, match="pictures: a ViTModel reads or answers what svdq compare has no"):
        compare(tmp_path / "pictures", SVDQConfig(), **QUICKLY)


@pytest.mark.slow
def test_only_pages_and_tasks_need_the_extra():
    """The libraries of the extra `evaluate` are missing, and the rest is imported all the same."""
    missing = "import sys; sys.modules.update(dict.fromkeys(['datasets', 'matplotlib', 'sklearn', 'scipy']))"
    home = "svdq_hf.evaluation.comparison"
    page = f"try:\n    {home}.run.check_page()\nexcept ImportError as error:\n    print(error)"
    code = f"{missing}\nimport {home}.run\n{page}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "the pictures need matplotlib: pip install -e '.[evaluate]'" in done.stdout


def test_a_reference_without_a_tokenizer_is_refused(tmp_path):
    KINDS["causal"][0](tiny.llama_config()).save_pretrained(tmp_path / "mute")
    with pytest.raises(ValueError, match="mute: has no tokenizer that can be loaded; save the model's own"):
        compare(tmp_path / "mute", SVDQConfig())


def test_a_speed_that_cannot_be_measured_is_a_note(place, text, monkeypatch):
    from svdq_hf.evaluation.speed import measure

    def fails(folder):
        raise ValueError("it stops")

    monkeypatch.setattr(measure, "measure_speed", fails)
    result = compare(place / "causal", SVDQConfig(k=4), text=text, tokens=60, context=32)
    assert result.others[0].speed is None
    assert "Speed and memory of causal were not measured: it stops" in result.notes
