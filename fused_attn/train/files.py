"""Images that stay in their files, for folders of photographs that fit no memory: decoded when a batch needs them."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np
import pyarrow
import torch
from PIL import Image
from torch import Tensor

from .decode import Encoded, UnreadableImage, decode

T = TypeVar("T")
R = TypeVar("R")

#: Why an image was skipped, by its name.
Skipped = dict[str, str]


class FilePaths:
    """Image files below a folder.  Their paths are kept in one Arrow array: 1.2 million take some 50 MB."""

    def __init__(self, folder: Path, paths: Iterable[str]) -> None:
        self.folder = folder
        self._paths = pyarrow.array([os.fsencode(path) for path in paths], pyarrow.large_binary())

    def __len__(self) -> int:
        return len(self._paths)

    def __getitem__(self, rows: list[int]) -> list[Encoded]:
        found = self._paths.take(pyarrow.array(rows, pyarrow.int64())).to_pylist()
        paths = [os.path.join(self.folder, os.fsdecode(path)) for path in found]
        return [Encoded(path, path) for path in paths]


class ImageColumn:
    """The images of a split of a Hugging Face data set, as they are encoded in it."""

    def __init__(self, split, column: str, name: str) -> None:
        from datasets import Image

        self._split = split.select_columns(column).cast_column(column, Image(decode=False))
        self._column, self._name = column, name

    def __len__(self) -> int:
        return len(self._split)

    def __getitem__(self, rows: list[int]) -> list[Encoded]:
        encoded = []
        for row, file in zip(rows, self._split[rows][self._column], strict=True):
            path, content = (None, None) if file is None else (file["path"], file["bytes"])
            name = f"of row {row} in {self._name}" + (f" ({path})" if path else "")
            encoded.append(Encoded(name, path if content is None else content))
        return encoded


class Split(NamedTuple):
    """Encoded images and their labels, (N,) int64, on the CPU."""

    files: FilePaths | ImageColumn
    labels: Tensor


class ImageFiles:
    """Images of a split that are decoded, as RGB, at every look at ``images``.

    An image is resized, so that its shorter side has ``size`` pixels, and its central square kept.

    Args:
        split: encoded images and labels.
        size: height and width of the square.
        rows: (n,) int64, the rows of the split that this is; None: all.
        skipped: gets those that :meth:`read` leaves out, as they cannot be read; None: they are errors.
    """

    def __init__(self, split: Split, size: int, rows: Tensor | None = None, skipped: Skipped | None = None) -> None:
        self.split, self.size, self.skipped = split, size, skipped
        self._rows = torch.arange(len(split.labels)) if rows is None else rows

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index) -> ImageFiles:
        return ImageFiles(self.split, self.size, self._rows[index], self.skipped)

    @property
    def labels(self) -> Tensor:
        return self.split.labels[self._rows]

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W) of every image."""
        return 3, self.size, self.size

    @property
    def images(self) -> Tensor:
        """(n, 3, size, size) uint8.

        Raises:
            UnreadableImage: names the first that cannot be read.
        """
        return self._decode(None)[0]

    def read(self) -> tuple[Tensor, Tensor]:
        """``images`` and ``labels``, without those that cannot be read where there is ``skipped`` to note them in."""
        images, kept = self._decode(self.skipped)
        return images, self.labels[kept]

    def _decode(self, skipped: Skipped | None) -> tuple[Tensor, list[int]]:
        squares = decode_all(self.split.files[self._rows.tolist()], self._square, skipped)
        kept = [index for index, square in enumerate(squares) if square is not None]
        if not kept:
            return torch.empty(0, *self.shape, dtype=torch.uint8), kept
        return torch.from_numpy(np.stack([squares[i] for i in kept])).permute(0, 3, 1, 2).contiguous(), kept

    def _square(self, image: Image.Image) -> np.ndarray:
        image, size = image.convert("RGB"), self.size
        scale = size / min(image.size)
        width, height = (max(round(side * scale), size) for side in image.size)
        image = image.resize((width, height), Image.Resampling.BILINEAR)
        left, top = (width - size) // 2, (height - size) // 2
        return np.asarray(image.crop((left, top, left + size, top + size)))


def decode_all(
    files: Sequence[Encoded], convert: Callable[[Image.Image], R], skipped: Skipped | None
) -> list[R | None]:
    """Decode and convert images on all cores.  Those that cannot be read are None, and noted in ``skipped``.

    Raises:
        UnreadableImage: an image cannot be read, and ``skipped`` is None.
    """

    def one(file: Encoded) -> R | None:
        try:
            return convert(decode(file))
        except UnreadableImage as error:
            if skipped is None:
                raise
            skipped[error.name] = error.reason
            return None

    with ThreadPoolExecutor(_threads()) as pool:
        return list(pool.map(one, files))


def load_ahead(items: Iterable[T], load: Callable[[T], R]) -> Iterator[R]:
    """``map(load, items)``, with the next one loaded in a thread while the caller works on the last."""
    with ThreadPoolExecutor(1) as pool:
        ahead = None
        for item in items:
            following = pool.submit(load, item)
            if ahead is not None:
                yield ahead.result()
            ahead = following
        if ahead is not None:
            yield ahead.result()


def _threads() -> int:
    """Cores that this process may use, shared with the other processes of torchrun on this machine."""
    return max(len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", "1")), 1)
