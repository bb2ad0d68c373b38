"""What `import svdq_hf` costs, and that the order of imports does not matter.

Each test is a process of its own, since modules are imported once.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_models import bert

from svdq_hf import SVDQConfig, quantize_model

LOAD = "print(type(AutoModel.from_pretrained({folder!r}).encoder.layer[0].output.dense).__name__)"
HEAVY = "sorted({'torch', 'transformers', 'numpy', 'huggingface_hub', 'safetensors'} & set(sys.modules))"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("quantized")
    quantize_model(bert(), SVDQConfig(k=16)).save_pretrained(folder)
    return folder


def run(code: str) -> str:
    """What the code prints; a failed registration, which is a warning, is an error."""
    arguments = [sys.executable, "-W", "error:svdq_hf:RuntimeWarning", "-c", code]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(arguments, env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_importing_the_package_imports_nothing_heavy():
    assert run(f"import sys, svdq_hf\nprint({HEAVY}, svdq_hf.__version__)") == "[] 0.1.0\n"


def test_what_the_command_says_of_itself_imports_nothing_heavy():
    code = (
        "import contextlib, io, sys\nfrom svdq_hf.cli import main\n"
        "for arguments in (['--version'], ['--help'], ['quantise'], ['quantize', '--help']):\n"
        "    out = io.StringIO()\n"
        "    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):\n"
        "        with contextlib.suppress(SystemExit):\n            main(arguments)\n"
        f"    print(len(out.getvalue()) > 10, {HEAVY})"
    )
    assert run(code) == "True []\n" * 4


@pytest.mark.parametrize(
    "first",
    [
        "import svdq_hf, torch",
        "import torch, svdq_hf",
        "import svdq_hf.core.packing, torch, this",  # half imported when torch is: tried again
    ],
)
def test_the_ops_are_there_with_torch(first):
    code = f"{first}\nimport sys\nprint(torch.ops.svdq.linear, 'transformers' in sys.modules)"
    assert run(code).endswith("svdq.linear False\n")


@pytest.mark.slow
def test_quantizing_with_every_public_name_at_hand_imports_neither_peft_nor_the_report():
    code = (
        "import sys, torch, svdq_hf\n"
        # a callback is one of transformers' Trainer, which imports peft
        "names = [getattr(svdq_hf, name) for name in svdq_hf.__all__ if not name.endswith('Callback')]\n"
        "model = torch.nn.Sequential(torch.nn.Linear(64, 64))\n"
        "svdq_hf.quantize_model(model, svdq_hf.SVDQConfig(k=4))\n"
        "unwanted = ('peft', 'matplotlib', 'svdq_hf.evaluation')\n"
        "print([name for name in sys.modules if name.startswith(unwanted)])"
    )
    assert run(code) == "[]\n"


@pytest.mark.slow
@pytest.mark.parametrize(
    "first",
    [
        "from transformers import AutoModel\nimport svdq_hf",
        "import svdq_hf\nfrom transformers import AutoModel",
        "import transformers, svdq_hf, transformers.core_model_loading\nfrom transformers import AutoModel",
    ],
)
def test_a_quantized_model_loads_in_either_order(first, folder):
    assert run(f"{first}\n{LOAD.format(folder=str(folder))}") == "SVDQLinear\n"


@pytest.mark.slow
@pytest.mark.parametrize("during", ["transformers.quantizers.auto", "torch"])
def test_it_may_be_imported_in_the_middle_of_another_import(during, folder):
    """By the first module that `during` imports, which is half imported then."""
    code = (
        "import sys\n"
        "class Middle:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        f"        if {during!r} in sys.modules and self in sys.meta_path:\n"
        "            sys.meta_path.remove(self)\n"
        f"            print(sys.modules[{during!r}].__spec__._initializing)\n"
        "            import svdq_hf\n"
        "sys.meta_path.insert(0, Middle())\n"
        "from transformers import AutoModel\n"
        f"{LOAD.format(folder=str(folder))}"
    )
    assert run(code) == "True\nSVDQLinear\n"


@pytest.mark.slow
def test_threads_may_import_everything_at_once(folder):
    """But for transformers itself, whose module is replaced by another while it is imported."""
    code = (
        "import sys, threading, transformers\n"
        "start = threading.Barrier(4)\n"
        "def svdq():\n    start.wait()\n    import svdq_hf\n    svdq_hf.SVDQHfQuantizer\n"
        "def load():\n    start.wait()\n    import svdq_hf\n    from transformers import AutoModel\n"
        f"    {LOAD.format(folder=str(folder))}\n"
        "threads = [threading.Thread(target=each) for each in (svdq, load, svdq, load)]\n"
        "sys.setswitchinterval(1e-5)\n"
        "[thread.start() for thread in threads]\n[thread.join() for thread in threads]"
    )
    assert run(code).count("SVDQLinear") == 2
