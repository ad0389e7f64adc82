"""Images that cannot be decoded: an error that names the file, or passed over, counted and named."""

import json
import os
import socket

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

from fused_attn.train import TrainConfig, TrainError, data, train
from fused_attn.train.files import FilePaths, ImageFiles, Split
from fused_attn.train.loop import Run


@pytest.fixture
def folder(tmp_path):
    """Two classes of squares of 16 pixels, each of a colour of its own: eight to train on, three to test."""
    for split, count in (("train", 8), ("val", 3)):
        for label, name in enumerate(("cat", "dog")):
            for number in range(count):
                path = tmp_path / "set" / split / name / f"{number}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.new("RGB", (16, 16), (10 * number + 100 * label, 5, 9)).save(path)
    return tmp_path / "set"


def damage(*paths):
    for path in paths:
        path.write_bytes(path.read_bytes()[:50])


def config(folder, out, **changes):
    settings = {"batch_size": 4, "accumulate": 2, "epochs": 2, "threads": 1, "image_size": 14}
    return TrainConfig("wrn_10_1", "imagefolder", out, data_dir=folder, **{**settings, **changes})


def unreadable(out):
    events = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return [event["image"] for event in events if event["event"] == "unreadable"]


def test_a_run_passes_over_them_counts_and_names_them(folder, tmp_path):
    broken = [folder / "train/dog/5.png", folder / "val/cat/0.png"]
    damage(*broken)
    out = tmp_path / "run"
    metrics = train(config(folder, out, skip_unreadable=True))
    assert metrics["unreadable_images"] == 2
    assert sorted(unreadable(out)) == sorted(map(str, broken))
    # Five test images are left.
    assert (metrics["test_accuracy"] * 5) % 1 == pytest.approx(0, abs=1e-5)
    assert metrics["steps"] == 8


def test_without_leave_to_skip_a_run_ends_with_the_name(folder, tmp_path):
    damage(folder / "val/cat/0.png")
    out = tmp_path / "run"
    with pytest.raises(TrainError, match=r"the image .*val/cat/0\.png could not be read, it may be damaged") as caught:
        train(config(folder, out))
    assert "\n" not in str(caught.value)
    # The epoch is not lost: the run goes on from its end, and the option may be given only now.
    metrics = train(config(folder, out, resume=True, skip_unreadable=True))
    assert (metrics["steps"], metrics["unreadable_images"]) == (8, 1)


def test_a_resumed_run_is_the_same(folder, tmp_path):
    damage(folder / "train/dog/5.png", folder / "train/cat/1.png")
    whole = train(config(folder, tmp_path / "whole", skip_unreadable=True))
    train(config(folder, tmp_path / "parts", skip_unreadable=True, max_steps=3))
    parts = train(config(folder, tmp_path / "parts", skip_unreadable=True, max_steps=None, resume=True))
    assert parts["test_loss"] == whole["test_loss"]
    assert parts["unreadable_images"] == whole["unreadable_images"] == 2
    assert len(unreadable(tmp_path / "parts")) == 2


def files_of(folder, names, skipped):
    split = Split(FilePaths(folder / "train", names), torch.arange(len(names)))
    return ImageFiles(split, 16, skipped=skipped)


def test_others_of_the_step_stand_in(folder):
    names = [f"{name}/{number}.png" for name in ("cat", "dog") for number in range(6)]
    damage(*(folder / "train" / names[index] for index in (1, 4, 5, 6, 7)))
    skipped = {}
    images = files_of(folder, names, skipped)
    parts = [images[:4], images[4:8], images[8:]]
    filled = data.in_memory_filled(parts)
    assert [len(part) for part in filled] == [4, 4, 4]
    assert sorted(skipped) == [str(folder / "train" / names[index]) for index in (1, 4, 5, 6, 7)]
    good = {0, 2, 3, 8, 9, 10, 11}
    for part in filled:
        for image, label in zip(part.images, part.labels.tolist(), strict=True):
            assert label in good
            assert image[0, 0, 0] == 10 * (label % 6) + 100 * (label // 6)
    assert set(torch.cat([part.labels for part in filled]).tolist()) == good
    assert [part.labels.tolist() for part in data.in_memory(parts)] == [[0, 2, 3], [], [8, 9, 10, 11]]
    with pytest.raises(TrainError, match="none of the 4 images of a step could be read"):
        data.in_memory_filled([images[4:6], images[6:8]])
    with pytest.raises(TrainError, match=r"cat/1\.png could not be read"):
        data.in_memory_filled([files_of(folder, names, None)[:4]])


def test_files_that_are_gone_and_links_that_lead_nowhere(folder):
    (folder / "train/cat/99.png").symlink_to("nowhere.png")
    loaded = data.load("imagefolder", folder, image_size=14, skip_unreadable=True)
    (folder / "train/dog/7.png").unlink()
    (part,) = data.in_memory([loaded.train])
    assert (len(loaded.train), len(part)) == (17, 15)
    assert sorted(loaded.skipped) == [str(folder / "train/cat/99.png"), str(folder / "train/dog/7.png")]


def fifo(path):
    os.mkfifo(path)
    return "a FIFO"


def sock(path):
    with socket.socket(socket.AF_UNIX) as server:
        folder = os.open(path.parent, os.O_RDONLY)  # a socket's path must be short
        server.bind(f"/proc/self/fd/{folder}/{path.name}")
        os.close(folder)
    return "a socket"


def device(path):
    path.symlink_to("/dev/zero")
    return "a device"


def link(path):
    os.mkfifo(path.parent.parent.parent / "fifo")
    path.symlink_to("../../fifo")
    return "a FIFO"


@pytest.mark.parametrize("make", [fifo, sock, device, link])
def test_what_is_no_file_is_no_image(folder, make):
    path = folder / "train/cat/99.png"
    what = make(path)
    match = rf"the image .*train/cat/99\.png could not be read.*it must be a regular file, got {what}"
    with pytest.raises(TrainError, match=match):
        data.load("imagefolder", folder, image_size=14)
    loaded = data.load("imagefolder", folder, image_size=14, skip_unreadable=True)
    (part,) = data.in_memory([loaded.train])
    assert (len(loaded.train), len(part)) == (17, 16)
    assert loaded.skipped == {str(path): f"ValueError: it must be a regular file, got {what}"}


def test_a_row_may_name_what_is_no_file(tmp_path):
    os.mkfifo(tmp_path / "fifo.png")
    features = datasets.Features({"img": datasets.Image(decode=False), "label": datasets.Value("int64")})
    images = [{"bytes": None, "path": str(tmp_path / "fifo.png")}] * 2
    (tmp_path / "set").mkdir()
    for split in ("train", "test"):
        rows = datasets.Dataset.from_dict({"img": images, "label": [0, 1]}, features=features)
        rows.to_parquet(tmp_path / f"set/{split}.parquet")
    with pytest.raises(TrainError, match=r"fifo\.png\) could not be read.*it must be a regular file, got a FIFO"):
        data.load("cifar10", tmp_path / "set")


def test_what_is_no_file_is_no_parquet(tmp_path):
    """datasets passes over it."""
    features = datasets.Features({"img": datasets.Image(), "label": datasets.Value("int64")})
    for split in ("train", "test"):
        rows = {"img": [np.zeros((4, 4, 3), np.uint8)] * 2, "label": [0, 1]}
        (tmp_path / "set").mkdir(exist_ok=True)
        datasets.Dataset.from_dict(rows, features=features).to_parquet(tmp_path / f"set/{split}-0.parquet")
    os.mkfifo(tmp_path / "set/train-1.parquet")
    with pytest.raises(TrainError, match=r"set/train-1\.parquet must be a regular file, got a FIFO"):
        data.load("cifar10", tmp_path / "set")


def test_nothing_to_train_on(folder):
    damage(*(folder / "train").rglob("*.png"))
    with pytest.raises(TrainError, match=r"none of 16 training images could be read, the first: .*train/.*\.png"):
        data.load("imagefolder", folder, skip_unreadable=True)


def test_rows_of_parquet(tmp_path):
    features = datasets.Features({"img": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b"])})
    for split in ("train", "test"):
        images = [np.full((4, 4, 3), value, np.uint8) for value in range(5)]
        images[2], images[3] = {"bytes": b"no image", "path": "two.png"}, None
        rows = {"img": images, "label": [0, 1, 0, 1, 1]}
        (tmp_path / "set").mkdir(exist_ok=True)
        datasets.Dataset.from_dict(rows, features=features).to_parquet(tmp_path / f"set/{split}.parquet")
    loaded = data.load("cifar10", tmp_path / "set", skip_unreadable=True)
    assert loaded.train.images[:, 0, 0, 0].tolist() == [0, 1, 4]
    assert loaded.train.labels.tolist() == [0, 1, 1]
    assert sorted(loaded.skipped) == [
        "of row 2 in test (two.png)", "of row 2 in train (two.png)", "of row 3 in test", "of row 3 in train",
    ]  # fmt: skip
    with pytest.raises(TrainError, match=r"the image of row [23] in train.*could not be read, it may be damaged"):
        data.load("cifar10", tmp_path / "set")


def test_few_training_images_of_a_run_are_of_both_classes(folder, tmp_path):
    assert Run(config(folder, tmp_path / "run", train_images=8)).images.labels.tolist() == [0] * 4 + [1] * 4
