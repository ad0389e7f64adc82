"""Images in memory: loaded once as uint8, batched and normalised on the device.

Nothing is unpickled: data come as Parquet or image files through Hugging Face ``datasets``, or from scikit-learn.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from .errors import TrainError


@dataclass(frozen=True)
class Images:
    """images (N, C, H, W) uint8 and labels (N,) int64, on the CPU."""

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index) -> Images:
        return Images(self.images[index], self.labels[index])


@dataclass(frozen=True)
class Dataset:
    """A data set in memory.  ``mean`` and ``std`` (C,) are those of the training images scaled to [0, 1]."""

    train: Images
    test: Images
    num_classes: int
    mean: Tensor
    std: Tensor

    @property
    def in_chans(self) -> int:
        return self.train.images.shape[1]

    @property
    def image_size(self) -> tuple[int, int]:
        return tuple(self.train.images.shape[2:])


@dataclass(frozen=True)
class Source:
    """Where a data set comes from and how it is customarily augmented."""

    hub_name: str | None = None
    label: str = "label"
    crop_padding: int = 4
    flip: bool = True


SOURCES = {
    "digits": Source(crop_padding=2, flip=False),
    "cifar10": Source("uoft-cs/cifar10"),
    "cifar100": Source("uoft-cs/cifar100", label="fine_label"),
    "fashion_mnist": Source("zalando-datasets/fashion_mnist", crop_padding=2),
    "synthetic": Source(),
}


def load(name: str, data_dir: Path | None = None, image_size: int | None = None) -> Dataset:
    """Load a data set.

    Args:
        name: one of ``SOURCES``.
        data_dir: folder in the hub's Parquet layout; None loads from the hub.
        image_size: resize to this height and width; None keeps the set's own (digits: 32).

    Raises:
        TrainError: the name is unknown, or the data are missing or damaged.
    """
    if name not in SOURCES:
        raise TrainError(f"dataset must be one of {', '.join(SOURCES)}, got {name!r}")
    if name in ("digits", "synthetic"):
        if data_dir is not None:
            raise TrainError(f"data_dir: {name} needs no folder, got {data_dir}")
        train, test, classes = _digits() if name == "digits" else _synthetic()
        image_size = image_size or 32
    else:
        train, test, classes = _from_datasets(SOURCES[name], data_dir)
    if image_size is not None:
        train, test = _resize(train, image_size), _resize(test, image_size)
    pixels = train.images.float() / 255.0
    mean, std = pixels.mean((0, 2, 3)), pixels.std((0, 2, 3)).clamp_min(1e-3)
    return Dataset(train, test, classes, mean, std)


def hold_out(train: Images, count: int) -> tuple[Images, Images]:
    """Split off ``count`` images, the same for every run: (kept, held out)."""
    if count >= len(train):
        raise TrainError(f"validation must be less than the {len(train)} training images, got {count}")
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(0))
    return train[order[count:]], train[order[:count]]


def epoch_batches(images: Images, batch_size: int, seed: int, epoch: int, first: int = 0) -> Iterator[Images]:
    """Batches of one epoch in its own random order, from batch ``first`` on; an incomplete last batch is left out."""
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed * 1_000_003 + epoch))
    for batch in range(first, len(images) // batch_size):
        yield images[order[batch * batch_size : (batch + 1) * batch_size]]


def _digits() -> tuple[Images, Images, int]:
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = torch.from_numpy((digits.images * (255.0 / 16.0)).round().astype(np.uint8))[:, None]
    labels = torch.from_numpy(digits.target.astype(np.int64))
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    everything = Images(images[order], labels[order])
    return everything[360:], everything[:360], 10


def _synthetic() -> tuple[Images, Images, int]:
    """Ten random patterns under noise: learnable, and made in a moment."""
    generator = torch.Generator().manual_seed(0)
    patterns = torch.rand(10, 3, 32, 32, generator=generator)
    labels = torch.arange(768) % 10
    noisy = 0.5 * patterns[labels] + 0.5 * torch.rand(768, 3, 32, 32, generator=generator)
    everything = Images((noisy * 255).to(torch.uint8), labels)
    return everything[:512], everything[512:], 10


def _from_datasets(source: Source, data_dir: Path | None) -> tuple[Images, Images, int]:
    import datasets

    if data_dir is not None and not any(data_dir.rglob("*.parquet")):
        what = "no folder" if not data_dir.is_dir() else "a folder without Parquet files"
        raise TrainError(f"data_dir must be a folder with the data set's Parquet files, got {what}: {data_dir}")
    datasets.disable_progress_bars()
    try:
        loaded = datasets.load_dataset(source.hub_name if data_dir is None else str(data_dir))
        missing = {"train", "test"} - set(loaded)
        if missing:
            raise TrainError(f"data_dir {data_dir}: expected the splits train and test, got {', '.join(loaded)}")
        classes = loaded["train"].features[_label_column(loaded["train"], source)].num_classes
        return _decode(loaded["train"], source), _decode(loaded["test"], source), classes
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


def _label_column(split, source: Source) -> str:
    from datasets import ClassLabel

    columns = [name for name, feature in split.features.items() if isinstance(feature, ClassLabel)]
    if not columns:
        raise TrainError(f"dataset: expected a column of class labels, got the columns {', '.join(split.features)}")
    return source.label if source.label in columns else columns[0]


def _decode(split, source: Source) -> Images:
    from datasets import Image

    columns = [name for name, feature in split.features.items() if isinstance(feature, Image)]
    if not columns:
        raise TrainError(f"dataset: expected a column of images, got the columns {', '.join(split.features)}")
    arrays = np.stack([np.asarray(image) for image in split[columns[0]]])
    images = torch.from_numpy(arrays if arrays.ndim == 4 else arrays[..., None]).permute(0, 3, 1, 2).contiguous()
    return Images(images, torch.tensor(split[_label_column(split, source)][:], dtype=torch.int64))


def _resize(images: Images, size: int) -> Images:
    if tuple(images.images.shape[2:]) == (size, size):
        return images
    resized = F.interpolate(images.images.float(), (size, size), mode="bilinear", antialias=True)
    return Images(resized.round().clamp(0, 255).to(torch.uint8), images.labels)
