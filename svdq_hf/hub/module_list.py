"""modules.json of a sentence-transformers model: the modules beside its transformer, by folder.

Not here: copying them (`checkpoint.companion_files`), and downloading them (`hub.client`).
"""

import json
from pathlib import Path, PurePosixPath

from svdq_hf.format.files import REMEDY

MODULES = "modules.json"


def is_sentence_transformer(folder: str | Path) -> bool:
    """Whether a folder holds a model of the library sentence-transformers."""
    return (Path(folder) / MODULES).is_file()


def module_folders(source: Path) -> dict[str, str]:
    """The modules beside the transformer of a sentence-transformers model.

    Args:
        source: folder of the model.

    Returns:
        Class by folder, as modules.json lists them; empty where there is no such file.

    Raises:
        ValueError: modules.json is damaged, or names a folder elsewhere.
    """
    file = source / MODULES
    if not file.is_file():
        return {}
    try:
        entries = json.loads(file.read_text(encoding="utf-8"))
        found = {str(one["path"]): str(one["type"]).rpartition(".")[2] for one in entries}
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"{file}: damaged ({error!r}); {REMEDY}") from error
    for path in found:
        if PurePosixPath(path).is_absolute() or ".." in PurePosixPath(path).parts or "\\" in path:
            raise ValueError(f"{file}: names {path!r}, which is no folder beside it; {REMEDY}")
    return {path: kind for path, kind in found.items() if PurePosixPath(path).parts}
