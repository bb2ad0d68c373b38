"""A GGUF file of 16 bits -> one of 4.5, of llama.cpp's own type IQ4_NL, which Ollama runs as well.

What llama.cpp's quantizer has not without data: scales are searched over size and sign, and columns are made
even where that can be folded into what comes before. A tensor at a time: memory is a few times that of the
largest. Not here: the types (`integrations.gguf.mixture`).
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from svdq_hf.core.arguments import checked_arguments
from svdq_hf.core.release import VERSION
from svdq_hf.integrations.gguf.block_types import IQ4_NL, BlockType, with_feedback
from svdq_hf.integrations.gguf.folding import Fold, find_folds, scale_of
from svdq_hf.integrations.gguf.mixture import block_type
from svdq_hf.integrations.gguf.model_file import ModelFile
from svdq_hf.integrations.gguf.written_file import TensorPlan, check_target, write_file

A_FILE = "the path of a GGUF file"
FILE_TYPE = 25
"""`LLAMA_FTYPE_MOSTLY_IQ4_NL`, what llama.cpp calls such a file."""

BLOCKS_VERSION = 2
"""`GGML_QNT_VERSION`, of the layouts of ggml's block types."""


@dataclass(frozen=True)
class GGUFReport:
    """What became of a GGUF file.

    Attributes:
        bytes_before: of the file that was read.
        bytes_after: of the file that was written.
        types: how many tensors have which type.
        matrices: how many matrices are in layers, and so could have a column scale.
        folded: how many of them have one.
    """

    bytes_before: int
    bytes_after: int
    types: dict[str, int]
    matrices: int
    folded: int


@checked_arguments(source=A_FILE, out=A_FILE)
def quantize_gguf(
    source: str | Path, out: str | Path, *, column_scale: bool = True, error_feedback: bool = False
) -> GGUFReport:
    """Quantize a GGUF file to IQ4_NL, for llama.cpp and Ollama; it is as large as llama.cpp's own.

    Args:
        source: a GGUF file of F16, BF16 or F32, as llama.cpp's `convert_hf_to_gguf.py` writes it.
        out: the file to write; must not exist.
        column_scale: whether columns are scaled where the scale can be folded into the tensors before, which
            leaves what the model computes as it was. A LoRA adapter in GGUF that was made for the model needs
            False: its own matrices read what is scaled.
        error_feedback: whether each error is compensated by the columns not rounded yet, with inputs that the
            model makes itself: transformers must know the model, and memory must hold it in float32.

    Returns:
        Sizes, and what the file is made of.

    Raises:
        TypeError: an argument is of a wrong type (`WrongKind`, which is a ValueError as well).
        ValueError: the source is no GGUF file, is damaged, quantized already, one of several parts, or has no
            matrix that is quantized; `out` exists; or transformers cannot read the source, for feedback.
        ImportError: the package gguf is not installed.
        OSError: the file cannot be written.
    """
    check_target(out)
    model = ModelFile.open(source)
    types = {name: block_type(model, name) for name in model.tensors}
    if not any(types.values()):
        raise ValueError(f"{source}: none of its tensors is one that is quantized; is it a language model?")
    work = _Work(model, types)
    if column_scale:
        work.fold(find_folds(model))
    if error_feedback:
        from svdq_hf.integrations.gguf.own_inputs import input_grams

        work.grams = input_grams(model)
    write_file(out, model, work.plans(), work.data(), CHANGES)
    return work.report(Path(out))


CHANGES: dict[str, int | str] = {
    "general.file_type": FILE_TYPE,
    "general.quantization_version": BLOCKS_VERSION,
    "general.quantized_by": f"svdq_hf {VERSION}",
}


@dataclass(eq=False)
class _Work:
    """The tensors of a file as they will be written.

    Attributes:
        model: the file that is read.
        types: the block type of each tensor, None where it stays as it is.
        columns: by matrix, what its columns are divided by, `[in]`.
        rows: by tensor, what its rows or entries are multiplied by, `[out]`.
        grams: by matrix, `X^T X` `[in, in]` of its inputs as the source has them.
    """

    model: ModelFile
    types: dict[str, BlockType | None]
    columns: dict[str, Tensor] = field(default_factory=dict)
    rows: dict[str, Tensor] = field(default_factory=dict)
    grams: dict[str, Tensor] = field(default_factory=dict)

    def fold(self, folds: list[Fold]) -> None:
        """Find the scales of all pairs."""
        for pair in folds:
            columns, rows = scale_of(self.model, pair)
            self.columns.update(dict.fromkeys(pair.readers, columns))
            self.rows.update(dict.fromkeys(pair.taken_by, rows))

    def plans(self) -> list[TensorPlan]:
        """All tensors, in the order of the source."""
        return [self._plan(name) for name in self.model.tensors]

    def _plan(self, name: str) -> TensorPlan:
        tensor, shape, kind = self.model.tensors[name], self.model.shape(name), self.types[name]
        if kind is None:
            return TensorPlan(name, shape, int(tensor.tensor_type), int(tensor.n_bytes))
        rows = int(tensor.n_elements) // shape[-1]
        return TensorPlan(name, shape, kind.number, rows * kind.row_bytes(shape[-1]))

    def data(self) -> Iterator[np.ndarray[Any, Any]]:
        """The bytes of all tensors, in that order."""
        for name in self.model.tensors:
            kind = self.types[name]
            yield self._encoded(name, kind) if kind is not None else self._kept(name)

    def _kept(self, name: str) -> np.ndarray[Any, Any]:
        """A tensor that is not quantized: a norm or a bias may take a scale, all others are copied."""
        if name in self.rows:
            return self._scaled(name).numpy()
        found: np.ndarray[Any, Any] = self.model.tensors[name].data
        return found

    def _encoded(self, name: str, kind: BlockType) -> np.ndarray[Any, Any]:
        weight = self._scaled(name)
        gram = self.grams.get(name)
        if gram is not None and kind is IQ4_NL:
            scale = self.columns.get(name, torch.ones(1))
            return with_feedback(weight, gram * scale * scale.unsqueeze(-1)).numpy()
        return kind.encoded(weight.flatten(0, -2)).numpy()

    def _scaled(self, name: str) -> Tensor:
        weight = self.model.weight(name)
        if name in self.columns:
            weight = weight / self.columns[name]
        if name in self.rows:
            rows = self.rows[name]
            weight = weight * (rows.unsqueeze(1) if weight.ndim > 1 else rows)
        return weight

    def report(self, out: Path) -> GGUFReport:
        """What was done."""
        names = Counter(
            kind.name if kind else self.model.tensors[name].tensor_type.name
            for name, kind in self.types.items()
        )
        matrices = [name for name, kind in self.types.items() if kind and name.startswith("blk.")]
        before, after = self.model.path.stat().st_size, out.stat().st_size
        return GGUFReport(before, after, dict(names), len(matrices), len(self.columns))
