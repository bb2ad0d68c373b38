"""SVDQ_AUTOLOAD=1: a quantized model loads in a program that never imports svdq_hf.

Each test is a process of its own: what is asked is what such a program meets.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from places import ROOT
from tiny_models import bert

from svdq_hf import SVDQConfig, quantize_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("quantized")
    quantize_model(bert(), SVDQConfig(k=16)).save_pretrained(folder)
    return folder


def run(code: str, folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    clean = {name: value for name, value in os.environ.items() if name != "SVDQ_AUTOLOAD"}
    return subprocess.run(
        [sys.executable, "-c", code],
        cwd=folder,  # the first place where `python -c` looks for modules
        env={**clean, "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    "first",
    [
        "from transformers import AutoModel",
        "import transformers.quantizers",
    ],
)
def test_asked_for_it_loads(folder, first):
    code = (
        f"{first}\nfrom transformers import AutoModel\n"
        f"model = AutoModel.from_pretrained({str(folder)!r})\n"
        "print(type(model.encoder.layer[0].output.dense).__name__)"
    )
    done = run(code, folder, SVDQ_AUTOLOAD="1")
    assert (done.returncode, done.stdout) == (0, "SVDQLinear\n"), done.stderr


@pytest.mark.slow
def test_not_asked_for_it_stops_loading_and_config_json_says_what_to_do(folder):
    code = f"from transformers import AutoModel\nAutoModel.from_pretrained({str(folder)!r})\nprint('loaded')"
    done = run(code, folder)
    assert done.returncode == 1
    assert done.stdout == ""
    assert "size mismatch" in done.stderr or "MISMATCH" in done.stderr
    assert "encoder.layer.{0, 1}.output.dense.weight" in done.stderr
    stored = json.loads((folder / "config.json").read_text())["quantization_config"]
    assert stored["requires"].endswith("then `import svdq_hf` before from_pretrained")


def test_the_module_imports_only_the_standard_library_and_acts_only_when_asked(tmp_path):
    code = (
        "import sys\nbefore = set(sys.modules)\nimport svdq_hf_autoload\n"
        "new = {name.split('.')[0] for name in set(sys.modules) - before} - sys.stdlib_module_names\n"
        "svdq_hf_autoload.install()\nprint(new, len(sys.meta_path))"
    )
    finders = {}
    for asked in ("0", "1"):
        done = run(code, tmp_path, SVDQ_AUTOLOAD=asked)
        assert done.returncode == 0, done.stderr
        names, finders[asked] = done.stdout.rsplit(maxsplit=1)
        assert names == "{'svdq_hf_autoload'}"
    assert int(finders["1"]) == int(finders["0"]) + 4  # torch, transformers, PEFT, sentence-transformers


@pytest.mark.slow
def test_a_broken_svdq_hf_does_not_stop_the_program(tmp_path):
    (tmp_path / "svdq_hf").mkdir()
    (tmp_path / "svdq_hf" / "__init__.py").write_text("raise KeyError('broken')")
    code = "from transformers import BertModel\nprint(BertModel.__name__)"
    done = run(code, tmp_path, SVDQ_AUTOLOAD="1")
    assert (done.returncode, done.stdout) == (0, "BertModel\n")
    assert "SVDQ_AUTOLOAD=1: svdq_hf could not be imported: KeyError('broken')" in done.stderr


def test_it_is_packaged():
    from importlib.metadata import entry_points

    (ours,) = [entry for entry in entry_points(group="torch.backends") if entry.name == "svdq_hf"]
    assert ours.value == "svdq_hf_autoload:install"
    assert Path(ours.load().__globals__["__file__"]) == ROOT / "svdq_hf_autoload.py"
