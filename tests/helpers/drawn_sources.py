"""Folders of models as hypothesis draws them: family, files, config.json, what lies in and beside them.

Not here: what a command must have done with each tensor (the test that draws them).
"""

import json
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import tiny_experts
import tiny_models as tiny
import torch
import transformers as hf
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from streamed import edit_config
from torch import Tensor, nn

FAMILIES: dict[str, Callable[[], hf.PreTrainedModel]] = {
    **{name: family.build for name, family in tiny.FAMILIES.items()},
    **{name: partial(tiny_experts.build, name) for name in tiny_experts.FAMILIES},
    "bert-classifier": tiny.classifier,
    "deberta": tiny.deberta1,
    "dinov2-swiglu": tiny.dinov2,
    "molmo2": tiny.molmo2_text,
}
ARCHITECTURES = ("kept", "kept", "kept", None, [], ["Nope"], "base", "as a string", [7, None])
STRAYS = (
    "stray.weight", "lm_head.bias", "classifier.weight", "model.layers.7.self_attn.q_proj.weight",
    "encoder.layer.1.output.dense.salient_rows", "embeddings.position_ids", "a", "model.norm.weight_scale",
)  # fmt: skip


class Drawn(NamedTuple):
    """A folder to be written: its choices, as they were drawn.

    stray: a tensor that the family may have no place for; drop: whether the user names it.
    renamed: whether the last tensor has another name. twice: whether one of tied tensors that files may lack
    is there, "equal" or not.
    """

    family: str
    dtype: torch.dtype = torch.float32
    shards: bool = False
    architectures: Any = "kept"
    stray: str | None = None
    drop: bool = False
    renamed: bool = False
    twice: str = ""
    dense_module: bool = False

    def write(self, folder: Path) -> None:
        """The folder, without what is drawn of its tensors: `save_pretrained`, and config.json edited."""
        model = dense(self.family, self.dtype)
        model.save_pretrained(folder, max_shard_size="60KB" if self.shards else "1GB")
        self.spoil(folder)

    def spoil(self, folder: Path) -> None:
        """What is drawn of tensors, config.json and modules, in a folder that is whole."""
        if self.architectures != "kept":
            kind = json.loads((folder / "config.json").read_text())["architectures"][0]
            base = getattr(hf, kind, type(dense(self.family, self.dtype)))
            edit_config(folder, architectures=self._architectures(kind, base))
        edit_files(folder, self._edit)
        if self.dense_module:
            add_dense_module(folder)

    def added(self, name: str) -> bool:
        """Whether a tensor is none that the family's own files have."""
        return name == self.stray or name.startswith("renamed.")

    def _architectures(self, kind: str, base: Any) -> Any:
        if self.architectures == "as a string":
            return kind
        if self.architectures != "base":
            return self.architectures
        model = dense(self.family, self.dtype)
        return [type(model.base_model).__name__]

    def _edit(self, tensors: dict[str, Tensor]) -> None:
        if self.renamed:
            last = next(reversed(tensors))
            tensors[f"renamed.{last}"] = tensors.pop(last)
        for one, other in (dense(self.family, self.dtype).all_tied_weights_keys or {}).items():
            if self.twice and one not in tensors and other in tensors and _is_dense(tensors[other]):
                tensors[one] = tensors[other].clone() * (1 if self.twice == "equal" else 2)
        if self.stray and self.stray not in tensors:
            tensors[self.stray] = torch.arange(6.0).view(2, 3)


def sources(**fixed: Any) -> st.SearchStrategy[Drawn]:
    """Any folder; half of them are just as they were saved, in most ways."""
    drawn = {
        "family": st.sampled_from(sorted(FAMILIES)),
        "dtype": st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
        "shards": st.booleans(),
        "architectures": st.sampled_from(ARCHITECTURES),
        "stray": st.one_of(st.none(), st.none(), st.sampled_from(STRAYS)),
        "drop": st.booleans(),
        "renamed": st.sampled_from([False] * 9 + [True]),
        "twice": st.sampled_from(["", "equal", "other"]),
        "dense_module": st.sampled_from([False, False, True]),
    }
    return st.builds(Drawn, **{**drawn, **fixed})


@cache
def dense(family: str, dtype: torch.dtype) -> hf.PreTrainedModel:
    """The family's model, not to be changed."""
    return FAMILIES[family]().to(dtype)


def edit_files(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    """Change the tensors of a folder, in one file or several; new ones are in the last."""
    files = sorted(folder.glob("*.safetensors"))
    for file in files:
        tensors = load_file(file)
        before = set(tensors)
        if file is files[-1]:
            change(tensors)
        if set(tensors) == before:
            continue
        save_file({name: one.contiguous() for name, one in tensors.items()}, file, metadata_of(file))
        index = folder / "model.safetensors.index.json"
        if index.is_file():
            told = json.loads(index.read_text())
            kept = {name: at for name, at in told["weight_map"].items() if at != file.name}
            told["weight_map"] = kept | dict.fromkeys(tensors, file.name)
            index.write_text(json.dumps(told))


def _is_dense(tensor: Tensor) -> bool:
    return tensor.is_floating_point()


def metadata_of(file: Path) -> dict[str, str]:
    """The facts of a file's header."""
    data = file.read_bytes()
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    return dict(header.get("__metadata__", {"format": "pt"}))


def add_dense_module(folder: Path) -> None:
    """The folder becomes that of a sentence-transformers model with a Dense module."""
    (folder / "2_Dense").mkdir()
    (folder / "2_Dense" / "config.json").write_text('{"in_features": 64, "out_features": 8}')
    save_file({"linear.weight": torch.ones(8, 64)}, folder / "2_Dense" / "model.safetensors")
    types = {"": "Transformer", "2_Dense": "Dense"}
    entries = [
        {"idx": at, "name": str(at), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for at, (path, kind) in enumerate(types.items())
    ]
    (folder / "modules.json").write_text(json.dumps(entries))


def tensors_of(folder: Path) -> dict[str, Tensor]:
    """All tensors of a folder's own files."""
    return {
        name: one for file in sorted(folder.glob("*.safetensors")) for name, one in load_file(file).items()
    }


def computed(model: nn.Module) -> set[str]:
    """Buffers that a model makes by itself: in a file they say nothing."""
    return {name for name, _ in model.named_buffers()} - set(model.state_dict())
