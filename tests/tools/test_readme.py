"""README and pages: figures are those of the committed result files, one screen, commands name networks that exist."""

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


def page_ids(path):
    return path.relative_to(ROOT).as_posix()


@pytest.mark.parametrize("page", readme.pages(), ids=page_ids)
def test_tables_are_those_of_the_result_files(page):
    text = page.read_text()
    assert len(readme.BLOCK.findall(text)) == text.count("<!-- from ")
    assert readme.fill(text, page) == text, "make bench renders it anew"


def test_pages_hold_tables():
    filled = [page for page in readme.pages() if readme.BLOCK.search(page.read_text())]
    assert ROOT / "README.md" in filled
    assert {"cpu.md", "default_allocator.md", "networks.md", "trainings.md", "models.md"} <= {
        each.name for each in filled
    }


def test_readme_is_one_screen():
    assert len(README.splitlines()) <= 150


def test_picture_shows_the_result_file():
    """Versions of matplotlib place things differently; what is written is the same."""
    picture = tool("report/picture")
    shown = re.findall(r"<text[^>]*>([^<]*)</text>", picture.PICTURE.read_text())
    labels = picture.labels()
    assert len(labels) >= 12
    assert [label for label in labels if not any(label in text for text in shown)] == []
    numbers = [text for text in shown if re.fullmatch(r"[\d,.]+", text)]
    known = {*labels, "256", "1,024", "4,096", "9,216"}
    assert {text for text in numbers if text not in known and text.strip("0") not in ("1", "1.")} == set()


def test_tables_of_benchmarks_are_those_of_their_json():
    found = 0
    for path, result, kind in readme.results():
        assert path.with_suffix(".md").read_text() == kind.markdown(result), f"make bench renders {path.name} anew"
        found += 1
    assert found
    for name, text in readme.tables().items():
        assert "|" in text or name == "headline.md"
        assert (ROOT / "benchmarks/results" / name).read_text() == text


def test_ops_that_were_measured_have_a_row(tmp_path):
    measured = (ROOT / "benchmarks/results/layer_attention.json").read_text()
    for ops in (("layer_attention",), ("bias_attention_2d", "layer_attention")):
        for op in ops:
            (tmp_path / f"{op}.json").write_text(measured)
        rows = re.findall(r"^\| \[.*\| `(\w+)\(", readme.replacements(tmp_path), re.MULTILINE)
        assert rows == [*ops]


def test_a_changed_figure_is_noticed():
    block = next(block[0] for block in readme.BLOCK.finditer(README) if "|" in block[0])
    digit = re.search(r"\d(?=[^\n]*\|\n)", block.partition("\n")[2])[0]
    head, line, rest = block.partition("\n")
    changed = README.replace(block, head + line + rest.replace(digit, str((int(digit) + 1) % 10), 1))
    assert changed != README
    assert readme.fill(changed) != changed


@pytest.mark.parametrize("page", readme.pages(), ids=page_ids)
def test_no_number_is_quoted_outside_the_tables_without_a_source(page):
    prose = readme.BLOCK.sub("", page.read_text())
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
