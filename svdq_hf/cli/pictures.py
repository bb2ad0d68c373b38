"""Pictures that commands write: looked at before the work, so that none is lost to a mistyped folder.

Not here: what is drawn (`evaluation.sensitivity_picture`, `evaluation.spectrum_picture`).
"""

from pathlib import Path
from typing import TYPE_CHECKING

from svdq_hf.core.release import how_to_install

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def check_picture(out: str | None) -> None:
    """Refuse a picture that could not be drawn or written, before any work is done.

    Args:
        out: the .svg file to write; None: no picture is wanted.

    Raises:
        ValueError: it is no .svg file, is a folder, or its folder is not there.
        ImportError: matplotlib is not installed.
    """
    if out is None:
        return
    target = Path(out)
    if target.suffix != ".svg":
        raise ValueError(f"--out {out}: must end with .svg")
    if target.is_dir():
        raise ValueError(f"--out {out}: is a folder; name a file in it: {target / 'picture.svg'}")
    if not target.parent.is_dir():
        raise ValueError(f"--out {out}: no such folder: {target.parent}; make it, or name another")
    try:
        import svdq_hf.evaluation.report.drawing  # noqa: F401
    except ImportError as error:
        raise ImportError(f"--out needs matplotlib: {how_to_install('evaluate')}") from error


def write_picture(figure: "Figure", out: str) -> None:
    """Write a picture.

    Args:
        figure: of matplotlib.
        out: the .svg file.
    """
    from svdq_hf.evaluation.report.drawing import svg

    Path(out).write_text(svg(figure), encoding="utf-8")
