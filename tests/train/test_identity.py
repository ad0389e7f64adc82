"""A run goes on with the data that it began with."""

import dataclasses

import pytest
import torch
from PIL import Image
from runs import contents, rewritten

from fused_attn.train import TrainConfig, TrainError, checkpoint, data, identity, train


@pytest.fixture
def folder(tmp_path):
    """Two classes of squares of 16 pixels: eight of each to train on, three to test."""
    for split, count in (("train", 8), ("val", 3)):
        for name in ("cat", "dog"):
            for number in range(count):
                add(tmp_path / "set" / split / name / f"{number}.png")
    return tmp_path / "set"


def add(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (16, 16), (10, 5, 9)).save(path)


def run(folder, out, **changes):
    settings = {"batch_size": 4, "epochs": 2, "threads": 1, "image_size": 14, "max_steps": 3, **changes}
    return train(TrainConfig("wrn_10_1", "imagefolder", out, data_dir=folder, **settings))


def move(path, target):
    target.parent.mkdir(exist_ok=True)
    path.rename(target)


@pytest.mark.parametrize("given", [{}, {"train_images": 12}, {"validation": 2}])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda f: add(f / "train/cat/9.png"), r"have 16 training images, got 17"),
        (lambda f: (f / "train/dog/0.png").unlink(), r"have 16 training images, got 15"),
        (lambda f: add(f / "val/cat/9.png"), r"have 6 test images, got 7"),
        (lambda f: add(f / "train/eel/0.png"), r"class 2 of the run in .* is none, got 'eel'"),
        (lambda f: (f / "train/dog").rename(f / "train/cow") and (f / "val/dog").rename(f / "val/cow"),
         r"class 1 of the run in .* is 'dog', got 'cow'"),
        (lambda f: move(f / "train/dog/7.png", f / "train/cat/9.png"), r"training images of .* have other labels"),
    ],
)  # fmt: skip
def test_a_folder_that_changed(folder, tmp_path, given, change, message):
    out = tmp_path / "run"
    run(folder, out, **given)
    before = contents(out)
    change(folder)
    with pytest.raises(TrainError, match=f"^--resume: .*{message}.*; go on with the same data, or start a new run$"):
        run(folder, out, **given, max_steps=5, resume=True)
    assert before == contents(out)


def test_the_same_data_elsewhere(folder, tmp_path):
    run(folder, tmp_path / "run")
    folder.rename(tmp_path / "moved")
    assert run(tmp_path / "moved", tmp_path / "run", max_steps=5, resume=True)["steps"] == 5


def test_a_checkpoint_without_the_record_is_resumed(folder, tmp_path):
    out = tmp_path / "run"
    run(folder, out)
    path = checkpoint.find(out / "checkpoints")[-1]
    state = torch.load(path / "state.pt", weights_only=True)
    del state["data"]
    rewritten(path, state)
    add(folder / "train/cat/9.png")
    assert run(folder, out, max_steps=5, resume=True)["steps"] == 5


def test_sets_in_memory(tmp_path):
    loaded = data.load("digits", image_size=8)
    saved = identity.of(loaded)
    assert (saved["train"], saved["test"], saved["classes"]) == (1437, 360, list("0123456789"))
    identity.check(saved, data.load("digits", image_size=8), tmp_path)
    fewer = dataclasses.replace(loaded, train=loaded.train[:1000])
    with pytest.raises(TrainError, match="have 1437 training images, got 1000"):
        identity.check(saved, fewer, tmp_path)
