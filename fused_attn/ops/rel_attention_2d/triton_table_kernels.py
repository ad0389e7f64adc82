"""Triton kernels between relative position tables and the row and column logits of the attention kernels.

The queries at one position of an axis see one window of its table, ``window[k] = table[i(position, k)]``, and their
logits are one matrix product: query @ window^T.  Gradients: grad_logits @ window for the query, grad_logits^T @ query
for the window.  No element of a table meets a query that does not see it, so that a NaN stays where it belongs.

Queries are numbered along planes of one batch element and head; with PER_HEAD tables, all of a program's are of one
head.  ``steps`` of a table: from one head to the next, to the window's first element, as the position and as the key
go on by one, along the depth.

No atomics: every element is written once, and gradients of tables leave as partial sums that a last kernel adds up.
"""

import triton
import triton.language as tl

from . import triton_tiles as tiles


@triton.jit
def _window(table_ptr, head, steps, position, k, d, live):
    """(keys, depth): the rows of a table that the queries at ``position`` see; 0 where masked."""
    first = tiles.int64(head) * steps[0] + steps[1] + tiles.int64(position) * steps[2]
    places = k.to(tl.int64)[:, None] * steps[3] + d.to(tl.int64)[None, :] * steps[4]
    return tl.load(table_ptr + first + places, mask=live, other=0.0)


@triton.jit
def _aligned(offset, ALIGN: tl.constexpr):
    return tl.multiple_of(offset, ALIGN) if ALIGN > 1 else offset


@triton.jit
def _at_position(number, position, length, head, heads, width, ROWS: tl.constexpr, PER_HEAD: tl.constexpr):
    """Of those queries that are at ``position`` of an axis, rows or columns, the batch, head, y and x of the
    ``number``-th; ``length`` is that of the other axis."""
    plane, other = number // length, number % length
    batch = (plane if PER_HEAD else plane // heads).to(tl.int64)
    head = (tl.zeros_like(plane) + head if PER_HEAD else plane % heads).to(tl.int64)
    y = tl.zeros_like(other) + position if ROWS else other
    x = other if ROWS else tl.zeros_like(other) + position
    return batch, head, y, x


@triton.jit
def _query_offset(batch, head, y, x, strides, ALIGN: tl.constexpr):
    offset = batch * strides[0] + head * strides[1] + y.to(tl.int64) * strides[2] + x.to(tl.int64) * strides[3]
    return _aligned(offset, ALIGN)[:, None]


@triton.jit
def _logits_offset(batch, head, y, x, heads, height, width, keys, ALIGN: tl.constexpr):
    """Of the first logit of each query in (B, heads, Hq, Wq, keys)."""
    return _aligned((((batch * heads + head) * height + y) * width + x) * keys, ALIGN)[:, None]


@triton.jit
def _axis_logits(
    query_ptr, table_ptr, logits_ptr, strides, steps, program, planes, heads, height, width, keys, D: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, ROWS: tl.constexpr, PER_HEAD: tl.constexpr,
    ALIGN: tl.constexpr, LOGITS_ALIGN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    positions, length = (height, width) if ROWS else (width, height)
    position, block = program % positions, program // positions
    own_head, block = (block % heads, block // heads) if PER_HEAD else (0, block)
    number = block * BLOCK_M + tl.arange(0, BLOCK_M)
    live = (number < planes * length)[:, None]
    batch, head, y, x = _at_position(number, position, length, own_head, heads, width, ROWS, PER_HEAD)
    d = tl.arange(0, BLOCK_D)
    offset = _query_offset(batch, head, y, x, strides, ALIGN) + d.to(tl.int64)[None, :] * strides[4]
    query = tl.load(query_ptr + offset, mask=live & (d < D)[None, :], other=0.0)
    logits_ptrs = logits_ptr + _logits_offset(batch, head, y, x, heads, height, width, keys, LOGITS_ALIGN)
    for first in range(0, keys, BLOCK_K):
        k = first + tl.arange(0, BLOCK_K)
        window = _window(table_ptr, own_head, steps, position, k, d, (k < keys)[:, None] & (d < D)[None, :])
        logits = tiles.dot(query, tl.trans(window), None, PRECISION)
        tl.store(logits_ptrs + k[None, :], logits.to(logits_ptr.dtype.element_ty), mask=live & (k < keys)[None, :])


@triton.jit
def rel_logits_fwd_kernel(
    query_ptr,
    row_table_ptr,
    col_table_ptr,
    row_logits_ptr,
    col_logits_ptr,
    query_strides,
    row_table_steps,
    col_table_steps,
    row_programs,
    planes,
    heads,
    query_height,
    query_width,
    key_height,
    key_width,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PER_HEAD: tl.constexpr,
    QUERY_ALIGN: tl.constexpr,
    ROW_LOGITS_ALIGN: tl.constexpr,
    COL_LOGITS_ALIGN: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """row_logits (B, heads, Hq, Wq, Hk) and col_logits (B, heads, Hq, Wq, Wk), contiguous and unscaled, of the tables
    that there are.

    Grid: ``row_programs`` for the rows, then those for the columns; each owns BLOCK_M queries at one position.
    """
    program = tl.program_id(0)
    if row_table_ptr is not None:  # noqa: SIM102 - that is known when it is compiled, the rest is not
        if program < row_programs:
            _axis_logits(
                query_ptr, row_table_ptr, row_logits_ptr, query_strides, row_table_steps, program, planes, heads,
                query_height, query_width, key_height, D, BLOCK_D, BLOCK_M, BLOCK_K, True, PER_HEAD, QUERY_ALIGN,
                ROW_LOGITS_ALIGN, PRECISION,
            )  # fmt: skip
    if col_table_ptr is not None:  # noqa: SIM102
        if program >= row_programs:
            _axis_logits(
                query_ptr, col_table_ptr, col_logits_ptr, query_strides, col_table_steps, program - row_programs,
                planes, heads, query_height, query_width, key_width, D, BLOCK_D, BLOCK_M, BLOCK_K, False, PER_HEAD,
                QUERY_ALIGN, COL_LOGITS_ALIGN, PRECISION,
            )  # fmt: skip


@triton.jit
def _add_axis(
    acc, grad_logits_ptr, offset, table_ptr, head, steps, position, keys, d, live, D: tl.constexpr,
    BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    for first in range(0, keys, BLOCK_K):
        k = first + tl.arange(0, BLOCK_K)
        grad = tl.load(grad_logits_ptr + offset + k[None, :], mask=live & (k < keys)[None, :], other=0.0)
        window = _window(table_ptr, head, steps, position, k, d, (k < keys)[:, None] & (d < D)[None, :])
        acc = tiles.dot(grad, window, acc, PRECISION)
    return acc


@triton.jit
def rel_logits_bwd_query_kernel(
    grad_query_ptr,
    grad_row_logits_ptr,
    grad_col_logits_ptr,
    row_table_ptr,
    col_table_ptr,
    grad_query_strides,
    row_table_steps,
    col_table_steps,
    planes,
    heads,
    query_height,
    query_width,
    key_height,
    key_width,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PER_HEAD: tl.constexpr,
    GRAD_QUERY_ALIGN: tl.constexpr,
    ROW_LOGITS_ALIGN: tl.constexpr,
    COL_LOGITS_ALIGN: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """grad_query += grad_row_logits @ row window + grad_col_logits @ column window.

    Grid: Hq * Wq * blocks of BLOCK_M planes programs; each owns the queries of its planes at one place.
    """
    queries = query_height * query_width
    place, block = tl.program_id(0) % queries, tl.program_id(0) // queries
    own_head, block = (block % heads, block // heads) if PER_HEAD else (0, block)
    y, x = place // query_width, place % query_width
    plane = block * BLOCK_M + tl.arange(0, BLOCK_M)
    live = (plane < planes)[:, None]
    batch, head, y_of, x_of = _at_position(plane, 0, 1, own_head, heads, query_width, True, PER_HEAD)
    y_of, x_of = y_of + y, x_of + x
    d = tl.arange(0, BLOCK_D)
    offset = _query_offset(batch, head, y_of, x_of, grad_query_strides, GRAD_QUERY_ALIGN)
    grad_query_ptrs = grad_query_ptr + offset + d.to(tl.int64)[None, :] * grad_query_strides[4]
    inside = live & (d < D)[None, :]
    acc = tl.load(grad_query_ptrs, mask=inside, other=0.0).to(tl.float32)
    if row_table_ptr is not None:
        offset = _logits_offset(batch, head, y_of, x_of, heads, query_height, query_width, key_height, ROW_LOGITS_ALIGN)
        acc = _add_axis(
            acc, grad_row_logits_ptr, offset, row_table_ptr, own_head, row_table_steps, y, key_height, d, live, D,
            BLOCK_K, PRECISION,
        )  # fmt: skip
    if col_table_ptr is not None:
        offset = _logits_offset(batch, head, y_of, x_of, heads, query_height, query_width, key_width, COL_LOGITS_ALIGN)
        acc = _add_axis(
            acc, grad_col_logits_ptr, offset, col_table_ptr, own_head, col_table_steps, x, key_width, d, live, D,
            BLOCK_K, PRECISION,
        )  # fmt: skip
    tl.store(grad_query_ptrs, acc.to(grad_query_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _axis_partial(
    query_ptr, grad_logits_ptr, partial_ptr, strides, program, blocks, chunks, planes, heads, height, width, keys,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, ROWS: tl.constexpr,
    PER_HEAD: tl.constexpr, ALIGN: tl.constexpr, LOGITS_ALIGN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    positions, length = (height, width) if ROWS else (width, height)
    position, program = program % positions, program // positions
    own_head, program = (program % heads, program // heads) if PER_HEAD else (0, program)
    chunk, key_block = program % chunks, program // chunks
    k, d = key_block * BLOCK_K + tl.arange(0, BLOCK_K), tl.arange(0, BLOCK_D)
    acc = tl.zeros((BLOCK_K, BLOCK_D), tl.float32)
    for block in range(chunk * blocks, (chunk + 1) * blocks):
        number = block * BLOCK_M + tl.arange(0, BLOCK_M)
        live = (number < planes * length)[:, None]
        batch, head, y, x = _at_position(number, position, length, own_head, heads, width, ROWS, PER_HEAD)
        offset = _query_offset(batch, head, y, x, strides, ALIGN) + d.to(tl.int64)[None, :] * strides[4]
        query = tl.load(query_ptr + offset, mask=live & (d < D)[None, :], other=0.0)
        offset = _logits_offset(batch, head, y, x, heads, height, width, keys, LOGITS_ALIGN) + k[None, :]
        grad = tl.load(grad_logits_ptr + offset, mask=live & (k < keys)[None, :], other=0.0)
        acc = tiles.dot(tl.trans(grad), query, acc, PRECISION)
    sets = heads if PER_HEAD else 1
    first = ((tiles.int64(chunk) * sets + own_head) * positions + position) * keys
    partial_ptrs = partial_ptr + (first + k)[:, None] * D + d[None, :]
    tl.store(partial_ptrs, acc, mask=(k < keys)[:, None] & (d < D)[None, :])


@triton.jit
def rel_logits_bwd_table_kernel(
    query_ptr,
    grad_row_logits_ptr,
    grad_col_logits_ptr,
    row_partial_ptr,
    col_partial_ptr,
    query_strides,
    row_programs,
    row_blocks,
    row_chunks,
    col_blocks,
    col_chunks,
    planes,
    heads,
    query_height,
    query_width,
    key_height,
    key_width,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PER_HEAD: tl.constexpr,
    QUERY_ALIGN: tl.constexpr,
    ROW_LOGITS_ALIGN: tl.constexpr,
    COL_LOGITS_ALIGN: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Partial sums of the windows' gradients, float32 (chunks, heads if PER_HEAD, positions, keys, D) for each axis.

    Grid: ``row_programs`` for the rows, then those for the columns: positions * heads if PER_HEAD * chunks * blocks of
    BLOCK_K keys each.  A chunk is the queries of so many blocks of BLOCK_M.
    """
    program = tl.program_id(0)
    if row_partial_ptr is not None:  # noqa: SIM102
        if program < row_programs:
            _axis_partial(
                query_ptr, grad_row_logits_ptr, row_partial_ptr, query_strides, program, row_blocks, row_chunks, planes,
                heads, query_height, query_width, key_height, D, BLOCK_D, BLOCK_M, BLOCK_K, True, PER_HEAD, QUERY_ALIGN,
                ROW_LOGITS_ALIGN, PRECISION,
            )  # fmt: skip
    if col_partial_ptr is not None:  # noqa: SIM102
        if program >= row_programs:
            _axis_partial(
                query_ptr, grad_col_logits_ptr, col_partial_ptr, query_strides, program - row_programs, col_blocks,
                col_chunks, planes, heads, query_height, query_width, key_width, D, BLOCK_D, BLOCK_M, BLOCK_K, False,
                PER_HEAD, QUERY_ALIGN, COL_LOGITS_ALIGN, PRECISION,
            )  # fmt: skip


@triton.jit
def _axis_fold(
    partial_ptr, grad_table_ptr, program, chunks, sets, queries, keys, D: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_P: tl.constexpr, KEY_MINUS_QUERY: tl.constexpr,
):  # fmt: skip
    length = queries + keys - 1
    own_set, row = program // length, program % length
    d = tl.arange(0, BLOCK_D)
    acc = tl.zeros((BLOCK_P, BLOCK_D), tl.float32)
    for chunk in range(0, chunks):
        chunk_ptr = partial_ptr + (tiles.int64(chunk) * sets + own_set) * queries * keys * D
        for first in range(0, queries, BLOCK_P):
            position = first + tl.arange(0, BLOCK_P)
            k = row + position - (queries - 1) if KEY_MINUS_QUERY else position - row + (keys - 1)
            live = (position < queries) & (k >= 0) & (k < keys)
            partial_ptrs = chunk_ptr + (position.to(tl.int64) * keys + k)[:, None] * D + d[None, :]
            acc += tl.load(partial_ptrs, mask=live[:, None] & (d < D)[None, :], other=0.0)
    grad_table_ptrs = grad_table_ptr + (tiles.int64(own_set) * length + row) * D + d
    tl.store(grad_table_ptrs, tl.sum(acc, 0).to(grad_table_ptr.dtype.element_ty), mask=d < D)


@triton.jit
def rel_logits_bwd_fold_kernel(
    row_partial_ptr,
    col_partial_ptr,
    grad_row_table_ptr,
    grad_col_table_ptr,
    row_programs,
    row_chunks,
    row_sets,
    col_chunks,
    col_sets,
    query_height,
    query_width,
    key_height,
    key_width,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_P: tl.constexpr,
    KEY_MINUS_QUERY: tl.constexpr,
):
    """grad_row_table and grad_col_table, contiguous, of the partial sums of the kernel above.

    Grid: ``row_programs``, one for each row of the tables of the rows, then those of the columns.  Of ``chunks`` times
    ``sets`` partial sums, those of one set are of one table.
    """
    program = tl.program_id(0)
    if row_partial_ptr is not None:  # noqa: SIM102
        if program < row_programs:
            _axis_fold(
                row_partial_ptr, grad_row_table_ptr, program, row_chunks, row_sets, query_height, key_height, D,
                BLOCK_D, BLOCK_P, KEY_MINUS_QUERY,
            )  # fmt: skip
    if col_partial_ptr is not None:  # noqa: SIM102
        if program >= row_programs:
            _axis_fold(
                col_partial_ptr, grad_col_table_ptr, program - row_programs, col_chunks, col_sets, query_width,
                key_width, D, BLOCK_D, BLOCK_P, KEY_MINUS_QUERY,
            )  # fmt: skip
