"""A model's way to the Hub and back, against a server on this machine that speaks the Hub's protocol.

Pushing is tested in this process, with the client's constants pointed at the server; what a stranger does
(download, load, quantize, with an empty cache) in a process of its own.
"""

import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from hub_server import HubServer, hub
from hub_store import Blob
from huggingface_hub import HfApi, constants
from huggingface_hub.errors import RepositoryNotFoundError
from places import HELPERS
from tiny_models import bert, classifier, outputs, text
from transformers import BertModel
from transformers.utils import logging as hf_logging

from svdq_hf import SVDQConfig, quantize_model
from svdq_hf.cli.command import main
from svdq_hf.format.metadata import tags
from svdq_hf.hub.card import CardResult
from svdq_hf.hub.client import local_folder
from svdq_hf.hub.push import push_folder, push_model
from svdq_hf.hub.readme import BEGIN, metadata_of, own_text, section_of

# huggingface_hub 2.4 hands an open file to httpx2 in a way that httpx2 wants to drop.
pytestmark = [pytest.mark.oldest, pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")]


@pytest.fixture(scope="module")
def quantized(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("quantized")
    quantize_model(bert(), SVDQConfig(k=16)).save_pretrained(folder)
    return folder


@pytest.fixture
def folder(quantized: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(quantized, tmp_path / "folder"))


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    with hub() as server:
        point_at(server, tmp_path, monkeypatch)
        yield server
    hf_logging.enable_progress_bar()  # which the command switches off


def point_at(server: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Point the client, which reads its environment when it is imported, at a server."""
    template = server.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    changed = {
        "ENDPOINT": server.endpoint,
        "HUGGINGFACE_CO_URL_TEMPLATE": template,
        "HF_HUB_DISABLE_XET": True,
        "HF_HUB_OFFLINE": False,
        "HF_HUB_CACHE": str(tmp_path / "cache"),
        "HF_TOKEN_PATH": str(tmp_path / "token"),
    }
    for name, value in changed.items():
        monkeypatch.setattr(constants, name, value)
    monkeypatch.setenv("HF_TOKEN", "hf_alice")


def on_disk(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def on_hub(server: HubServer, name: str, branch: str = "main") -> dict[str, bytes]:
    return {path: content for path, content in server.files(name, branch).items() if path != ".gitattributes"}


def put(server: HubServer, name: str, files: dict[str, bytes]) -> None:
    """Files that somebody else's tools put into a repository of the server."""
    HfApi().create_repo(name, exist_ok=True)
    repository = server.repositories[name]
    there = repository.commits[repository.branches["main"]]
    repository.commit("main", {**there, **{path: Blob(text, lfs=False) for path, text in files.items()}})


def test_modules_beside_a_transformer_are_downloaded_whole_but_for_pickles(server):
    module = {"idx": 1, "name": "1", "path": "2_Dense", "type": "sentence_transformers.models.Dense"}
    put(
        server,
        "alice/sentences",
        {
            "config.json": b"{}",
            "code.py": b"raise",
            "modules.json": json.dumps([{"path": "", "type": "a.Transformer"}, module]).encode(),
            "2_Dense/model.safetensors": b"weights",
            "2_Dense/own.py": b"x = 1",
            "2_Dense/table.npy": b"table",
            "2_Dense/pytorch_model.bin": b"pickle",
        },
    )
    folder = local_folder("alice/sentences")
    there = {str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file()}
    assert there == {
        "config.json",
        "modules.json",
        "2_Dense/model.safetensors",
        "2_Dense/own.py",
        "2_Dense/table.npy",
    }


# What arrives.


def test_the_hub_holds_what_the_folder_holds(server, folder):
    (folder / "sub").mkdir()
    (folder / "sub" / "notes.txt").write_text("mine")
    assert push_folder(folder, "alice/model") == f"{server.endpoint}/alice/model"
    assert on_hub(server, "alice/model") == on_disk(folder)
    assert section_of((folder / "README.md").read_text())  # a folder without a card gets one
    push_folder(folder, "alice/model")
    assert len(server.repositories["alice/model"].commits) == 2  # created, and pushed once


def test_revision_is_a_branch_of_its_own(server, folder):
    put(server, "alice/model", {"config.json": b"{}", "model.safetensors": b"dense"})
    url = push_folder(folder, "alice/model", revision="svdq")
    assert url == f"{server.endpoint}/alice/model/tree/svdq"
    assert on_hub(server, "alice/model", "svdq") == on_disk(folder)
    assert on_hub(server, "alice/model")["model.safetensors"] == b"dense"


def test_shards_of_an_earlier_push_do_not_stay(server, folder, tmp_path):
    model = BertModel.from_pretrained(folder)
    model.save_pretrained(tmp_path / "sharded", max_shard_size="30KB")
    put(server, "alice/model", {"lora/model.safetensors": b"another"})
    push_folder(tmp_path / "sharded", "alice/model")
    assert "model.safetensors.index.json" in on_hub(server, "alice/model")
    push_folder(folder, "alice/model")
    assert on_hub(server, "alice/model") == {**on_disk(folder), "lora/model.safetensors": b"another"}


def test_private_stays_private(server, folder):
    push_folder(folder, "alice/secret", private=True)
    assert HfApi(token="hf_alice").model_info("alice/secret").private
    for stranger in ("hf_bob", False):
        with pytest.raises(RepositoryNotFoundError):
            HfApi(token=stranger).model_info("alice/secret")
    push_folder(folder, "alice/secret")  # its owner may push again
    assert server.repositories["alice/secret"].private


def test_private_is_never_pushed_to_a_public_repository(server, folder):
    put(server, "alice/public", {})
    with pytest.raises(ValueError, match="alice/public is there and public: make it private"):
        push_folder(folder, "alice/public", private=True)
    assert on_hub(server, "alice/public") == {}


def test_text_written_on_the_hub_is_kept(server, folder):
    push_folder(folder, "alice/model")
    theirs = on_hub(server, "alice/model")["README.md"].decode()
    put(
        server,
        "alice/model",
        {"README.md": theirs.replace("---\n\n", "license: mit\n---\n\nMy words.\n", 1).encode()},
    )
    (folder / "README.md").unlink()
    quantize_model(bert(), SVDQConfig(k=8)).save_pretrained(folder)
    push_folder(folder, "alice/model")
    card = on_hub(server, "alice/model")["README.md"].decode()
    assert own_text(card) == "My words."
    assert metadata_of(card)["license"] == "mit"
    assert "| 8 per layer," in section_of(card)
    (folder / "README.md").write_text("---\nlicense: mit\n---\nThe folder's.")
    push_folder(folder, "alice/model")
    assert on_hub(server, "alice/model")["README.md"] == (folder / "README.md").read_bytes()


# What is refused, and in which words.


@pytest.mark.parametrize(
    ("token", "error", "message"),
    [
        (None, PermissionError, "alice/model: no token to push with; run `hf auth login`, or set HF_TOKEN"),
        ("hf_nobody", PermissionError, "alice/model: the Hub does not know this token; run `hf auth login`"),
        ("hf_bob", PermissionError, "alice/model: the token has no right to this; take one that has it"),
    ],
)
def test_token_that_will_not_do(server, folder, monkeypatch, token, error, message):
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(error) as caught:
        push_folder(folder, "alice/model", token=token)
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)
    assert server.repositories == {}


def test_token_of_a_reader_may_not_write_to_a_model_that_is_there(server, folder):
    push_folder(folder, "alice/model")
    before = on_hub(server, "alice/model")
    (folder / "more.txt").write_text("more")
    with pytest.raises(PermissionError, match="alice/model: the token has no right to this"):
        push_folder(folder, "alice/model", token="hf_bob")
    assert on_hub(server, "alice/model") == before


def test_no_network(folder, tmp_path, monkeypatch):
    with hub() as server:
        point_at(server, tmp_path, monkeypatch)
    with pytest.raises(ConnectionError, match=r"alice/model: the Hub cannot be reached \(.*refused\); check"):
        push_folder(folder, "alice/model")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(
        ConnectionError, match=r"cannot be reached \(.*offline mode is enabled.*HF_HUB_OFFLINE"
    ):
        push_folder(folder, "alice/model")


@pytest.mark.parametrize("name", ["model", "a/b/c", "alice/mo del", "alice/--x"])
def test_name_that_is_none(server, folder, name):
    with pytest.raises(ValueError, match=r"user/model|alphanumeric|cannot start"):
        push_folder(folder, name)


def test_dense_model_is_not_pushed(server, tmp_path):
    bert().save_pretrained(tmp_path / "dense")
    with pytest.raises(ValueError, match="no layer in these files is quantized by svdq"):
        push_folder(tmp_path / "dense", "alice/model")
    with pytest.raises(ValueError, match="BertModel is not quantized by svdq"):
        push_model(bert(), "alice/model")
    assert server.requests == []


@pytest.mark.parametrize(
    ("config", "difference"),
    [
        (b'{"model_type": "bert"}', "not quantized by svdq"),
        (b"broken", "not quantized by svdq"),
        (b'{"quantization_config": {"quant_method": "awq"}}', "quantized by 'awq'"),
        (
            b'{"model_type": "bert", "architectures": ["BertForMaskedLM"], "quantization_config": '
            b'{"quant_method": "svdq"}}',
            r"architectures \['BertForMaskedLM'\], not \['BertModel'\]",
        ),
    ],
)
def test_another_model_is_replaced_only_when_asked(server, folder, config, difference):
    put(server, "alice/model", {"config.json": config, "vocab.txt": b"theirs", "README.md": b"About theirs"})
    before = on_hub(server, "alice/model")
    with pytest.raises(
        ValueError, match=rf"alice/model holds another model \({difference}\): push to another"
    ):
        push_folder(folder, "alice/model")
    assert on_hub(server, "alice/model") == before
    push_folder(folder, "alice/model", replace=True)
    assert on_hub(server, "alice/model") == on_disk(folder)


def test_interrupted_push_is_completed_by_the_next(server, folder, tmp_path, monkeypatch):
    monkeypatch.setattr(time, "sleep", lambda seconds: None)  # the client waits 24 s over its five retries
    BertModel.from_pretrained(folder).save_pretrained(tmp_path / "sharded", max_shard_size="30KB")
    shards = sorted((tmp_path / "sharded").glob("model-*.safetensors"))
    objects = {hashlib.sha256(shard.read_bytes()).hexdigest() for shard in shards}
    assert len(objects) == 4
    broken = min(objects)
    server.broken_uploads.add(broken)
    with pytest.raises(ConnectionError, match=r"alice/model: the upload stopped \(.*run the same push again"):
        push_folder(tmp_path / "sharded", "alice/model")
    assert on_hub(server, "alice/model") == {}  # nothing that looks whole
    arrived = set(server.objects)
    assert broken not in arrived
    server.broken_uploads.clear()
    server.requests.clear()
    push_folder(tmp_path / "sharded", "alice/model")
    assert on_hub(server, "alice/model") == on_disk(tmp_path / "sharded")
    sent = {request.removeprefix("PUT /objects/") for request in server.requests if request.startswith("PUT")}
    assert sent == objects - arrived


def test_a_push_that_stops_before_its_commit_leaves_what_was_there(server, folder, tmp_path, monkeypatch):
    monkeypatch.delattr(HfApi, "upload_folder")  # huggingface_hub 2 makes several commits of a folder
    sharded = tmp_path / "sharded"
    BertModel.from_pretrained(folder).save_pretrained(sharded, max_shard_size="30KB")
    server.broken_commits = 1
    with pytest.raises(ConnectionError, match="alice/model: the Hub answered 413"):
        push_folder(sharded, "alice/model")
    assert on_hub(server, "alice/model") == {}
    with pytest.raises(OSError, match="alice/model does not appear to have a file named"):
        BertModel.from_pretrained("alice/model")
    push_folder(sharded, "alice/model")
    assert on_hub(server, "alice/model") == on_disk(sharded)
    server.broken_commits = 1
    with pytest.raises(ConnectionError, match="413"):
        push_folder(folder, "alice/model")
    assert on_hub(server, "alice/model") == on_disk(sharded)  # not a file of another model among them
    push_folder(folder, "alice/model")
    assert on_hub(server, "alice/model") == on_disk(folder)
    assert len(server.repositories["alice/model"].commits) == 3  # created, pushed, and pushed


def test_connection_lost_once_is_not_noticed(server, folder, monkeypatch):
    content = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    server.broken_uploads.add(content)
    monkeypatch.setattr(time, "sleep", lambda seconds: server.broken_uploads.clear())
    push_folder(folder, "alice/model")
    assert [request for request in server.requests if request == f"PUT /objects/{content}"] != []
    assert on_hub(server, "alice/model") == on_disk(folder)


# A model in memory.


class Tokenizer:
    def save_pretrained(self, folder: str) -> None:
        Path(folder, "tokenizer.json").write_text("{}")


def test_model_is_pushed_with_tokenizer_card_and_results(server):
    put(server, "alice/base", {"README.md": b"---\nlicense: mit\n---\n"})
    model = quantize_model(bert(), SVDQConfig(k=16))
    model.name_or_path = "alice/base"
    result = CardResult("fill-mask", "imdb", "accuracy", 0.5)
    url = push_model(model, "alice/small", Tokenizer(), results=[result], private=True)
    assert url == f"{server.endpoint}/alice/small"
    files = on_hub(server, "alice/small")
    assert files.keys() == {"README.md", "config.json", "model.safetensors", "tokenizer.json"}
    card = files["README.md"].decode()
    metadata = metadata_of(card)
    assert metadata.pop("model-index")[0]["results"][0]["metrics"] == [{"type": "accuracy", "value": 0.5}]
    assert metadata == {
        "library_name": "transformers",
        "base_model": "alice/base",
        "base_model_relation": "quantized",
        "license": "mit",
        "tags": tags(),
    }
    assert 'from_pretrained("alice/small")' in card
    assert server.repositories["alice/small"].private


@pytest.mark.parametrize(
    ("name", "expected"),
    [("alice/nowhere", {}), ("/tmp/no/where", {}), ("", {}), ("{folder}", {"base_model": "org/base"})],
)
def test_base_model_that_the_hub_does_not_know_is_not_named(server, folder, name, expected):
    (folder / "README.md").write_text("---\nbase_model: org/base\n---\n")
    model = quantize_model(bert(), SVDQConfig(k=16))
    model.name_or_path = name.format(folder=folder)
    push_model(model, "alice/small")
    metadata = metadata_of(on_hub(server, "alice/small")["README.md"].decode())
    assert metadata == {"library_name": "transformers", "tags": tags(), **expected}


def test_tags_of_a_model_are_there_until_it_is_dequantized(folder):
    model = BertModel.from_pretrained(folder)
    model.add_model_tags("mine")
    assert model.model_tags == [*tags(), "mine"]
    assert quantize_model(bert(), SVDQConfig(k=4)).model_tags == tags()
    assert model.dequantize().model_tags == ["mine"]


# The command.


def test_svdq_push_prints_the_url(server, folder, capsys):
    assert main(["push", str(folder), "alice/model"]) == 0
    assert capsys.readouterr().out == f"{server.endpoint}/alice/model\n"
    assert main(["push", str(folder), "alice/secret", "--private", "--revision", "b", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"url": f"{server.endpoint}/alice/secret/tree/b"}
    assert server.repositories["alice/secret"].private
    put(server, "alice/other", {"config.json": b"{}"})
    assert main(["push", str(folder), "alice/other"]) == 1
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("svdq push: alice/other holds another model (not quantized by svdq)")
    assert "--replace" in printed.err
    assert main(["push", str(folder), "alice/other", "--replace"]) == 0
    assert on_hub(server, "alice/other") == on_disk(folder)


def test_svdq_push_asks_for_the_base_model_where_the_card_names_none(server, folder, capsys):
    assert main(["push", str(folder), "alice/model"]) == 0
    assert "names no base model" in capsys.readouterr().err
    assert main(["push", str(folder), "alice/model", "--base-model", "./local"]) == 1
    assert "must be a name on the Hub, user/model" in capsys.readouterr().err
    assert main(["push", str(folder), "alice/model", "--base-model", "org/base"]) == 0
    assert capsys.readouterr().err == ""
    assert "base_model: org/base" in (folder / "README.md").read_text()
    assert on_hub(server, "alice/model") == on_disk(folder)


def test_svdq_inspect_takes_a_name_on_the_hub(server, folder, capsys):
    assert main(["push", str(folder), "alice/model", "--json"]) == 0
    capsys.readouterr()
    assert main(["inspect", str(folder), "--json"]) == 0
    local = capsys.readouterr().out
    assert main(["inspect", "alice/model", "--json"]) == 0
    assert capsys.readouterr().out == local


def test_svdq_push_says_in_one_line_what_is_wrong(server, folder, capsys, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_bob")
    assert main(["push", str(folder), "alice/model"]) == 1
    assert main(["push", "./nowhere", "alice/model"]) == 1
    assert main(["quantize", "alice/nowhere", str(folder / "out")]) == 1
    first, second, third = capsys.readouterr().err.splitlines()
    assert first.startswith("svdq push: alice/model: the token has no right to this")
    assert second.startswith("svdq push: ./nowhere: no such folder")
    assert third.startswith(
        "svdq quantize: alice/nowhere: the Hub has no such model, or it is private or gated"
    )
    assert not (folder / "out").exists()


# A stranger, in a process of his own with an empty cache.

STRANGER = """
import json, sys
import torch
from transformers import AutoModel, BertModel
import svdq_hf
from svdq_hf.cli import main
from tiny_models import outputs, text

sys.argv[1:] = out, = sys.argv[1:]
model = AutoModel.from_pretrained("alice/model")
torch.save(outputs(model, text()), out + "/pushed.pt")
model.push_to_hub("alice/plain")
torch.save(outputs(AutoModel.from_pretrained("alice/plain"), text()), out + "/plain.pt")
errors = {}
for name in ("bob/secret", "alice/nowhere"):
    try:
        AutoModel.from_pretrained(name)
    except OSError as error:
        errors[name] = str(error)
errors["code"] = main(["quantize", "alice/dense", out + "/quantized", "--k", "16"])
print(json.dumps(errors), file=open(out + "/errors.json", "w"))
"""


@pytest.mark.slow
def test_a_stranger_loads_pushes_and_quantizes(server, folder, tmp_path, monkeypatch):
    dense = tmp_path / "dense"
    classifier().save_pretrained(dense)
    card = b"---\nlicense: mit\n---\nAbout it."
    put(server, "alice/dense", {"README.md": card, "evil.py": b"raise", **on_disk(dense)})
    push_folder(folder, "alice/model")
    push_folder(folder, "bob/secret", private=True, token="hf_bob")
    server.broken_downloads = 1  # the client asks for the rest
    environment = {
        **os.environ,
        "HF_ENDPOINT": server.endpoint,
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_OFFLINE": "0",
        "HF_HOME": str(tmp_path / "home"),
        "PYTHONPATH": str(HELPERS),
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run(
        [sys.executable, "-c", STRANGER, str(tmp_path)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    expected = outputs(BertModel.from_pretrained(folder), text())
    assert torch.equal(torch.load(tmp_path / "pushed.pt"), expected)
    assert torch.equal(torch.load(tmp_path / "plain.pt"), expected)
    assert server.broken_downloads == 0
    errors = json.loads((tmp_path / "errors.json").read_text())
    assert "is not a valid model identifier" in errors["alice/nowhere"]
    assert "is not a valid model identifier" in errors["bob/secret"]
    plain = on_hub(server, "alice/plain")["README.md"].decode()
    assert metadata_of(plain)["tags"] == tags()  # the card is transformers' own, and BEGIN not in it
    assert BEGIN not in plain
    assert errors["code"] == 0
    written = (tmp_path / "quantized" / "README.md").read_text()
    assert metadata_of(written) == {
        "library_name": "transformers",
        "base_model": "alice/dense",
        "base_model_relation": "quantized",
        "license": "mit",
        "tags": tags(),
    }
    assert "About it." not in written
    assert not (tmp_path / "quantized" / "evil.py").exists()
