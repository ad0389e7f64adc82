"""READMEs: figures are those of the committed result files, examples run, commands name networks that exist."""

import re
import shlex
from pathlib import Path

import pytest
import torch
import tyro
from commands import ROOT, tool

from fused_attn import create_model
from fused_attn.train.config import TrainConfig
from fused_attn.train.recipes import RECIPES

readme = tool("report/readme")
README = (ROOT / "README.md").read_text()
#: Trainings of the ablations, in the README of the op.
ABLATIONS = re.findall(r"`R (--[^`]+)`", (ROOT / "fused_attn/ops/squeeze_excite/README.md").read_text())


def test_tables_are_those_of_the_result_files():
    assert len(readme.BLOCK.findall(README)) == README.count("<!-- from ")
    assert readme.fill(README) == README


def test_tables_of_benchmarks_are_those_of_their_json():
    found = 0
    for path, result, kind in readme.results():
        assert path.with_suffix(".md").read_text() == kind.markdown(result), f"make bench renders {path.name} anew"
        found += 1
    assert found
    for name, text in readme.summaries().items():
        assert "|" in text
        assert (ROOT / "benchmarks/results" / name).read_text() == text


def test_a_changed_figure_is_noticed():
    block = next(block[0] for block in readme.BLOCK.finditer(README) if "|" in block[0])
    digit = re.search(r"\d(?=[^\n]*\|\n)", block.partition("\n")[2])[0]
    head, line, rest = block.partition("\n")
    changed = README.replace(block, head + line + rest.replace(digit, str((int(digit) + 1) % 10), 1))
    assert changed != README
    assert readme.fill(changed) != changed


def test_python_examples_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    examples = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert examples
    namespace: dict = {}
    for example in examples:
        exec(compile(example, "README.md", "exec"), namespace)


def test_no_number_is_quoted_outside_the_tables_without_a_source():
    prose = readme.BLOCK.sub("", README)
    assert not re.search(r"\d(\.\d+)?\s?(ms|MiB|GiB|images/s)\b", prose)


def test_there_are_ablations():
    assert len(ABLATIONS) >= 11


@pytest.mark.parametrize("command", ABLATIONS)
def test_ablation(command):
    default = TrainConfig(out=Path("out"), **RECIPES["result-attention"][1])
    config = tyro.cli(TrainConfig, args=shlex.split(command), default=default)
    with torch.device("meta"):
        model = create_model(config.model, num_classes=100, **config.parsed_model_options())
    assert len(model.auxiliary) == len(config.aux_weights)
