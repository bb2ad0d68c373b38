"""Push of a quantized model to the Hub, with errors that tell the remedy.

The work is done by huggingface_hub's own client. Here: what is refused before anything is sent, and
that no text that somebody wrote on the Hub is lost. Not here: the files of a commit (`hub.commit`),
downloading (`hub.client`).
"""

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict, Unpack

from huggingface_hub import HfApi, get_token
from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError
from torch import nn

from svdq_hf.core.arguments import checked_arguments
from svdq_hf.format.files import full_disk_named
from svdq_hf.hub.card import CardResult, write_card
from svdq_hf.hub.client import explained
from svdq_hf.hub.commit import additions, deletions, difference, remote_text
from svdq_hf.hub.readme import README, merge, metadata_of, own_text, read_text, section_of
from svdq_hf.quantize.footprint import Footprint, footprint, read_footprint

WEIGHTS = ["model.safetensors", "model-*-of-*.safetensors", "model.safetensors.index.json"]
"""Patterns of files of an earlier push that must not stay beside the new ones."""

_REPOSITORY = "a model's name on the Hub, user/model"
_FOLDER = "of a quantized model; of one in memory it is push_model(model, repo_id)"


@checked_arguments(folder=_FOLDER, repo_id=_REPOSITORY)
def push_folder(
    folder: str | Path,
    repo_id: str,
    *,
    private: bool | None = None,
    token: str | None = None,
    revision: str | None = None,
    commit_message: str | None = None,
    replace: bool = False,
    base_model: str | None = None,
) -> str:
    """Upload the quantized model in a folder to the Hub.

    A folder without README.md gets one first. Everything arrives in one commit: whoever loads the model
    meanwhile, or after a push that was interrupted, finds what was there before, or nothing, and never half a
    model. An interrupted push is just run again; what has arrived is not sent twice.

    Args:
        folder: of the quantized model.
        repo_id: "user/model".
        private: whether a new repository is private; None: as the account's settings say.
        token: None: the one of `hf auth login`, or of HF_TOKEN.
        revision: branch to push to, created from the main one if needed; None: the main one.
        commit_message: None: a default text.
        replace: whether the repository may hold another model now; all of its files are removed then, but
            stay in its history.
        base_model: name on the Hub of the model that was quantized, for the card; None: as the card has it.

    Returns:
        The repository's URL.

    Raises:
        TypeError: an argument is of a wrong type (`WrongKind`, which is a ValueError as well).
        ValueError: the folder holds no quantized model, the repository holds another one, or is
            public though `private` is True.
        PermissionError: no token, a wrong one, or one that may not write there.
        ConnectionError: the Hub was not reached, or not to the end.
    """
    weights = read_footprint(folder)
    if repo_id.count("/") != 1:
        raise ValueError(f"{repo_id}: a model's name on the Hub is user/model")
    if base_model is not None or not Path(folder, README).exists():
        write_card(folder, footprint=weights, base_model=base_model, repo_id=repo_id)
    if not (token or get_token()):
        raise PermissionError(f"{repo_id}: no token to push with; run `hf auth login`, or set HF_TOKEN")
    with explained(repo_id):
        push = _Push(HfApi(token=token, library_name="svdq_hf"), Path(folder), repo_id, revision, replace)
        push.check(private)
        url = push.upload(private, commit_message or "Upload quantized weights (svdq_hf)")
    return f"{url}/tree/{revision}" if revision else str(url)


class Push(TypedDict, total=False):
    """What `push_folder` takes beside a folder and a name."""

    private: bool | None
    token: str | None
    revision: str | None
    commit_message: str | None
    replace: bool
    base_model: str | None


@checked_arguments(model="load it first, or push_folder(folder, repo_id)", repo_id=_REPOSITORY)
def push_model(
    model: nn.Module,
    repo_id: str,
    tokenizer: Any = None,
    *,
    results: Sequence[CardResult] = (),
    **choices: Unpack[Push],
) -> str:
    """Save a quantized model (and its tokenizer or processor) with its card, and push it.

    Args:
        model: in memory, without adapters.
        repo_id: "user/model".
        tokenizer: tokenizer or processor to save with it.
        results: evaluations for the card.
        **choices: further arguments of `push_folder`.

    Returns:
        The repository's URL.

    Raises:
        TypeError: an argument is of a wrong type (`WrongKind`, which is a ValueError as well).
        ValueError: the model is not quantized, has adapters, or would not be saved completely; see also
            `push_folder`.
        PermissionError: see `push_folder`.
        ConnectionError: see `push_folder`.
    """
    if not footprint(model).layers:
        raise ValueError(f"{type(model).__name__} is not quantized by svdq; push it with its own push_to_hub")
    if hasattr(model, "peft_config"):
        raise ValueError(
            "the model has adapters, which are pushed by themselves: model.push_to_hub(repo_id) sends the "
            "adapter; to push all in one, merge_adapters(model) first"
        )
    saved: Any = model
    with tempfile.TemporaryDirectory() as folder:
        with full_disk_named(folder):
            saved.save_pretrained(folder)
        written = _check_saved(model, folder)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
        named = choices.pop("base_model", None)
        found, base_card = _base(model, choices.get("token"))
        base_model = named or found
        write_card(
            folder,
            base_model=base_model,
            base_card=base_card,
            results=results,
            repo_id=repo_id,
            footprint=written,
        )
        return push_folder(folder, repo_id, **choices)


def _check_saved(model: Any, folder: str | Path) -> Footprint:
    """The footprint of the saved files, after checking that no tensor of the model is missing.

    Raises:
        ValueError: a tensor of the model is not in the files.
    """
    held, written = footprint(model), read_footprint(folder)
    state = model.state_dict(keep_vars=True)
    never = {
        id(state[name]): state[name].nbytes for name in model._keys_to_ignore_on_save or () if name in state
    }
    names = {layer.name for layer in written.layers}
    if len(names) < len(held.layers) or written.total_bytes < held.total_bytes - sum(never.values()):
        raise ValueError(
            f"{type(model).__name__}: {held.total_bytes:,} bytes in {len(held.layers)} quantized layers are "
            f"in memory, and {written.total_bytes:,} in {len(written.layers)} were saved: a tensor is lost, "
            "and nothing was pushed; save_pretrained of this class writes less than it holds"
        )
    return written


@dataclass(frozen=True)
class _Push:
    """A folder and the repository that it is pushed to; `replace`: another model there may be removed."""

    api: HfApi
    folder: Path
    repo_id: str
    revision: str | None
    replace: bool

    def check(self, private: bool | None) -> None:
        """Refuse a repository in which this push would do harm."""
        try:
            info = self.api.model_info(self.repo_id)
        except RepositoryNotFoundError:
            return
        if private and not info.private:
            raise ValueError(
                f"{self.repo_id} is there and public: make it private in its settings, or push to another "
                "name"
            )
        stored = None if self.replace else self._remote("config.json")
        if stored is not None:
            differs = difference(stored, (self.folder / "config.json").read_text())
            if differs:
                raise ValueError(
                    f"{self.repo_id} holds another model ({differs}): push to another name, or replace it "
                    "with `replace=True` (--replace)"
                )

    def upload(self, private: bool | None, message: str) -> str:
        """Send the folder; returns the repository's URL."""
        url = self.api.create_repo(self.repo_id, private=private, exist_ok=True)
        if self.revision is not None and not self.revision.startswith("refs/"):
            self.api.create_branch(self.repo_id, branch=self.revision, exist_ok=True)
        added = additions(self.folder, None if self.replace else self._merged_readme())
        there = self.api.list_repo_files(self.repo_id, revision=self.revision)
        self.api.create_commit(
            self.repo_id,
            [*added, *deletions(there, added, "*" if self.replace else WEIGHTS)],
            commit_message=message,
            revision=self.revision,
        )
        return str(url)

    def _merged_readme(self) -> str | None:
        """The Hub's README.md with our section, where the folder's README.md holds no text of its user.

        None: the folder's is to be uploaded as it is.
        """
        local = read_text(self.folder / README)
        generated = section_of(local) and not own_text(local)
        remote = self._remote(README) if generated else None
        if remote is None:
            return None
        merged = merge(remote, metadata_of(local), section_of(local))
        return None if merged == local else merged

    def _remote(self, name: str) -> str | None:
        return remote_text(self.api, self.repo_id, name, self.revision)


def _base(model: Any, token: str | None) -> tuple[str | None, str]:
    """The base model's name on the Hub, or None, and the text of its card."""
    name = str(model.name_or_path)
    if not name or Path(name).is_dir():
        return None, read_text(Path(name, README), "replace") if name else ""
    try:
        with explained(name):
            card = remote_text(HfApi(token=token), name, README, None) or ""
    except (FileNotFoundError, HFValidationError):
        return None, ""
    # A model that was loaded quantized has a card that names its base.
    loaded = getattr(getattr(model, "hf_quantizer", None), "pre_quantized", False)  # of parts: no quantizer
    return None if loaded else name, card
