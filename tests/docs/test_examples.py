"""The examples run, and what they say of themselves holds."""

import re

import pytest
from commands import ROOT, python
from PIL import Image
from sklearn.datasets import load_sample_image

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
    out = tmp_path / "new" / "matches.png"
    text = output("match_images.py", "--out", out)
    assert int(re.match(r"(\d+) matches", text)[1]) > 50
    assert percentages(text)[0] > 90
    assert out.stat().st_size > 10_000


def test_images_of_a_user_are_matched(tmp_path):
    """Two parts of a photograph, of different heights and in different formats."""
    image = Image.fromarray(load_sample_image("china.jpg"))
    image.crop((0, 0, 560, 427)).save(tmp_path / "a.jpg")
    image.crop((60, 20, 620, 400)).save(tmp_path / "b.png")
    text = output("match_images.py", "--images", tmp_path / "a.jpg", tmp_path / "b.png", "--out", tmp_path / "m.png")
    assert int(re.match(r"(\d+) matches among \d+ and \d+ patches\n", text)[1]) > 50
    assert (tmp_path / "m.png").stat().st_size > 10_000


def test_an_image_that_cannot_be_read_is_named(tmp_path):
    result = python(ROOT / "examples/match_images.py", "--images", "none.jpg", "none.jpg", "--out", tmp_path / "m.png")
    assert (result.returncode, result.stderr.splitlines()[0][:34]) == (1, "--images: none.jpg cannot be read ")


def test_masks_overlap(tmp_path):
    out = tmp_path / "new" / "mask.png"
    text = output("dense_prediction.py", "--steps", 15, "--out", out)
    assert percentages(text)[0] > 20
    assert out.stat().st_size > 10_000
