"""Trainer's callback for spectral decay (S2D): it decays, logs what it sees, and resumes bit for bit.

Its state lies in each checkpoint's folder, as safetensors and JSON. Not here: the decay itself
(`training.spectral_decay`), and pictures of the spectra (`evaluation.spectrum_picture`).
"""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import TrainerCallback

from svdq_hf.core.svd import principal
from svdq_hf.training.spectral_decay import SpectralDecay

TENSORS = "spectral_decay.safetensors"
FACTS = "spectral_decay.json"
PARTS = ("u", "s", "v", "shares")
SHOWN = 10
"""Singular values in `before` and `after`."""


class SpectralDecayCallback(TrainerCallback):  # type: ignore[misc]  # transformers ships no types
    """Spectral decay for `Trainer`: `Trainer(model, ..., callbacks=[SpectralDecayCallback()])`.

    The penalty's gradient is added once for each step of the optimizer, after clipping, which is left to the
    task's gradient. Logged beside the loss: `sigma_1` and `pcdr` (means over the flagged layers),
    `outlier_ratio` (the highest of them) and how many are `flagged_layers`.

    Args:
        resume_from: folder of the checkpoint that training resumes from, where it is not
            `output_dir/checkpoint-STEP`.
        **choices: those of `SpectralDecay`: strength, power, tau, k_max, every, layers.

    Attributes:
        decay: the `SpectralDecay`; None before training.
        before, after: by layer, the ten largest singular values `[10]` at the start and at the end.
    """

    def __init__(self, resume_from: str | Path | None = None, **choices: Any) -> None:
        self.resume_from, self.choices = resume_from, choices
        self.decay: SpectralDecay | None = None
        self.before: dict[str, Tensor] = {}
        self.after: dict[str, Tensor] = {}

    def before_reporters(self, trainer: Any) -> None:
        """Let reporters (TensorBoard, progress bar) show what is logged here; Trainer asks them first.

        Args:
            trainer: the `Trainer` that this callback was given to.
        """
        handler = trainer.callback_handler
        handler.callbacks.insert(0, handler.pop_callback(self))

    def on_train_begin(self, args: Any, state: Any, control: Any, *, model: nn.Module, **_: Any) -> None:
        """Start, or go on where the checkpoint left off.

        Raises:
            ValueError: training is resumed and the checkpoint has no state of spectral decay.
        """
        self.decay = SpectralDecay(model, **self.choices)
        self.before = self._values()
        if state.global_step:
            folder = Path(self.resume_from or Path(args.output_dir) / f"checkpoint-{state.global_step}")
            load_state(self.decay, folder)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, *, optimizer: Any, **_: Any) -> None:
        """Add the penalty's gradient; gradients that a GradScaler has scaled are unscaled first."""
        scaler = getattr(optimizer, "scaler", None)
        if scaler is not None and scaler.is_enabled():
            try:
                scaler.unscale_(getattr(optimizer, "optimizer", optimizer))
            except RuntimeError as error:  # by clipping, which must know their true size
                if "already been called" not in str(error):
                    raise
        self._started().step()

    def on_log(self, args: Any, state: Any, control: Any, *, logs: dict[str, Any], **_: Any) -> None:
        """Add the figures to what is logged of a training step."""
        if self.decay is None or "loss" not in logs:
            return
        found = figures(self.decay)
        logs.update(found)
        if state.log_history:
            state.log_history[-1].update(found)

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Save the state into the checkpoint's folder."""
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        if state.is_world_process_zero and folder.is_dir():
            save_state(self._started(), folder)

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Take the hooks off the model."""
        self.after = self._values()
        self._started().close()

    def _started(self) -> SpectralDecay:
        if self.decay is None:
            raise ValueError(
                "SpectralDecayCallback was not there when training began: pass it to Trainer(callbacks=...)"
            )
        return self.decay

    @torch.no_grad()
    def _values(self) -> dict[str, Tensor]:
        layers = self._started().layers
        return {name: principal(layer.weight(), SHOWN).s.cpu() for name, layer in layers.items()}


def figures(decay: SpectralDecay) -> dict[str, float]:
    """What is logged: means of sigma_1 and PCDR and the highest outlier ratio of the flagged layers."""
    seen = list(decay.flagged.values())
    found: dict[str, float] = {"flagged_layers": len(seen)}
    if seen:
        found["sigma_1"] = sum(float(one.values[0]) for one in seen) / len(seen)
        found["pcdr"] = sum(float(one.shares[one.count - 1]) for one in seen) / len(seen)
        found["outlier_ratio"] = max(one.outlier_ratio for one in seen)
    return found


def save_state(decay: SpectralDecay, folder: Path) -> None:
    """Write the state of a spectral decay into a folder, as safetensors and JSON."""
    state = decay.state_dict()
    tensors = {f"{name}.{part}": one[part] for name, one in state["layers"].items() for part in PARTS}
    save_file(tensors, folder / TENSORS)
    facts = {
        name: {key: value for key, value in one.items() if key not in PARTS}
        for name, one in state["layers"].items()
    }
    (folder / FACTS).write_text(json.dumps({"steps": state["steps"], "layers": facts}, indent=1))


def load_state(decay: SpectralDecay, folder: Path) -> None:
    """Go on from the state in a folder.

    Args:
        decay: of a model of the same layers.
        folder: that `save_state` wrote to.

    Raises:
        ValueError: the folder has no such state, or that of other layers.
    """
    if not (folder / FACTS).is_file():
        raise ValueError(
            f"{folder} has no {FACTS}: to resume, name the checkpoint that was saved with spectral decay, "
            "SpectralDecayCallback(resume_from=FOLDER)"
        )
    facts, tensors = json.loads((folder / FACTS).read_text()), load_file(folder / TENSORS)
    layers = {
        name: {**one, **{part: tensors[f"{name}.{part}"] for part in PARTS}}
        for name, one in facts["layers"].items()
    }
    decay.load_state_dict({"steps": facts["steps"], "layers": layers})
