import importlib.util
import re

from places import EXAMPLES
from synthetic_cells import cell, overlap, write

from svdq_hf.evaluation.report.report import write_report

EXAMPLE = EXAMPLES / "publish_results.py"
spec = importlib.util.spec_from_file_location("publish_results", EXAMPLE)
publish_results = importlib.util.module_from_spec(spec)
spec.loader.exec_module(publish_results)


def test_what_is_published_is_small_and_names_only_itself(tmp_path):
    cells = [cell(), cell("none"), *(cell(m, 16, relative_error={"a.0": 0.1}) for m in ("svd", "spqr"))]
    source = write(tmp_path / "out", cells, [overlap(), overlap(other="awq")])
    write_report(source)
    files = publish_results.publish(source, tmp_path / "results")
    assert {file for file in (tmp_path / "results").rglob("*") if file.is_file()} == set(files)
    assert {file.suffix for file in files} == {".md", ".csv", ".svg"}
    text = (tmp_path / "results" / "report.md").read_text()
    named = set(re.findall(r"\((pictures/[^)]+)\)", text))
    assert named == {f"pictures/{file.name}" for file in files if file.suffix == ".svg"}
    assert {name.rsplit("-", 1)[1] for name in named} == {"score.svg", "kl.svg", "spqr.svg"}
    assert not any(file.name.endswith("-runs.csv") for file in files)
    assert text.replace("\n", "")[:6] == "# svdq"
