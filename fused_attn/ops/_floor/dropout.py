"""The dropout mask of the attention ops, as a pure function of (seed, row, column).

Every implementation evaluates this same integer hash, so the mask is replayed in the backward pass from the
seed alone, does not depend on tiling or on the number of threads, and is bit for bit the same in the
reference, the C++ kernel and the Triton kernel.  The row key is SplitMix64's output function (Steele et al.,
2014); the column mix is a two-key variant of a 32-bit xorshift-multiply finaliser.
"""

from __future__ import annotations

import torch

_MASK32 = 0xFFFFFFFF


def _shift_right(x: torch.Tensor, bits: int) -> torch.Tensor:
    """Logical right shift of int64."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _as_signed(x: int) -> int:
    return x - (1 << 64) if x >= 1 << 63 else x


def threshold(dropout_p: float) -> int:
    """Elements whose 32-bit hash lies below this number are dropped."""
    return min(round(dropout_p * 2**32), 2**32 - 1)


_ROW_STEP = _as_signed(0x9E3779B97F4A7C15)


def behind(seed: torch.Tensor, rows: int) -> torch.Tensor:
    """The seed whose mask is that of ``seed`` without its first ``rows`` rows."""
    return seed + _as_signed(rows * _ROW_STEP % 2**64)


def keep_mask(seed: torch.Tensor, rows: int, columns: int, dropout_p: float) -> torch.Tensor:
    """The elements to keep.

    Args:
        seed: int64 tensor of shape (1,).
        rows, columns: size of the mask; a row is one (batch, head, query), a column one key.
        dropout_p: probability of dropping an element, in [0, 1).

    Returns:
        bool tensor (rows, columns) on the device of ``seed``.
    """
    row = torch.arange(1, rows + 1, device=seed.device, dtype=torch.int64)
    z = seed + row * _ROW_STEP
    z = (z ^ _shift_right(z, 30)) * _as_signed(0xBF58476D1CE4E5B9)
    z = (z ^ _shift_right(z, 27)) * _as_signed(0x94D049BB133111EB)
    z = z ^ _shift_right(z, 31)
    key0, key1 = (z & _MASK32)[:, None], _shift_right(z, 32)[:, None]

    column = torch.arange(columns, device=seed.device, dtype=torch.int64)[None, :]
    x = (column * 0x9E3779B1 + key0) & _MASK32
    x = ((x ^ (x >> 16)) * 0x21F0AAAD) & _MASK32
    x = x ^ (x >> 15) ^ key1
    x = (x * 0x735A2D97) & _MASK32
    x = x ^ (x >> 15)
    return x >= threshold(dropout_p)
