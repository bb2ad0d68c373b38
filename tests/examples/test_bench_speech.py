"""The quality bench's speech: what is heard, what is scored, and a tiny Whisper on it."""

import sys
from types import SimpleNamespace

import pytest
import tiny_models as tiny
import torch
from places import EXAMPLES
from torch.nn import functional as F

sys.path.insert(0, str(EXAMPLES))
import bench_quality as bq  # examples are no package
import quality_speech as speech

from svdq_hf.evaluation.comparison import sound

LAST = 3


class Words:
    """A tokenizer: a word is a token, its letters' sum."""

    def __call__(self, text, **_):
        return {"input_ids": [10 + sum(map(ord, word)) % 50 for word in text.split()]}

    def convert_tokens_to_ids(self, names):
        return LAST if names == "<|endoftext|>" else list(range(4, 4 + len(names)))


def listen(sound, **about):
    assert about["sampling_rate"] == 16000
    return SimpleNamespace(input_features=torch.from_numpy(sound)[None, :160].view(1, 8, 20))


@pytest.fixture
def task(tmp_path, monkeypatch):
    monkeypatch.setattr(sound, "WORDS", 5)
    monkeypatch.setattr(speech, "spoken", lambda text: torch.linspace(0, 1, 8 * 20) * len(text))
    file = tmp_path / "read.txt"
    file.write_text("the quick brown fox jumps over the lazy dog and runs away from it all today " * 2)
    return speech.SpeechTask(file, Words(), listen, tokens=7, held=5)


def test_clips_are_scored_from_the_start_and_held_at_the_end(task):
    assert [batch["decoder_input_ids"].shape[1] for batch in task.batches] == [9, 9]
    assert [batch["decoder_input_ids"].shape[1] for batch in task.calibration()] == [9]
    first, last = (part[0]["decoder_input_ids"][0].tolist() for part in (task.batches, task.held))
    assert first == [4, 5, 6, 7, *Words()("the quick brown fox jumps")["input_ids"]]
    # 32 words are six clips, and two are left out
    assert last[4:] == Words()("and runs away from it")["input_ids"]


def test_loss_is_the_models_own_on_the_text_and_its_end(task):
    model = tiny.FAMILIES["whisper"].loud_model()
    with torch.no_grad():
        found = task(model)
    total, n = 0.0, 0
    for batch in task.batches:
        ids = batch["decoder_input_ids"]
        with torch.no_grad():
            logits = model(**batch).logits[0]
        told = [*ids[0].tolist()[4:], LAST]
        total += sum(
            float(F.cross_entropy(logits[3 + place], torch.tensor(token))) for place, token in enumerate(told)
        )
        n += len(told)
    assert found["n"] == n == 12
    assert found["loss"] == pytest.approx(total / n, rel=1e-5)
    assert 0 <= found["metrics"]["right"] <= 1


def test_cells_of_a_speech_model(task, tmp_path):
    bench = bq.Bench(tiny.FAMILIES["whisper"].loud_model(), "tiny", task, tmp_path / "out")
    bench.run(["svdq default", "svdq calibrated"])
    cells = {cell["method"]: cell for cell in bq.read(tmp_path / "out")}
    assert cells["fp32"]["kl"] == 0.0
    assert cells["svdq default"]["kl"] > 0
    assert cells["svdq calibrated"]["bits"] > 3
    assert "right" in bq.table(cells.values())


def test_a_text_that_is_too_short_is_refused(task, tmp_path):
    with pytest.raises(ValueError, match="fewer than 7 to score and 500 to hold"):
        speech.SpeechTask(tmp_path / "read.txt", Words(), listen, tokens=7, held=500)
