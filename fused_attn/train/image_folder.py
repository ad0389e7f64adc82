"""Folders of images, SPLIT/CLASS/FILE, by the rule of torchvision's ``ImageFolder``."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import torch

from .decode import one_line
from .errors import TrainError
from .files import FilePaths, Split

#: torchvision's; in names of any case.
EXTENSIONS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")
#: Names that a split's folder may have, in any case.
NAMES = {"train": ("train",), "test": ("test",), "validation": ("val", "valid", "validation")}


class _File(NamedTuple):
    path: str
    """Below the split's folder."""
    real: str
    """Where the links lead."""


def read(data_dir: Path | None) -> tuple[Split, Split, list[str]]:
    """List a folder of images: (train, test, names of the classes).

    The class of an image is the first folder below that of its split; further folders say nothing.  Classes are
    numbered as their names in train sort.  Names that begin with a dot, and files without one of the ``EXTENSIONS``,
    are skipped; links are followed, except those that lead back to where they are.  Of a test and a
    validation set that both have labels, test is used; one without any folder of a class in train has none.

    Raises:
        TrainError: a split is missing, has two folders, images beside its classes, a class that train lacks or one
            without images; or a file of the test set is one of train too.
    """
    found = _split_folders(data_dir) if data_dir is not None else {}
    if "train" not in found:
        raise TrainError(
            "data_dir must be a folder with the folders train and val (or test) of one folder of images per class, "
            f"got {'nothing' if data_dir is None else data_dir}"
        )
    train = _SplitFolder(data_dir, found["train"])
    if not train.classes:
        got = f"images, as {train.shown(train.stray)}" if train.stray else "none"
        raise TrainError(f"data_dir {data_dir}: {train.name} must have a folder for every class, got {got}")
    train.check_strays()
    train.check_wrapper()
    seen = [train.name]
    for name in ("test", "validation"):
        if name in found:
            held_out = _SplitFolder(data_dir, found[name])
            if not set(held_out.classes).isdisjoint(train.classes):
                break
            seen.append(f"{held_out.name} (without labels: it has no folder of a class in {train.name})")
    else:
        raise TrainError(f"data_dir {data_dir}: expected the splits train and test, got {', '.join(seen)}")
    held_out.check_strays()
    if unknown := [name for name in held_out.classes if name not in set(train.classes)]:
        raise TrainError(
            f"data_dir {data_dir}: {held_out.name} has the classes {_some(unknown)}, which {train.name} lacks"
        )
    taken = {file.real: held_out.shown(file.path) for name in held_out.classes for file in held_out.files(name)}
    return train.list(train.classes, taken), held_out.list(train.classes, {}), train.classes


def _split_folders(data_dir: Path) -> dict[str, str]:
    """Split -> the name of its folder."""
    if not data_dir.is_dir():
        return {}
    found: dict[str, str] = {}
    for folder in sorted(name for name, is_folder in _visible(data_dir) if is_folder):
        for split, names in NAMES.items():
            if folder.lower() not in names:
                continue
            other = found.setdefault(split, folder)
            if os.path.realpath(data_dir / other) != os.path.realpath(data_dir / folder):
                raise TrainError(f"data_dir {data_dir}: expected one folder for each split, got {other} and {folder}")
    return found


class _SplitFolder:
    def __init__(self, data_dir: Path, name: str) -> None:
        self.name, self.data_dir, self.folder = name, data_dir, data_dir / name
        entries = sorted(_visible(self.folder))
        self.classes = [name for name, is_folder in entries if is_folder]
        self.stray = next((name for name, is_folder in entries if not is_folder and _is_image(name)), None)

    def shown(self, path: str) -> str:
        return one_line(f"{self.name}/{path}")

    def files(self, name: str) -> Iterator[_File]:
        """Images of a class, in torchvision's order: by folder, then by name."""
        above = (os.path.realpath(self.data_dir), os.path.realpath(self.folder))
        for folder, real, names in sorted(_walk(self.folder, name, above)):
            for file, is_link in names:
                path = os.path.join(folder, file)
                yield _File(path, os.path.realpath(self.folder / path) if is_link else os.path.join(real, file))

    def check_strays(self) -> None:
        """Refuse images both in the split's folder and in folders of classes."""
        if self.stray is None:
            return
        inside = next((file.path for name in self.classes for file in self.files(name)), None)
        if inside is not None:
            raise TrainError(
                f"data_dir {self.data_dir}: {self.name} has images beside folders of classes, "
                f"{self.shown(self.stray)} and {self.shown(inside)}; expected {self.name}/CLASS/FILE"
            )

    def check_wrapper(self) -> None:
        """Refuse a split with one folder that holds folders: either may be the classes."""
        if len(self.classes) > 1:
            return
        paths = [file.path for file in self.files(self.classes[0])]
        if paths and all(path.count(os.sep) > 1 for path in paths):
            raise TrainError(
                f"data_dir {self.data_dir}: {self.shown(paths[0])} and {self.shown(paths[-1])}: are the folders in "
                f"{self.shown(self.classes[0])} one class or several? expected {self.name}/CLASS/FILE"
            )

    def list(self, classes: Sequence[str], taken: Mapping[str, str]) -> Split:
        """All images, labelled with the position of their class among ``classes``; ``taken``: real path -> name of
        another split's images."""
        index = {name: number for number, name in enumerate(classes)}
        paths, labels = [], []
        for name in self.classes:
            before = len(paths)
            for file in self.files(name):
                if file.real in taken:
                    raise TrainError(
                        f"data_dir {self.data_dir}: {taken[file.real]} and {self.shown(file.path)} are the same file, "
                        "in two splits"
                    )
                paths.append(file.path)
            if len(paths) == before:
                raise TrainError(
                    f"data_dir {self.data_dir}: no image is in {self.shown(name)}; "
                    f"expected files that end in {', '.join(EXTENSIONS)}"
                )
            labels += [index[name]] * (len(paths) - before)
        return Split(FilePaths(self.folder, paths), torch.tensor(labels))


def _visible(folder: str | Path) -> Iterator[tuple[str, bool]]:
    """(name, whether it is a folder) of the entries that are not hidden."""
    with os.scandir(folder) as entries:
        for entry in entries:
            if not entry.name.startswith("."):
                yield entry.name, entry.is_dir()


def _walk(root: Path, folder: str, above: tuple[str, ...]) -> Iterator[tuple[str, str, list[tuple[str, bool]]]]:
    """(folder below ``root``, where it really is, its images and whether each is a link) of a folder and those in it.

    ``above`` are the real folders passed on the way: a link to one of them, or to one above them, leads back.
    """
    real = os.path.realpath(root / folder)
    inside = real.rstrip(os.sep) + os.sep
    if any(passed == real or passed.startswith(inside) for passed in above):
        return
    with os.scandir(real) as found:
        entries = [entry for entry in found if not entry.name.startswith(".")]
    folders = {entry.name for entry in entries if entry.is_dir()}
    yield (
        folder,
        real,
        sorted(
            (entry.name, entry.is_symlink()) for entry in entries if entry.name not in folders and _is_image(entry.name)
        ),
    )
    for name in folders:
        yield from _walk(root, os.path.join(folder, name), (*above, real))


def _is_image(name: str) -> bool:
    return name.lower().endswith(EXTENSIONS)


def _some(names: Sequence[str]) -> str:
    shown = ", ".join(one_line(name) for name in islice(names, 5))
    return shown if len(names) <= 5 else f"{shown} and {len(names) - 5} more"
