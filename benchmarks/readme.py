"""Fills the README's tables from the committed result files, so that no figure in it can differ from its source.

A block between ``<!-- from benchmarks/results/NAME.md -->`` and ``<!-- end -->`` is replaced by that file.

Run from the repository root: ``python benchmarks/readme.py`` (``--check``: change nothing, fail if it would).
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
BLOCK = re.compile(r"(<!-- from (?P<source>benchmarks/results/\S+\.md) -->\n).*?(<!-- end -->)", re.DOTALL)


def fill(text: str, root: Path = ROOT) -> str:
    """The README with every block as its source file has it."""
    return BLOCK.sub(lambda block: f"{block[1]}{(root / block['source']).read_text().strip()}\n{block[3]}", text)


def main() -> int:
    readme = ROOT / "README.md"
    filled = fill(readme.read_text())
    if "--check" in sys.argv[1:]:
        return int(filled != readme.read_text())
    readme.write_text(filled)
    return 0


if __name__ == "__main__":
    sys.exit(main())
