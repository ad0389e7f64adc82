"""Which convolutions of a residual network are augmented with attention, and the sizes of grids and images."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor

from ..ops._floor import checks
from ..ops._floor.tracing import leaf, pinned

BLOCKS = ("all", "first", "last")


class AttentionCoverage:
    """Choice of residual blocks.

    Args:
        stages: stages with attention, counted from 1; none for a plain network.
        blocks: ``"all"`` blocks of those stages, or their ``"first"`` or ``"last"`` only.
        num_stages: stages of the network.

    Raises:
        ValueError: an argument is out of range.
    """

    def __init__(self, stages: Iterable[int], blocks: str, num_stages: int) -> None:
        self.stages = tuple(stages)
        if not all(stage in range(1, num_stages + 1) for stage in self.stages):
            raise ValueError(f"attention_stages must be numbers from 1 to {num_stages}, got {self.stages}")
        checks.one_of("attention_blocks", blocks, BLOCKS)
        self.blocks = blocks

    def __call__(self, stage: int, block: int, num_blocks: int) -> bool:
        """Whether block ``block``, counted from 0, of stage ``stage``, counted from 1, has attention."""
        if stage not in self.stages:
            return False
        return {"all": True, "first": block == 0, "last": block == num_blocks - 1}[self.blocks]


def grid(image_size: int | tuple[int, int]) -> tuple[int, int]:
    """(H, W) of an image given by one number or two.

    Raises:
        ValueError: it is neither.
    """
    size = (image_size, image_size) if isinstance(image_size, int) else tuple(image_size)
    if len(size) != 2 or min(size) < 1:
        raise ValueError(f"image_size must be a positive number or two of them (H, W), got {image_size}")
    return size


@leaf
def check_size(x: Tensor, size: tuple[int, int], way_out: str = "") -> Tensor:
    """Require images (B, in_chans, H, W) of one size; returns them.  The error ends with ``way_out``.

    Raises:
        ValueError: they have another one.
    """
    if tuple(x.shape[2:]) != size:
        raise ValueError(f"images must have the size (H, W)={size}, got shape {tuple(x.shape)}{_after(way_out)}")
    return pinned(x)


@leaf
def check_largest_size(x: Tensor, size: tuple[int, int], way_out: str = "") -> None:
    """Require images (B, in_chans, H, W) that are nowhere larger than ``size``.  The error ends with ``way_out``.

    Raises:
        ValueError: they are.
    """
    if any(length > most for length, most in zip(x.shape[2:], size, strict=True)):
        shape = tuple(x.shape)
        raise ValueError(f"images must have a size (H, W) of at most {size}, got shape {shape}{_after(way_out)}")


def _after(way_out: str) -> str:
    return f"; {way_out}" if way_out else ""


def strided(size: tuple[int, int], stride: int) -> tuple[int, int]:
    """Grid after a convolution or pooling of that stride with padding of half its (odd) kernel: rounded up."""
    return -(-size[0] // stride), -(-size[1] // stride)
