"""Folders of images: which file is in which split and class, by the rule of torchvision's ImageFolder."""

import os
import random
from pathlib import Path

import pytest
from PIL import Image

from fused_attn.train import TrainError, data

#: torchvision.datasets.folder.IMG_EXTENSIONS
EXTENSIONS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")
NAMES = "train_station test testing train val validation valid a[1] b*c what? mérida 猫 Cat cat dog.jpg b\\d #1 0 10 9"
CLASSES = [*NAMES.split(), "two words", " leading", "new\nline"]
HIDDEN = (".DS_Store.png", "._0.jpg", ".ipynb_checkpoints/0-checkpoint.jpg", ".cache/train/0.png")
NO_IMAGES = ("metadata.csv", "metadata.jsonl", "notes.txt", "Thumbs.db", "moving.gif", "x.jpg.part")


class Tree:
    """Writes files of one pixel, every one of another colour, by which it is recognised when it is loaded."""

    def __init__(self, root: Path) -> None:
        self.root, self.colors = root, {}

    def add(self, *paths: str) -> None:
        for path in paths:
            file = self.root / path
            file.parent.mkdir(parents=True, exist_ok=True)
            number = len(self.colors) + 1
            self.colors[number] = path
            Image.new("RGB", (1, 1), (number % 256, number // 256, 9)).save(file, format="PNG")

    def text(self, *paths: str) -> None:
        for path in paths:
            (self.root / path).parent.mkdir(parents=True, exist_ok=True)
            (self.root / path).write_text("file_name,label\n0.jpg,3\n")

    def link(self, path: str, target: str) -> None:
        (self.root / path).parent.mkdir(parents=True, exist_ok=True)
        (self.root / path).symlink_to(os.path.relpath(self.root / target, (self.root / path).parent))

    def load(self):
        return data.load("imagefolder", self.root, image_size=1)

    def seen(self, images) -> list[tuple[str, int]]:
        """(file, label) of everything loaded, in order."""
        colors = images.images[:, :2, 0, 0].int()
        numbers = (colors[:, 0] + 256 * colors[:, 1]).tolist()
        return list(zip([self.colors[number] for number in numbers], images.labels.tolist(), strict=True))

    def expected(self, split: str) -> list[tuple[str, int]]:
        """What torchvision's ``find_classes`` and ``make_dataset`` list, less hidden files and folders; classes of the
        validation set are numbered as those of train."""
        folder = self.root / split
        names = sorted(entry.name for entry in os.scandir(self.root / "train") if visible_folder(entry))
        found = sorted(entry.name for entry in os.scandir(folder) if visible_folder(entry))
        written, listed = {os.path.realpath(self.root / path): path for path in self.colors.values()}, []
        for name in found:
            for root, _, files in sorted(os.walk(folder / name, followlinks=True)):
                if any(part.startswith(".") for part in Path(root).relative_to(folder).parts):
                    continue
                for file in sorted(files):
                    if file.lower().endswith(EXTENSIONS) and not file.startswith("."):
                        listed.append((written[os.path.realpath(os.path.join(root, file))], names.index(name)))
        return listed


def visible_folder(entry) -> bool:
    return entry.is_dir() and not entry.name.startswith(".")


@pytest.fixture
def tree(tmp_path):
    tree = Tree(tmp_path / "set")
    tree.add("train/cat/0.png", "train/cat/1.png", "train/dog/0.png", "val/cat/0.png", "val/dog/0.png")
    return tree


def grow(tree: Tree, draw: random.Random) -> str:
    """A random tree; returns the name of its validation folder."""
    names = draw.sample(CLASSES, draw.randint(2, 5))
    held_out = draw.choice(["val", "valid", "validation", "test"])
    for split in ("train", held_out):
        base = f"elsewhere/{split}" if draw.random() < 0.2 else split
        if base != split:
            tree.link(split, base)
        for number, name in enumerate(names if split == "train" else draw.sample(names, draw.randint(1, len(names)))):
            folder, store = f"{base}/{name}", f"store/{split}/{number}"
            if draw.random() < 0.2:
                tree.link(folder, f"{store}/class")
                folder = f"{store}/class"
            below = draw.sample(["", "indoor/", "test/", "a/b/", "a-b/", "[x]/", "train/"], draw.randint(1, 4))
            for place in below:
                for image in range(draw.randint(1, 3)):
                    ending = draw.choice(EXTENSIONS)
                    tree.add(f"{folder}/{place}{image} {name}{draw.choice([ending, ending.upper()])}")
            tree.text(f"{folder}/{draw.choice(NO_IMAGES)}")
            tree.add(f"{folder}/{draw.choice(HIDDEN)}")
            if draw.random() < 0.2:
                tree.add(f"{store}/data/one.png", f"{store}/data/b/two.JPG")
                tree.link(f"{folder}/linked", f"{store}/data")
            if draw.random() < 0.2:
                tree.add(f"{store}/file.bin")
                tree.link(f"{folder}/link.jpeg", f"{store}/file.bin")
        tree.text(f"{base}/{draw.choice(['metadata.csv', 'train.csv', 'README.md'])}")
        tree.add(f"{base}/._0.jpg")
    if held_out != "test" and draw.random() < 0.4:
        tree.add("test/0.jpg", "test/1.jpg")
    tree.add("cover.png", "train_more/cat/0.png", "notes/val/dog/1.png")
    return held_out


@pytest.mark.parametrize("seed", range(50))
def test_generated_trees_are_read_by_torchvisions_rule(tmp_path, seed):
    draw = random.Random(seed)
    tree = Tree(tmp_path / draw.choice(["set", "test/my set [1]", "a*b/train", "q?/val", "train_test"]))
    held_out = grow(tree, draw)
    loaded = tree.load()
    assert tree.seen(loaded.train) == tree.expected("train")
    assert tree.seen(loaded.test) == tree.expected(held_out)
    assert loaded.num_classes == len([entry for entry in os.scandir(tree.root / "train") if visible_folder(entry)])


@pytest.mark.parametrize("name", ["train_station", "train", "test", "testing", "val", "validation", "eval-1"])
def test_class_names_do_not_decide_splits(tree, name):
    tree.add(f"train/{name}/0.png", f"val/{name}/0.png", f"val/{name}/1.png")
    loaded = tree.load()
    assert {path.split("/")[0] for path, _ in tree.seen(loaded.train)} == {"train"}
    assert sorted(path for path, _ in tree.seen(loaded.test)) == [
        "val/cat/0.png", "val/dog/0.png", f"val/{name}/0.png", f"val/{name}/1.png",
    ]  # fmt: skip
    assert loaded.num_classes == 3


def test_the_first_folder_is_the_class(tree):
    for split in ("train", "val"):
        tree.add(f"{split}/bazaar/indoor/0.png", f"{split}/market/indoor/0.png")
    loaded = tree.load()
    assert loaded.num_classes == 4
    assert tree.seen(loaded.test) == [
        ("val/bazaar/indoor/0.png", 0), ("val/cat/0.png", 1), ("val/dog/0.png", 2), ("val/market/indoor/0.png", 3),
    ]  # fmt: skip


@pytest.mark.parametrize("unlabelled", ["test/0.png", "test/unknown/0.png"])
def test_a_test_set_without_labels_is_no_class(tree, unlabelled):
    """As in ImageNet: the validation set is then the test set."""
    tree.add(unlabelled)
    loaded = tree.load()
    assert loaded.num_classes == 2
    assert tree.seen(loaded.test) == [("val/cat/0.png", 0), ("val/dog/0.png", 1)]


def test_a_test_set_with_labels_comes_before_a_validation_set(tree):
    tree.add("Test/dog/7.png")
    assert tree.seen(tree.load().test) == [("Test/dog/7.png", 1)]


def test_a_split_may_have_fewer_classes_than_train(tree):
    tree.add("train/ant/0.png")
    assert tree.seen(tree.load().test) == [("val/cat/0.png", 1), ("val/dog/0.png", 2)]


def test_links_that_lead_back_are_not_followed(tree):
    tree.link("train/cat/loop", "train/cat")
    tree.link("train/cat/up", "train")
    tree.link("train/dog/top", ".")
    assert tree.seen(tree.load().train) == [("train/cat/0.png", 0), ("train/cat/1.png", 0), ("train/dog/0.png", 1)]


def test_file_names_that_are_no_text(tree):
    name = os.fsdecode(b"caf\xe9 \xff.png")
    tree.add(f"train/dog/{name}")
    assert tree.seen(tree.load().train)[-1] == (f"train/dog/{name}", 1)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda t: t.add("train/stray.jpg"), r"images beside folders of classes.*train/stray\.jpg.*train/cat/0\.png"),
        (lambda t: t.add("val/stray.jpg"), r"images beside folders of classes.*val/stray\.jpg.*val/cat/0\.png"),
        (lambda t: t.text("train/bird/notes.txt"), r"no image.*train/bird"),
        (lambda t: t.text("val/ant/notes.txt") or t.add("train/ant/0.png"), r"no image.*val/ant"),
        (lambda t: t.add("val/bird/0.png", "val/zoo/0.png"), r"val has the classes bird, zoo, which train lacks"),
        (lambda t: t.add("VALID/cat/0.png"), r"one folder for each split, got VALID and val"),
        (lambda t: t.add("Train/cat/0.png"), r"one folder for each split, got Train and train"),
        (lambda t: t.link("test", "train"), r"test/cat/0\.png.*train/cat/0\.png.*same file"),
        (lambda t: t.link("val/dog/9", "train/dog"), r"val/dog/9/0\.png.*train/dog/0\.png.*same file"),
        (lambda t: t.link("val/dog/9.png", "train/dog/0.png"), r"val/dog/9\.png.*train/dog/0\.png.*same file"),
    ],
)
def test_ambiguous_and_damaged_folders(tree, change, match):
    change(tree)
    with pytest.raises(TrainError, match=match) as caught:
        tree.load()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("files", "match"),
    [
        (
            ["train/images/cat/0.png", "train/images/dog/0.png", "val/images/cat/0.png"],
            r"train/images/cat/0\.png.*train/images/dog/0\.png.*one class or several",
        ),
        (["train/train/cat/0.png", "train/train/cat/1.png", "val/cat/0.png"], r"train/train/cat/0\.png.*one class or"),
        (["train/0.png", "val/0.png"], r"train must have a folder for every class, got .*train/0\.png"),
        (
            ["train/cat/0.png", "train/dog/0.png", "val/0.png"],
            r"splits train and test, got train, val \(without labels",
        ),
        (["train/cat/0.png", "train/dog/0.png", "val/images/0.png"], r"got train, val \(without labels"),
    ],
)
def test_nestings_that_are_not_split_and_class(tmp_path, files, match):
    tree = Tree(tmp_path / "set")
    tree.add(*files)
    with pytest.raises(TrainError, match=match) as caught:
        tree.load()
    assert "\n" not in str(caught.value)
