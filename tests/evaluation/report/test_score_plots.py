import importlib
import sys
import xml.etree.ElementTree as ET

import numpy as np
import pytest
from matplotlib.collections import QuadMesh
from matplotlib.colors import to_hex, to_rgb
from synthetic_cells import LAYERS, METHODS, cell, overlap, write

from svdq_hf.evaluation.report.cells import Overlap, groups
from svdq_hf.evaluation.report.drawing import lettering, save, svg
from svdq_hf.evaluation.report.layer_plots import error_picture, overlap_picture
from svdq_hf.evaluation.report.palette import INK, KNOWN, looks
from svdq_hf.evaluation.report.read import read_cells
from svdq_hf.evaluation.report.rows import main_rows
from svdq_hf.evaluation.report.score_plots import kl_picture, score_picture

CELLS = (
    cell(correct="1111111110"),
    cell("none", correct="1111100000", kl=0.5),
    cell("svd", 1, correct="1111110000", kl=0.2),
    cell("svd", 16, correct="1111111000", kl=0.1),
    cell("magnitude", 1, correct="1111100000", kl=0.4),
)


@pytest.fixture
def drawn(tmp_path):
    def make(picture, *cells):
        [group] = groups(read_cells(write(tmp_path, list(cells))))
        return picture(group, main_rows(group), looks(group.methods))

    return make


def lines(figure):
    """What is drawn of each method: its k, rounded, and its values."""
    [axes] = figure.axes
    named = {line.get_label(): line for line in axes.lines if not line.get_label().startswith("_")}
    return {name: (np.round(line.get_xdata()).tolist(), line.get_ydata()) for name, line in named.items()}


def test_score_is_drawn_against_k_with_levels_across(drawn):
    figure = drawn(score_picture, *CELLS)
    found = lines(figure)
    assert list(found) == ["FP32", "4-bit, nothing salient", "svd", "magnitude"]
    assert found["svd"][0] == [1, 16]
    assert list(found["svd"][1]) == [0.6, 0.7]
    assert list(found["FP32"][1]) == [0.9, 0.9]
    [axes] = figure.axes
    assert axes.get_xscale() == "log"
    assert [label.get_text() for label in axes.get_xticklabels()] == ["1", "16"]


def test_intervals_are_wilsons(drawn):
    [axes] = drawn(score_picture, *CELLS).axes
    bars = [line.get_ydata() for line in axes.lines if line.get_label().startswith("_")]
    # 7 of 10: 0.397 to 0.892 (Wilson 1927)
    assert any(list(bar) == pytest.approx([0.3968, 0.8922], abs=1e-4) for bar in bars)
    assert len(bars) == 3


def test_many_methods_keep_the_bars_of_svd_and_magnitude_alone(drawn):
    [axes] = drawn(score_picture, cell(), *(cell(method, 1) for method in METHODS)).axes
    bars = [line for line in axes.lines if line.get_label().startswith("_")]
    assert [to_hex(bar.get_color()) for bar in bars] == [KNOWN["svd"].colour, KNOWN["magnitude"].colour]


def test_kl_is_drawn_on_two_logarithmic_axes_without_fp32(drawn):
    figure = drawn(kl_picture, *CELLS)
    [axes] = figure.axes
    assert (axes.get_xscale(), axes.get_yscale()) == ("log", "log")
    assert list(lines(figure)) == ["4-bit, nothing salient", "svd", "magnitude"]
    assert list(lines(figure)["svd"][1]) == [0.2, 0.1]


@pytest.mark.parametrize("kl", [None, 0.0, float("nan"), float("inf")])
def test_kl_that_no_logarithm_has_is_left_out(drawn, kl):
    assert drawn(kl_picture, cell(), cell("svd", 1, kl=kl)) is None
    assert list(lines(drawn(kl_picture, cell("svd", 1, kl=kl), cell("svd", 2, kl=0.1)))["svd"][1]) == [0.1]


def test_score_that_is_no_number_is_not_drawn(drawn):
    broken = cell("svd", 1, correct=None, metrics={"perplexity": float("inf")})
    assert drawn(score_picture, broken) is None


def test_overlap_is_a_field_of_layers_by_k():
    lines = [
        overlap("x.0.a", 1, share=0.1),
        overlap("x.0.a", 16, share=0.62),
        overlap("x.1.b", 16, share=0.8),
    ]
    lines.append(overlap("x.1.b", 16, share=0.9, model="mini-seed1"))
    figure = overlap_picture([Overlap(**line) for line in lines], "spqr")
    [axes] = figure.axes
    [mesh] = [part for part in axes.collections if isinstance(part, QuadMesh)]
    assert np.ma.filled(mesh.get_array(), -1).round(3).tolist() == [[0.1, 0.62], [-1, 0.85]]
    assert [text.get_text() for text in axes.texts] == ["10", "62", "85"]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["0.a", "1.b"]


def test_many_layers_are_drawn_without_numbers_and_only_some_named():
    lines = [overlap(f"layers.{number}.q", k) for number in range(200) for k in (1, 16)]
    figure = overlap_picture([Overlap(**line) for line in lines], "spqr")
    assert len(figure.axes[0].texts) == 0
    assert len(figure.axes[0].get_yticklabels()) == 50
    assert len(figure.axes) == 2  # and a scale of the colours


def test_error_is_the_mean_over_seeds_at_the_highest_k(tmp_path):
    cells = [
        cell("svd", 1, relative_error={"a": 0.9}),
        cell("svd", 16, relative_error={"a": 0.1, "b": 0.3}),
        cell("svd", 16, model_seed=1, relative_error={"a": 0.2, "b": 0.3}),
        cell("none", relative_error={"a": 0.5, "b": 0.6}),
    ]
    [group] = groups(read_cells(write(tmp_path, cells)))
    figure = error_picture(group, looks(group.methods))
    dots = {line.get_label(): line.get_xdata() for line in figure.axes[0].lines}
    assert list(dots["svd"]) == pytest.approx([0.15, 0.3])
    assert list(dots["4-bit, nothing salient"]) == [0.5, 0.6]
    assert "k = 16" in figure.get_suptitle()


def test_error_that_is_unknown_is_not_drawn(tmp_path):
    [group] = groups(read_cells(write(tmp_path, [cell(), cell("svd", 1)])))
    assert error_picture(group, looks(group.methods)) is None


def test_files_are_the_same_to_the_byte_and_carry_no_date(drawn, tmp_path):
    first = save(drawn(score_picture, *CELLS), tmp_path / "a.b")
    again = save(drawn(score_picture, *CELLS), tmp_path / "c")
    assert [file.name for file in first] == ["a.b.svg", "a.b.png"]
    assert [file.read_bytes() for file in first] == [file.read_bytes() for file in again]
    assert b"date" not in first[0].read_bytes().lower()
    assert ET.parse(first[0]).getroot().tag.endswith("svg")


@pytest.mark.parametrize("name", ["$\\frac{", "a$b$c", "犬", "<b>&amp;", "\x00\x07", "m" * 5000, "_hidden"])
def test_strangers_names_are_drawn(drawn, name):
    figure = drawn(score_picture, cell(), cell(name, 1))
    assert ET.fromstring(svg(figure)) is not None


def test_lettering_by_hand():
    assert lettering("a$b\\c犬") == r"a\$b/c?"
    assert len(lettering("a" * 31)) == 30


def _luminance(colour: str) -> float:
    channels = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in to_rgb(colour)]
    return 0.2126 * channels[0] + 0.7152 * channels[1] + 0.0722 * channels[2]


@pytest.mark.parametrize("method", [*KNOWN, "mine", "other", "third", "fourth"])
def test_every_colour_can_be_seen_on_a_light_and_on_a_dark_page(method):
    colour = looks(["mine", "other", "third", "fourth"])[method].colour
    if colour != INK:  # which a page replaces by its own
        light, dark = _luminance("#ffffff"), _luminance("#14171b")
        # WCAG 2.2, 1.4.11: 3 to 1 for what is not text
        assert (light + 0.05) / (_luminance(colour) + 0.05) >= 3
        assert (_luminance(colour) + 0.05) / (dark + 0.05) >= 3


def test_methods_look_different_and_the_same_everywhere():
    look = looks([*METHODS, "mine", "other"])
    drawn = [(one.colour, one.marker) for one in look.values()]
    assert len(set(drawn)) == len(drawn)
    assert looks(["svd"])["svd"] == look["svd"]


@pytest.mark.parametrize(("module", "package"), [("drawing", "matplotlib"), ("statistics", "scipy")])
def test_missing_extra_is_named(monkeypatch, module, package):
    for name in [name for name in sys.modules if name.split(".")[0] == package]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.delitem(sys.modules, f"svdq_hf.evaluation.report.{module}")
    with pytest.raises(ImportError, match=r"pip install -e '\.\[evaluate\]'"):
        importlib.import_module(f"svdq_hf.evaluation.report.{module}")


def test_layers_of_the_synthetic_model_fit():
    figure = overlap_picture([Overlap(**overlap(layer)) for layer in LAYERS], "spqr")
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()][:2] == [
        "0.attention.self.query",
        "0.attention.self.key",
    ]


def test_axes_span_enough_that_noise_looks_like_noise(drawn):
    same = [cell(correct="1" * 999 + "0"), cell("svd", 1, correct="1" * 998 + "00")]
    low, high = drawn(score_picture, *same).axes[0].get_ylim()
    assert high - low == pytest.approx(0.05)
    texts = {"correct": None, "n": 9}
    loss = [
        cell(**texts, metrics={"perplexity": 20.0}),
        cell("svd", 1, **texts, metrics={"perplexity": 20.01}),
    ]
    low, high = drawn(score_picture, *loss).axes[0].get_ylim()
    assert high - low == pytest.approx(1.0)  # 5 % of FP32's
    apart = [cell(), cell("svd", 1, kl=0.0100), cell("svd", 16, kl=0.0101)]
    low, high = drawn(kl_picture, *apart).axes[0].get_ylim()
    assert high / low >= 9.999
