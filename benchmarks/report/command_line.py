"""The page of the command line: what ``--help`` of every command says, and the recipes.

Run from the repository root: ``python benchmarks/report/command_line.py``; ``make bench`` does.
"""

from __future__ import annotations

import contextlib
import io
import os
import sys
from pathlib import Path

# Runs from a clone without installation too.
sys.path.insert(0, str(Path(__file__).parents[2]))

from fused_attn import cli
from fused_attn.train.recipes import RECIPES

PAGE = Path(__file__).parents[2] / "docs" / "command_line.md"
COMMANDS = ("train", "reproduce", "inspect", "scales", "demo", "bench", "bench networks", "convert", "info")

HEAD = """# Command line

```
fused-attn info
```

says which kernels are there, which implementation each op would use, and which models and recipes there are. The
options below are those of `--help`. A command that fails says why in one line, and its
[exit status](training.md#losses-that-are-not-finite-and-exit-statuses) says whose fault it was."""


def help_of(command: str) -> str:
    """What ``fused-attn COMMAND --help`` prints."""
    output, columns = io.StringIO(), os.environ.get("COLUMNS")
    os.environ["COLUMNS"] = "104"
    try:
        with contextlib.redirect_stdout(output), contextlib.suppress(SystemExit):
            cli.main([*command.split(), "--help"])
    finally:
        if columns is None:
            del os.environ["COLUMNS"]
        else:
            os.environ["COLUMNS"] = columns
    return "\n".join(line.rstrip() for line in output.getvalue().splitlines()).strip()


def render() -> str:
    lines = [HEAD]
    for command in COMMANDS:
        lines += ["", f"## fused-attn {command}", "", "```text", help_of(command), "```"]
    lines += ["", "## Recipes", "", "| `--recipe` | source and settings |", "| --- | --- |"]
    lines += [f"| `{name}` | {text} |" for name, (text, _) in RECIPES.items()]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    PAGE.write_text(render())
