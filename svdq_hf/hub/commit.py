"""The files of a push: what one commit adds and removes, and what the repository holds already.

Not here: what is refused, and the push itself (`hub.push`).
"""

import json
import tempfile
from collections.abc import Sequence
from pathlib import Path

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.errors import RemoteEntryNotFoundError, RevisionNotFoundError
from huggingface_hub.utils import (  # type: ignore[attr-defined]  # it lists no names
    DEFAULT_IGNORE_PATTERNS,
    filter_repo_objects,
)

from svdq_hf.config.choices import QUANT_METHOD
from svdq_hf.hub.readme import README, read_text


def difference(theirs: str, ours: str) -> str:
    """Why the model of one config.json is no version of the other's; empty if it is one."""
    try:
        remote, local = json.loads(theirs), json.loads(ours)
        if remote["quantization_config"]["quant_method"] != QUANT_METHOD:
            return f"quantized by {remote['quantization_config']['quant_method']!r}"
    except (ValueError, KeyError, TypeError):
        return "not quantized by svdq"
    keys = [key for key in ("model_type", "architectures") if remote.get(key) != local.get(key)]
    return ", ".join(f"{key} {remote.get(key)!r}, not {local.get(key)!r}" for key in keys)


def additions(folder: Path, readme: str | None) -> list[CommitOperationAdd]:
    """Every file of the folder that the Hub's client would upload; `readme` replaces the text of README.md.

    `upload_folder` is not used: in release 2 it makes several commits of a large folder.
    """
    files = {
        file.relative_to(folder).as_posix(): file for file in sorted(folder.rglob("*")) if file.is_file()
    }
    contents: dict[str, str | bytes] = {
        name: str(files[name]) for name in filter_repo_objects(files, ignore_patterns=DEFAULT_IGNORE_PATTERNS)
    }
    if readme is not None:
        contents[README] = readme.encode()
    return [CommitOperationAdd(name, content) for name, content in contents.items()]


def deletions(
    there: Sequence[str], added: Sequence[CommitOperationAdd], patterns: str | list[str]
) -> list[CommitOperationDelete]:
    """The files of the repository that must not stay beside the new ones."""
    stay = {".gitattributes", *(each.path_in_repo for each in added)}
    gone = filter_repo_objects(there, allow_patterns=patterns)
    return [CommitOperationDelete(name) for name in gone if name not in stay]


def remote_text(api: HfApi, repo_id: str, name: str, revision: str | None) -> str | None:
    """The text of a small file of a repository; None: it is not there."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            file = api.hf_hub_download(repo_id, name, revision=revision, local_dir=folder)
        except (RemoteEntryNotFoundError, RevisionNotFoundError):
            return None
        return read_text(Path(file))
