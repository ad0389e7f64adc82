"""The Markdown files that users read, and the code in them."""

import re
from collections.abc import Iterator
from pathlib import Path

from commands import ROOT

#: The README and every page, the op's READMEs and those that a page includes or links.
DOCUMENTS = sorted(
    path.relative_to(ROOT).as_posix()
    for path in [
        *ROOT.glob("*.md"),
        *(ROOT / "docs").rglob("*.md"),
        *(ROOT / "fused_attn").rglob("*.md"),
        *(ROOT / "benchmarks").glob("*.md"),
        *(ROOT / "examples").glob("*.md"),
    ]
)
_BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def read(document: str) -> str:
    return (ROOT / document).read_text()


def blocks(document: str, language: str) -> list[tuple[int, str]]:
    """(line of the first line, text) of every block of code in that language; "" is a shell's."""
    text = read(document)
    found = (match for match in _BLOCK.finditer(text) if match[1] == language)
    return [(text.count("\n", 0, match.start(2)) + 1, match[2]) for match in found]


def run(block: tuple[int, str], document: str, namespace: dict) -> None:
    """Execute a block; errors carry the line in the document."""
    line, code = block
    exec(compile("\n" * (line - 1) + code, str(Path(document)), "exec"), namespace)


def documents_with(language: str) -> Iterator[str]:
    return (document for document in DOCUMENTS if blocks(document, language))
