"""Launches of the Triton kernels: arguments, and the two entry points of op.py.  Tiles: triton_tile_table.py.

A launch is planned as data (:class:`Launch`) from shapes, strides and the architecture alone.  ``forward`` and
``backward`` run the plans; ``triton_compile_cases.py`` gives the same plans over meta tensors to the compile report.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .._floor.dropout import threshold
from .._floor.launch import Launch, alignment, architecture, bucket_size, checked, compiler_options, strides
from .._floor.replay import run
from . import triton_backward_kernels, triton_kernels
from .relative_logits import plan_logits, plan_logits_backward
from .triton_tile_table import Tile, blocks, key_tile


class AttentionLaunch(Launch):
    """A launch over tiles of scores."""

    __slots__ = ()

    @property
    def tile(self) -> str:
        a = self.arguments
        if "BLOCK_M" in a:
            return f"{a['BLOCK_M']} x ({a['ROWS']}x{a['BLOCK_W']})"
        rows, columns = self._query_tile
        return f"({rows}x{columns}) x ({a['ROWS']}x{a['BLOCK_W']})"

    @property
    def _query_tile(self) -> tuple[int, int]:
        a = self.arguments
        return a.get("QUERY_ROWS", a["ROWS"]), a.get("QUERY_W", a["BLOCK_W"])

    @property
    def scores_per_tile(self) -> int:
        a = self.arguments
        rows, columns = self._query_tile
        return a.get("BLOCK_M", rows * columns) * a["ROWS"] * a["BLOCK_W"]


class FoldLaunch(Launch):
    """The launch that sums partial gradients of a free table."""

    __slots__ = ()

    @property
    def tile(self) -> str:
        a = self.arguments
        return f"{a['BLOCK_E']} x ({a['ROWS']}x{a['BLOCK_W']})"

    @property
    def bytes_per_tile(self) -> int:
        a = self.arguments
        return 4 * a["BLOCK_E"] * a["ROWS"] * a["BLOCK_W"]


class Terms(NamedTuple):
    """What the logits and the output are made of."""

    query: Tensor
    key: Tensor
    value: Tensor
    row_logits: Tensor | None = None
    col_logits: Tensor | None = None
    bias_table: Tensor | None = None
    query_segments: Tensor | None = None
    key_segments: Tensor | None = None
    prefix_key: Tensor | None = None  # a grid of one row, (B, heads, 1, P, depth), as prefix_value
    prefix_value: Tensor | None = None


class Factors(NamedTuple):
    """Scales of the logits' terms, and dropout."""

    scale: float
    row_scale: float
    col_scale: float
    dropout_p: float
    seed: Tensor | None
    key_minus_query: bool
    precision: str  # of products in float32, "ieee" or "tf32"


class Gradients(NamedTuple):
    """Gradients of :class:`Terms`, which the launches write.

    ``row_logits`` is float32 where there are several column strips (:func:`strips`); ``bias_table`` is contiguous.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    row_logits: Tensor | None = None
    col_logits: Tensor | None = None
    bias_table: Tensor | None = None
    prefix_key: Tensor | None = None
    prefix_value: Tensor | None = None


def _traits(**tensors: Tensor | None) -> tuple[str, ...]:
    """What :func:`choose_tile` may ask of a call, but for :func:`_traits_of_tile`: those that it has of "table",
    "prefix" and "dropout", in this order."""
    return tuple(trait for trait, tensor in tensors.items() if tensor is not None)


def _traits_of_tile(height: int, width: int, rows: int, columns: int) -> tuple[str, ...]:
    """What :func:`choose_tile` may ask of the grid that a kernel's loop walks, in the tiles of other calls."""
    present = {"strips": width > columns, "padded": height % rows > 0 or width % columns > 0}
    return tuple(trait for trait, there in present.items() if there)


def _tile_over_keys(kernel: str, terms: Terms, seed: Tensor | None, arch: str) -> tuple[Tile, int, int, int, int]:
    """Of a kernel that owns queries and loops over keys: its tile, the padded depths of key and value, and the rows and
    columns of a tile of keys."""
    query, key, value = terms[:3]
    traits = _traits(table=terms.bias_table, prefix=terms.prefix_key, dropout=seed)
    height, width = key.shape[2:4]
    tile, block_dk, block_dv = blocks(kernel, arch, query.dtype, query.shape[4], value.shape[4], traits)
    rows, columns = key_tile(tile.block_n, height, width)
    if more := _traits_of_tile(height, width, rows, columns):
        tile, _, _ = blocks(kernel, arch, query.dtype, query.shape[4], value.shape[4], (*more, *traits))
        rows, columns = key_tile(tile.block_n, height, width)
    return tile, block_dk, block_dv, rows, columns


def _precision(dtype: torch.dtype) -> str:
    return "tf32" if dtype == torch.float32 and torch.backends.cuda.matmul.allow_tf32 else "ieee"


def _seed(factors: Factors) -> Tensor | None:
    return factors.seed if factors.dropout_p > 0.0 else None


def _common(terms: Terms, factors: Factors) -> dict[str, Any]:
    """Arguments that all three kernels take, by name, but for those of the tile."""
    query, key, value, row_logits, col_logits = terms[:5]
    segments = terms.query_segments
    _, heads, _, width, d_k = query.shape
    query_strides, row_logits_strides, col_logits_strides = strides(query), strides(row_logits), strides(col_logits)
    return {
        "query_ptr": query,
        "key_ptr": key,
        "value_ptr": value,
        "row_logits_ptr": row_logits,
        "col_logits_ptr": col_logits,
        "table_ptr": terms.bias_table,
        "query_segments_ptr": segments,
        "key_segments_ptr": terms.key_segments,
        "seed_ptr": _seed(factors),
        "query_strides": query_strides,
        "key_strides": strides(key),
        "value_strides": strides(value),
        "row_logits_strides": row_logits_strides,
        "col_logits_strides": col_logits_strides,
        "table_steps": table_steps(terms, factors.key_minus_query),
        "segment_sets": None if segments is None else segments.shape[0],
        "heads": heads,
        "query_width": width,
        "key_height": key.shape[2],
        "key_width": key.shape[3],
        "scale": factors.scale,
        "row_scale": factors.row_scale,
        "col_scale": factors.col_scale,
        "threshold": threshold(factors.dropout_p),
        "keep_scale": 1.0 / (1.0 - factors.dropout_p),
        "D_K": d_k,
        "D_V": value.shape[4],
        "QUERY_ALIGN": alignment(query, query_strides),
        "ROW_LOGITS_ALIGN": alignment(row_logits, row_logits_strides),
        "COL_LOGITS_ALIGN": alignment(col_logits, col_logits_strides),
        "PRECISION": factors.precision,
    }


def table_steps(terms: Terms, key_minus_query: bool, table: Tensor | None = None) -> tuple[int, int, int, int] | None:
    """How a table, ``bias_table`` unless given, is walked: from one head to the next; from its beginning to the bias of
    a query and a key at the same place; as the query goes one row down, or one column to the right.
    """
    table = terms.bias_table if table is None else table
    if table is None:
        return None
    head, down, right = table.stride()
    height, width = (terms.query if key_minus_query else terms.key).shape[2:4]
    sign = -1 if key_minus_query else 1
    return head, (height - 1) * down + (width - 1) * right, sign * down, sign * right


def _launch_over_queries(
    name: str, kernel, common: dict[str, Any], arguments: dict[str, Any], terms: Terms, arch: str
) -> Launch:
    """A launch of a kernel that owns queries and loops over keys."""
    query, key, value = common["query_ptr"], common["key_ptr"], common["value_ptr"]
    batch, heads, height, width = query.shape[:4]
    key_height, key_width = key.shape[2:4]
    prefix = terms.prefix_key
    tile, block_dk, block_dv, rows, columns = _tile_over_keys(name, terms, common["seed_ptr"], arch)
    # A pipeline longer than the loop only costs what fills it.
    tile = tile._replace(stages=min(tile.stages, max(2, -(-key_height // rows) * -(-key_width // columns))))
    queries = height * width
    block_m = max(16, min(tile.block_m, bucket_size(queries)))
    prefixes = None if prefix is None else prefix.shape[3]
    arguments = {
        **common,
        **arguments,
        "queries": queries,
        "prefix_key_ptr": prefix,
        "prefix_value_ptr": terms.prefix_value,
        "prefix_key_strides": strides(prefix),
        "prefix_value_strides": strides(terms.prefix_value),
        "prefixes": prefixes,
        "BLOCK_P": None if prefixes is None else max(16, min(tile.block_n, bucket_size(prefixes))),
        "BLOCK_DK": block_dk,
        "BLOCK_DV": block_dv,
        "BLOCK_M": block_m,
        "ROWS": rows,
        "BLOCK_W": columns,
        "ONE_STRIP": key_width <= columns,
        "EVEN_H": key_height % rows == 0,
        "EVEN_W": key_width % columns == 0,
        "KEY_ALIGN": alignment(key, common["key_strides"]),
        "VALUE_ALIGN": alignment(value, common["value_strides"]),
    }
    return _launch(kernel, batch * heads * -(-queries // block_m), arguments, tile)


def _launch(kernel, programs: int, arguments: dict[str, Any], tile: Tile) -> Launch:
    # The tile table counts on FMA contraction.
    return AttentionLaunch(
        kernel, checked(programs, "query and key make"), arguments, compiler_options(tile.warps, tile.stages)
    )


def plan_forward(terms: Terms, factors: Factors, out: Tensor, statistics: Tensor, arch: str) -> Launch:
    """The forward launch; writes ``out`` and ``statistics``."""
    outputs = {"out_ptr": out, "out_strides": strides(out), "statistics_ptr": statistics}
    kernel = triton_kernels.rel_attention_fwd_kernel
    return _launch_over_queries("forward", kernel, _common(terms, factors), outputs, terms, arch)


def plan_backward(
    grad_out: Tensor,
    terms: Terms,
    factors: Factors,
    out: Tensor,
    statistics: Tensor,
    per_query: Tensor,
    grads: Gradients,
    arch: str,
) -> list[Launch]:
    """The backward launches in order: dQ, which also writes ``per_query``, then those that read it: dK and dV, of the
    grid and of prefix keys, and the gradient of the free table.

    In float32 a launch of the dQ kernel that only sums delta precedes them.
    """
    common = _common(terms, factors)
    over_keys = {
        "grad_out_ptr": grad_out,
        "grad_out_strides": strides(grad_out),
        "planes": grad_out.shape[0] * grad_out.shape[1],
        "per_query_ptr": per_query,
        "grad_scale": factors.scale,
    }
    dq = _plan_dq(common | over_keys, out, statistics, grads, terms, factors, arch)
    launches = [dq, _plan_dkv(common | over_keys, grads.key, grads.value, arch)]
    if terms.prefix_key is not None:
        prefix = Terms(terms.query, terms.prefix_key, terms.prefix_value)
        first = {"first_key": terms.key.shape[2] * terms.key.shape[3]}
        launches.append(
            _plan_dkv(_common(prefix, factors) | over_keys | first, grads.prefix_key, grads.prefix_value, arch)
        )
    if terms.bias_table is not None:
        launches += _plan_table(common | over_keys, terms, factors, grads.bias_table, arch)
    if grad_out.dtype != torch.float32:
        return launches
    delta = _plan_dq(common | over_keys, out, statistics, grads, terms, factors, arch, delta_only=True)
    return [delta, *launches]


def _plan_dq(
    common: dict[str, Any], out, statistics, grads: Gradients, terms: Terms, factors, arch: str, delta_only=False
) -> Launch:
    d_row = grads.row_logits
    arguments = {
        "out_ptr": out,
        "out_strides": strides(out),
        "statistics_ptr": statistics,
        "grad_query_ptr": grads.query,
        "grad_query_strides": strides(grads.query),
        "grad_row_logits_ptr": d_row,
        "grad_row_logits_strides": strides(d_row),
        "grad_col_logits_ptr": grads.col_logits,
        "grad_col_logits_strides": strides(grads.col_logits),
        "grad_row_scale": factors.row_scale,
        "grad_col_scale": factors.col_scale,
        "DELTA_ONLY": delta_only,
    }
    kernel = triton_backward_kernels.rel_attention_bwd_dq_kernel
    name = "backward_delta" if delta_only else "backward_dq"
    return _launch_over_queries(name, kernel, common, arguments, terms, arch)


def _plan_dkv(common: dict[str, Any], grad_key: Tensor, grad_value: Tensor, arch: str) -> Launch:
    batch, heads, height, width, d_k = common["query_ptr"].shape
    key_height, key_width = common["key_height"], common["key_width"]
    grad_out = common["grad_out_ptr"]
    traits = _traits(table=common["table_ptr"], dropout=common["seed_ptr"])
    tile, block_dk, block_dv = blocks("backward_dkv", arch, grad_out.dtype, d_k, common["D_V"], traits)
    query_rows, query_columns = key_tile(tile.block_m, height, width)
    if more := _traits_of_tile(height, width, query_rows, query_columns):
        tile, _, _ = blocks("backward_dkv", arch, grad_out.dtype, d_k, common["D_V"], (*more, *traits))
        query_rows, query_columns = key_tile(tile.block_m, height, width)
    rows, columns = key_tile(tile.block_n, key_height, key_width)
    arguments = {
        "first_key": None,
        **common,
        "grad_key_ptr": grad_key,
        "grad_key_strides": strides(grad_key),
        "grad_value_ptr": grad_value,
        "grad_value_strides": strides(grad_value),
        "query_height": height,
        "BLOCK_DK": block_dk,
        "BLOCK_DV": block_dv,
        "QUERY_ROWS": query_rows,
        "QUERY_W": query_columns,
        "ROWS": rows,
        "BLOCK_W": columns,
        "ONE_STRIP": width <= query_columns,
        "EVEN_M": height % query_rows == 0 and width % query_columns == 0,
        "GRAD_OUT_ALIGN": alignment(grad_out, common["grad_out_strides"]),
    }
    programs = batch * heads * -(-key_height // rows) * -(-key_width // columns)
    return _launch(triton_backward_kernels.rel_attention_bwd_dkv_kernel, programs, arguments, tile)


#: Programs that the gradient of a free table is shared out to where the batch is large enough.
_TABLE_PROGRAMS = 512


def _plan_table(common: dict[str, Any], terms: Terms, factors: Factors, grad_table: Tensor, arch: str) -> list[Launch]:
    """Launches that sum the gradient of the free table.

    Tiles of queries and of keys have one shape.  Where they lie apart alike, so do their queries and keys: those pairs
    of tiles, of a part of the images, add up in registers, and are one tile of ``partial``, float32 (splits, heads,
    tiles apart, queries, keys).  It holds 4 * block numbers per head and position of the grid at most, and no more than
    about ``_TABLE_PROGRAMS`` tiles where it is split; the second launch sums its diagonals.
    """
    query, key = terms.query, terms.key
    batch, heads, height, width, d_k = query.shape
    key_height, key_width = key.shape[2:4]
    tile, block_dk, block_dv = blocks("backward_table", arch, query.dtype, d_k, common["D_V"])
    rows, columns = key_tile(tile.block_n, max(height, key_height), max(width, key_width))
    apart = (-(-height // rows) + -(-key_height // rows) - 1, -(-width // columns) + -(-key_width // columns) - 1)
    tiles = heads * apart[0] * apart[1]
    images = -(-batch // min(batch, -(-_TABLE_PROGRAMS // tiles)))
    splits = -(-batch // images)
    partial = grad_table.new_empty((splits, tiles, rows * columns, rows * columns), dtype=torch.float32)
    names = ("row_logits_ptr", "col_logits_ptr", "row_logits_strides", "col_logits_strides", "row_scale", "col_scale")
    names += ("grad_scale", "ROW_LOGITS_ALIGN", "COL_LOGITS_ALIGN")
    arguments = {name: argument for name, argument in common.items() if name not in names}
    shape = {"ROWS": rows, "BLOCK_W": columns, "heads": heads, "key_height": key_height, "key_width": key_width}
    shape |= {"query_height": height, "query_width": width, "partial_ptr": partial}
    arguments |= shape | {
        "batch": batch,
        "images": images,
        "BLOCK_DK": block_dk,
        "BLOCK_DV": block_dv,
        "KEY_ALIGN": alignment(key, common["key_strides"]),
        "VALUE_ALIGN": alignment(terms.value, common["value_strides"]),
        "GRAD_OUT_ALIGN": alignment(common["grad_out_ptr"], common["grad_out_strides"]),
    }
    entries = grad_table.shape[1] * grad_table.shape[2]
    fold = {
        "grad_table_ptr": grad_table,
        "grad_table_steps": table_steps(terms, factors.key_minus_query, grad_table),
        "splits": splits,
        **shape,
        "BLOCK_E": 8,
    }
    programs = checked(heads * -(-entries // 8), "the bias table makes")
    return [
        _launch(triton_backward_kernels.rel_attention_bwd_table_kernel, splits * tiles, arguments, tile),
        FoldLaunch(triton_backward_kernels.rel_attention_bwd_table_fold_kernel, programs, fold, compiler_options(4, 1)),
    ]


def strips(terms: Terms, seed: Tensor | None, arch: str) -> int:
    """Column strips of keys that the dQ pass walks.  Of the terms, ``query``, ``key``, ``value``, ``bias_table`` and
    ``prefix_key`` are looked at."""
    *_, columns = _tile_over_keys("backward_dq", terms, seed, arch)
    return -(-terms.key.shape[3] // columns)


def _tables(row_term: Tensor | None, col_term: Tensor | None) -> list[Tensor | None]:
    """Those of the terms that are tables, which have 2 or 3 dimensions; finished logits have 5."""
    return [None if term is None or term.dim() == 5 else term for term in (row_term, col_term)]


def _problem(
    query, key, value, row_term, col_term, bias_table, query_segments, key_segments, prefix_key, prefix_value, scale,
    rel_scale, key_minus_query, dropout_p, seed, precision,
) -> tuple[Terms, Factors, list[Launch]]:  # fmt: skip
    """What the kernels get of the arguments of the operators, and the launch that makes logits of tables, if any."""
    prefix = [
        None if tensor is None or 0 in tensor.shape[:3] else tensor[:, :, None] for tensor in (prefix_key, prefix_value)
    ]
    common = dropout_p, seed, key_minus_query, precision
    key_size = tuple(key.shape[2:4])
    if 0 in key_size:  # prefix keys alone are a grid
        return Terms(query, *prefix), Factors(scale, 1.0, 1.0, *common), []
    tables = row_table, col_table = _tables(row_term, col_term)
    row_logits, col_logits, launches = row_term, col_term, []
    if row_table is not None or col_table is not None:
        made, launches = plan_logits(query, *tables, key_size, key_minus_query, precision)
        row_logits = row_term if row_table is None else made[0]
        col_logits = col_term if col_table is None else made[1]
    row_scale, col_scale = (1.0 if table is None else rel_scale for table in tables)
    terms = Terms(query, key, value, row_logits, col_logits, bias_table, query_segments, key_segments, *prefix)
    return terms, Factors(scale, row_scale, col_scale, *common), launches


def _plan_forward(*arguments) -> list[Launch]:
    """All launches of :func:`forward`."""
    *arguments, precision, out, statistics, arch = arguments
    terms, factors, launches = _problem(*arguments, precision)
    return [*launches, plan_forward(terms, factors, out, statistics, arch)]


def _plan_backward(grad_out, inputs, numbers, precision, out, statistics, grads, arch) -> list[Launch]:
    """All launches of :func:`backward`, but for those from logits to tables, of which ``grads`` has the logits'."""
    terms, factors, launches = _problem(*inputs, *numbers, precision)
    per_query = statistics.new_empty((5, *terms.query.shape[:4]))
    return [*launches, *plan_backward(grad_out, terms, factors, out, statistics, per_query, grads, arch)]


def _reachable(bias_table: Tensor | None) -> Tensor | None:
    """``bias_table``, where the kernels' places in a head's table, which have 32 bits, reach all of it, or a copy."""
    if bias_table is None:
        return None
    sizes = zip(bias_table.shape[1:], bias_table.stride()[1:], strict=True)
    return bias_table if sum(n * abs(s) for n, s in sizes) < 2**31 else bias_table.contiguous()


def forward(query, key, value, row_term, col_term, bias_table, *arguments) -> None:
    """Forward of the operators in op.py."""
    *arguments, out, statistics = arguments
    if statistics.numel() == 0:
        return
    prefix_key = arguments[2]
    if 0 in key.shape[2:4] and (prefix_key is None or 0 in prefix_key.shape[:3]):
        out.zero_(), statistics.zero_()
        return
    with torch.cuda.device_of(query):
        tensors = query, key, value, row_term, col_term, _reachable(bias_table)
        run(_plan_forward, *tensors, *arguments, _precision(query.dtype), out, statistics, architecture(query))


def backward(grad_out, query, key, value, row_term, col_term, *arguments) -> None:
    """Backward of the operators in op.py.  Logits of tables are computed again, not saved."""
    arguments, grads = arguments[:-8], arguments[-8:]
    grad_query, grad_key, grad_value, d_row_term, d_col_term, d_table, d_prefix_key, d_prefix_value = grads
    bias_table, query_segments, key_segments, prefix_key, prefix_value, out, statistics, *numbers = arguments
    key_minus_query = numbers[2]
    key_size = tuple(key.shape[2:4])
    on_grid = 0 not in key_size
    has_keys = on_grid or (prefix_key is not None and prefix_key.shape[2] > 0)
    runs = statistics.numel() > 0 and has_keys and value.shape[4] > 0
    if not (runs and on_grid):
        for grad in grads:
            if grad.numel() > 0:
                grad.zero_()
    if not runs:
        return
    inputs = query, key, value, row_term, col_term, _reachable(bias_table)
    inputs += query_segments, key_segments, prefix_key, prefix_value
    precision, arch = _precision(query.dtype), architecture(query)
    with torch.cuda.device_of(query):
        d_prefix = (d_prefix_key[:, :, None], d_prefix_value[:, :, None]) if prefix_key is not None else (None, None)
        if not on_grid:
            written = Gradients(grad_query, *d_prefix)
            run(_plan_backward, grad_out, inputs, numbers, precision, out, statistics, written, arch)
            return
        tables = row_table, col_table = _tables(row_term, col_term)
        d_row = d_row_sums = _grad_of_logits(query, row_term, row_table, d_row_term, key_size[0])
        d_col = _grad_of_logits(query, col_term, col_table, d_col_term, key_size[1])
        if d_row is not None and d_row.dtype != torch.float32:
            terms = Terms(*inputs[:3], bias_table=bias_table, prefix_key=prefix_key)
            dropout_p, seed = numbers[3:]
            if strips(terms, seed if dropout_p > 0.0 else None, arch) > 1:
                d_row_sums = torch.empty_like(d_row, dtype=torch.float32)
        written = Gradients(grad_query, grad_key, grad_value, d_row_sums, d_col, d_table, *d_prefix)
        run(_plan_backward, grad_out, inputs, numbers, precision, out, statistics, written, arch)
        if d_row_sums is not d_row:
            d_row.copy_(d_row_sums)
        if row_table is not None or col_table is not None:
            d_logits, d_tables = (
                [None if table is None else grad for table, grad in zip(tables, grads, strict=True)]
                for grads in ((d_row, d_col), (d_row_term, d_col_term))
            )
            run(
                plan_logits_backward, *d_logits, query, *tables, grad_query, *d_tables, key_size, key_minus_query,
                precision,
            )  # fmt: skip


def _grad_of_logits(query, term: Tensor | None, table: Tensor | None, grad_term: Tensor, length: int) -> Tensor | None:
    """What the kernel writes: the gradient of the term, or that of its logits where the term is a table."""
    if term is None:
        return None
    return grad_term if table is None else query.new_empty((*query.shape[:4], length))
