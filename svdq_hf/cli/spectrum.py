"""`svdq spectrum`: the largest singular values of a model's layers, and the outliers that they make.

Not here: the measuring (`evaluation.spectrum`), the picture (`evaluation.spectrum_picture`), and taking
outliers away (`training.spectral_decay`).
"""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from svdq_hf.cli.options import examples
from svdq_hf.cli.pictures import check_picture, write_picture

if TYPE_CHECKING:
    from rich.table import Table

    from svdq_hf.evaluation.spectrum import Spectrum

EXAMPLE: Final = "svdq spectrum before after --text notes.txt --out spectra.svg"
WINDOW: Final = 256
"""Tokens of the text that the model sees at once."""


def add(commands: Any) -> argparse.ArgumentParser:
    """Add the command's parser to those of `svdq`."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "spectrum",
        help="singular values of a model's layers, and the outliers they make",
        **examples(EXAMPLE),
    )
    add = parser.add_argument
    add("folder", help="a model's folder, quantized or not, or the Hub's user/model")
    add("other", nargs="?", help="a second model of the same layers, to compare")
    add("--text", help="a text file, to see activations: PCDR and outliers")
    add("--tokens", type=int, default=2048, help="of the text that the model reads (2048)")
    add("--out", help="an .svg file to write a picture of the spectra to")
    return parser


def run(options: argparse.Namespace) -> dict[str, object]:
    """Measure one model after the other, print a table and draw a picture; returns what `--json` prints.

    Raises:
        ValueError: an option or a model that cannot be used, or two models of different layers.
    """
    _check(options)
    folders = [options.folder] + ([] if options.other is None else [options.other])
    found = [_measured(folder, options) for folder in folders]
    if len(found) == 2 and [one.name for one in found[0]] != [one.name for one in found[1]]:
        raise ValueError(
            f"{options.folder} and {options.other} have different layers; compare two of one model"
        )
    if not options.json:
        from svdq_hf.cli.tables import console

        console().print(_table(found))
    if options.out is not None:
        _draw(found, options.out)
    models = [
        {"folder": folder, "layers": {one.name: one.to_dict() for one in layers}}
        for folder, layers in zip(folders, found, strict=True)
    ]
    return {"models": models, "picture": options.out}


def _check(options: argparse.Namespace) -> None:
    """Refuse what cannot work before a model is loaded.

    Raises:
        ValueError: no such text, too few tokens, or a picture that cannot be written.
        ImportError: matplotlib is not installed.
    """
    if options.text is not None and not Path(options.text).is_file():
        raise ValueError(f"--text {options.text}: no such file")
    if options.tokens < 2:
        raise ValueError(f"--tokens {options.tokens}: must be 2 or more")
    check_picture(options.out)


def _measured(folder: str, options: argparse.Namespace) -> list["Spectrum"]:
    """The spectra of one model, which is loaded for that and dropped."""
    import torch
    from transformers import AutoModel, AutoTokenizer

    from svdq_hf.calibration.texts import read_text
    from svdq_hf.checkpoint.source import Source
    from svdq_hf.evaluation.spectrum import measure_spectra
    from svdq_hf.evaluation.tasks.perplexity import token_ids

    source = Source.resolve(folder)
    source.stored  # noqa: B018  # refuses what is no model's folder
    safe = {"trust_remote_code": False, "local_files_only": True}
    model = AutoModel.from_pretrained(source.folder, use_safetensors=True, **safe)
    batches = []
    if options.text is not None:
        tokenizer = AutoTokenizer.from_pretrained(source.folder, **safe)
        ids = token_ids(read_text(options.text), tokenizer, options.tokens)
        names = ["input_ids"] + ["decoder_input_ids"] * bool(model.config.is_encoder_decoder)
        batches = [dict.fromkeys(names, piece[None]) for piece in torch.split(ids, WINDOW)]
    return measure_spectra(model, batches)


def _draw(found: list[list["Spectrum"]], out: str) -> None:
    from svdq_hf.evaluation.spectrum_picture import spectra_picture

    values = [{one.name: one.values for one in layers} for layers in found]
    write_picture(spectra_picture(*values), out)


def _table(found: list[list["Spectrum"]]) -> "Table":
    """A row for each layer; of two models each cell has both figures. Narrow enough for 60 columns."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    from svdq_hf.cli.tables import plain
    from svdq_hf.evaluation.report.short_names import short_names

    seen = any(one.pcdr is not None for layers in found for one in layers)
    table = Table(title="spectra", box=SIMPLE_HEAD)
    table.add_column("layer", overflow="fold")
    for title in ("sigma 1", "sigma 10", "stable rank")[: 3 if len(found) == 1 or not seen else 1]:
        table.add_column(title, justify="right")
    for title in ("PCDR", "outliers") if seen else ():
        table.add_column(title, justify="right")
    for name, *layers in zip(short_names([one.name for one in found[0]]), *found, strict=True):
        cells = (" > ".join(cell) for cell in zip(*(_cells(one, seen) for one in layers), strict=True))
        kept = list(cells)
        table.add_row(plain(name), *(kept[:1] + kept[3:] if seen and len(found) == 2 else kept))
    return table


def _cells(one: "Spectrum", seen: bool) -> list[str]:
    cells = [f"{one.values[0]:.2f}", f"{one.values[-1]:.2f}", f"{one.stable_rank:.1f}"]
    if seen:
        pcdr = "-" if one.pcdr is None else f"{one.pcdr[-1]:.2f}"
        cells += [pcdr, "-" if one.outlier_ratio is None else f"{one.outlier_ratio:.0f}"]
    return cells
