"""The examples run, and what they say of themselves holds."""

import re

import pytest
from commands import ROOT, python

EXAMPLES = sorted(path.name for path in (ROOT / "examples").glob("*.py"))


def output(name, *arguments):
    result = python(ROOT / "examples" / name, *arguments)
    assert result.returncode == 0, result.stderr
    return result.stdout


def percentages(text):
    return [float(number) for number in re.findall(r"([\d.]+)%", text)]


def test_there_are_five():
    assert len(EXAMPLES) == 5
    assert all(name in (ROOT / "examples/README.md").read_text() for name in EXAMPLES)


@pytest.mark.parametrize(("name", "results"), [("augment_a_block.py", 2), ("layers_of_a_vit.py", 3)])
def test_networks_learn(name, results):
    accuracies = percentages(output(name, "--steps", 25))
    assert len(accuracies) == results
    assert min(accuracies) > 40  # of ten classes


def test_tables_and_gates_are_enough_to_gain():
    upright, turned, tuned = percentages(output("tune_tables_and_gates.py", "--steps", 40))
    assert upright > 40
    assert tuned > turned + 10


def test_matches_are_right(tmp_path):
    text = output("match_images.py", "--out", tmp_path / "matches.png")
    assert int(re.match(r"(\d+) matches", text)[1]) > 50
    assert percentages(text)[0] > 90
    assert (tmp_path / "matches.png").stat().st_size > 10_000


def test_masks_overlap(tmp_path):
    text = output("dense_prediction.py", "--steps", 15, "--out", tmp_path / "mask.png")
    assert percentages(text)[0] > 20
    assert (tmp_path / "mask.png").stat().st_size > 10_000
