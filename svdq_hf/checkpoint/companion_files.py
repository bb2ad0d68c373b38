"""What lies beside a model's weights and belongs to it: tokenizers, processors, pooling, prompts.

Not here: weights, code and pickles, which are never copied; README.md (`card`).
"""

import json
import logging
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from svdq_hf.hub.client import COMPANIONS

logger = logging.getLogger(__name__)


def copy_companions(source: Path, target: Path) -> None:
    """Copy small files that are not weights, and that saving has not written itself.

    Left out: what is hidden, subfolders that are models of their own, links to outside of `source`.
    """
    for file in _files(source):
        name = file.relative_to(source)
        place = target / name
        wanted = file.suffix in COMPANIONS and not file.name.endswith(".index.json")
        if not wanted or not file.is_file() or place.exists():
            continue
        if not _is_inside(file, source):
            logger.warning("%s: %s is a link to outside of that folder, and not copied", source, name)
            continue
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, place)


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
