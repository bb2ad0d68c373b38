"""Sound for speech models: a text read aloud by espeak-ng, recordings of the user's, or tones by arithmetic.

Not here: what a model makes of it (`evaluation.comparison.speech`).
"""

import math
import shutil
import subprocess
import tempfile
import wave
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

RATE = 16000
"""Samples in a second, as speech models hear."""
WORDS = 50
"""Of a clip: less than the 30 seconds that a Whisper model hears, at `SPEED`."""
SPEED = 150
"""Words in a minute."""
READER = "espeak-ng"
VOICES = ((120.0, 3.1), (190.0, 4.3), (250.0, 5.7))
"""Pitch and syllables in a second of the voices that tones imitate."""


class Clip(NamedTuple):
    """A sound and its text.

    Attributes:
        sound: `[samples]`, float32, -1 to 1, of 16 kHz.
        text: what is said; for tones, what a model is told that it has said so far.
    """

    sound: Tensor
    text: str


def clips(text: str) -> list[str]:
    """The text in pieces of `WORDS` words, the rest left out.

    >>> [len(clip.split()) for clip in clips("so " * 120)]
    [50, 50]
    """
    words = text.split()
    whole = len(words) // WORDS * WORDS
    return [" ".join(words[start : start + WORDS]) for start in range(0, whole, WORDS)]


def can_read_aloud() -> bool:
    """Whether the program espeak-ng (Debian's package of that name) is installed."""
    return shutil.which(READER) is not None


def spoken(text: str) -> Tensor:
    """A text as a wave `[samples]` of 16 kHz, float32, -1 to 1.

    Raises:
        ValueError: the program espeak-ng is not installed.
    """
    if not can_read_aloud():
        raise ValueError("speech needs the program espeak-ng: apt-get install espeak-ng")
    with tempfile.TemporaryDirectory() as folder:
        file, told = Path(folder, "speech.wav"), Path(folder, "text.txt")
        told.write_text(text, encoding="utf-8")
        options = ["-v", "en-us", "-s", str(SPEED), "-w", str(file), "-f", str(told)]
        subprocess.run([READER, *options], check=True)
        return recorded(file)


def recorded(file: Path) -> Tensor:
    """A .wav file as a wave `[samples]` of 16 kHz, float32, -1 to 1; the first of its channels.

    Args:
        file: PCM of 16 bits.

    Raises:
        ValueError: it is no such file, or of less than 16 kHz.
    """
    try:
        with wave.open(str(file)) as sound:
            rate, width, channels = sound.getframerate(), sound.getsampwidth(), sound.getnchannels()
            data = sound.readframes(sound.getnframes())
    except (wave.Error, EOFError) as error:
        raise ValueError(f"{file}: no sound can be read ({error}); convert it to PCM of 16 bits") from error
    if width != 2 or rate < RATE or len(data) < 2 * channels:
        raise ValueError(f"{file}: {8 * width} bits, {rate} Hz; convert it to PCM of 16 bits, 16000 Hz")
    whole = torch.frombuffer(bytearray(data), dtype=torch.int16).float() / 2**15
    return resampled(whole[::channels], rate, RATE)


def resampled(sound: Tensor, rate: int, wanted: int) -> Tensor:
    """A wave `[samples]` at a lower rate, by leaving out the frequencies that it cannot hold.

    >>> tone = torch.sin(torch.arange(200) * torch.pi / 10)
    >>> bool((resampled(tone, 200, 100) - tone[::2]).abs().max() < 1e-5)
    True
    """
    samples = round(sound.numel() * wanted / rate)
    spectrum = torch.fft.rfft(sound)[: samples // 2 + 1]
    slower: Tensor = torch.fft.irfft(spectrum, samples) * (samples / sound.numel())
    return slower


def tones(voice: int, seconds: float = 10.0) -> Tensor:
    """A wave `[samples]` of 16 kHz that rises and falls like a voice and says nothing.

    Args:
        voice: its number; each is another one.
        seconds: length.
    """
    pitch, syllables = VOICES[voice % len(VOICES)]
    time = torch.arange(round(seconds * RATE), dtype=torch.float64) / RATE
    bend = 0.1 * torch.sin(2 * math.pi * 0.4 * (1 + voice) * time / len(VOICES))
    phase = 2 * math.pi * torch.cumsum(pitch * (1 + bend), 0) / RATE
    voiced = torch.stack([torch.sin(number * phase) / number for number in range(1, 13)]).sum(0)
    loudness = torch.sin(math.pi * syllables * time) ** 2
    sound: Tensor = (0.3 * loudness * voiced).float()
    return sound


def recordings(folder: Path) -> list[Clip]:
    """The recordings of a folder: NAME.wav and what is said, NAME.txt.

    Raises:
        ValueError: there is none, or a text is missing.
    """
    files = sorted(folder.glob("*.wav"))
    if not files:
        raise ValueError(f"{folder}: no NAME.wav is there, with what is said as NAME.txt beside it")
    silent = [file.name for file in files if not file.with_suffix(".txt").is_file()]
    if silent:
        raise ValueError(f"{folder}: {silent[0]} has no {Path(silent[0]).stem}.txt with what is said")
    return [Clip(recorded(file), file.with_suffix(".txt").read_text(encoding="utf-8")) for file in files]
