"""Links of Markdown files: where they lead, and how they read from another folder."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from pathlib import PurePosixPath

#: Fenced code, inline code, or a link's target; only the last has a group.
_LINK = re.compile(r"^```.*?^```|`[^`\n]*`|(?<=\]\()(?P<path>[^()\s#]*)(?P<anchor>#[^()\s]*)?(?=\))", re.S | re.M)
_EXTERNAL = re.compile(r"[a-z][a-z0-9+.-]*:")


def targets(text: str) -> Iterator[tuple[str, str]]:
    """Every link outside code: path (empty within the page) and anchor (with its ``#``, or empty)."""
    for link in _LINK.finditer(text):
        if link["path"] is not None:
            yield link["path"], link["anchor"] or ""


def is_external(path: str) -> bool:
    return _EXTERNAL.match(path) is not None


def replace(text: str, new: Callable[[str], str]) -> str:
    """``text`` with the path of every link to another file of the repository changed; anchors stay."""

    def one(link: re.Match) -> str:
        if not link["path"] or is_external(link["path"]):
            return link[0]
        return new(link["path"]) + (link["anchor"] or "")

    return _LINK.sub(one, text)


def resolve(path: str, folder: str) -> str:
    """The link ``path`` of a file in ``folder``, from the root of the repository."""
    return os.path.normpath(PurePosixPath(folder) / path)


def relocate(text: str, source: str, target: str) -> str:
    """``text`` of a file in the folder ``source`` as it reads in a file of the folder ``target``."""
    return replace(text, lambda path: os.path.relpath(resolve(path, source), target or "."))
