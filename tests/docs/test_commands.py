"""Commands in the documentation are commands: the real parsers take their arguments, files and targets exist."""

import functools
import re
import shlex

import pytest
from commands import ROOT, python, tool
from documents import DOCUMENTS, blocks

from fused_attn import cli
from fused_attn.bench import command as bench
from fused_attn.bench import networks
from fused_attn.cli import convert_model, demo, draw_scales, inspect_model
from fused_attn.reproduce import command as reproduce
from fused_attn.train import loop

command_line = tool("report/command_line")


def commands(document: str) -> list[str]:
    """Of the blocks without a language: comments away, continued lines joined."""
    lines = []
    for _, block in blocks(document, ""):
        lines += re.sub(r"\\\n\s*", "", block).splitlines()
    return [line for line in (re.sub(r"\s+# .*", "", line).strip() for line in lines) if line]


COMMANDS = sorted({(command, document) for document in DOCUMENTS for command in commands(document)})


def test_there_are_commands():
    assert len(COMMANDS) > 40


@pytest.fixture
def parsed(monkeypatch):
    """The commands' own functions are called with what was parsed, and do nothing."""
    calls = []

    def idle(run, result):
        @functools.wraps(run)
        def called(*arguments, **options):
            calls.append((run.__module__, arguments, options))
            return result

        return called

    metrics = {"skipped_steps": 0, "steps": 0, "seconds": 0.0, "test_loss": 0.0, "test_accuracy": 0.0}
    monkeypatch.setattr(loop, "train", idle(loop.train, metrics))
    for module in (bench, networks, convert_model, demo, draw_scales, inspect_model, reproduce):
        monkeypatch.setattr(module, "run", idle(module.run, 0))
    return calls


@pytest.mark.parametrize(("command", "document"), COMMANDS)
def test_command_exists(command, document, parsed, capsys):
    words = shlex.split(command.replace("DIR/*", "DIR"))
    while "=" in words[0]:  # variables of the environment
        words.pop(0)
    if words[0] == "torchrun":
        words = ["fused-attn", *words[words.index("fused_attn.cli") + 1 :]]
    if words[0] == "fused-attn":
        assert cli.main(words[1:]) == 0, capsys.readouterr().err
        assert len(parsed) == (words[1] != "info")
    elif words[0] == "make":
        targets = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
        assert words[1] in targets
        assert all(re.fullmatch(r"[A-Z_]+=\S+", word) for word in words[2:])
    elif words[0] in ("pip", "python") and "install" in words:
        extras = re.findall(r"\.\[([\w,]+)\]", command)
        known = re.findall(r"^([\w-]+) = \[", (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
        assert all(extra in known for each in extras for extra in each.split(","))
    elif words[0] == "python":
        takes = options_of(words[1])
        assert all(word.partition("=")[0] in takes for word in words[2:] if word.startswith("--"))
    elif words[0] == "pytest":
        paths = [word for word in words[1:] if "/" in word or word.endswith(".py") or word == "benchmarks"]
        assert paths
        assert all((ROOT / path).exists() for path in paths)
    elif words[0].startswith("."):
        assert (ROOT / words[0]).exists()
    else:
        assert words[0] in ("cp", "cd", "git", "pre-commit"), f"{document}: is this a command? {command}"


@functools.cache
def options_of(script: str) -> str:
    """The text of the script: it names the options that its parser takes."""
    return (ROOT / script).read_text() if script != "setup.py" else "--inplace"


def test_a_wrong_option_is_noticed(parsed):
    with pytest.raises(SystemExit):
        cli.main(["bench", "--treads", "2"])
    assert not parsed


def test_page_of_the_command_line_is_current():
    """In a process of its own: other tests may have registered recipes or changed defaults."""
    code = "import sys; sys.path.insert(0, 'benchmarks/report'); import command_line; print(command_line.render())"
    assert python("-c", code).stdout.strip() == command_line.PAGE.read_text().strip(), "make bench renders it anew"


def test_the_page_names_no_path_of_this_machine():
    assert str(ROOT) not in command_line.PAGE.read_text()
    assert str(ROOT) not in command_line.render()


def test_every_command_is_on_the_page():
    assert {command.split()[0] for command in command_line.COMMANDS} == set(cli.COMMANDS)
