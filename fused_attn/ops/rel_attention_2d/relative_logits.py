"""Relative position tables to row and column logits and back: launches of triton_table_kernels.py.

The logits of an axis are (B, heads, Hq, Wq, Lk), O(N*(H+W)) in all, never N x N.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .._floor.launch import Launch, alignment, bucket_size, checked, compiler_options, strides
from . import triton_table_kernels as kernels

#: Programs that the gradients of the tables are shared out to where there are enough queries.
_TABLE_PROGRAMS = 1024


class TableLaunch(Launch):
    """A launch over tiles of queries, or of the rows of a table."""

    __slots__ = ()

    @property
    def tile(self) -> str:
        a = self.arguments
        if "BLOCK_P" in a:
            return f"{a['BLOCK_P']} positions x {a['BLOCK_D']}"
        return f"{a['BLOCK_M']} x {a['BLOCK_K']} keys x {a['BLOCK_D']}"

    @property
    def bytes_per_tile(self) -> int:
        """What a tile moves: queries and logits, or partial sums."""
        a = self.arguments
        if "BLOCK_P" in a:
            return 4 * a["BLOCK_P"] * a["D"]
        tensor = a.get("query_ptr", a.get("grad_query_ptr"))
        return a["BLOCK_M"] * (a["D"] + a["BLOCK_K"]) * tensor.element_size()


def _steps(table: Tensor | None, queries: int, keys: int, key_minus_query: bool) -> tuple[int, ...] | None:
    """How a table is walked: see triton_table_kernels.py."""
    if table is None:
        return None
    head = table.stride(0) if table.dim() == 3 else 0
    row, depth = table.stride()[-2:]
    first, sign = (queries - 1, 1) if key_minus_query else (keys - 1, -1)
    return head, first * row, -sign * row, sign * row, depth


def _common(query: Tensor, row_table, col_table, key_size, precision: str, block_m: int) -> dict[str, Any]:
    """Arguments of the kernels over queries, by name."""
    batch, heads, height, width, depth = query.shape
    checked(batch * heads * max(height, width), "query makes")  # numbers of queries have 32 bits
    per_head = any(table is not None and table.dim() == 3 for table in (row_table, col_table))
    block_d = max(16, bucket_size(depth))
    longest = max(length for table, length in zip((row_table, col_table), key_size, strict=True) if table is not None)
    most, single = 16 // query.element_size(), query.dtype == torch.float32
    largest = 32 if single else 64  # that registers hold beside a large block of queries
    return {
        "planes": batch if per_head else batch * heads,
        "heads": heads,
        "query_height": height,
        "query_width": width,
        "key_height": key_size[0],
        "key_width": key_size[1],
        "D": depth,
        "BLOCK_D": block_d,
        "BLOCK_M": 32 if block_d > largest else min(block_m, 64) if single else block_m,
        "BLOCK_K": max(16, min(bucket_size(longest), 64 if block_d <= largest else 32)),
        "PER_HEAD": per_head,
        "ROW_LOGITS_ALIGN": _divisor(key_size[0], most),
        "COL_LOGITS_ALIGN": _divisor(key_size[1], most),
        "PRECISION": precision,
    }


def _divisor(length: int, most: int) -> int:
    """The largest power of two up to ``most`` that divides ``length``."""
    return min(length & -length, most)


def _launch(kernel, programs: int, arguments: dict[str, Any]) -> Launch:
    query = arguments.get("query_ptr", arguments.get("grad_query_ptr"))
    options = compiler_options(4, 1 if query.dtype == torch.float32 else 2)
    return TableLaunch(kernel, checked(programs, "query and tables make"), arguments, options)


def _over_positions(common: dict[str, Any], table: Tensor | None, axis: int) -> tuple[int, int]:
    """(programs, blocks of queries at one position) along an axis, 0 for the rows."""
    if table is None:
        return 0, 0
    sizes = common["query_height"], common["query_width"]
    blocks = -(-common["planes"] * sizes[1 - axis] // common["BLOCK_M"])
    return sizes[axis] * (common["heads"] if common["PER_HEAD"] else 1), blocks


def plan_logits(
    query: Tensor,
    row_table: Tensor | None,
    col_table: Tensor | None,
    key_size: tuple[int, int],
    key_minus_query: bool,
    precision: str,
) -> tuple[tuple[Tensor | None, Tensor | None], list[Launch]]:
    """``query[b, h, y, x] . table[i(position, k)]`` for every position k of the keys along each axis.

    Args:
        query: (B, heads, Hq, Wq, d_k), any strides.
        row_table, col_table: (Lq+Lk-1, d_k) or (heads, Lq+Lk-1, d_k); one of them may be None.
        key_size: (Hk, Wk).
        key_minus_query: index convention, see :func:`..api.rel_attention_2d`.
        precision: of products in float32, ``"ieee"`` or ``"tf32"``.

    Returns:
        the logits, (B, heads, Hq, Wq, Hk) and (B, heads, Hq, Wq, Wk) or None, contiguous, dtype of ``query``, unscaled,
        and the launch that writes them.
    """
    row_logits, col_logits = (
        None if table is None else query.new_empty((*query.shape[:4], length))
        for table, length in zip((row_table, col_table), key_size, strict=True)
    )
    common = _common(query, row_table, col_table, key_size, precision, 128)
    rows, columns = (
        programs * blocks
        for programs, blocks in (
            _over_positions(common, table, axis) for axis, table in enumerate((row_table, col_table))
        )
    )
    query_strides = strides(query)
    arguments = {
        "query_ptr": query,
        "row_table_ptr": row_table,
        "col_table_ptr": col_table,
        "row_logits_ptr": row_logits,
        "col_logits_ptr": col_logits,
        "query_strides": query_strides,
        "row_table_steps": _steps(row_table, query.shape[2], key_size[0], key_minus_query),
        "col_table_steps": _steps(col_table, query.shape[3], key_size[1], key_minus_query),
        "row_programs": rows,
        **common,
        "QUERY_ALIGN": alignment(query, query_strides),
    }
    return (row_logits, col_logits), [_launch(kernels.rel_logits_fwd_kernel, rows + columns, arguments)]


def plan_logits_backward(
    grad_row_logits: Tensor | None,
    grad_col_logits: Tensor | None,
    query: Tensor,
    row_table: Tensor | None,
    col_table: Tensor | None,
    grad_query: Tensor,
    grad_row_table: Tensor | None,
    grad_col_table: Tensor | None,
    key_size: tuple[int, int],
    key_minus_query: bool,
    precision: str,
) -> list[Launch]:
    """Gradients of the logits of tables, bitwise reproducible: adds to ``grad_query``, writes those of the tables.

    Args:
        grad_row_logits, grad_col_logits: contiguous, as the logits.
        grad_query: like ``query``; rounded once.
        grad_row_table, grad_col_table: contiguous.

    Returns:
        the launches in order: gradient of the query, partial sums of those of the tables, and their sums.
    """
    common = _common(query, row_table, col_table, key_size, precision, 64)
    height, width = query.shape[2:4]
    depth, per_head = common["D"], common["PER_HEAD"]
    logits = {"grad_row_logits_ptr": grad_row_logits, "grad_col_logits_ptr": grad_col_logits}
    query_strides, grad_query_strides = strides(query), strides(grad_query)
    planes = common["planes"]
    block_m = max(16, min(common["BLOCK_M"], bucket_size(planes)))
    to_query = {
        "grad_query_ptr": grad_query,
        **logits,
        "row_table_ptr": row_table,
        "col_table_ptr": col_table,
        "grad_query_strides": grad_query_strides,
        "row_table_steps": _steps(row_table, height, key_size[0], key_minus_query),
        "col_table_steps": _steps(col_table, width, key_size[1], key_minus_query),
        **common,
        "BLOCK_M": block_m,
        "GRAD_QUERY_ALIGN": alignment(grad_query, grad_query_strides),
    }
    programs = height * width * (common["heads"] if per_head else 1) * -(-planes // block_m)
    launches = [_launch(kernels.rel_logits_bwd_query_kernel, programs, to_query)]

    partials: list[Tensor | None] = []
    shares: list[tuple[int, int, int]] = []  # programs, blocks in a chunk, chunks
    folds: list[tuple[int, int, int]] = []  # programs, chunks, sets
    tables = ((row_table, height, key_size[0]), (col_table, width, key_size[1]))
    for axis, (table, queries, keys) in enumerate(tables):
        if table is None:
            partials.append(None), shares.append((0, 0, 0)), folds.append((0, 0, 0))
            continue
        positions, blocks = _over_positions(common, table, axis)
        positions *= -(-keys // common["BLOCK_K"])
        per_chunk = -(-blocks // max(1, _TABLE_PROGRAMS // 2 // positions))
        chunks = -(-blocks // per_chunk)
        sets = common["heads"] if per_head else 1
        partials.append(query.new_empty((chunks, sets, queries, keys, depth), dtype=torch.float32))
        shares.append((positions * chunks, per_chunk, chunks))
        own = sets if table.dim() == 3 else 1
        folds.append((own * (queries + keys - 1), chunks * sets // own, own))
    partial = {"row_partial_ptr": partials[0], "col_partial_ptr": partials[1]}
    names = "row_programs", "row_blocks", "row_chunks", "col_blocks", "col_chunks"
    numbers = dict(zip(names, (*shares[0], *shares[1][1:]), strict=True))
    to_tables = {"query_ptr": query, **logits, **partial, "query_strides": query_strides, **numbers, **common}
    to_tables["QUERY_ALIGN"] = alignment(query, query_strides)
    launches.append(_launch(kernels.rel_logits_bwd_table_kernel, shares[0][0] + shares[1][0], to_tables))

    names = "row_programs", "row_chunks", "row_sets", "col_chunks", "col_sets"
    fold = {
        **partial,
        "grad_row_table_ptr": grad_row_table,
        "grad_col_table_ptr": grad_col_table,
        **dict(zip(names, (*folds[0], *folds[1][1:]), strict=True)),
        "query_height": height,
        "query_width": width,
        "key_height": key_size[0],
        "key_width": key_size[1],
        "D": depth,
        "BLOCK_D": common["BLOCK_D"],
        "BLOCK_P": max(8, min(64, bucket_size(max(height, width)))),
        "KEY_MINUS_QUERY": key_minus_query,
    }
    programs = checked(folds[0][0] + folds[1][0], "tables make")
    launches.append(TableLaunch(kernels.rel_logits_bwd_fold_kernel, programs, fold, compiler_options(2, 1)))
    return launches
