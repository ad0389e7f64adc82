"""Backbones for dense prediction: what ``features_only=True`` returns."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import pairwise


class FeatureInfo(list):
    """Channels and strides of the maps that a backbone returns, in their order.

    A list of ``{"num_chs": channels, "reduction": stride}``; :meth:`channels` and :meth:`reduction` read one column, as
    users of timm's ``features_only`` models expect.
    """

    def channels(self) -> list[int]:
        """Channels of every map."""
        return [info["num_chs"] for info in self]

    def reduction(self) -> list[int]:
        """Input pixels per position of every map, along each axis."""
        return [info["reduction"] for info in self]


def choose_levels(
    levels: Sequence[tuple[int, int]], out_indices: Iterable[int] | None
) -> tuple[tuple[int, ...], FeatureInfo]:
    """Which of a network's maps it returns, and their description.

    Args:
        levels: (channels, stride) of every map that the network has to offer.
        out_indices: which of them, in order, counted from 0 or, where negative, from the end; None: all.

    Raises:
        ValueError: an index is out of range, or there is none, or they are not in order.
    """
    chosen = tuple(range(len(levels)) if out_indices is None else out_indices)
    if not all(-len(levels) <= index < len(levels) for index in chosen):
        raise ValueError(f"out_indices must be numbers from 0 to {len(levels) - 1}, got {chosen}")
    indices = tuple(index % len(levels) for index in chosen)
    if not indices or any(b <= a for a, b in pairwise(indices)):
        raise ValueError(f"out_indices must be at least one number, each once and in order, got {chosen}")
    return indices, FeatureInfo({"num_chs": levels[index][0], "reduction": levels[index][1]} for index in indices)
