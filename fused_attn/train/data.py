"""Images: small ones in memory, loaded once as uint8, others in their files; batched and normalised on the device.

Nothing is unpickled: data come as Parquet or image files through Hugging Face ``datasets``, or from scikit-learn.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from .errors import TrainError
from .files import ImageFiles


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
    """A data set.  ``mean`` and ``std`` (C,) are those of the training images scaled to [0, 1].

    ``crop`` is the height and width that the network gets to see of larger images; None: all of the image.
    """

    train: Images | ImageFiles
    test: Images | ImageFiles
    num_classes: int
    mean: Tensor
    std: Tensor
    crop: int | None = None

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
#: Height and width of images from files, and by how much the loaded square exceeds what the network sees: 256 for 224.
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


def load(name: str, data_dir: Path | None = None, image_size: int | None = None) -> Dataset:
    """Load a data set.

    Args:
        name: one of ``SOURCES``, or ``owner/name`` on the hub.
        data_dir: folder in the hub's Parquet layout, or, for ``imagefolder``, one with the folders train and val (or
            test), each of which has a folder of image files for every class; None loads from the hub.
        image_size: resize to this height and width; None keeps the set's own (digits: 32).  Photographs of all sizes
            are resized and cropped: 224 when None, for ``imagefolder``.

    Raises:
        TrainError: the name is unknown, or the data are missing or damaged.
    """
    where = source(name, image_size)
    if where.files:
        return _from_files(where, data_dir, image_size or FILE_SIZE)
    if name in ("digits", "synthetic"):
        if data_dir is not None:
            raise TrainError(f"data_dir: {name} needs no folder, got {data_dir}")
        train, test, classes = _digits() if name == "digits" else _synthetic()
        image_size = image_size or 32
    else:
        train, test, classes = _from_datasets(where, data_dir)
    if image_size is not None:
        train, test = _resize(train, image_size), _resize(test, image_size)
    pixels = train.images.float() / 255.0
    mean, std = pixels.mean((0, 2, 3)), pixels.std((0, 2, 3)).clamp_min(1e-3)
    return Dataset(train, test, classes, mean, std)


def hold_out(train: Images | ImageFiles, count: int) -> tuple[Images | ImageFiles, Images | ImageFiles]:
    """Split off ``count`` images, the same for every run: (kept, held out)."""
    if count >= len(train):
        raise TrainError(f"validation must be less than the {len(train)} training images, got {count}")
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(0))
    return train[order[count:]], train[order[:count]]


def epoch_batches(
    images: Images | ImageFiles, batch_size: int, seed: int, epoch: int, first: int = 0
) -> Iterator[Images | ImageFiles]:
    """Batches of one epoch in its own random order, from batch ``first`` on; an incomplete last batch is left out."""
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed * 1_000_003 + epoch))
    for batch in range(first, len(images) // batch_size):
        yield images[order[batch * batch_size : (batch + 1) * batch_size]]


def in_memory(parts: list[Images | ImageFiles]) -> list[Images]:
    """The same images, decoded where they are still in files."""
    return [Images(part.images, part.labels) for part in parts]


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
    with _one_line_errors(source, data_dir):
        train, test = _splits(source, data_dir)
        classes = train.features[_label_column(train, source)].num_classes
        return _decode(train, source), _decode(test, source), classes


def _from_files(source: Source, data_dir: Path | None, size: int) -> Dataset:
    with _one_line_errors(source, data_dir):
        splits = [
            ImageFiles(split, _image_column(split), _labels(split, source), round(size * FILE_MARGIN))
            for split in _splits(source, data_dir)
        ]
        train, test = splits
        classes = train.split.features[_label_column(train.split, source)].num_classes
        sample = train[:: -(-len(train) // SAMPLE)].images.float() / 255.0
    mean, std = sample.mean((0, 2, 3)), sample.std((0, 2, 3)).clamp_min(1e-3)
    return Dataset(train, test, classes, mean, std, crop=size)


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


def _splits(source: Source, data_dir: Path | None) -> tuple:
    """(train, test); a validation split serves as the test split where there is none with labels, as in ImageNet."""
    import datasets

    datasets.disable_progress_bars()
    if source.hub_name is not None and data_dir is None:
        loaded = datasets.load_dataset(source.hub_name)
    elif source.hub_name is None:
        if data_dir is None or not (data_dir / "train").is_dir():
            raise TrainError(
                "data_dir must be a folder with the folders train and val (or test) of one folder of images per class, "
                f"got {'nothing' if data_dir is None else data_dir}"
            )
        loaded = datasets.load_dataset("imagefolder", data_dir=str(data_dir), drop_labels=False)
    else:
        if not any(data_dir.rglob("*.parquet")):
            what = "no folder" if not data_dir.is_dir() else "a folder without Parquet files"
            raise TrainError(f"data_dir must be a folder with the data set's Parquet files, got {what}: {data_dir}")
        loaded = datasets.load_dataset(str(data_dir))
    labelled = [name for name, split in loaded.items() if len(split) and min(split[_label_column(split, source)]) >= 0]
    for name in ("test", "validation"):
        if "train" in labelled and name in labelled:
            return loaded["train"], loaded[name]
    found = [name if name in labelled else f"{name} (without labels)" for name in loaded]
    where = source.hub_name if data_dir is None else f"data_dir {data_dir}"
    raise TrainError(f"{where}: expected the splits train and test, got {', '.join(found)}")


def _label_column(split, source: Source) -> str:
    from datasets import ClassLabel

    columns = [name for name, feature in split.features.items() if isinstance(feature, ClassLabel)]
    if not columns:
        raise TrainError(f"dataset: expected a column of class labels, got the columns {', '.join(split.features)}")
    return source.label if source.label in columns else columns[0]


def _labels(split, source: Source) -> Tensor:
    return torch.tensor(split[_label_column(split, source)][:], dtype=torch.int64)


def _image_column(split) -> str:
    from datasets import Image

    columns = [name for name, feature in split.features.items() if isinstance(feature, Image)]
    if not columns:
        raise TrainError(f"dataset: expected a column of images, got the columns {', '.join(split.features)}")
    return columns[0]


def _decode(split, source: Source) -> Images:
    arrays = [np.asarray(image) for image in split[_image_column(split)]]
    if len(shapes := {array.shape for array in arrays}) > 1:
        raise TrainError(f"dataset: the images have {len(shapes)} sizes; pass --image-size to resize and crop them")
    stacked = np.stack(arrays)
    images = torch.from_numpy(stacked if stacked.ndim == 4 else stacked[..., None]).permute(0, 3, 1, 2).contiguous()
    return Images(images, _labels(split, source))


def _resize(images: Images, size: int) -> Images:
    if tuple(images.images.shape[2:]) == (size, size):
        return images
    resized = F.interpolate(images.images.float(), (size, size), mode="bilinear", antialias=True)
    return Images(resized.round().clamp(0, 255).to(torch.uint8), images.labels)
