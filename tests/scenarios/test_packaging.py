"""The package as others get it: a wheel with the C library, and a source archive that builds one.

Built from a copy of the checkout, with the setuptools that is here: no network.
"""

import os
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LIBRARY = "svdq_hf/kernels/native/_svdq."
NO_COMPILER = {"CC": "/bin/false", "PATH": "/nowhere"}

pytestmark = pytest.mark.slow


def run(*command: str | Path, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    clean = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [*map(str, command)],
        cwd=cwd,
        env={**clean, "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return done


def pip(*arguments: str | Path, cwd: Path, **environment: str) -> None:
    offline = ("--quiet", "--no-index", "--no-deps", "--disable-pip-version-check")
    run(sys.executable, "-m", "pip", *arguments, *offline, cwd=cwd, **environment)


def build_wheel(source: Path, out: Path, **environment: str) -> Path:
    pip("wheel", "--no-build-isolation", "-w", out, source, cwd=out.parent, **environment)
    (wheel,) = out.glob("*.whl")
    return wheel


def libraries_of(wheel: Path) -> list[str]:
    return [name for name in zipfile.ZipFile(wheel).namelist() if name.startswith(LIBRARY)]


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the checkout, since building leaves files behind."""
    copy = tmp_path_factory.mktemp("checkout")
    shutil.copytree(ROOT / "svdq_hf", copy / "svdq_hf", ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    for name in ("svdq_hf_autoload.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    return copy


@pytest.fixture(scope="module")
def archive(checkout: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The source archive; `python -m build` makes it first, and the wheel out of it."""
    out = tmp_path_factory.mktemp("archive")
    code = "import sys; from setuptools import build_meta; build_meta.build_sdist(sys.argv[1])"
    run(sys.executable, "-c", code, out, cwd=checkout)
    (archive,) = out.glob("*.tar.gz")
    return archive


@pytest.fixture(scope="module")
def wheel(archive: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_wheel(archive, tmp_path_factory.mktemp("wheel"))


def test_the_source_archive_has_the_c_source(archive):
    with tarfile.open(archive) as opened:
        names = [name.partition("/")[2] for name in opened.getnames()]
    sources = {str(file.relative_to(ROOT)) for file in (ROOT / "svdq_hf/kernels/native").glob("*.[ch]")}
    assert sources <= set(names)
    assert {"svdq_hf_autoload.py", "pyproject.toml", "README.md", "LICENSE"} <= set(names)


def test_the_wheel_has_the_library_the_types_and_the_module_for_torch(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    assert len(libraries_of(wheel)) == 1
    assert {"svdq_hf/py.typed", "svdq_hf_autoload.py"} <= set(names)
    assert not [name for name in names if name.startswith(("tests/", "examples/", "docs/"))]


def test_without_a_compiler_a_wheel_is_built_all_the_same(checkout, tmp_path):
    wheel = build_wheel(checkout, tmp_path / "wheel", **NO_COMPILER)
    assert libraries_of(wheel) == []
    assert "svdq_hf/__init__.py" in zipfile.ZipFile(wheel).namelist()


def test_the_wheel_runs_the_demo_where_there_is_no_compiler(wheel, tmp_path):
    """Installed beside the packages of this environment, and before the checkout that is there."""
    pip("install", "--target", tmp_path / "site", wheel, cwd=tmp_path, **NO_COMPILER)
    script = tmp_path / "demo.py"
    script.write_text(
        "from svdq_hf.kernels.native.library import library\n"
        "from svdq_hf.cli import main\n"
        "print(library()._name)\n"
        "raise SystemExit(main(['demo', '--json']))\n"
    )
    done = run(sys.executable, script, cwd=tmp_path, PYTHONPATH=str(tmp_path / "site"), **NO_COMPILER)
    library, _, result = done.stdout.partition("\n")
    assert library.startswith(str(tmp_path / "site" / LIBRARY))
    assert '"reload_equal": true' in result


def test_every_entry_point_names_a_function_that_is_there():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    points = [*project["scripts"].values()]
    points += [point for group in project["entry-points"].values() for point in group.values()]
    assert len(points) == 3
    for point in points:
        module, _, name = point.partition(":")
        place = ROOT / module.replace(".", "/")
        file = place / "__init__.py" if place.is_dir() else place.with_suffix(".py")
        assert f"\ndef {name}(" in file.read_text()
