"""Speech models: what they are told, what is scored, with and without a text."""

import letters
import pytest
import tiny_models as tiny
import torch
from torch.nn import functional as F

from svdq_hf.evaluation.comparison.answers import Reference
from svdq_hf.evaluation.comparison.sound import Clip
from svdq_hf.evaluation.comparison.speech import HeardFrames, SpokenClips, heard

CLIP = Clip(torch.linspace(0, 1, 160), "the fox")


def listen(sound, **about):
    assert about == {"sampling_rate": 16000, "return_tensors": "pt"}
    return {"input_features": torch.from_numpy(sound).view(1, 8, 20)}


@pytest.fixture
def whisper():
    return tiny.FAMILIES["whisper"].loud_model()


def test_the_decoder_is_told_its_start_and_the_text(whisper):
    tokenizer = letters.tokenizer()
    found = heard(CLIP, tokenizer, listen, whisper.config)
    text = tokenizer(" the fox")["input_ids"]
    assert found.told.tolist() == [[whisper.config.decoder_start_token_id, *text]]
    assert found.wanted.tolist() == [*text, tokenizer.eos_token_id]
    assert found.start == 1


def test_a_text_is_cut_to_what_the_decoder_has_positions_for(whisper):
    found = heard(Clip(CLIP.sound, "so " * 50), letters.tokenizer(), listen, whisper.config)
    assert found.told.shape == (1, whisper.config.max_target_positions)
    assert found.wanted.numel() == whisper.config.max_target_positions


def test_loss_is_that_of_the_text_and_its_end(whisper, tmp_path):
    clip = heard(CLIP, letters.tokenizer(), listen, whisper.config)
    found = SpokenClips([clip, clip], "read", True, Reference(tmp_path))(whisper)
    with torch.no_grad():
        logits = whisper(**clip.inputs, decoder_input_ids=clip.told).logits[0]
    expected = float(F.cross_entropy(logits, clip.wanted))
    assert float(found.loss.mean()) == pytest.approx(expected, rel=1e-5)
    assert found.n == 2 * clip.wanted.numel()
    assert found.block.unique().tolist() == [0, 1]


def test_tones_have_no_loss(whisper, tmp_path):
    clip = heard(CLIP, letters.tokenizer(), listen, whisper.config)
    reference = Reference(tmp_path)
    measure = SpokenClips([clip], "tones", False, reference)
    first, second = measure(whisper), measure(whisper)
    assert (first.loss, first.right) == (None, None)
    assert second.kl.tolist() == [0.0] * clip.wanted.numel()


def test_frames_of_a_model_without_a_decoder(tmp_path):
    class Frames:
        def __call__(self, input_features):
            return type("Output", (), {"logits": input_features.transpose(1, 2)})

    found = HeardFrames([listen(CLIP.sound.numpy(), sampling_rate=16000, return_tensors="pt")], "x",
                        Reference(tmp_path))(Frames())  # fmt: skip
    assert (found.n, found.loss) == (20, None)
