"""Docstrings as Markdown: roles of reStructuredText become code, ``::`` before a block a colon, and an entry of several
parameters one of each."""

from __future__ import annotations

import re

import griffe

ROLE = re.compile(r":(?:func|class|meth|mod|attr|data):`~?(?:[\w.]*\.)?(\w+)`")
#: Spans of code that wrap would otherwise be cut into by Markdown's emphasis.
DOUBLE = re.compile(r"``(.+?)``", re.DOTALL)
#: An entry of several parameters, with its further lines.
SEVERAL = re.compile(r"^( +)(\w+(?:, \w+)+):( .*\n(?:\1 +\S.*\n)*)", re.MULTILINE)


def _one_each(entry: re.Match) -> str:
    return "".join(f"{entry[1]}{name}:{entry[3]}" for name in entry[2].split(", "))


class Markdown(griffe.Extension):
    def on_object(self, *, obj, **_) -> None:
        if obj.docstring is not None:
            text = ROLE.sub(r"`\1`", obj.docstring.value)
            text = DOUBLE.sub(lambda code: f"`{' '.join(code[1].split())}`", text)
            text = re.sub(r"::$", ":", text, flags=re.MULTILINE)
            obj.docstring.value = SEVERAL.sub(_one_each, text) if "Args:" in text else text
