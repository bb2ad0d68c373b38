"""The small part of an evaluation's report, to be committed: tables, findings, and the telling pictures.

    python examples/publish_results.py OUT examples/results/rte

OUT is the folder of `svdq evaluate`. The page, the PNGs, the single runs and most of the layer-by-layer
pictures stay there: `report.md` names what is copied and nothing else.
"""

import argparse
import re
import shutil
from pathlib import Path

PICTURE = re.compile(r"!\[[^\]]*\]\((pictures/[^)]+)\)\n*")
TOLD_IN_TABLES = re.compile(r"-error\.svg$|-overlap-(?!spqr)[a-z-]+\.svg$")  # a table says the same, shorter


def publish(source: Path, target: Path) -> list[Path]:
    """Copy a report without what is large; the files written."""
    text = (source / "report.md").read_text(encoding="utf-8")
    pictures = [name for name in PICTURE.findall(text) if not TOLD_IN_TABLES.search(name)]
    kept = PICTURE.sub(lambda found: found[0] if found[1] in pictures else "", text)
    tables = [f"tables/{file.name}" for file in sorted((source / "tables").glob("*.csv"))]
    names = [name for name in tables if not name.endswith("-runs.csv")] + pictures
    for name in names:
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source / name, target / name)
    (target / "report.md").write_text(kept, encoding="utf-8")
    return [target / name for name in [*names, "report.md"]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("source", type=Path)
    parser.add_argument("target", type=Path)
    options = parser.parse_args()
    for file in publish(options.source, options.target):
        print(file)


if __name__ == "__main__":
    main()
