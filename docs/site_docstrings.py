"""Docstrings as Markdown: roles of reStructuredText become code, ``::`` before a block a colon."""

from __future__ import annotations

import re

import griffe

ROLE = re.compile(r":(?:func|class|meth|mod|attr|data):`~?(?:[\w.]*\.)?(\w+)`")
#: Spans of code that wrap would otherwise be cut into by Markdown's emphasis.
DOUBLE = re.compile(r"``(.+?)``", re.DOTALL)


class Markdown(griffe.Extension):
    def on_object(self, *, obj, **_) -> None:
        if obj.docstring is not None:
            text = ROLE.sub(r"`\1`", obj.docstring.value)
            text = DOUBLE.sub(lambda code: f"`{' '.join(code[1].split())}`", text)
            obj.docstring.value = re.sub(r"::$", ":", text, flags=re.MULTILINE)
