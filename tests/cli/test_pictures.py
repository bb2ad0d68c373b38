"""Pictures of the commands: which files are refused before the work."""

import sys

import pytest

from svdq_hf.cli.pictures import check_picture, write_picture


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("x.png", "x.png: must end with .svg"),
        ("", "must end with .svg"),
        ("folder.svg", r"folder.svg: is a folder; name a file in it: .*folder.svg/picture.svg"),
        ("none/x.svg", r"none/x.svg: no such folder: .*none; make it, or name another"),
    ],
)
def test_what_cannot_be_written_is_refused(name, words, tmp_path):
    (tmp_path / "folder.svg").mkdir()
    with pytest.raises(ValueError, match=words):
        check_picture(str(tmp_path / name) if name else name)


def test_without_matplotlib_the_remedy_is_told(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "svdq_hf.evaluation.report.drawing", None)
    with pytest.raises(ImportError, match="--out needs matplotlib: pip install"):
        check_picture(str(tmp_path / "x.svg"))
    check_picture(None)


def test_what_passes_is_written(tmp_path):
    figure = pytest.importorskip("matplotlib.figure", reason="needs the extra: pip install -e '.[evaluate]'")
    out = tmp_path / "x.svg"
    check_picture(str(out))
    write_picture(figure.Figure(), str(out))
    assert out.read_text().startswith("<?xml")
