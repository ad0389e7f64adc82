"""Images that stay in their files, for folders of photographs that fit no memory: decoded when a batch needs them."""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from .errors import TrainError

T = TypeVar("T")


class ImageFiles:
    """Rows of a Hugging Face data set whose images are decoded, as RGB, at every look at ``images``.

    An image is resized, so that its shorter side has ``size`` pixels, and its central square kept.

    Args:
        split: a split of the data set.
        column: of the images.
        labels: (N,) int64, of all rows of the split.
        size: height and width of the square.
        rows: (n,) int64, the rows of the split that this is; None: all.
    """

    def __init__(self, split, column: str, labels: Tensor, size: int, rows: Tensor | None = None) -> None:
        from datasets import Image

        self.split, self._column, self._all_labels, self.size = split, column, labels, size
        self._undecoded = split.select_columns(column).cast_column(column, Image(decode=False))
        self._rows = torch.arange(len(split)) if rows is None else rows

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index) -> ImageFiles:
        return ImageFiles(self.split, self._column, self._all_labels, self.size, self._rows[index])

    @property
    def labels(self) -> Tensor:
        return self._all_labels[self._rows]

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W) of every image."""
        return 3, self.size, self.size

    @property
    def images(self) -> Tensor:
        """(n, 3, size, size) uint8."""
        if not len(self):
            return torch.empty(0, *self.shape, dtype=torch.uint8)
        files = self._undecoded[self._rows.tolist()][self._column]
        with ThreadPoolExecutor(_threads()) as pool:
            squares = list(pool.map(lambda file: _square(file, self.size), files))
        return torch.from_numpy(np.stack(squares)).permute(0, 3, 1, 2).contiguous()


def load_ahead(items: Iterable[T], load: Callable[[T], T]) -> Iterator[T]:
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


def _square(file: dict, size: int) -> np.ndarray:
    """Decode one image: (size, size, 3) uint8."""
    from PIL import Image

    try:
        with Image.open(file["path"] if file["bytes"] is None else io.BytesIO(file["bytes"])) as image:
            image = image.convert("RGB")
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise TrainError(f"the image {file['path'] or '(without a path)'} could not be read ({error})") from error
    scale = size / min(image.size)
    width, height = (max(round(side * scale), size) for side in image.size)
    image = image.resize((width, height), Image.Resampling.BILINEAR)
    left, top = (width - size) // 2, (height - size) // 2
    return np.asarray(image.crop((left, top, left + size, top + size)))


def _threads() -> int:
    """Cores that this process may use, shared with the other processes of torchrun on this machine."""
    return max(len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", "1")), 1)
