"""Client of the Hub: a model's folder, downloaded where it is not local, and errors with remedies.

Not here: uploads (`hub.push`).
"""

import glob
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import (
    HfHubHTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
)
from huggingface_hub.utils import httpx  # type: ignore[attr-defined]  # httpx2 of release 2, httpx of 1

from svdq_hf.format.files import check_is_folder
from svdq_hf.hub.module_list import module_folders
from svdq_hf.hub.readme import README


def local_folder(model: str | Path) -> Path:
    """The folder of a model: the given one, or a download from the Hub: no pickles, code of modules only.

    Args:
        model: a folder, or the Hub's user/model.

    Raises:
        ValueError: neither a folder nor a name that the Hub could have.
        OSError: the Hub does not have it, or cannot be reached.
    """
    if Path(model).is_dir():
        return Path(model)
    name = str(model)
    if Path(model).is_file():
        check_is_folder(model)
    if name.count("/") > 1 or name.startswith(("/", "./", "../", "~")):
        raise ValueError(f"{name}: no such folder (and not a Hub name, which is user/model)")
    told = name if "/" in name else f"{name} (no such folder is here)"
    patterns = ["*.safetensors", README, *(f"*{suffix}" for suffix in COMPANIONS)]
    with explained(told):
        folder = Path(snapshot_download(name, allow_patterns=patterns, ignore_patterns=OTHER_WEIGHTS))
        modules = _module_patterns(folder)
        if modules:
            snapshot_download(name, allow_patterns=modules, ignore_patterns=[f"*{end}" for end in PICKLES])
        return folder


def _module_patterns(folder: Path) -> list[str]:
    """Patterns for all files of a sentence-transformers model's modules."""
    try:
        return [f"{glob.escape(path)}/*" for path in module_folders(folder)]
    except ValueError:  # which is told where it matters
        return []


OTHER_WEIGHTS = ["consolidated*"]
"""Files of Mistral's repositories with the same weights for another library."""

COMPANIONS = (".json", ".txt", ".model", ".jinja", ".spm", ".codes", ".tokenizer", ".tiktoken")
"""Suffixes of companion files; of Marian (spm), PhoBERT (codes), ProphetNet (tokenizer), Qwen (tiktoken)."""


PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".joblib")
"""Suffixes of files that may run code when they are read; they are never read."""


@contextmanager
def explained(name: str) -> Iterator[None]:
    """Context manager that turns errors of the Hub's client into one line with a remedy.

    Args:
        name: of the model.

    Raises:
        PermissionError: the token is unknown, or has no right to this.
        FileNotFoundError: the Hub has no such model, or does not show it.
        ConnectionError: the Hub was not reached, or not to the end.
    """
    try:
        yield
    except RepositoryNotFoundError as error:
        raise FileNotFoundError(
            f"{name}: the Hub has no such model, or it is private or gated: check the name; where it is not "
            "public, run `hf auth login` (or set HF_TOKEN), and accept the terms on its page"
        ) from error
    except (OfflineModeIsEnabled, LocalEntryNotFoundError, httpx.TransportError) as error:
        raise ConnectionError(
            f"{name}: the Hub cannot be reached ({_line(error.__cause__ or error)}); check the network, "
            "HF_ENDPOINT and HF_HUB_OFFLINE, and run it again"
        ) from error
    except HfHubHTTPError as error:
        raise _refusal(name, error) from error
    except RuntimeError as error:  # of one file of an upload; the cause says why
        cause = error.__cause__ or error
        if isinstance(cause, HfHubHTTPError) and cause.response.status_code in (401, 403):
            raise _refusal(name, cause) from error
        raise ConnectionError(
            f"{name}: the upload stopped ({_line(error)} {_line(cause)}); run the same push again, what "
            "has arrived is not sent twice"
        ) from error


def _refusal(name: str, error: HfHubHTTPError) -> OSError:
    status = error.response.status_code
    if status == 401:
        return PermissionError(
            f"{name}: the Hub does not know this token; run `hf auth login` again, or correct HF_TOKEN"
        )
    if status == 403:
        return PermissionError(
            f"{name}: the token has no right to this; take one that has it (for a push, the permission to "
            "write) from https://huggingface.co/settings/tokens, or push under your own name"
        )
    return ConnectionError(f"{name}: the Hub answered {status} ({_line(error)}); run it again later")


def _line(error: BaseException) -> str:
    """The message of an error in one line."""
    return " ".join(str(error).split())[:300] or type(error).__name__
