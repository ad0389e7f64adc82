"""Data sets: what is loaded, the order of batches, and damaged folders."""

import datasets
import numpy as np
import pytest
import torch

from fused_attn.train import TrainError, data

CLASSES = [str(number) for number in range(10)]


def write(path, images, labels, features=None):
    features = features or datasets.Features({"img": datasets.Image(), "label": datasets.ClassLabel(names=CLASSES)})
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = dict(zip(features, (list(images), labels), strict=True))
    datasets.Dataset.from_dict(rows, features=features).to_parquet(path)


def pixels(count, seed):
    return np.random.default_rng(seed).integers(0, 256, (count, 32, 32, 3), dtype=np.uint8)


@pytest.fixture
def folder(tmp_path):
    write(tmp_path / "set/data/train-00000-of-00001.parquet", pixels(20, 0), [i % 10 for i in range(20)])
    write(tmp_path / "set/data/test-00000-of-00001.parquet", pixels(10, 1), list(range(10)))
    return tmp_path / "set"


def test_folder_is_read_pixel_by_pixel(folder):
    loaded = data.load("cifar10", folder)
    expected = pixels(20, 0)
    assert loaded.train.images.dtype == torch.uint8
    np.testing.assert_array_equal(loaded.train.images.numpy(), expected.transpose(0, 3, 1, 2))
    np.testing.assert_array_equal(loaded.test.images.numpy(), pixels(10, 1).transpose(0, 3, 1, 2))
    assert loaded.train.labels.tolist() == [i % 10 for i in range(20)]
    assert (loaded.num_classes, loaded.in_chans, loaded.image_size) == (10, 3, (32, 32))
    np.testing.assert_allclose(loaded.mean, expected.mean((0, 1, 2)) / 255, rtol=1e-5)
    np.testing.assert_allclose(loaded.std, expected.std((0, 1, 2)) / 255, rtol=1e-3)


def test_fine_labels_of_cifar100_are_chosen_and_grey_images_have_a_channel(tmp_path):
    names = [str(number) for number in range(100)]
    features = datasets.Features(
        {
            "image": datasets.Image(),
            "coarse_label": datasets.ClassLabel(names=names[:20]),
            "fine_label": datasets.ClassLabel(names=names),
        }
    )
    for split in ("train", "test"):
        path = tmp_path / f"set/{split}.parquet"
        path.parent.mkdir(exist_ok=True)
        rows = {"image": list(pixels(3, 2)[..., 0]), "coarse_label": [1, 2, 3], "fine_label": [97, 98, 99]}
        datasets.Dataset.from_dict(rows, features=features).to_parquet(path)
    loaded = data.load("cifar100", tmp_path / "set")
    assert loaded.train.labels.tolist() == [97, 98, 99]
    assert loaded.num_classes == 100
    np.testing.assert_array_equal(loaded.train.images[:, 0].numpy(), pixels(3, 2)[..., 0])


def test_digits_are_scikit_learns():
    from sklearn.datasets import load_digits

    loaded = data.load("digits", image_size=8)
    together = torch.cat([loaded.train.images, loaded.test.images])[:, 0].numpy().astype(int)
    original = np.rint(load_digits().images * 255 / 16).astype(int)
    assert sorted(map(bytes, together.astype(np.uint8))) == sorted(map(bytes, original.astype(np.uint8)))
    assert (len(loaded.train), len(loaded.test)) == (1437, 360)
    assert data.load("digits").image_size == (32, 32)


def test_hold_out_is_disjoint_complete_and_always_the_same():
    images = data.Images(torch.arange(100)[:, None], torch.arange(100))
    kept, held = data.hold_out(images, 30)
    assert len(held) == 30
    assert sorted(kept.labels.tolist() + held.labels.tolist()) == list(range(100))
    torch.manual_seed(123)
    assert data.hold_out(images, 30)[1].labels.tolist() == held.labels.tolist()
    with pytest.raises(TrainError, match=r"validation must be less than the 100 training images, got 100"):
        data.hold_out(images, 100)


def test_an_epoch_is_a_permutation_that_can_be_entered_anywhere():
    images = data.Images(torch.arange(70)[:, None], torch.arange(70))

    def order(seed, epoch, first=0):
        return [label for batch in data.epoch_batches(images, 8, seed, epoch, first) for label in batch.labels.tolist()]

    whole = order(0, 0)
    assert len(whole) == len(set(whole)) == 64
    assert order(0, 0, first=3) == whole[24:]
    assert order(0, 1) != whole
    assert order(1, 0) != whole
    left_out = {label for epoch in range(20) for label in set(range(70)) - set(order(0, epoch))}
    assert len(left_out) > 30  # not always the same ones


def test_missing_folder(tmp_path):
    with pytest.raises(TrainError, match=r"data_dir must be a folder .* got no folder: .*nowhere"):
        data.load("cifar10", tmp_path / "nowhere")


def test_folder_without_parquet_files(tmp_path):
    (tmp_path / "notes.txt").write_text("nothing")
    with pytest.raises(TrainError, match=r"data_dir must be .*a folder without Parquet files"):
        data.load("cifar10", tmp_path)


def test_folder_without_a_test_split(folder):
    next(folder.rglob("test*.parquet")).unlink()
    with pytest.raises(TrainError, match=r"expected the splits train and test, got train"):
        data.load("cifar10", folder)


def test_truncated_file(folder):
    file = next(folder.rglob("train*.parquet"))
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    with pytest.raises(TrainError, match=r"could not be read, it may be damaged") as caught:
        data.load("cifar10", folder)
    assert "\n" not in str(caught.value)


def test_image_that_does_not_decode(tmp_path):
    features = datasets.Features({"img": datasets.Image(), "label": datasets.ClassLabel(names=CLASSES)})
    for split in ("train", "test"):
        write(tmp_path / f"set/{split}.parquet", [{"bytes": b"not an image", "path": None}] * 2, [0, 1], features)
    with pytest.raises(TrainError, match=r"could not be read, it may be damaged"):
        data.load("cifar10", tmp_path / "set")


def labelled(path, columns, kind, train, test):
    """A data set with the given label columns, all of one kind and with the same values."""
    features = datasets.Features({"img": datasets.Image(), **dict.fromkeys(columns, kind)})
    for split, labels in (("train", train), ("test", test)):
        rows = {"img": list(pixels(len(labels), 3)), **dict.fromkeys(columns, labels)}
        (path / split).parent.mkdir(parents=True, exist_ok=True)
        datasets.Dataset.from_dict(rows, features=features).to_parquet(path / f"{split}.parquet")
    return path


@pytest.mark.parametrize(
    ("dtype", "train", "test", "expected"),
    [
        ("int64", [0, 1, 1, 3], [3, 0], ([0, 1, 1, 2], [2, 0])),
        ("uint8", [200, 10, 30], [30], ([2, 0, 1], [1])),
        ("int8", [2, 1], [1], ([1, 0], [0])),
        ("bool", [True, False], [True], ([1, 0], [1])),
        ("string", ["dog", "cat", "Dog"], ["cat"], ([2, 1, 0], [1])),
    ],
)
def test_labels_that_are_not_classes(tmp_path, dtype, train, test, expected):
    """The distinct values of train, in their order, are the classes."""
    loaded = data.load("cifar10", labelled(tmp_path / "set", ["label"], datasets.Value(dtype), train, test))
    assert (loaded.train.labels.tolist(), loaded.test.labels.tolist()) == expected
    assert loaded.num_classes == len(set(train))


@pytest.mark.parametrize(
    ("columns", "dtype", "train", "test", "match"),
    [
        (
            ["label"],
            "float32",
            [0.0, 1.0],
            [1.0],
            r"the column label must hold classes, integers or strings, got .*float",
        ),
        (["target"], "int64", [0, 1], [1], r"expected one column of class labels.*got the columns img, target"),
        (["label"], "int64", [0, 1], [1, 7, 5], r"test has the labels 5, 7 in the column label, .* the 2 classes"),
        (
            ["label"],
            "int64",
            [0, 1],
            [-1, -1],
            r"expected the splits train and test, got train, test \(without labels\)",
        ),
        (
            ["label"],
            "int64",
            [0, 1],
            [None, 1],
            r"expected the splits train and test, got train, test \(without labels\)",
        ),
        (
            ["fine", "coarse"],
            None,
            [0, 1],
            [1],
            r"one column of .* got fine and coarse; pass --label-column",
        ),
    ],
)
def test_labels_that_say_no_classes(tmp_path, columns, dtype, train, test, match):
    kind = datasets.ClassLabel(names=CLASSES) if dtype is None else datasets.Value(dtype)
    with pytest.raises(TrainError, match=match) as caught:
        data.load("someone/set", labelled(tmp_path / "set", columns, kind, train, test))
    assert "\n" not in str(caught.value)


def test_a_label_column_is_chosen_by_name(tmp_path):
    folder = labelled(tmp_path / "set", ["fine", "coarse"], datasets.Value("int32"), [5, 6], [6])
    assert data.load("someone/set", folder, label_column="coarse").test.labels.tolist() == [1]
    with pytest.raises(TrainError, match=r"label_column must be one of img, fine, coarse, got 'other'"):
        data.load("someone/set", folder, label_column="other")
    with pytest.raises(TrainError, match=r"label_column: digits has no columns, got 'fine'"):
        data.load("digits", label_column="fine")


@pytest.mark.parametrize(
    ("names", "match"),
    [
        (
            ["train-test-more/train-0", "train-test-more/test-0"],
            "test-0.parquet must be in one split .* got test and train",
        ),
        (
            ["my_train/train-0", "my_train/test-0", "validation/0"],
            "test-0.parquet must be in one split .* got test and train",
        ),
        (["train_0", "test_train"], "test_train.parquet must be in one split .* got test and train"),
    ],
)
def test_a_parquet_file_is_in_one_split(tmp_path, names, match):
    for number, name in enumerate(names):
        write(tmp_path / f"set/{name}.parquet", pixels(2, number), [0, 1])
    with pytest.raises(TrainError, match=match):
        data.load("cifar10", tmp_path / "set")


@pytest.mark.parametrize(
    "names",
    [
        ["train-00000-of-00001", "test-00000-of-00001"],
        ["data/train-00000-of-00001", "data/test-00000-of-00001"],
        ["default/train/0000", "default/validation/0000"],
        ["train", "validation"],
    ],
)
def test_layouts_of_the_hub(tmp_path, names):
    for number, name in enumerate(names):
        write(tmp_path / f"set/{name}.parquet", pixels(2, number), [0, 1])
    loaded = data.load("cifar10", tmp_path / "set")
    for number, images in enumerate((loaded.train, loaded.test)):
        np.testing.assert_array_equal(images.images.numpy(), pixels(2, number).transpose(0, 3, 1, 2))


def of_classes(names):
    return datasets.Features({"img": datasets.Image(), "label": datasets.ClassLabel(names=names)})


def of_values(dtype):
    return datasets.Features({"img": datasets.Image(), "label": datasets.Value(dtype)})


@pytest.mark.parametrize("extra", [None, "train-1", "test-1", "validation"])
def test_files_that_number_their_classes_differently(tmp_path, extra):
    """datasets takes the names of one file, and reads the numbers of all by them."""
    write(tmp_path / "set/train-0.parquet", pixels(2, 0), [0, 1], of_classes(["cat", "dog"]))
    write(tmp_path / "set/test-0.parquet", pixels(2, 1), [0, 1], of_classes(["cat", "dog"]))
    other = "test-0" if extra is None else extra
    write(tmp_path / f"set/{other}.parquet", pixels(2, 2), [0, 1], of_classes(["dog", "cat"]))
    if extra == "validation":  # which is not used, as there is a test set
        assert len(data.load("cifar10", tmp_path / "set").train) == 2
        (tmp_path / "set/test-0.parquet").unlink()
    match = rf"the column label alike, got for class 0 'cat' in .*/train-0\.parquet and 'dog' in .*/{other}\.parquet"
    with pytest.raises(TrainError, match=match) as caught:
        data.load("cifar10", tmp_path / "set")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("train", "test", "match"),
    [
        (of_classes(["a", "b"]), of_classes(["a", "b", "c"]), r"class 2 none in .*train.parquet and 'c' in .*test"),
        (of_classes(["a", "b", "c"]), of_classes(["a", "b"]), r"class 2 'c' in .*train.parquet and none in .*test"),
        (of_classes(["a", "b"]), of_values("string"), r"of one kind, got texts in .*test.* and numbers in .*train"),
        (of_values("int64"), of_values("string"), r"of one kind, got texts in .*test.* and numbers in .*train"),
        (of_values("string"), of_classes(["a", "b"]), r"of one kind, got texts in .*train.* and numbers in .*test"),
    ],
)
def test_files_with_other_classes(tmp_path, train, test, match):
    for split, features in (("train", train), ("test", test)):
        labels = ["0", "1"] if features["label"].dtype == "string" else [0, 1]
        write(tmp_path / f"set/{split}.parquet", pixels(2, 0), labels, features)
    with pytest.raises(TrainError, match=match):
        data.load("cifar10", tmp_path / "set")


def test_numbers_without_names_are_those_of_the_named_file(tmp_path):
    write(tmp_path / "set/train.parquet", pixels(3, 0), [0, 1, 2], of_classes(["a", "b", "c"]))
    write(tmp_path / "set/test.parquet", pixels(2, 1), [2, 0], of_values("int32"))
    assert data.load("cifar10", tmp_path / "set").test.labels.tolist() == [2, 0]


def test_classes_of_the_card_that_are_not_those_of_the_files(tmp_path):
    for split in ("train", "test"):
        write(tmp_path / f"set/{split}.parquet", pixels(2, 0), [0, 1], of_classes(["cat", "dog"]))
    card = "---\ndataset_info:\n  features:\n  - name: img\n    dtype: image\n  - name: label\n    dtype:\n"
    card += "      class_label:\n        names:\n          '0': dog\n          '1': cat\n---\n"
    (tmp_path / "set/README.md").write_text(card)
    with pytest.raises(TrainError, match=r"class 0 'cat' in .*train\.parquet and 'dog' in what datasets takes"):
        data.load("cifar10", tmp_path / "set")


def test_patterns_in_the_path_of_parquet_files_are_refused(tmp_path):
    for folder in ("set[1]", "s*t"):
        write(tmp_path / folder / "train.parquet", pixels(2, 0), [0, 1])
        with pytest.raises(TrainError, match=r"data_dir must be a path without \* \? \[ for Parquet files, got"):
            data.load("cifar10", tmp_path / folder)


@pytest.mark.parametrize("counts", [[10, 10, 10], [50, 3, 7, 1], [1], [4, 4]])
def test_fewer_images_are_of_all_classes_alike(counts):
    labels = torch.cat([torch.full((count,), label) for label, count in enumerate(counts)])
    images = data.Images(torch.arange(len(labels))[:, None], labels)
    before = set()
    for count in range(1, len(labels) + 1):
        chosen = data.take(images, count)
        assert len(chosen) == count
        taken = torch.bincount(chosen.labels, minlength=len(counts)).tolist()
        # No class may have two fewer than another, unless all of it is taken.
        assert all(mine >= max(taken) - 1 or mine == all_ for mine, all_ in zip(taken, counts, strict=True))
        numbers = chosen.images[:, 0].tolist()
        assert numbers == sorted(numbers)
        assert before <= set(numbers)
        before = set(numbers)
    with pytest.raises(TrainError, match=f"train_images must be at most {len(labels)}, got {len(labels) + 1}"):
        data.take(images, len(labels) + 1)


def test_hub_out_of_reach(monkeypatch):
    def refuse(*args, **kwargs):
        raise ConnectionError("no route")

    monkeypatch.setattr(datasets, "load_dataset", refuse)
    with pytest.raises(TrainError, match=r"uoft-cs/cifar10 could not be loaded from the hub .*no route.*--data-dir"):
        data.load("cifar10")


def test_folder_for_a_data_set_that_needs_none(tmp_path):
    with pytest.raises(TrainError, match="data_dir: digits needs no folder"):
        data.load("digits", tmp_path)
