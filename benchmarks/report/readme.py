"""Renders the committed results (``make bench``): Markdown and pictures from JSON, and the README's tables from those.

Nothing is measured here, so no figure in the README can differ from its source: a block between
``<!-- from benchmarks/results/NAME.md -->`` and ``<!-- end -->`` is replaced by that file.

Run from the repository root: ``python benchmarks/report/readme.py`` (``--check``: change nothing, fail if it would
change the README or a table).
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# Runs from a clone without installation too.
sys.path.insert(0, str(Path(__file__).parents[2]))

from fused_attn.bench import networks, report

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results"
BLOCK = re.compile(r"(<!-- from (?P<source>benchmarks/results/\S+\.md) -->\n).*?(<!-- end -->)", re.DOTALL)


def results(folder: Path = RESULTS) -> Iterator[tuple[Path, dict[str, Any], Any]]:
    """What ``fused-attn bench`` wrote: (JSON file, its content, the module that renders it)."""
    for path in sorted(folder.glob("*.json")):
        result = json.loads(path.read_text())
        if isinstance(result, dict) and "interrupted" in result:
            yield path, result, report if "op" in result else networks


def summaries(folder: Path = RESULTS) -> dict[str, str]:
    """Tables of all ops on the CPU in float32, by file name: one for each allocator."""
    reports = [result for path, result, kind in results(folder) if kind is report]
    return {
        f"summary{suffix}.md": report.summary(each for each in reports if report.stem(each) == each["op"] + suffix)
        for suffix in ("", "_default_allocator")
    }


def fill(text: str, root: Path = ROOT) -> str:
    """The README with every block as its source file has it."""
    return BLOCK.sub(lambda block: f"{block[1]}{(root / block['source']).read_text().strip()}\n{block[3]}", text)


def main() -> int:
    readme = ROOT / "README.md"
    if "--check" in sys.argv[1:]:
        tables = all(path.with_suffix(".md").read_text() == kind.markdown(result) for path, result, kind in results())
        tables = tables and all((RESULTS / name).read_text() == text for name, text in summaries().items())
        return int(not tables or fill(readme.read_text()) != readme.read_text())
    for _, result, kind in results():
        kind.render(result, RESULTS)
    for name, text in summaries().items():
        (RESULTS / name).write_text(text)
    readme.write_text(fill(readme.read_text()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
