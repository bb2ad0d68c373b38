"""Companion files of a model's weights: tokenizers, processors, pooling, prompts, modules.

The modules of a sentence-transformers model (modules.json) are copied completely, weights too, and code that
a module's folder holds (nothing here runs it). Not here: the model's own weights; code beside it, and pickles
anywhere, which are not copied; README.md (`hub.card`).
"""

import json
import logging
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from svdq_hf.hub.client import COMPANIONS, PICKLES
from svdq_hf.hub.module_list import module_folders

_WITH_WEIGHTS = {
    "Dense", "LayerNorm", "CNN", "LSTM", "WeightedLayerPooling", "WordEmbeddings", "StaticEmbedding",
    "SparseStaticEmbedding", "SparseAutoEncoder", "IDF",
}  # fmt: skip
"""Modules of sentence-transformers that have weights: a folder without any is incomplete."""

logger = logging.getLogger(__name__)


def copy_companions(source: Path, target: Path) -> None:
    """Copy small files that are not weights and that saving has not written itself; and all files of modules.

    Hidden files, subfolders that are models themselves, and links to outside of `source` are left out.

    Args:
        source: folder of the model.
        target: folder of the output; files that exist there are kept.

    Raises:
        ValueError: see `module_folders`.
    """
    modules = [source / path for path in module_folders(source)]
    for folder in modules:
        for file in _files_of_module(folder):
            _copy(file, target / file.relative_to(source))
    for file in _files(source):
        name = file.relative_to(source)
        place = target / name
        wanted = file.suffix in COMPANIONS and not file.name.endswith(".index.json")
        if not wanted or not file.is_file() or place.exists():
            continue
        if not _is_inside(file, source):
            logger.warning("%s: %s is a link to outside of that folder, and not copied", source, name)
            continue
        _copy(file, place)


def _copy(file: Path, place: Path) -> None:
    place.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(file, place)


def check_modules(source: Path) -> None:
    """Refuse modules that could not be copied completely.

    Args:
        source: folder of the model.

    Raises:
        ValueError: a module's weights are pickled or missing, or one of its files is a link to elsewhere.
    """
    for path, kind in module_folders(source).items():
        folder = source / path
        files = list(_files_of_module(folder)) if folder.is_dir() else []
        whole = any(file.suffix == ".safetensors" for file in files)
        pickled = [file for file in _walk(folder) if file.suffix in PICKLES] if folder.is_dir() else []
        if not whole and (pickled or kind in _WITH_WEIGHTS):
            what = (
                f"{path}/{pickled[0].name} is a pickle, which is not read" if pickled else "it has none here"
            )
            raise ValueError(
                f"{source}: the module {path} ({kind}) has no safetensors file: {what}; load the model in "
                "Python with sentence_transformers and save it again, which writes safetensors"
            )
        outside = [file for file in files if not _is_inside(file, source)]
        if outside:
            raise ValueError(
                f"{source}: {outside[0].relative_to(source)} is a link to outside of that folder; put the "
                "file itself there"
            )


def _files_of_module(folder: Path) -> Iterator[Path]:
    """All files of a module except pickles; `check_modules` has found its weights in safetensors."""
    return (file for file in _walk(folder) if file.suffix not in PICKLES)


def _walk(folder: Path) -> Iterator[Path]:
    for at, folders, names in os.walk(folder):
        folders[:] = [name for name in sorted(folders) if name[0] != "."]
        yield from (Path(at, name) for name in sorted(names) if name[0] != "." and Path(at, name).is_file())


def _files(source: Path) -> Iterator[Path]:
    for at, folders, names in os.walk(source):  # which follows no links to folders
        folders[:] = [name for name in sorted(folders) if name[0] != "." and not _is_model(Path(at, name))]
        yield from (Path(at, name) for name in sorted(names) if name[0] != ".")


def _is_model(folder: Path) -> bool:
    """Whether a folder holds a whole model, such as one that was quantized into a subfolder before.

    A part of a sentence-transformers model has a config.json and weights too, and no model_type.
    """
    if not any(folder.glob("*.safetensors")):
        return False
    try:
        return "model_type" in json.loads((folder / "config.json").read_text())
    except (OSError, ValueError, TypeError):
        return False


def _is_inside(file: Path, source: Path) -> bool:
    """Whether a file lies in a folder, or in the Hub's cache beside it, to which its files are links."""
    roots = [source.resolve()]
    if roots[0].parent.name == "snapshots":
        roots.append(roots[0].parents[1] / "blobs")
    return any(file.resolve().is_relative_to(root) for root in roots)
