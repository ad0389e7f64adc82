"""Launches of the Triton kernels: tile shapes per architecture, arguments, and the two entry points of op.py.

A launch is planned as data (:class:`Launch`) from shapes, strides and the architecture alone.  ``forward`` and
``backward`` run the plans; ``compile_cases`` gives the same plans over meta tensors to the compile report.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from .._floor.dropout import threshold
from . import triton_kernels
from .relative_logits import relative_logits, relative_logits_backward


class Tile(NamedTuple):
    """Launch parameters of one kernel: queries per tile, keys per tile (aimed at), warps, pipeline stages."""

    block_m: int
    block_n: int
    warps: int
    stages: int


class Launch(NamedTuple):
    """One kernel launch: ``kernel[(programs,)](**arguments, **options)``."""

    kernel: Any
    programs: int
    arguments: dict[str, Any]
    options: dict[str, Any]

    @property
    def tile(self) -> str:
        a = self.arguments
        queries = f"({a['QUERY_ROWS']}x{a['QUERY_W']})" if "QUERY_W" in a else a["BLOCK_M"]
        return f"{queries} x ({a['ROWS']}x{a['BLOCK_W']})"

    @property
    def scores_per_tile(self) -> int:
        a = self.arguments
        queries = a["QUERY_ROWS"] * a["QUERY_W"] if "QUERY_W" in a else a["BLOCK_M"]
        return queries * a["ROWS"] * a["BLOCK_W"]

    def run(self) -> None:
        self.kernel[(self.programs,)](**self.arguments, **self.options)


# Kernel -> depth bucket -> tile; the bucket is the larger padded depth of key and value.  Chosen by
# the compile report: first no spills, then few instructions per score, then several independent thread
# blocks per multiprocessor, so that one block's exponentials cover another's products.
_TILES_NVIDIA = {
    "forward": {32: Tile(128, 128, 8, 2), 64: Tile(64, 64, 4, 2), 128: Tile(64, 64, 4, 2), 256: Tile(64, 32, 4, 1)},
    "backward_dq": {32: Tile(64, 64, 4, 2), 64: Tile(64, 64, 4, 2), 128: Tile(64, 32, 4, 1), 256: Tile(32, 32, 8, 1)},
    "backward_dkv": {32: Tile(64, 64, 4, 2), 64: Tile(32, 64, 4, 1), 128: Tile(32, 64, 4, 1), 256: Tile(32, 32, 8, 1)},
}
# Where a family's registers do not hold the tile above.  sm_80 stands for every part with warp-level matrix products.
_TILES_BY_FAMILY = {
    ("sm_80", "forward", 128): Tile(64, 32, 8, 2),
    ("sm_80", "forward", 256): Tile(64, 32, 8, 1),
    ("sm_80", "backward_dq", 64): Tile(64, 32, 4, 2),
    ("sm_80", "backward_dq", 128): Tile(64, 32, 8, 1),
    ("sm_80", "backward_dkv", 32): Tile(64, 64, 8, 1),
    ("sm_80", "backward_dkv", 64): Tile(32, 64, 8, 1),
    ("sm_90", "backward_dkv", 128): Tile(16, 64, 4, 1),
    ("sm_100", "forward", 256): Tile(64, 32, 8, 1),
    ("sm_100", "backward_dkv", 32): Tile(64, 64, 4, 1),
}
_TILES_AMD = {
    "forward": {32: Tile(128, 64, 4, 1), 64: Tile(128, 64, 4, 1), 128: Tile(64, 64, 4, 1), 256: Tile(64, 32, 4, 1)},
    "backward_dq": {32: Tile(128, 64, 4, 1), 64: Tile(64, 64, 4, 1), 128: Tile(64, 32, 4, 1), 256: Tile(32, 32, 4, 1)},
    "backward_dkv": {32: Tile(64, 64, 4, 1), 64: Tile(32, 64, 4, 1), 128: Tile(32, 64, 4, 1), 256: Tile(32, 32, 4, 1)},
}
# IEEE float32 products run on the vector units and keep whole rows of operands in registers: none holds a depth of 256.
_TILES_FLOAT32 = {
    "forward": {32: Tile(32, 64, 4, 1), 64: Tile(64, 32, 8, 1), 128: Tile(16, 16, 8, 1)},
    "backward_dq": {32: Tile(64, 32, 4, 1), 64: Tile(16, 32, 8, 1), 128: Tile(16, 16, 8, 1)},
    "backward_dkv": {32: Tile(32, 32, 4, 1), 64: Tile(32, 32, 8, 1), 128: Tile(16, 32, 4, 1)},
}


def architecture(tensor: Tensor) -> str:
    """``"sm_90"``, ``"gfx942"``, ...: what ``tensor`` lives on.  ``"sm_90"`` for the interpreter."""
    if tensor.device.type != "cuda":
        return "sm_90"
    properties = torch.cuda.get_device_properties(tensor.device)
    if torch.version.hip:
        return properties.gcnArchName.split(":")[0]
    return f"sm_{properties.major}{properties.minor}"


def choose_tile(kernel: str, arch: str, dtype: torch.dtype, block_dk: int, block_dv: int) -> Tile:
    """Tile of ``kernel`` ("forward", "backward_dq" or "backward_dkv") on ``arch``."""
    bucket = max(32, block_dk, block_dv)
    if dtype == torch.float32:
        return _TILES_FLOAT32[kernel][bucket]
    if arch.startswith("gfx"):
        return _TILES_AMD[kernel][bucket]
    family = {"sm_90": "sm_90", "sm_100": "sm_100", "sm_103": "sm_100"}.get(arch, "sm_80")
    return _TILES_BY_FAMILY.get((family, kernel, bucket), _TILES_NVIDIA[kernel][bucket])


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


def _depth_block(depth: int) -> int:
    return max(16, triton.next_power_of_2(depth))


def _precision(dtype: torch.dtype) -> str:
    return "tf32" if dtype == torch.float32 and torch.backends.cuda.matmul.allow_tf32 else "ieee"


def _strides(tensor: Tensor | None) -> tuple[int, ...] | None:
    """Strides, 0 along dimensions of size 1: what they say there is arbitrary."""
    if tensor is None:
        return None
    return tuple(0 if size == 1 else stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))


def _align(tensor: Tensor | None) -> int:
    """Elements, up to 16 bytes, that divide the address and strides of a tensor whose depth is contiguous; else 1."""
    strides = _strides(tensor)
    if strides is None or strides[4] != 1:
        return 1
    itemsize = tensor.element_size()
    address = 0 if tensor.is_meta else tensor.data_ptr()
    return math.gcd(16 // itemsize, address // itemsize if address % itemsize == 0 else 1, *strides[:4])


def _common(query, key, value, row, col, scale, row_scale, col_scale, dropout_p, seed, tile) -> dict[str, Any]:
    """Arguments that all three kernels take, by name."""
    heads, height, width, d_k = query.shape[1:]
    block_dk, block_dv = _depth_block(d_k), _depth_block(value.shape[4])
    rows, columns = key_tile(tile.block_n, *key.shape[2:4])
    return {
        "query_ptr": query,
        "key_ptr": key,
        "value_ptr": value,
        "row_ptr": row,
        "col_ptr": col,
        "seed_ptr": seed if dropout_p > 0.0 else None,
        "query_strides": _strides(query),
        "key_strides": _strides(key),
        "value_strides": _strides(value),
        "row_strides": _strides(row),
        "col_strides": _strides(col),
        "heads": heads,
        "queries": height * width,
        "query_width": width,
        "key_height": key.shape[2],
        "key_width": key.shape[3],
        "scale": scale,
        "row_scale": row_scale,
        "col_scale": col_scale,
        "threshold": threshold(dropout_p),
        "keep_scale": 1.0 / (1.0 - dropout_p),
        "D_K": d_k,
        "D_V": value.shape[4],
        "BLOCK_DK": block_dk,
        "BLOCK_DV": block_dv,
        "BLOCK_M": max(16, min(tile.block_m, triton.next_power_of_2(height * width))),
        "ROWS": rows,
        "BLOCK_W": columns,
        "QUERY_ALIGN": _align(query),
        "ROW_ALIGN": _align(row),
        "COL_ALIGN": _align(col),
        "PRECISION": _precision(query.dtype),
    }


def plan_forward(
    query, key, value, row, col, out, statistics, scale, row_scale, col_scale, dropout_p, seed, *, arch: str
) -> Launch:
    """The forward launch over finished row and column logits; writes ``out`` and ``statistics``."""
    block_dk, block_dv = _depth_block(query.shape[4]), _depth_block(value.shape[4])
    tile = choose_tile("forward", arch, query.dtype, block_dk, block_dv)
    arguments = _common(query, key, value, row, col, scale, row_scale, col_scale, dropout_p, seed, tile)
    arguments |= {
        "out_ptr": out,
        "out_strides": _strides(out),
        "statistics_ptr": statistics,
        **_key_loop(key, value, arguments),
    }
    return _launch(triton_kernels.rel_attention_fwd_kernel, _query_programs(query, arguments), arguments, tile)


def plan_backward_dq(
    grad_out, query, key, value, row, col, out, statistics, normaliser, grad_query, grad_row, grad_col, scale,
    row_scale, col_scale, dropout_p, seed, *, arch: str, delta_only: bool = False,
) -> Launch:  # fmt: skip
    """The dQ launch; writes ``grad_query``, ``normaliser`` and, where the logits exist, ``grad_row`` and ``grad_col``.

    ``grad_row`` has a leading dimension of one entry per column strip (:func:`strips`).  In float32 a launch with
    ``delta_only`` has to precede it.
    """
    block_dk, block_dv = _depth_block(query.shape[4]), _depth_block(value.shape[4])
    tile = choose_tile("backward_dq", arch, query.dtype, block_dk, block_dv)
    arguments = _common(query, key, value, row, col, scale, row_scale, col_scale, dropout_p, seed, tile)
    row_strides = None if grad_row is None else (*_strides(grad_row[0]), grad_row.stride(0))
    arguments |= {
        "grad_out_ptr": grad_out,
        "grad_out_strides": _strides(grad_out),
        "out_ptr": out,
        "out_strides": _strides(out),
        "statistics_ptr": statistics,
        "planes": query.shape[0] * query.shape[1],
        "normaliser_ptr": normaliser,
        "grad_query_ptr": grad_query,
        "grad_query_strides": _strides(grad_query),
        "grad_row_ptr": grad_row,
        "grad_row_strides": row_strides,
        "grad_col_ptr": grad_col,
        "grad_col_strides": _strides(grad_col),
        "grad_scale": scale,
        "grad_row_scale": row_scale,
        "grad_col_scale": col_scale,
        "DELTA_ONLY": delta_only,
        **_key_loop(key, value, arguments),
    }
    return _launch(triton_kernels.rel_attention_bwd_dq_kernel, _query_programs(query, arguments), arguments, tile)


def plan_backward_dkv(
    grad_out, query, key, value, row, col, normaliser, grad_key, grad_value, scale, row_scale, col_scale,
    dropout_p, seed, *, arch: str,
) -> Launch:  # fmt: skip
    """The dK/dV launch; reads the ``normaliser`` that the dQ launch wrote; writes ``grad_key`` and ``grad_value``."""
    block_dk, block_dv = _depth_block(query.shape[4]), _depth_block(value.shape[4])
    tile = choose_tile("backward_dkv", arch, query.dtype, block_dk, block_dv)
    arguments = _common(query, key, value, row, col, scale, row_scale, col_scale, dropout_p, seed, tile)
    query_rows, query_columns = key_tile(tile.block_m, *query.shape[2:4])
    arguments |= {
        "grad_out_ptr": grad_out,
        "grad_out_strides": _strides(grad_out),
        "planes": query.shape[0] * query.shape[1],
        "normaliser_ptr": normaliser,
        "grad_key_ptr": grad_key,
        "grad_key_strides": _strides(grad_key),
        "grad_value_ptr": grad_value,
        "grad_value_strides": _strides(grad_value),
        "grad_scale": scale,
        "query_height": query.shape[2],
        "QUERY_ROWS": query_rows,
        "QUERY_W": query_columns,
        "ONE_STRIP": query.shape[3] <= query_columns,
        "EVEN_M": query.shape[2] % query_rows == 0 and query.shape[3] % query_columns == 0,
        "GRAD_OUT_ALIGN": _align(grad_out),
    }
    del arguments["queries"], arguments["BLOCK_M"]
    row_tiles = -(-key.shape[2] // arguments["ROWS"])
    programs = query.shape[0] * query.shape[1] * row_tiles * -(-key.shape[3] // arguments["BLOCK_W"])
    return _launch(triton_kernels.rel_attention_bwd_dkv_kernel, programs, arguments, tile)


def plan_backward(
    grad_out, query, key, value, row, col, out, statistics, normaliser, grads, scale, row_scale, col_scale, dropout_p,
    seed, *, arch: str,
) -> list[Launch]:  # fmt: skip
    """The backward launches in order; ``grads`` as in op.py, but ``grad_row`` as in :func:`plan_backward_dq`."""
    grad_query, grad_key, grad_value, grad_row, grad_col = grads
    terms, factors = (grad_out, query, key, value, row, col), (scale, row_scale, col_scale, dropout_p, seed)
    launches = [
        plan_backward_dq(
            *terms, out, statistics, normaliser, grad_query, grad_row, grad_col, *factors,
            arch=arch, delta_only=delta_only,
        )
        for delta_only in ((True, False) if query.dtype == torch.float32 else (False,))
    ]  # fmt: skip
    return [*launches, plan_backward_dkv(*terms, normaliser, grad_key, grad_value, *factors, arch=arch)]


def strips(query: Tensor, key: Tensor, value: Tensor, arch: str) -> int:
    """Column strips that the dQ pass walks: the leading dimension of its ``grad_row``."""
    tile = choose_tile("backward_dq", arch, query.dtype, _depth_block(query.shape[4]), _depth_block(value.shape[4]))
    return -(-key.shape[3] // key_tile(tile.block_n, *key.shape[2:4])[1])


def _key_loop(key: Tensor, value: Tensor, arguments: dict[str, Any]) -> dict[str, Any]:
    """Arguments of the kernels that loop over keys."""
    height, width = key.shape[2:4]
    return {
        "ONE_STRIP": width <= arguments["BLOCK_W"],
        "EVEN_H": height % arguments["ROWS"] == 0,
        "EVEN_W": width % arguments["BLOCK_W"] == 0,
        "KEY_ALIGN": _align(key),
        "VALUE_ALIGN": _align(value),
    }


def _query_programs(query: Tensor, arguments: dict[str, Any]) -> int:
    return query.shape[0] * query.shape[1] * -(-arguments["queries"] // arguments["BLOCK_M"])


def _launch(kernel, programs: int, arguments: dict[str, Any], tile: Tile) -> Launch:
    if programs >= 2**31:
        raise ValueError(f"query and key make {programs} tiles of work, expected fewer than 2**31; split the batch")
    # FMA contraction is the default up to Triton 3.9 and no longer after it; the tile table counts on it.
    options = {"num_warps": tile.warps, "num_stages": tile.stages, "enable_fp_fusion": True}
    return Launch(kernel, programs, arguments, options)


def _logits(query, term, key_length, axis, rel_scale, key_minus_query):
    """Finished logits of ``term`` and the factor the kernel applies to them; a table has 2 or 3 dimensions."""
    if term is None or term.dim() == 5:
        return term, 1.0
    return relative_logits(query, term, key_length, axis, key_minus_query), rel_scale


def forward(
    query, key, value, row, col, scale, rel_scale, key_minus_query, dropout_p, seed, out, statistics
) -> None:  # fmt: skip
    """Forward of the operators in op.py."""
    if key.shape[2] * key.shape[3] == 0:
        out.zero_(), statistics.zero_()
        return
    if statistics.numel() == 0:
        return
    with torch.cuda.device_of(query):
        row, row_scale = _logits(query, row, key.shape[2], 2, rel_scale, key_minus_query)
        col, col_scale = _logits(query, col, key.shape[3], 3, rel_scale, key_minus_query)
        plan_forward(
            query, key, value, row, col, out, statistics, scale, row_scale, col_scale, dropout_p, seed,
            arch=architecture(query),
        ).run()  # fmt: skip


def backward(
    grad_out, query, key, value, row, col, out, statistics, scale, rel_scale, key_minus_query, dropout_p, seed, *grads
) -> None:  # fmt: skip
    """Backward of the operators in op.py.  Logits of tables are computed again, not saved."""
    if 0 in (statistics.numel(), key.shape[2] * key.shape[3], value.shape[4]):
        for grad in grads:
            grad.zero_()
        return
    grad_query, _, _, grad_row, grad_col = grads
    arch = architecture(query)
    with torch.cuda.device_of(query):
        tables = {2: row, 3: col}
        row, row_scale = _logits(query, row, key.shape[2], 2, rel_scale, key_minus_query)
        col, col_scale = _logits(query, col, key.shape[3], 3, rel_scale, key_minus_query)
        # Where the term is a table, what the kernel writes is the gradient of its logits.
        d_row = grad_row if row is tables[2] else torch.empty_like(row, memory_format=torch.contiguous_format)
        d_col = grad_col if col is tables[3] else torch.empty_like(col, memory_format=torch.contiguous_format)
        count = strips(query, key, value, arch)
        strip_rows = d_row[None] if count == 1 else d_row.new_empty((count, *d_row.shape), dtype=torch.float32)
        written = (
            *grads[:3],
            None if row is None else strip_rows,
            None if col is None else d_col,
        )
        normaliser = statistics.new_empty((5, *query.shape[:4]))
        for launch in plan_backward(
            grad_out, query, key, value, row, col, out, statistics, normaliser, written, scale, row_scale, col_scale,
            dropout_p, seed, arch=arch,
        ):  # fmt: skip
            launch.run()
        if row is not None and count > 1:
            d_row.copy_(strip_rows.sum(0))

        for axis, d_logits, grad_table in ((2, d_row, grad_row), (3, d_col, grad_col)):
            table = tables[axis]
            if table is not None and table.dim() != 5:
                d_query, d_table = relative_logits_backward(d_logits, query, table, axis, key_minus_query)
                grad_query.add_(d_query)
                grad_table.copy_(d_table)


#: Cases of the compile report: name -> (query grid, d_k, d_v, dtype, options).
_COMPILE_SHAPES: dict[str, tuple] = {
    "aa-wrn stage 1": ((32, 32), 20, 2, torch.bfloat16, {}),
    "aa-wrn stage 2": ((16, 16), 20, 4, torch.bfloat16, {}),
    "aa-wrn stage 3": ((8, 8), 20, 8, torch.bfloat16, {}),
    "aa-wrn stage 1, channels first": ((32, 32), 20, 2, torch.bfloat16, {"channels_first": True}),
    "aa-wrn stage 1, dropout": ((32, 32), 20, 2, torch.bfloat16, {"dropout_p": 0.1}),
    "aa-wrn stage 1, no logits": ((32, 32), 20, 2, torch.bfloat16, {"logits": False}),
    "odd grid 33x47": ((33, 47), 20, 2, torch.float16, {}),
    "sam window 14x14": ((14, 14), 64, 64, torch.float16, {}),
    "sam global 64x64": ((64, 64), 64, 64, torch.bfloat16, {}),
    "botnet 14x14": ((14, 14), 128, 128, torch.bfloat16, {}),
    "deep 16x16": ((16, 16), 256, 256, torch.bfloat16, {}),
    "aa-wrn stage 1, float32": ((32, 32), 20, 2, torch.float32, {}),
    "sam global 64x64, float32": ((64, 64), 64, 64, torch.float32, {}),
    "botnet 14x14, float32": ((14, 14), 128, 128, torch.float32, {}),
}

COMPILE_NOTES = """
Instructions per score that no formulation of the loop avoids, for d_k=20, d_v=2 in bfloat16 (tensor products run
beside them):

- forward 6.5: scale and column logit (1 FMA), row logit (1), maximum (1), subtraction (1), exponential (2), half a
  conversion.  Row logit less maximum could be one number per row, but not for logits of which one rounds the other
  away, as masks do; and scales that hold log2(e) would make infinities of masks.  The row sum is a column of ones in
  the padding of the values and costs none.  What remains in the loop loads the key tile and builds that column.
- dQ pass 9.5: FMA, row logit, subtraction, exponential (2), subtraction of delta, product, one addition each for the
  row and the column gradient, half a conversion.  The sum of the exponentials divides what the loop has added up.
- dK/dV pass 9.0: FMA, row logit, subtraction, exponential (2), product with the inverse sum, subtraction of delta,
  product, two half conversions.  Column logits change with every tile here, so that reading and widening them adds
  about 2.
- dropout adds the hash, about 11 integer instructions.
"""


def compile_cases(arch: str) -> Iterator[tuple[str, Launch]]:
    """(case, launch) of every shipped configuration on ``arch``, over meta tensors: see compile_report.py."""
    for name, (grid, d_k, d_v, dtype, options) in _COMPILE_SHAPES.items():
        for launch in _plan_all(grid, d_k, d_v, dtype, arch, **options):
            yield f"{name}, delta" if launch.arguments.get("DELTA_ONLY") else name, launch


def _plan_all(grid, d_k, d_v, dtype, arch, *, channels_first=False, dropout_p=0.0, logits=True) -> list[Launch]:
    lead = (8, 8)

    def empty(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    def feature(depth: int) -> Tensor:
        return empty(*lead, depth, *grid).permute(0, 1, 3, 4, 2) if channels_first else empty(*lead, *grid, depth)

    query, key, value, out, grad_out = feature(d_k), feature(d_k), feature(d_v), feature(d_v), feature(d_v)
    row = empty(*lead, *grid, grid[0]) if logits else None
    col = empty(*lead, *grid, grid[1]) if logits else None
    statistics = empty(*lead, *grid, 2, dtype=torch.float32)
    normaliser = empty(5, *lead, *grid, dtype=torch.float32)
    seed = torch.empty(1, dtype=torch.int64, device="meta")
    terms, factors = (query, key, value, row, col), (d_k**-0.5, 1.0, 1.0, dropout_p, seed)
    d_row = None
    if logits:
        count = strips(query, key, value, arch)
        d_row = row[None] if count == 1 else empty(count, *row.shape, dtype=torch.float32)
    return [
        plan_forward(*terms, out, statistics, *factors, arch=arch),
        *plan_backward(
            grad_out, *terms, out, statistics, normaliser, (query, key, value, d_row, col), *factors, arch=arch
        ),
    ]
