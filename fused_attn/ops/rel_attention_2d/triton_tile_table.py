"""Tiles of the Triton kernels' launches, by kernel, architecture, depths, and what a call has beside its tensors."""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
import triton

from .._floor.launch import triton_before


class Tile(NamedTuple):
    """Launch parameters of one kernel: queries per tile, keys per tile (aimed at), warps, pipeline stages."""

    block_m: int
    block_n: int
    warps: int
    stages: int


# Kernel -> depth bucket -> tile; the bucket is the larger padded depth of key and value.  For sm_90 in 16 bits, up to a
# depth of 64, chosen by their times on a GPU with Triton 3.6 (benchmarks/results/tile_times.json): the fastest over the
# shapes of a bucket, without spills.  The others were chosen by the compile report: first no spills, then few
# instructions per score, then several independent thread blocks per multiprocessor, so that one block's exponentials
# cover another's products.
_TILES_NVIDIA = {
    "forward": {32: Tile(128, 128, 8, 2), 64: Tile(64, 64, 4, 2), 128: Tile(64, 64, 4, 2), 256: Tile(64, 32, 4, 1)},
    "backward_dq": {32: Tile(64, 64, 4, 2), 64: Tile(64, 64, 4, 2), 128: Tile(64, 32, 4, 1), 256: Tile(32, 32, 8, 1)},
    "backward_dkv": {32: Tile(64, 64, 4, 2), 64: Tile(32, 64, 4, 1), 128: Tile(32, 64, 4, 1), 256: Tile(32, 32, 8, 1)},
    "backward_table": {
        32: Tile(64, 64, 8, 1),
        64: Tile(64, 64, 8, 1),
        128: Tile(32, 32, 4, 1),
        256: Tile(32, 32, 8, 1),
    },
}
# Where a family's registers do not hold the tile above.  sm_80 stands for every part with warp-level matrix products.
_TILES_BY_FAMILY = {
    ("sm_80", "forward", 128): Tile(64, 32, 8, 2),
    ("sm_80", "forward", 256): Tile(64, 32, 8, 1),
    ("sm_80", "backward_dq", 64): Tile(64, 32, 4, 2),
    ("sm_80", "backward_dq", 128): Tile(32, 32, 8, 1),
    ("sm_80", "backward_dkv", 32): Tile(64, 64, 8, 1),
    ("sm_80", "backward_dkv", 64): Tile(32, 64, 8, 1),
    ("sm_80", "backward_dkv", 128): Tile(32, 64, 8, 1),
    ("sm_90", "forward", 32): Tile(128, 64, 4, 3),
    ("sm_90", "forward", 64): Tile(64, 64, 4, 3),
    ("sm_90", "forward", 128): Tile(64, 64, 8, 2),
    ("sm_90", "backward_dq", 32): Tile(64, 64, 4, 3),
    ("sm_90", "backward_dq", 128): Tile(128, 32, 8, 1),
    ("sm_90", "backward_dkv", 32): Tile(32, 128, 4, 2),
    ("sm_90", "backward_dkv", 64): Tile(32, 64, 4, 2),
    ("sm_90", "backward_dkv", 128): Tile(16, 128, 8, 1),
    ("sm_90", "backward_table", 32): Tile(64, 64, 4, 2),
    ("sm_100", "forward", 128): Tile(128, 64, 8, 2),
    ("sm_100", "forward", 256): Tile(64, 32, 8, 1),
    ("sm_100", "backward_dkv", 32): Tile(64, 64, 4, 1),
}
_TILES_AMD = {
    "forward": {32: Tile(128, 64, 4, 1), 64: Tile(128, 64, 4, 1), 128: Tile(64, 64, 4, 1), 256: Tile(64, 32, 4, 1)},
    "backward_dq": {32: Tile(128, 64, 4, 1), 64: Tile(64, 64, 4, 1), 128: Tile(64, 32, 4, 1), 256: Tile(32, 32, 4, 1)},
    "backward_dkv": {32: Tile(64, 64, 4, 1), 64: Tile(32, 64, 4, 1), 128: Tile(32, 64, 4, 1), 256: Tile(32, 32, 4, 1)},
    "backward_table": _TILES_NVIDIA["backward_table"],
}
# IEEE float32 products run on the vector units and keep whole rows of operands in registers: none holds a depth of 256.
_TILES_FLOAT32 = {
    "forward": {32: Tile(32, 64, 4, 1), 64: Tile(64, 32, 8, 1), 128: Tile(16, 16, 8, 1)},
    "backward_dq": {32: Tile(64, 32, 4, 1), 64: Tile(16, 32, 8, 1), 128: Tile(16, 16, 8, 1)},
    "backward_dkv": {32: Tile(32, 32, 4, 1), 64: Tile(32, 32, 8, 1), 128: Tile(16, 32, 4, 1)},
    "backward_table": {32: Tile(32, 32, 4, 1), 64: Tile(32, 32, 8, 1), 128: Tile(16, 16, 4, 1)},
}
# Where a family's compiler makes the tile above spill.
_TILES_FLOAT32_BY_FAMILY = {
    ("sm_80", "backward_dkv", 128): Tile(32, 16, 8, 1),
    ("sm_80", "backward_delta", 32): Tile(32, 32, 4, 1),
    ("sm_80", "backward_dq", 32): Tile(32, 32, 4, 1),
    ("sm_80", "backward_dq", 128): Tile(16, 16, 8, 2),
    ("sm_90", "backward_dq", 128): Tile(16, 16, 8, 3),
    ("sm_100", "backward_delta", 32): Tile(64, 32, 4, 2),
}
# Where a call has a trait: trait, precision or family of the 16-bit types, kernel, bucket.  "table": biases that are
# read for every score; "prefix": prefix keys; "dropout"; "strips": the grid that the loop walks is wider than a tile;
# "padded": tiles do not divide it.
_TILES_WITH = {
    ("table", "16 bits", "forward", 32): Tile(128, 32, 4, 2),
    ("table", "float32", "forward", 32): Tile(32, 32, 4, 1),
    ("table", "sm_90", "forward", 32): Tile(64, 32, 4, 3),
    ("table", "sm_90", "backward_dq", 32): Tile(64, 32, 4, 3),
    ("table", "sm_90", "backward_dkv", 32): Tile(32, 64, 4, 1),
    ("table", "sm_100", "forward", 32): Tile(64, 32, 4, 2),
    ("dropout", "sm_80", "forward", 128): Tile(64, 32, 8, 1),
    ("strips", "sm_80", "forward", 32): Tile(128, 64, 8, 2),
    ("strips", "sm_80", "backward_dq", 32): Tile(64, 32, 4, 2),
    ("strips", "sm_90", "forward", 32): Tile(128, 128, 8, 2),
    ("strips", "sm_90", "backward_dq", 128): Tile(64, 16, 4, 1),
    ("dropout", "sm_90", "backward_dkv", 32): Tile(64, 64, 4, 2),
    ("padded", "sm_90", "forward", 64): Tile(64, 32, 4, 3),
    ("padded", "sm_90", "backward_dq", 64): Tile(64, 32, 4, 3),
    ("padded", "sm_90", "backward_dkv", 64): Tile(32, 64, 4, 1),
    ("table", "sm_100", "forward", 128): Tile(64, 64, 8, 2),
    ("table", "sm_80", "backward_dq", 128): Tile(64, 32, 8, 1),
    ("prefix", "sm_80", "forward", 64): Tile(64, 32, 8, 2),
    ("dropout", "sm_80", "backward_dkv", 128): Tile(32, 32, 8, 1),
}
# Where the compilers of Triton before 3.7 make the tiles above spill, or need more instructions: as above, with the
# precision beside the family; the trait "" is every call's.
_TILES_TRITON_3_6 = {
    ("strips", "16 bits", "sm_80", "backward_dkv", 32): Tile(32, 128, 8, 1),
    ("table", "16 bits", "sm_80", "backward_dkv", 32): Tile(64, 32, 8, 1),
    ("dropout", "16 bits", "sm_80", "forward", 128): Tile(64, 32, 8, 1),
    ("", "16 bits", "sm_80", "forward", 256): Tile(64, 32, 8, 2),
    ("", "16 bits", "sm_90", "forward", 256): Tile(64, 32, 8, 2),
    ("padded", "16 bits", "sm_90", "backward_dq", 64): Tile(64, 32, 4, 3),
    ("", "16 bits", "sm_90", "backward_dq", 64): Tile(64, 64, 4, 3),
    ("padded", "16 bits", "sm_90", "backward_dkv", 64): Tile(32, 64, 4, 1),
    ("", "16 bits", "sm_90", "backward_dkv", 64): Tile(64, 128, 8, 2),
    ("strips", "16 bits", "sm_90", "backward_dq", 128): Tile(64, 32, 8, 2),
    ("padded", "16 bits", "sm_90", "backward_dkv", 128): Tile(16, 64, 8, 1),
    ("dropout", "16 bits", "sm_90", "backward_dkv", 128): Tile(16, 64, 8, 1),
    ("", "16 bits", "sm_100", "backward_dq", 32): Tile(64, 64, 4, 1),
    ("table", "16 bits", "sm_100", "backward_dkv", 32): Tile(32, 32, 4, 1),
    ("strips", "16 bits", "sm_100", "backward_dkv", 128): Tile(64, 64, 8, 1),
    ("", "float32", "sm_80", "backward_dq", 128): Tile(16, 16, 8, 1),
    ("", "float32", "sm_90", "backward_delta", 32): Tile(64, 32, 4, 2),
    ("", "float32", "sm_90", "backward_dq", 128): Tile(16, 16, 8, 1),
    ("", "float32", "sm_100", "forward", 64): Tile(32, 32, 8, 2),
    ("", "float32", "sm_100", "backward_dkv", 32): Tile(32, 32, 4, 2),
    ("", "float32", "sm_100", "backward_dkv", 128): Tile(16, 32, 8, 1),
}


def choose_tile(
    kernel: str, arch: str, dtype: torch.dtype, block_dk: int, block_dv: int, traits: tuple[str, ...] = ()
) -> Tile:
    """Tile of ``kernel`` on ``arch``: of "forward", "backward_dq", "backward_delta" (the DELTA_ONLY launch of the dQ
    kernel), "backward_dkv" or "backward_table", for a call with ``traits``.
    """
    bucket = max(32, block_dk, block_dv)
    amd = arch.startswith("gfx")
    family = "gfx" if amd else {"sm_90": "sm_90", "sm_100": "sm_100", "sm_103": "sm_100"}.get(arch, "sm_80")
    precision = "float32" if dtype == torch.float32 else "16 bits"
    if triton_before(3, 7):
        for trait in (*traits, ""):
            if (trait, precision, family, kernel, bucket) in _TILES_TRITON_3_6:
                return _TILES_TRITON_3_6[trait, precision, family, kernel, bucket]
    if kernel == "backward_delta":
        if precision == "float32" and (family, kernel, bucket) in _TILES_FLOAT32_BY_FAMILY:
            return _TILES_FLOAT32_BY_FAMILY[family, kernel, bucket]
        kernel = "backward_dq"
    for trait in traits:
        if precision == "16 bits" and (trait, family, kernel, bucket) in _TILES_WITH:
            return _TILES_WITH[trait, family, kernel, bucket]
        if (trait, precision, kernel, bucket) in _TILES_WITH:
            return _TILES_WITH[trait, precision, kernel, bucket]
    if dtype == torch.float32:
        return _TILES_FLOAT32_BY_FAMILY.get((family, kernel, bucket), _TILES_FLOAT32[kernel][bucket])
    if amd:
        return _TILES_AMD[kernel][bucket]
    return _TILES_BY_FAMILY.get((family, kernel, bucket), _TILES_NVIDIA[kernel][bucket])


@functools.cache
def key_tile(block_n: int, height: int, width: int) -> tuple[int, int]:
    """(rows, columns) of a key tile of at most ``block_n`` keys: powers of two, at least 16 keys together.

    Whole image rows unless narrower strips pad so much less that they pay for their row logits (one per row and strip).
    """

    def shape(columns: int) -> tuple[int, int]:
        return max(min(block_n // columns, triton.next_power_of_2(height)), -(-16 // columns)), columns

    def cost(columns: int) -> tuple[float, int]:
        rows, _ = shape(columns)
        padded = -(-height // rows) * rows * -(-width // columns) * columns
        return padded * (1.0 + 2.0 / columns), -columns

    widest = min(triton.next_power_of_2(width), block_n)
    return shape(min((2**i for i in range(widest.bit_length())), key=cost))


@functools.cache
def blocks(
    kernel: str, arch: str, dtype: torch.dtype, d_k: int, d_v: int, traits: tuple[str, ...] = ()
) -> tuple[Tile, int, int]:
    """Tile of a kernel and the padded depths of key and value."""
    block_dk, block_dv = (max(16, triton.next_power_of_2(depth)) for depth in (d_k, d_v))
    return choose_tile(kernel, arch, dtype, block_dk, block_dv, traits), block_dk, block_dv
