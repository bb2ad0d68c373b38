"""Sound: recordings, tones, and a text read aloud where the program for it is installed."""

import shutil
import wave

import pytest
import torch

from svdq_hf.evaluation.comparison import sound


def write(file, samples, rate=16000, channels=1, width=2):
    with wave.open(str(file), "wb") as opened:
        opened.setnchannels(channels)
        opened.setsampwidth(width)
        opened.setframerate(rate)
        opened.writeframes(samples.to(torch.int16).numpy().tobytes())


def test_a_recording_is_read_with_its_text(tmp_path):
    write(tmp_path / "b.wav", 2**14 * torch.ones(50))
    write(tmp_path / "a.wav", torch.tensor([2**14, -5]).repeat(40), channels=2)
    for name in "ab":
        (tmp_path / f"{name}.txt").write_text(f"what {name} says")
    first, second = sound.recordings(tmp_path)
    assert (first.text, second.text) == ("what a says", "what b says")
    torch.testing.assert_close(second.sound, 0.5 * torch.ones(50))
    torch.testing.assert_close(first.sound, 0.5 * torch.ones(40))  # the first of two channels


def test_a_fast_recording_is_slowed_down(tmp_path):
    write(tmp_path / "a.wav", 2**14 * torch.ones(441), rate=44100)
    assert sound.recorded(tmp_path / "a.wav").numel() == 160


def test_what_is_no_recording_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"no NAME\.wav is there"):
        sound.recordings(tmp_path)
    (tmp_path / "a.wav").write_bytes(b"RIFF nothing")
    with pytest.raises(ValueError, match=r"a\.wav has no a\.txt"):
        sound.recordings(tmp_path)
    (tmp_path / "a.txt").write_text("hello")
    with pytest.raises(ValueError, match="convert it to PCM of 16 bits"):
        sound.recordings(tmp_path)
    write(tmp_path / "a.wav", torch.ones(80), rate=8000)
    with pytest.raises(ValueError, match="16 bits, 8000 Hz; convert it"):
        sound.recordings(tmp_path)


def test_tones_are_loud_differ_and_are_the_same_each_time():
    first, second = sound.tones(0, seconds=0.5), sound.tones(1, seconds=0.5)
    assert first.shape == second.shape == (8000,)
    assert torch.equal(first, sound.tones(0, seconds=0.5))
    assert not torch.allclose(first, second, atol=0.1)
    assert 0.1 < float(first.abs().max()) <= 1


def test_the_program_is_named_where_it_is_missing(monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(ValueError, match="apt-get install espeak-ng"):
        sound.spoken("hello")


@pytest.mark.skipif(shutil.which("espeak-ng") is None, reason="espeak-ng reads aloud")
def test_speech_is_a_wave_of_16_khz():
    found = sound.spoken("one two three four five six seven")
    assert 1.5 < found.numel() / 16000 < 6
    assert 0.1 < float(found.abs().max()) <= 1.2
