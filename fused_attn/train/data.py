"""Images: small ones in memory, loaded once as uint8, others in their files; batched and normalised on the device.

Nothing is unpickled: data come as image files, as Parquet through Hugging Face ``datasets``, or from scikit-learn.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from . import image_folder, parquet
from .config import TrainConfig
from .errors import TrainError
from .files import ImageColumn, ImageFiles, Skipped, Split, decode_all


@dataclass(frozen=True)
class Images:
    """images (N, C, H, W) uint8 and labels (N,) int64, on the CPU."""

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index) -> Images:
        return Images(self.images[index], self.labels[index])

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W) of every image."""
        return tuple(self.images.shape[1:])


@dataclass(frozen=True)
class Dataset:
    """A data set.  ``mean`` and ``std`` (C,) are those of the training images scaled to [0, 1]; ``names`` those of the
    classes.

    ``crop`` is the height and width that the network gets to see of larger images; None: all of the image.
    ``skipped`` holds what could not be read so far, where that is no error.
    """

    train: Images | ImageFiles
    test: Images | ImageFiles
    num_classes: int
    mean: Tensor
    std: Tensor
    crop: int | None = None
    skipped: Skipped = field(default_factory=dict)
    names: Sequence[str] = ()

    @property
    def in_chans(self) -> int:
        return self.train.shape[0]

    @property
    def image_size(self) -> tuple[int, int]:
        return self.train.shape[1:] if self.crop is None else (self.crop, self.crop)


@dataclass(frozen=True)
class Source:
    """Where a data set comes from and how it is customarily augmented.

    ``files``: its images have all sizes, and stay in their files.
    """

    hub_name: str | None = None
    label: str = "label"
    crop_padding: int = 4
    crop_scale: float = 0.08
    flip: bool = True
    files: bool = False


SOURCES = {
    "digits": Source(crop_padding=2, flip=False),
    "cifar10": Source("uoft-cs/cifar10"),
    "cifar100": Source("uoft-cs/cifar100", label="fine_label"),
    "fashion_mnist": Source("zalando-datasets/fashion_mnist", crop_padding=2),
    "synthetic": Source(),
    "imagefolder": Source(files=True),
}
#: Default height and width of images from files, and the ratio of the loaded square to what a network sees: 256:224.
FILE_SIZE, FILE_MARGIN = 224, 8 / 7
#: Training images from which mean and standard deviation are taken where decoding all would take long.
SAMPLE = 512


def source(name: str, image_size: int | None = None) -> Source:
    """The data set of that name: one of ``SOURCES``, or ``owner/name`` on the hub, whose images stay in their files
    when ``image_size`` is given.

    Raises:
        TrainError: the name is unknown.
    """
    if name in SOURCES:
        return SOURCES[name]
    if name.count("/") != 1:
        raise TrainError(f"dataset must be one of {', '.join(SOURCES)}, or owner/name on the hub, got {name!r}")
    return Source(name, files=image_size is not None)


def load(
    name: str,
    data_dir: Path | None = None,
    image_size: int | None = None,
    *,
    label_column: str | None = None,
    skip_unreadable: bool = False,
) -> Dataset:
    """Load a data set.

    Args:
        name: one of ``SOURCES``, or ``owner/name`` on the hub.
        data_dir: folder in the hub's Parquet layout, or, for ``imagefolder``, one with the folders train and val (or
            valid, validation, test), each of which has a folder of image files for every class, as
            :func:`.image_folder.read` reads it; None loads from the hub.
        image_size: resize to this height and width; None keeps the set's own (digits: 32).  Photographs of all sizes
            are resized and cropped: 224 when None, for ``imagefolder``.
        label_column: of the labels in a data set of the hub: classes, integers or strings.  Where it is None, they are
            in ``label``, or in the only column of classes.
        skip_unreadable: skip images that cannot be decoded; ``skipped`` of what is returned then holds them.

    Every image is decoded by :func:`.decode.decode`.  Sets in memory have one channel where all their images are
    grey by their mode, and three where one is not; files always have three.

    Raises:
        TrainError: the name is unknown, or the data are missing or damaged.
    """
    where, skipped = source(name, image_size), {} if skip_unreadable else None
    if label_column is not None and where.hub_name is None:
        raise TrainError(f"label_column: {name} has no columns, got {label_column!r}")
    if name in ("digits", "synthetic"):
        if data_dir is not None:
            raise TrainError(f"data_dir: {name} needs no folder, got {data_dir}")
        train, test = _digits() if name == "digits" else _synthetic()
        names = [str(number) for number in range(10)]
        image_size = image_size or 32
    else:
        with _one_line_errors(where, data_dir):
            splits = image_folder.read(data_dir) if name == "imagefolder" else _from_hub(where, data_dir, label_column)
            train, test, names = splits
            if where.files:
                return _in_files(train, test, names, image_size or FILE_SIZE, skipped)
            train, test = _decoded(train, test, skipped)
    if image_size is not None:
        train, test = _resize(train, image_size), _resize(test, image_size)
    pixels = train.images.float() / 255.0
    mean, std = pixels.mean((0, 2, 3)), pixels.std((0, 2, 3)).clamp_min(1e-3)
    return Dataset(train, test, len(names), mean, std, skipped=skipped or {}, names=names)


def of_run(config: TrainConfig) -> Dataset:
    """The data set of a run.

    Raises:
        TrainError: it has one class only, or see :func:`load`.
    """
    loaded = load(
        config.dataset,
        config.data_dir,
        config.image_size,
        label_column=config.label_column,
        skip_unreadable=config.skip_unreadable,
    )
    if loaded.num_classes < 2:
        raise TrainError(f"dataset {config.dataset} must have at least 2 classes, got {loaded.num_classes}")
    return loaded


def pixel_mean(images: Images) -> Tensor:
    """(C, H, W) mean of images scaled to [0, 1]."""
    total = torch.zeros(images.shape, dtype=torch.float64)
    for part in images.images.split(1000):
        total += part.double().sum(0)
    return (total / (255.0 * len(images))).float()


def hold_out(train: Images | ImageFiles, count: int) -> tuple[Images | ImageFiles, Images | ImageFiles]:
    """Split off ``count`` images, the same for every run: (kept, held out)."""
    if count >= len(train):
        raise TrainError(f"validation must be less than the {len(train)} training images, got {count}")
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(0))
    return train[order[count:]], train[order[:count]]


def take(train: Images | ImageFiles, count: int) -> Images | ImageFiles:
    """``count`` images, spread evenly over the classes: the first of each, the second of each, and so
    on.  The same for every run; a smaller set is part of a larger one."""
    if count > len(train):
        raise TrainError(f"train_images must be at most {len(train)}, got {count}")
    by_class = torch.argsort(train.labels, stable=True)
    labels = train.labels[by_class]
    turn = torch.arange(len(labels)) - torch.searchsorted(labels, labels)
    return train[by_class[torch.argsort(turn, stable=True)[:count]].sort().values]


def epoch_batches(
    images: Images | ImageFiles, batch_size: int, seed: int, epoch: int, first: int = 0
) -> Iterator[Images | ImageFiles]:
    """Batches of one epoch in its own random order, from batch ``first`` on; an incomplete last batch is left out."""
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed * 1_000_003 + epoch))
    for batch in range(first, len(images) // batch_size):
        yield images[order[batch * batch_size : (batch + 1) * batch_size]]


def in_memory(parts: list[Images | ImageFiles]) -> list[Images]:
    """The same images, decoded where they are still in files; without those that are skipped."""
    return [Images(*part.read()) if isinstance(part, ImageFiles) else part for part in parts]


def in_memory_filled(parts: list[Images | ImageFiles]) -> list[Images]:
    """As :func:`in_memory`, but others of the same parts stand in for those that are skipped: a part keeps its size."""
    read = in_memory(parts)
    if all(len(left) == len(part) for left, part in zip(read, parts, strict=True)):
        return read
    images, labels = torch.cat([part.images for part in read]), torch.cat([part.labels for part in read])
    if not len(labels):
        raise TrainError(f"none of the {sum(map(len, parts))} images of a step could be read")
    filled, used = [], 0
    for left, part in zip(read, parts, strict=True):
        missing = len(part) - len(left)
        index = (used + torch.arange(missing)) % len(labels)
        used += missing
        filled.append(Images(torch.cat([left.images, images[index]]), torch.cat([left.labels, labels[index]])))
    return filled


def _digits() -> tuple[Images, Images]:
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = torch.from_numpy((digits.images * (255.0 / 16.0)).round().astype(np.uint8))[:, None]
    labels = torch.from_numpy(digits.target.astype(np.int64))
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    everything = Images(images[order], labels[order])
    return everything[360:], everything[:360]


def _synthetic() -> tuple[Images, Images]:
    """Ten random patterns under noise: learnable, and made in a moment."""
    generator = torch.Generator().manual_seed(0)
    patterns = torch.rand(10, 3, 32, 32, generator=generator)
    labels = torch.arange(768) % 10
    noisy = 0.5 * patterns[labels] + 0.5 * torch.rand(768, 3, 32, 32, generator=generator)
    everything = Images((noisy * 255).to(torch.uint8), labels)
    return everything[:512], everything[512:]


def _in_files(train: Split, test: Split, names: Sequence[str], size: int, skipped: Skipped | None) -> Dataset:
    images, test_images = (ImageFiles(split, round(size * FILE_MARGIN), skipped=skipped) for split in (train, test))
    sample = images[:: -(-len(images) // SAMPLE)]
    pixels = sample.read()[0].float() / 255.0
    if not len(pixels):
        raise TrainError(f"none of {len(sample)} training images could be read, the first: {_first(skipped)}")
    mean, std = pixels.mean((0, 2, 3)), pixels.std((0, 2, 3)).clamp_min(1e-3)
    skipped = {} if skipped is None else skipped
    return Dataset(images, test_images, len(names), mean, std, crop=size, skipped=skipped, names=names)


def _first(skipped: Skipped) -> str:
    name, reason = next(iter(skipped.items()))
    return f"{name} ({reason})"


@contextlib.contextmanager
def _one_line_errors(source: Source, data_dir: Path | None) -> Iterator[None]:
    """Turn whatever the reading of a data set raises into a TrainError of one line."""
    try:
        yield
    except TrainError:
        raise
    except Exception as error:
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        if data_dir is None:
            raise TrainError(
                f"dataset {source.hub_name} could not be loaded from the hub ({reason}); "
                "pass --data-dir for a local copy"
            ) from error
        raise TrainError(
            f"data_dir {data_dir}: the data set could not be read, it may be damaged ({reason})"
        ) from error


def _from_hub(source: Source, data_dir: Path | None, label_column: str | None) -> tuple[Split, Split, list[str]]:
    """(train, test, names of the classes); a validation split serves as the test split where there is none with
    labels, as in ImageNet."""
    import datasets

    datasets.disable_progress_bars()
    where = source.hub_name if data_dir is None else f"data_dir {data_dir}"
    files: dict[str, list[str]] = {}
    if data_dir is None:
        loaded = datasets.load_dataset(source.hub_name)
    else:
        files = parquet.files_of_splits(data_dir)
        loaded = datasets.load_dataset(str(data_dir))
    column = _label_column(next(iter(loaded.values())), source, label_column)
    labels = {name: split[column][:] for name, split in loaded.items() if column in split.features}
    labelled = [name for name, values in labels.items() if values and not any(map(_is_missing, values))]
    for name in ("test", "validation"):
        if "train" in labelled and name in labelled:
            if data_dir is not None:
                own = getattr(loaded["train"].features[column], "names", None)
                parquet.check_labels(data_dir, [*files["train"], *files[name]], column, own)
            names, train_labels, test_labels = _classes(loaded["train"], column, labels["train"], labels[name], name)
            return _encoded(loaded, "train", train_labels), _encoded(loaded, name, test_labels), names
    found = [name if name in labelled else f"{name} (without labels)" for name in loaded]
    raise TrainError(f"{where}: expected the splits train and test, got {', '.join(found)}")


def _label_column(split, source: Source, wanted: str | None) -> str:
    from datasets import ClassLabel, Value

    if wanted is not None:
        if wanted not in split.features:
            raise TrainError(f"label_column must be one of {', '.join(split.features)}, got {wanted!r}")
        names = [wanted]
    else:
        classes = [name for name, feature in split.features.items() if isinstance(feature, ClassLabel)]
        names = [source.label] if source.label in split.features else classes
        if len(names) != 1:
            raise TrainError(
                "dataset: expected one column of class labels, or one called label, got "
                + (
                    f"{' and '.join(names)}; pass --label-column"
                    if names
                    else f"the columns {', '.join(split.features)}"
                )
            )
    feature = split.features[names[0]]
    kinds = ("int", "uint", "bool", "string", "large_string")
    if not isinstance(feature, ClassLabel | Value) or not feature.dtype.startswith(kinds):
        raise TrainError(f"dataset: the column {names[0]} must hold classes, integers or strings, got {feature}")
    return names[0]


def _is_missing(label: int | str | None) -> bool:
    return label is None or (not isinstance(label, str) and label < 0)


def _classes(split, column: str, train: list, test: list, test_name: str) -> tuple[list[str], Tensor, Tensor]:
    """Names of the classes and both splits' labels: a column's own classes, or the values that occur in train."""
    from datasets import ClassLabel

    feature = split.features[column]
    known = range(feature.num_classes) if isinstance(feature, ClassLabel) else sorted(set(train))
    index = {value: number for number, value in enumerate(known)}
    for name, values in (("train", train), (test_name, test)):
        if unknown := sorted(set(values) - set(index)):
            raise TrainError(
                f"dataset: {name} has the labels {', '.join(map(str, unknown[:5]))} in the column {column}, "
                f"which are not among the {len(index)} classes"
            )
    names = feature.names if isinstance(feature, ClassLabel) else [str(value) for value in known]
    return names, *(torch.tensor([index[value] for value in values]) for values in (train, test))


def _encoded(loaded, name: str, labels: Tensor) -> Split:
    from datasets import Image

    features = loaded[name].features
    columns = [column for column, feature in features.items() if isinstance(feature, Image)]
    if not columns:
        raise TrainError(f"dataset: expected a column of images, got the columns {', '.join(features)}")
    return Split(ImageColumn(loaded[name], columns[0], name), labels)


def _decoded(train: Split, test: Split, skipped: Skipped | None) -> tuple[Images, Images]:
    """Both splits in memory, with as many channels: grey only where no image has colours."""
    arrays = [_arrays(split, skipped) for split in (train, test)]
    everything = [array for split in arrays for array in split if array is not None]
    if not all(any(array is not None for array in split) for split in arrays):
        raise TrainError(f"dataset: no image of a split could be read, the first: {_first(skipped)}")
    if len(shapes := {array.shape[:2] for array in everything}) > 1:
        raise TrainError(f"dataset: the images have {len(shapes)} sizes; pass --image-size to resize and crop them")
    channels = max(array.ndim for array in everything)
    return tuple(
        _stack(split, labels, 3 if channels == 3 else 1)
        for split, (_, labels) in zip(arrays, (train, test), strict=True)
    )


def _arrays(split: Split, skipped: Skipped | None) -> list[np.ndarray | None]:
    """(H, W) or (H, W, 3) of every image, or None where it is skipped."""
    arrays, rows = [], 1000
    for first in range(0, len(split.labels), rows):
        encoded = split.files[list(range(first, min(first + rows, len(split.labels))))]
        arrays += decode_all(encoded, np.asarray, skipped)
    return arrays


def _stack(arrays: list[np.ndarray | None], labels: Tensor, channels: int) -> Images:
    kept = [index for index, array in enumerate(arrays) if array is not None]
    height, width = arrays[kept[0]].shape[:2]
    images = np.empty((len(kept), channels, height, width), np.uint8)
    for row, index in enumerate(kept):
        array = arrays[index]
        images[row] = array if array.ndim == 2 else array.transpose(2, 0, 1)
    return Images(torch.from_numpy(images), labels[kept])


def _resize(images: Images, size: int) -> Images:
    if tuple(images.images.shape[2:]) == (size, size):
        return images
    resized = F.interpolate(images.images.float(), (size, size), mode="bilinear", antialias=True)
    return Images(resized.round().clamp(0, 255).to(torch.uint8), images.labels)
