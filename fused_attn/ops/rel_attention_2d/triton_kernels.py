"""Triton kernels of attention with decomposed (row + column) logits: forward.  triton_backward_kernels.py: backward.

``logits[q, k] = scale*q.k + row_scale*row[q, yk] + col_scale*col[q, xk]``.  Tensors are (B, heads, H, W, depth) with
any strides; addresses are 64-bit.  A weight is e**(logit - maximum).  Scales that hold log2(e) would save a product per
score, but make infinities, and NaN, of terms near the largest finite number, as masks are.

A key tile is ROWS rows by BLOCK_W columns of the key grid.  While the loop walks down the rows of one column strip, the
column logits of the query tile stay in registers and a row logit is one number per (query, row).  Padding of the key
grid costs no instruction per score beyond those: a padded column has a column logit of -inf, a padded row a row logit
of -inf; its keys are those of the edge again, as an infinity times zeros is NaN.

No atomics: the dQ pass owns query rows, the dK/dV pass owns key tiles, every element is written once.
"""

import triton
import triton.language as tl

from .._floor.triton_math import reciprocal, softmax_exp
from . import triton_tiles as tiles


@triton.jit
def _attend(
    s,
    v_block,
    m_i,
    l_i,
    acc,
    key0,
    key1,
    column,
    threshold,
    keep_scale,
    ONES_COLUMN: tl.constexpr,
    EXACT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Maximum, sum and output of what a query has attended to so far, with another tile of logits (queries, keys).

    ``key0`` and ``key1`` are those of the dropout mask or None, ``column`` the place of every key in it.
    """
    m_new = tl.maximum(m_i, tl.max(s, 1))
    # With every logit so far at -inf, subtracting the maximum would make NaN; any finite number will do.
    shift = tl.where(m_new == float("-inf"), 0.0, m_new)
    # Of whole logits: a row logit less the maximum, which costs nothing per score, is not what a logit that rounds to
    # the row's is less the maximum, and may leave a score of any size in the exponent.
    p = softmax_exp(s - shift[:, None], EXACT)
    alpha = softmax_exp(m_i - shift, EXACT)
    acc *= alpha[:, None]
    if not ONES_COLUMN:
        l_i = l_i * alpha + tl.sum(p, 1)
    if key0 is not None:
        keep = tiles.keep(key0[:, None], key1[:, None], column[None, :], threshold)
        p = tiles.dropped(p, keep, keep_scale)
    return m_new, l_i, tiles.dot(p.to(v_block.dtype), v_block, acc, PRECISION)


@triton.jit
def rel_attention_fwd_kernel(
    query_ptr,
    key_ptr,
    value_ptr,
    row_logits_ptr,
    col_logits_ptr,
    table_ptr,
    query_segments_ptr,
    key_segments_ptr,
    prefix_key_ptr,
    prefix_value_ptr,
    out_ptr,
    statistics_ptr,
    seed_ptr,
    query_strides,
    key_strides,
    value_strides,
    row_logits_strides,
    col_logits_strides,
    table_steps,
    prefix_key_strides,
    prefix_value_strides,
    out_strides,
    segment_sets,
    prefixes,
    heads,
    queries,
    query_width,
    key_height,
    key_width,
    scale,
    row_scale,
    col_scale,
    threshold,
    keep_scale,
    D_K: tl.constexpr,
    D_V: tl.constexpr,
    BLOCK_DK: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_P: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_W: tl.constexpr,
    ONE_STRIP: tl.constexpr,
    EVEN_H: tl.constexpr,
    EVEN_W: tl.constexpr,
    QUERY_ALIGN: tl.constexpr,
    ROW_LOGITS_ALIGN: tl.constexpr,
    COL_LOGITS_ALIGN: tl.constexpr,
    KEY_ALIGN: tl.constexpr,
    VALUE_ALIGN: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """out (B, heads, Hq, Wq, D_V) and statistics (B, heads, Hq, Wq, 2), float32: the largest logit as scaled, and the
    sum of the exponentials after subtracting it; (0, 0) for a query whose logits are all -inf.

    Grid: B * heads * ceil(queries / BLOCK_M) programs; each owns BLOCK_M queries and loops over all keys.
    """
    BLOCK_N: tl.constexpr = ROWS * BLOCK_W
    EXACT: tl.constexpr = query_ptr.dtype.element_ty == tl.float32
    ONES_COLUMN: tl.constexpr = (BLOCK_DV > D_V) and (seed_ptr is None)
    plane, batch, head, m = tiles.own_queries(heads, queries, BLOCK_M)
    live_m = m < queries
    y_m, x_m = m // query_width, m % query_width
    n = tl.arange(0, BLOCK_N)
    y_n, x_n = n // BLOCK_W, n % BLOCK_W
    r, w = tl.arange(0, ROWS), tl.arange(0, BLOCK_W)
    d_k, d_v = tl.arange(0, BLOCK_DK), tl.arange(0, BLOCK_DV)
    live_k, live_v = (d_k < D_K)[None, :], (d_v < D_V)[None, :]

    q_block = tiles.load(query_ptr, batch, head, y_m, x_m, d_k, live_m[:, None], live_k, query_strides, QUERY_ALIGN)
    key_ptr = tiles.plane(key_ptr, batch, head, key_strides, KEY_ALIGN)
    k_offsets = tiles.offsets(y_n, x_n, d_k, key_strides, KEY_ALIGN)
    value_ptr = tiles.plane(value_ptr, batch, head, value_strides, VALUE_ALIGN)
    v_offsets = tiles.offsets(y_n, x_n, d_v, value_strides, VALUE_ALIGN)
    row_ptrs = None
    if row_logits_ptr is not None:
        row_ptrs = tiles.pointers(row_logits_ptr, batch, head, y_m, x_m, r, row_logits_strides, ROW_LOGITS_ALIGN)
    col_ptrs = None
    if col_logits_ptr is not None:
        col_ptrs = tiles.pointers(col_logits_ptr, batch, head, y_m, x_m, w, col_logits_strides, COL_LOGITS_ALIGN)
    query_places, query_segment = None, None
    if table_ptr is not None:
        table_ptr += head * table_steps[0] + table_steps[1]
        inside_m = tl.minimum(m, queries - 1)
        query_places = inside_m // query_width * table_steps[2] + inside_m % query_width * table_steps[3]
    if key_segments_ptr is not None:
        segments_of = batch % segment_sets
        key_segments_ptr += segments_of * (key_height * key_width)
        query_segment = tiles.load_segments(query_segments_ptr, segments_of * queries + m, live_m, -2)
    key0, key1 = None, None
    if seed_ptr is not None:
        key0, key1 = tiles.row_keys(seed_ptr, plane * queries + m)

    m_i = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    l_i = tl.zeros((BLOCK_M,), tl.float32)
    # Cast from float32: the interpreter of Triton 3.6 makes no bfloat16 constants.
    one = tl.full((1, 1), 1.0, tl.float32).to(value_ptr.dtype.element_ty)
    acc = tl.zeros((BLOCK_M, BLOCK_DV), tl.float32)
    # Before the loop over the grid, which so holds no more registers than without prefix keys.
    if prefix_key_ptr is not None:
        for j0 in range(0, prefixes, BLOCK_P):
            j = j0 + tl.arange(0, BLOCK_P)
            live_j = j < prefixes
            k_block, v_block = tiles.load_prefix(
                prefix_key_ptr, prefix_value_ptr, batch, head, j, d_k, d_v, live_j[:, None], live_k, live_v,
                prefix_key_strides, prefix_value_strides,
            )  # fmt: skip
            if ONES_COLUMN:
                v_block = tl.where((d_v == D_V)[None, :], one, v_block)
            s = tiles.dot(q_block, tl.trans(k_block), None, PRECISION) * scale
            s = tl.where(live_j[None, :], s, float("-inf"))
            m_i, l_i, acc = _attend(
                s, v_block, m_i, l_i, acc, key0, key1, key_height * key_width + j, threshold, keep_scale, ONES_COLUMN,
                EXACT, PRECISION,
            )  # fmt: skip
        q_block = tiles.load_again(
            query_ptr, batch, head, y_m, x_m, d_k, live_m[:, None], live_k, query_strides, QUERY_ALIGN
        )
    for x0 in range(0, BLOCK_W if ONE_STRIP else key_width, BLOCK_W):
        col_tile = tiles.along(col_ptrs, x0, col_logits_strides)
        live_w = (x0 + w < key_width)[None, :]
        col_logits = tiles.axis_logits(col_tile, col_scale, live_m[:, None], live_w, not EVEN_W)
        for y0 in range(0, key_height, ROWS):
            y, x = y0 + y_n, x0 + x_n
            live_n = tiles.inside(y, x, key_height, key_width, EVEN_H and EVEN_W)[:, None]
            k_block = tiles.load_operand(
                key_ptr, k_offsets, y0, x0, y, x, key_height, key_width, d_k, live_k, key_strides, KEY_ALIGN,
                EVEN_H and EVEN_W,
            )  # fmt: skip
            v_block = tiles.load_tile(value_ptr, v_offsets, y0, x0, live_n, live_v, value_strides, VALUE_ALIGN)
            if ONES_COLUMN:
                v_block = tl.where((d_v == D_V)[None, :], one, v_block)

            if table_ptr is not None:
                s = tiles.scores(q_block, k_block, scale, ROWS, False, PRECISION)
                key_places = tiles.table_places(y, x, key_height, key_width, table_steps)
                bias_ptrs = table_ptr + (query_places[:, None] - key_places[None, :])
                if EVEN_H and EVEN_W:
                    s += tl.reshape(tl.load(bias_ptrs).to(tl.float32), s.shape)
                else:
                    s += tl.reshape(
                        tl.load(bias_ptrs, mask=tl.trans(live_n), other=float("-inf")).to(tl.float32), s.shape
                    )
            else:
                s = tiles.scores(q_block, k_block, scale, ROWS, False, PRECISION)
                row_tile = tiles.along(row_ptrs, y0, row_logits_strides)
                live_r = (y0 + r < key_height)[None, :]
                s = tiles.logits(s, col_logits, row_tile, row_scale, live_m[:, None], live_r, not EVEN_H, False)
            s = tl.reshape(s, (BLOCK_M, BLOCK_N))
            n_live = tiles.inside(y, x, key_height, key_width, EVEN_H and EVEN_W)
            key_segment = tiles.load_segments(key_segments_ptr, y * key_width + x, n_live, -1)
            s = tiles.seen(s, tiles.same_segment(query_segment, key_segment), float("-inf"))
            m_i, l_i, acc = _attend(
                s, v_block, m_i, l_i, acc, key0, key1, y * key_width + x, threshold, keep_scale, ONES_COLUMN, EXACT,
                PRECISION,
            )  # fmt: skip

    if ONES_COLUMN:
        l_i = tl.sum(tl.where((d_v == D_V)[None, :], acc, 0.0), 1)
    shift = tl.where(m_i == float("-inf"), 0.0, m_i)
    out = acc * reciprocal(tl.where(l_i == 0.0, 1.0, l_i), EXACT)[:, None]
    tiles.store(out_ptr, batch, head, y_m, x_m, d_v, out_strides, out, live_m[:, None] & live_v)
    tl.store(statistics_ptr + 2 * (plane * queries + m), shift, mask=live_m)
    tl.store(statistics_ptr + 2 * (plane * queries + m) + 1, l_i, mask=live_m)
