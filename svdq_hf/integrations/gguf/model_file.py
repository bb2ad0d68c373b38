"""A model in a GGUF file, opened and checked: its metadata, and its weights in float32.

GGUF is the format of llama.cpp and Ollama. A file here is one that llama.cpp's converter has made, of 16 or
32 bits; its own package, gguf, reads it. Not here: writing one (`integrations.gguf.written_file`).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

MAGIC = b"GGUF"
CONVERT = "llama.cpp's convert_hf_to_gguf.py makes one of a model's folder: --outtype f16 (or bf16)"
INSTALL = "GGUF files need the package gguf: pip install gguf"

DENSE = ("F32", "F16", "BF16")
"""Types of a matrix that has not been quantized."""


@dataclass(frozen=True)
class ModelFile:
    """A GGUF file of 16 or 32 bits.

    Attributes:
        path: of the file.
        reader: the `gguf.GGUFReader` of it; tensors are read when they are asked for.
    """

    path: Path
    reader: Any

    @classmethod
    def open(cls, path: str | Path) -> "ModelFile":
        """Open a file and check that it holds a whole model that can be quantized.

        Args:
            path: of the file.

        Raises:
            ValueError: it is none, is damaged, one part of several, no language model, or quantized already.
            ImportError: the package gguf is not installed.
        """
        found = cls(Path(path), _reader(Path(path)))
        found._check()
        return found

    def metadata(self, key: str, default: Any = None) -> Any:
        """A value of the metadata; `default` where the file has none.

        Args:
            key: its name, such as "general.architecture".
            default: what is returned instead.
        """
        field = self.reader.get_field(key)
        return default if field is None else field.contents()

    def count(self, key: str, default: int = 0) -> int | list[int]:
        """A number of the architecture, such as "block_count"; a list where layers differ in it.

        Args:
            key: its name, without that of the architecture.
            default: where the file has none.
        """
        found: int | list[int] = self.metadata(f"{self.architecture}.{key}", default)
        return found

    def first_count(self, key: str, default: int = 0) -> int:
        """Likewise; where layers differ, that of the first."""
        found = self.count(key, default)
        return found[0] if isinstance(found, list) else found

    @cached_property
    def architecture(self) -> str:
        """The name of llama.cpp's graph that runs the model, such as "llama" or "gemma3"."""
        return str(self.metadata("general.architecture", ""))

    @cached_property
    def tensors(self) -> Mapping[str, Any]:
        """The `gguf.ReaderTensor` of each name, in the file's order."""
        return {tensor.name: tensor for tensor in self.reader.tensors}

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor as torch counts it, `[out, in]`; GGUF's own order is the reverse."""
        return tuple(reversed(self.tensors[name].shape.tolist()))

    def weight(self, name: str) -> Tensor:
        """A tensor in float32.

        Args:
            name: of a tensor of 16 or 32 bits.

        Returns:
            A copy, `[out, in]` for a matrix, `[out]` for a norm or a bias, `[experts, out, in]` for experts.

        Raises:
            ValueError: it has a NaN or an infinity.
        """
        tensor = self.tensors[name]
        data = torch.from_numpy(np.array(tensor.data))
        if tensor.tensor_type.name == "BF16":
            data = data.view(torch.bfloat16)
        found = data.float().reshape(self.shape(name))
        if not torch.isfinite(found).all():
            raise ValueError(f"{self.path}: {name} has a NaN or an infinity; convert the model again")
        return found

    def _check(self) -> None:
        parts = self.metadata("split.count", 1)
        if self.reader.byte_order == "S":
            raise ValueError(f"{self.path}: its byte order is not this machine's; convert the model again")
        if parts > 1:
            remedy = "join them with llama.cpp's llama-gguf-split --merge"
            raise ValueError(f"{self.path}: one of {parts} parts of a model; {remedy}")
        kind = self.metadata("general.type", "model")
        if not self.architecture or kind != "model":
            raise ValueError(f"{self.path}: holds no model (general.type is {kind!r}); {CONVERT}")
        for name, tensor in self.tensors.items():
            if len(tensor.shape) > 1 and tensor.tensor_type.name not in DENSE:
                what = f"quantized already, {name} is {tensor.tensor_type.name}"
                raise ValueError(f"{self.path}: {what}; take the file of F16 or BF16: {CONVERT}")


def _reader(path: Path) -> Any:
    """The package's reader of a file; its errors name the file."""
    if path.is_dir():
        raise ValueError(f"{path}: is a folder, no GGUF file; {CONVERT}")
    if not path.is_file():
        raise ValueError(f"{path}: no such file")
    with open(path, "rb") as file:
        if file.read(4) != MAGIC:
            raise ValueError(f"{path}: not a GGUF file; {CONVERT}")
    try:
        from gguf import GGUFReader
    except ImportError as error:
        raise ImportError(INSTALL) from error
    try:
        return GGUFReader(path)
    except (ValueError, IndexError, KeyError, OverflowError, MemoryError) as error:
        raise ValueError(f"{path}: truncated or damaged ({error}); download or convert it again") from error
