"""Source: the model in a folder, inspected once: where it is, its class, files and tensors.

What is refused before any work starts is refused here, above all tensors that an output would lack. Not here:
loading it (`checkpoint.load`), the choice of its class (`checkpoint.class_choice`).
"""

import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from transformers import AutoConfig, AutoModel

from svdq_hf.checkpoint.accounting import Account, account, listed, split_dropped, unwritten
from svdq_hf.checkpoint.class_choice import Choice, choose, whole_class
from svdq_hf.checkpoint.companion_files import check_modules
from svdq_hf.checkpoint.folders import check_text
from svdq_hf.checkpoint.streaming.byte_ranges import Place, tensor_places
from svdq_hf.format.files import FOR_GGUF, REMEDY, folder_bytes, weight_files
from svdq_hf.format.names import weight_of_part
from svdq_hf.hub.client import local_folder
from svdq_hf.quantize.empty_model import built, named_class

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Source:
    """A model's folder, resolved once and handed on: its config, class, files, bytes and headers.

    Every property is computed when it is first used, and then kept.

    Attributes:
        folder: where it is on this machine.
        name: on the Hub; None where it was given as a folder.
        drop: tensors of its files, or modules, that the user allows the output to lack.
        packed: whether the model must be quantized by svdq (for export) instead of dense.
    """

    folder: Path
    name: str | None = None
    drop: tuple[str, ...] = ()
    packed: bool = False

    @classmethod
    def resolve(
        cls, model: "str | Path | Source", *, drop: Sequence[str] = (), packed: bool = False
    ) -> "Source":
        """The source of a folder or of a Hub name.

        Args:
            model: a folder, the Hub's user/model, or a `Source`, which is returned with the given `packed`.
            drop: tensors of its files, or modules, that the output may lack.
            packed: whether the model must be quantized by svdq.

        Raises:
            ValueError: no such folder, or its name is not UTF-8.
            OSError: the Hub does not have it, or cannot be reached.
        """
        if isinstance(model, Source):
            return model if model.packed is packed else replace(model, packed=packed)
        check_text(model)
        name = None if Path(model).is_dir() else str(model)
        return cls(local_folder(model), name, tuple(drop), packed)

    def __str__(self) -> str:
        return self.name or str(self.folder)

    @cached_property
    def stored(self) -> dict[str, Any]:
        """The keys of config.json.

        Raises:
            ValueError: the file is missing or no JSON; or the folder holds an adapter.
        """
        check_no_adapter(self.folder)
        file = self.folder / "config.json"
        if not file.is_file():
            raise ValueError(f"{self.folder}: no config.json is there; is it the folder of a model?")
        try:
            return dict(json.loads(file.read_text(encoding="utf-8")).items())
        except (ValueError, AttributeError, RecursionError) as error:
            raise ValueError(f"{file}: damaged ({error!r}); {REMEDY}") from error

    @cached_property
    def config(self) -> Any:
        """The config as transformers reads it; no code of the model's author is run for it.

        Raises:
            ValueError: it needs such code; and what transformers raises.
        """
        remote = isinstance(self.stored.get("auto_map"), dict)
        try:
            return AutoConfig.from_pretrained(self.folder, local_files_only=True, trust_remote_code=False)
        except Exception as error:
            if not isinstance(error, ValueError):  # what transformers finds in single keys, on several lines
                told = " ".join(str(error).split())
                raise ValueError(f"{self.folder / 'config.json'}: {told}; {REMEDY}") from error
            if not (remote and "custom code" in str(error)):
                raise
            raise ValueError(
                f"{self.folder}: the model's class is code of its author's (auto_map in config.json), which "
                "svdq does not run; if you trust it, load the model in Python with trust_remote_code=True, "
                "and call quantize_model(model, config) and model.save_pretrained(folder)"
            ) from error

    @cached_property
    def places(self) -> dict[str, Place]:
        """Where each tensor of the files is, by its name in files; see `tensor_places`."""
        return tensor_places(self.folder)

    @cached_property
    def files(self) -> tuple[str, ...]:
        """Paths of the safetensors files."""
        return tuple(map(str, weight_files(self.folder)))

    @cached_property
    def bytes(self) -> int:
        """Bytes of the safetensors files."""
        return folder_bytes(self.folder)

    @cached_property
    def choice(self) -> Choice:
        """The class that loads the model, and the dense model of that class on the meta device.

        Raises:
            ValueError: the folder holds an adapter, has no config.json or no safetensors file; it is
                quantized already and `packed` is False; or transformers has no such class.
        """
        self._check_kind()
        named = named_class(self.config.architectures)
        if named is not AutoModel:
            return Choice(named, built(named, self.config))
        found = choose(self.config, self._account)
        if found is None:
            raise ValueError(
                f"{self.folder}: transformers has no class {self.config.architectures!r} (architectures in "
                f"config.json), nor one for the type {self.config.model_type!r} that has all of its tensors; "
                f"{REMEDY}"
            )
        return found

    @property
    def kind(self) -> Any:
        """The class that loads the model."""
        return self.choice.kind

    @property
    def empty(self) -> Any:
        """The dense model on the meta device, without weights."""
        return self.choice.model

    def check(self) -> None:
        """Refuse a source that the output would lack a tensor of; warn of tensors that its class leaves out.

        Raises:
            ValueError: a tensor would be lost, and the user has not named it; a module beside the model
                cannot be copied completely; see also `choice` and `tensor_places`.
        """
        self._check_kind()
        check_modules(self.folder)
        _ = self.places
        found = self._account(self.empty)
        lost, dropped = split_dropped(found.lost, self.drop, self.folder)
        if any(weight_of_part(name) is not None for name in lost):
            raise ValueError(
                f"{self.folder}: quantized already, by svdq, and config.json has lost its "
                "quantization_config; put that back"
            )
        if lost:
            raise ValueError(self._told(lost))
        for names, why in (
            (found.ignored, f"{self._class_name} leaves out"),
            (dropped, "you have asked to drop"),
        ):
            if names:
                logger.warning("%s: %s in its files and not in the output: %s", self, listed(names), why)
        unread = self._unread()
        if unread:
            logger.warning("%s: %s not of the model's files, and left there", self, listed(unread))

    def check_written(self, work: Path) -> None:
        """Refuse an output that lacks a tensor of the source: the last check, of the written files.

        Args:
            work: folder of the output.

        Raises:
            ValueError: it names the tensors.
        """
        gone = unwritten(self.empty, self.files, weight_files(work), packed=self.packed)
        if gone:
            raise ValueError(
                f"{self.folder}: {listed(gone)} in its files and not in what was written, which is thrown "
                "away: please report this; quantize_model and save_pretrained in Python may serve meanwhile"
            )

    def _check_kind(self) -> None:
        stored = self.stored.get("quantization_config")
        if not self.packed and not any(self.folder.glob("*.safetensors")):
            raise ValueError(f"{self.folder}: no *.safetensors file is there; {_others(self.folder)}")
        if stored is not None and not self.packed:
            method = stored.get("quant_method") if isinstance(stored, dict) else stored
            raise ValueError(f"{self.folder}: quantized already, by {method!r}; quantize the original model")

    def _unread(self) -> list[str]:
        """Safetensors files in the folder that do not belong to the model."""
        extra = getattr(getattr(self.kind, "config_class", None), "extra_files", ())
        read = {Path(file).name for file in self.files} | set(extra)
        return sorted(file.name for file in self.folder.glob("*.safetensors") if file.name not in read)

    def _account(self, model: Any) -> Account:
        return account(model, self.files, packed=self.packed)

    def _told(self, lost: list[str]) -> str:
        """Why the source is refused, and the remedy."""
        better = whole_class(self.config, self._account)
        names = f'["{better.kind.__name__}"]' if better is not None else "the class that has all of them"
        chosen = "" if self.kind is not AutoModel else " (config.json names no class of transformers)"
        return (
            f"{self.folder}: {listed(lost)} in its files and would not be in the output: {self._class_name}"
            f'{chosen} has no place for that; write {names} as "architectures" into config.json, or leave it '
            f"out by name: --drop {lost[0].rpartition('.')[0] or lost[0]} (in Python, "
            "Source.resolve(folder, drop=[...]))"
        )

    @property
    def _class_name(self) -> str:
        return type(self.empty).__name__


def _others(folder: Path) -> str:
    """What a folder without safetensors files has instead, and the remedy."""
    if any(folder.glob("*.gguf")):
        return f"GGUF files are not read; take the model that they were made of, or {FOR_GGUF}"
    return (
        "pickled weights are not read; if you trust them, load the model in Python and save it again, which "
        "writes safetensors: AutoModel.from_pretrained(folder).save_pretrained(new_folder), by its own class"
    )


def check_no_adapter(source: Path) -> None:
    """Refuse the folder of an adapter, which `from_pretrained` would put on top of the model.

    Args:
        source: the folder.

    Raises:
        ValueError: adapter_config.json is there.
    """
    if (source / "adapter_config.json").is_file():
        raise ValueError(
            f"{source}: holds a LoRA adapter (adapter_config.json); merge it (merge_and_unload()), save "
            "the model into a folder of its own, and quantize that"
        )
