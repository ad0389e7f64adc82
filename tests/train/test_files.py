"""Folders of image files and data sets of the hub by name: what is decoded, what is cropped, and damaged files."""

import threading

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

from fused_attn.train import TrainConfig, TrainError, augment, data, train
from fused_attn.train.files import ImageFiles, load_ahead


def pixels(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


@pytest.fixture
def folder(tmp_path):
    """Two classes, with files of both splits: squares of 16, the size that is loaded for networks that see 14."""
    for split, count in (("train", 6), ("val", 2)):
        for label, name in enumerate(("cat", "dog")):
            path = tmp_path / "set" / split / name
            path.mkdir(parents=True)
            for index in range(count):
                image = Image.fromarray(pixels(16, 16, 3, seed=100 * label + index + 1000 * (split == "val")))
                image.save(path / f"{index}.png")
    return tmp_path / "set"


def test_folder_is_read_pixel_by_pixel(folder):
    loaded = data.load("imagefolder", folder, image_size=14)
    assert (len(loaded.train), len(loaded.test), loaded.num_classes) == (12, 4, 2)
    assert (loaded.in_chans, loaded.image_size, loaded.train.shape) == (3, (14, 14), (3, 16, 16))
    assert loaded.train.labels.tolist() == [0] * 6 + [1] * 6
    expected = np.stack([pixels(16, 16, 3, seed=100 * label + i) for label in range(2) for i in range(6)])
    np.testing.assert_array_equal(loaded.train.images.numpy(), expected.transpose(0, 3, 1, 2))
    np.testing.assert_array_equal(loaded.test[3:].images[0].permute(1, 2, 0).numpy(), pixels(16, 16, 3, seed=1101))
    np.testing.assert_allclose(loaded.mean, expected.mean((0, 1, 2)) / 255, rtol=1e-5)
    np.testing.assert_allclose(loaded.std, expected.std((0, 1, 2)) / 255, rtol=1e-2)


def test_rows_are_chosen_before_they_are_decoded(folder):
    train_images = data.load("imagefolder", folder, image_size=14).train
    everything = data.Images(train_images.images, train_images.labels)
    for index in (slice(3, 9, 2), torch.tensor([11, 0, 7]), slice(0, 0)):
        chosen, expected = train_images[index], everything[index]
        assert torch.equal(chosen.images, expected.images)
        assert torch.equal(chosen.labels, expected.labels)
        assert torch.equal(chosen[:1].images, expected[:1].images)
    kept, held = data.hold_out(train_images, 4)
    assert len(kept) == 8
    assert torch.equal(held.images, data.hold_out(everything, 4)[1].images)


def test_images_of_any_shape_and_mode_become_rgb_squares(tmp_path):
    """Shorter side to the size, central square: a wide image of three flat thirds leaves its middle."""
    wide = np.zeros((20, 60, 3), np.uint8)
    wide[:, :20], wide[:, 20:40], wide[:, 40:] = (250, 0, 0), (0, 250, 0), (0, 0, 250)
    images = {
        "wide": Image.fromarray(wide),
        "tall": Image.fromarray(wide.transpose(1, 0, 2).copy()),
        "grey": Image.fromarray(np.full((9, 9), 77, np.uint8)),
        "alpha": Image.fromarray(np.full((9, 30, 4), 200, np.uint8)),
    }
    for split in ("train", "test"):
        for name, image in images.items():
            (tmp_path / "set" / split / name).mkdir(parents=True)
            image.save(tmp_path / "set" / split / name / "0.png")
    loaded = data.load("imagefolder", tmp_path / "set", image_size=7).train
    assert loaded.images.shape == (4, 3, 8, 8)
    alpha, grey, tall, wide = loaded.images  # in the order of the classes
    assert torch.equal(alpha.unique(), torch.tensor([212], dtype=torch.uint8))  # 200 · 200/255 on white
    assert torch.equal(grey.unique(), torch.tensor([77], dtype=torch.uint8))
    for square in (tall, wide):
        assert (square[1, 2:6, 2:6] == 250).all()
        assert (square[::2, 2:6, 2:6] == 0).all()


def test_evaluation_sees_the_centre_and_training_random_parts(folder):
    loaded = data.load("imagefolder", folder, image_size=14)
    config = TrainConfig(model="resnet20", dataset="imagefolder", out=folder, image_size=14, flip=False)
    training, evaluation = augment.build(config, loaded)
    images = loaded.train.images.float() / 255
    centre = images[:, :, 1:15, 1:15]
    normal = (centre - loaded.mean[:, None, None]) / loaded.std[:, None, None]
    torch.testing.assert_close(evaluation(images), normal)
    torch.manual_seed(0)
    first, second = training(images), training(images)
    assert first.shape == normal.shape
    assert not torch.equal(first, second)
    whole, _ = augment.build(TrainConfig(**{**vars(config), "crop_scale": 1.0}), loaded)
    # All of the area leaves a crop only its proportions to choose, so an image stays near itself.
    spread = [(transform(images) - normal).abs().mean().item() for transform in (whole, training)]
    assert spread[0] < spread[1]


def test_training_on_a_folder(folder, tmp_path):
    config = TrainConfig(
        model="resnet20", dataset="imagefolder", data_dir=folder, image_size=14, out=tmp_path / "run", batch_size=4,
        accumulate=2, epochs=1, threads=1, validation=2,
    )  # fmt: skip
    metrics = train(config)
    assert metrics["steps"] == 2
    assert 0 <= metrics["test_accuracy"] <= 1
    again = train(TrainConfig(**{**vars(config), "out": tmp_path / "again"}))
    assert again["train_loss"] == metrics["train_loss"]


def test_hub_data_set_by_name(monkeypatch):
    """Without labels in its test split, as ImageNet's, the validation split is the test set."""
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b"])})

    def split(labels, shape=(8, 8, 3)):
        rows = {"image": [Image.fromarray(pixels(*shape, seed=seed)) for seed in range(len(labels))], "label": labels}
        return datasets.Dataset.from_dict(rows, features=features)

    asked = []
    splits = {"train": split([0, 1, 1]), "validation": split([1, 0]), "test": split([-1, -1, -1])}
    monkeypatch.setattr(datasets, "load_dataset", lambda name: asked.append(name) or splits)
    loaded = data.load("someone/things")
    assert asked == ["someone/things"]
    assert loaded.test.labels.tolist() == [1, 0]
    np.testing.assert_array_equal(loaded.train.images[2].permute(1, 2, 0).numpy(), pixels(8, 8, 3, seed=2))
    assert loaded.image_size == (8, 8)
    resized = data.load("someone/things", image_size=14)
    assert isinstance(resized.train, ImageFiles)
    assert (resized.train.images.shape, resized.image_size) == ((3, 3, 16, 16), (14, 14))

    splits["train"] = datasets.concatenate_datasets([split([0]), split([1], shape=(9, 8, 3))])
    with pytest.raises(TrainError, match="the images have 2 sizes; pass --image-size to resize and crop them"):
        data.load("someone/things")
    del splits["validation"]
    with pytest.raises(TrainError, match=r"someone/things: expected .*, got train, test \(without labels\)"):
        data.load("someone/things")


@pytest.mark.parametrize(
    ("name", "make", "match"),
    [
        ("imagefolder", lambda path: None, "data_dir must be a folder with the folders train and val .* got nothing"),
        ("imagefolder", lambda path: path / "nowhere", "data_dir must be a folder with the folders train .*nowhere"),
        (
            "imagenet",
            lambda path: None,
            "dataset must be one of .*imagefolder, or owner/name on the hub, got 'imagenet'",
        ),
        ("a/b/c", lambda path: None, "or owner/name on the hub, got 'a/b/c'"),
    ],
)
def test_bad_input(tmp_path, name, make, match):
    with pytest.raises(TrainError, match=match):
        data.load(name, make(tmp_path))


def test_folder_without_test_images(folder):
    (folder / "val").rename(folder.parent / "elsewhere")
    with pytest.raises(TrainError, match="expected the splits train and test, got train"):
        data.load("imagefolder", folder)


def test_damaged_file_is_named(folder):
    broken = folder / "val" / "dog" / "1.png"
    broken.write_bytes(broken.read_bytes()[:200])
    test = data.load("imagefolder", folder, image_size=14).test
    assert test[:3].images.shape == (3, 3, 16, 16)
    with pytest.raises(TrainError, match=r"the image .*dog/1\.png could not be read"):
        _ = test.images


def test_load_ahead_keeps_the_order_loads_one_more_and_passes_errors_on():
    loaded, second_started = [], threading.Event()

    def load(item):
        loaded.append(item)
        if item == 1:
            second_started.set()
        if item == 3:
            raise ValueError("item 3")
        return item * 10

    results = load_ahead(range(5), load)
    assert next(results) == 0
    assert second_started.wait(timeout=10)
    assert 2 not in loaded
    assert [next(results), next(results)] == [10, 20]
    with pytest.raises(ValueError, match="item 3"):
        next(results)
    assert list(load_ahead([], load)) == []
