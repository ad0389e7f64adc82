"""Keeps a table that ``fused-attn reproduce`` made: results/reproduce/NAME.md, with the table, the figure and what is
small of every run in results/reproduce/NAME/.

Run from the repository root: ``python benchmarks/report/reproduced.py OUT [--rows ROWS]``, with the folders that the
command was given; NAME is the table's id with - for /.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from pathlib import Path

# Runs from a clone without installation too.
sys.path.insert(0, str(Path(__file__).parents[2]))

from fused_attn.reproduce.tables import Tables

RESULTS = Path(__file__).parents[1] / "results" / "reproduce"
TABLE = ("table.csv", "figure.png")
RUN = ("config.json", "metrics.json", "log.csv")


def keep(out: Path, rows: Path, results: Path = RESULTS) -> Path:
    """Copy a table and its runs; returns the page."""
    made = json.loads((out / "reproduce.json").read_text())
    name = made["table"].replace("/", "-")
    missing = [file for file in TABLE if not (out / file).exists()]
    if missing:
        sys.exit(f"{out} is not complete: it has no {', '.join(missing)}")
    slugs = {row.slug for row in Tables().table(made["table"], made["scale"]).rows}
    folder = results / name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for file in TABLE:
        shutil.copy(out / file, folder / file)
    for metrics in sorted(rows.glob("*/seed*/metrics.json")):
        run = metrics.parent
        if run.parent.name in slugs:
            to = folder / run.parent.name / run.name
            to.mkdir(parents=True)
            for file in RUN:
                (to / file).write_text(_without_places((run / file).read_text(), run))
            if (cost := run.parent / "cost.json").exists():
                shutil.copy(cost, to.parent / cost.name)
    page = results / f"{name}.md"
    # The page that has the table has headings of its own.
    title, _, body = (out / "table.md").read_text().partition("\n")
    page.write_text(
        f"{title.lstrip('# ')}.  {body.strip()}\n\n[Figure]({name}/figure.png), [numbers]({name}/table.csv).\n"
    )
    return page


def _without_places(text: str, run: Path) -> str:
    """The text without where the data and the runs were on this machine."""
    config = json.loads((run / "config.json").read_text())
    data = config["data_dir"] and str(Path(config["data_dir"]).parent)
    for place, name in ((data, "<data>"), (str(Path(config["out"]).parents[1]), "runs")):
        text = text.replace(place, name) if place else text
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--rows", type=Path)
    options = parser.parse_args()
    print(keep(options.out, options.rows or options.out).read_text())


if __name__ == "__main__":
    main()
