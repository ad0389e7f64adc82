"""Triton kernels of attention with decomposed (row + column) logits: forward, dQ pass, dK/dV pass.

``logits[q, k] = scale*q.k + row_scale*row[q, yk] + col_scale*col[q, xk]``.  Tensors are (B, heads, H, W, depth) with
any strides; addresses are 64-bit.  A weight is e**(logit - maximum).  Scales that hold log2(e) would save a product per
score, but make infinities, and NaN, of terms near the largest finite number, as masks are.

A key tile is ROWS rows by BLOCK_W columns of the key grid.  While the loop walks down the rows of one column strip, the
column logits of the query tile stay in registers and a row logit is one number per (query, row).  Padding of the key
grid costs no instruction per score beyond those: a padded column has a column logit of -inf, a padded row a row logit
of -inf.

No atomics: the dQ pass owns query rows, the dK/dV pass owns key tiles, every element is written once.
"""

import triton
import triton.language as tl

from .._floor.triton_math import reciprocal, softmax_exp
from . import triton_tiles as tiles


@triton.jit
def rel_attention_fwd_kernel(
    query_ptr,
    key_ptr,
    value_ptr,
    row_logits_ptr,
    col_logits_ptr,
    out_ptr,
    statistics_ptr,
    seed_ptr,
    query_strides,
    key_strides,
    value_strides,
    row_logits_strides,
    col_logits_strides,
    out_strides,
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
    if seed_ptr is not None:
        key0, key1 = tiles.row_keys(seed_ptr, plane * queries + m)

    m_i = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    l_i = tl.zeros((BLOCK_M,), tl.float32)
    # Cast from float32: the interpreter of Triton 3.6 makes no bfloat16 constants.
    one = tl.full((1, 1), 1.0, tl.float32).to(value_ptr.dtype.element_ty)
    acc = tl.zeros((BLOCK_M, BLOCK_DV), tl.float32)
    for x0 in range(0, BLOCK_W if ONE_STRIP else key_width, BLOCK_W):
        col_tile = tiles.along(col_ptrs, x0, col_logits_strides)
        live_w = (x0 + w < key_width)[None, :]
        col_logits = tiles.axis_logits(col_tile, col_scale, live_m[:, None], live_w, not EVEN_W)
        for y0 in range(0, key_height, ROWS):
            y, x = y0 + y_n, x0 + x_n
            live_n = tiles.inside(y, x, key_height, key_width, EVEN_H and EVEN_W)[:, None]
            k_block = tiles.load_tile(key_ptr, k_offsets, y0, x0, live_n, live_k, key_strides, KEY_ALIGN)
            v_block = tiles.load_tile(value_ptr, v_offsets, y0, x0, live_n, live_v, value_strides, VALUE_ALIGN)
            if ONES_COLUMN:
                v_block = tl.where((d_v == D_V)[None, :], one, v_block)

            s = tiles.scores(q_block, k_block, scale, ROWS, False, PRECISION)
            row_tile = tiles.along(row_ptrs, y0, row_logits_strides)
            live_r = (y0 + r < key_height)[None, :]
            s = tiles.logits(s, col_logits, row_tile, row_scale, live_m[:, None], live_r, not EVEN_H, False)
            s = tl.reshape(s, (BLOCK_M, BLOCK_N))
            m_new = tl.maximum(m_i, tl.max(s, 1))
            # With every logit so far at -inf, subtracting the maximum would make NaN; any finite number will do.
            shift = tl.where(m_new == float("-inf"), 0.0, m_new)
            # Of whole logits: a row logit less the maximum, which costs nothing per score, is not what a logit that
            # rounds to the row's is less the maximum, and may leave a score of any size in the exponent.
            p = softmax_exp(s - shift[:, None], EXACT)
            alpha = softmax_exp(m_i - shift, EXACT)
            m_i = m_new
            acc *= alpha[:, None]
            if not ONES_COLUMN:
                l_i = l_i * alpha + tl.sum(p, 1)
            if seed_ptr is not None:
                keep = tiles.keep(key0[:, None], key1[:, None], (y * key_width + x)[None, :], threshold)
                p = tiles.dropped(p, keep, keep_scale)
            acc = tiles.dot(p.to(v_block.dtype), v_block, acc, PRECISION)

    if ONES_COLUMN:
        l_i = tl.sum(tl.where((d_v == D_V)[None, :], acc, 0.0), 1)
    shift = tl.where(m_i == float("-inf"), 0.0, m_i)
    out = acc * reciprocal(tl.where(l_i == 0.0, 1.0, l_i), EXACT)[:, None]
    tiles.store(out_ptr, batch, head, y_m, x_m, d_v, out_strides, out, live_m[:, None] & live_v)
    tl.store(statistics_ptr + 2 * (plane * queries + m), shift, mask=live_m)
    tl.store(statistics_ptr + 2 * (plane * queries + m) + 1, l_i, mask=live_m)


@triton.jit
def rel_attention_bwd_dq_kernel(
    grad_out_ptr,
    query_ptr,
    key_ptr,
    value_ptr,
    row_logits_ptr,
    col_logits_ptr,
    out_ptr,
    statistics_ptr,
    per_query_ptr,
    grad_query_ptr,
    grad_row_logits_ptr,
    grad_col_logits_ptr,
    seed_ptr,
    grad_out_strides,
    query_strides,
    key_strides,
    value_strides,
    row_logits_strides,
    col_logits_strides,
    out_strides,
    grad_query_strides,
    grad_row_logits_strides,
    grad_col_logits_strides,
    planes,
    heads,
    queries,
    query_width,
    key_height,
    key_width,
    scale,
    row_scale,
    col_scale,
    grad_scale,
    grad_row_scale,
    grad_col_scale,
    threshold,
    keep_scale,
    D_K: tl.constexpr,
    D_V: tl.constexpr,
    BLOCK_DK: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr,
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
    DELTA_ONLY: tl.constexpr,
):
    """grad_query, the gradients of the row and column logits, and what the dK/dV pass needs to know of each query:
    per_query (5, B, heads, Hq, Wq), float32, is maximum and delta, inverse_sum, and the bits of both dropout keys if
    there is dropout.

    grad_row_logits is (strips, B*heads, queries, Hk): one partial sum per column strip, float32 when there are several.
    Grid and ownership as in the forward kernel.

    delta, the mean over keys of the gradient of the weights, is rowsum(grad_out * out).  The rounding of ``out`` in it
    is amplified where the weights' gradients cancel; float32 sums it from the weights, in a DELTA_ONLY launch before.
    """
    BLOCK_N: tl.constexpr = ROWS * BLOCK_W
    EXACT: tl.constexpr = query_ptr.dtype.element_ty == tl.float32
    plane, batch, head, m = tiles.own_queries(heads, queries, BLOCK_M)
    live_m = m < queries
    y_m, x_m = m // query_width, m % query_width
    n = tl.arange(0, BLOCK_N)
    y_n, x_n = n // BLOCK_W, n % BLOCK_W
    r, w = tl.arange(0, ROWS), tl.arange(0, BLOCK_W)
    d_k, d_v = tl.arange(0, BLOCK_DK), tl.arange(0, BLOCK_DV)
    live_k, live_v = (d_k < D_K)[None, :], (d_v < D_V)[None, :]

    q_block = tiles.load(query_ptr, batch, head, y_m, x_m, d_k, live_m[:, None], live_k, query_strides, QUERY_ALIGN)
    do_block = tiles.load(grad_out_ptr, batch, head, y_m, x_m, d_v, live_m[:, None], live_v, grad_out_strides, 1)
    index = plane * queries + m
    maximum, inverse_sum = tiles.load_statistics(statistics_ptr, index, live_m)
    total = tiles.int64(queries) * planes
    if DELTA_ONLY:
        delta = tl.zeros((BLOCK_M,), tl.float32)
    elif EXACT:
        delta = tl.load(per_query_ptr + total + index, mask=live_m, other=0.0)
    else:
        o_block = tiles.load(out_ptr, batch, head, y_m, x_m, d_v, live_m[:, None], live_v, out_strides, 1)
        delta = tl.sum(do_block.to(tl.float32) * o_block.to(tl.float32), 1)
        tl.store(per_query_ptr + total + index, delta, mask=live_m)
    tl.store(per_query_ptr + index, maximum, mask=live_m)
    tl.store(per_query_ptr + 2 * total + index, inverse_sum, mask=live_m)
    if seed_ptr is not None:
        key0, key1 = tiles.row_keys(seed_ptr, index)
        tl.store(per_query_ptr + 3 * total + index, key0.to(tl.float32, bitcast=True), mask=live_m)
        tl.store(per_query_ptr + 4 * total + index, key1.to(tl.float32, bitcast=True), mask=live_m)

    key_ptr = tiles.plane(key_ptr, batch, head, key_strides, KEY_ALIGN)
    k_offsets = tiles.offsets(y_n, x_n, d_k, key_strides, KEY_ALIGN)
    value_ptr = tiles.plane(value_ptr, batch, head, value_strides, VALUE_ALIGN)
    v_offsets = tiles.offsets(y_n, x_n, d_v, value_strides, VALUE_ALIGN)
    row_ptrs = None
    if row_logits_ptr is not None:
        row_ptrs = tiles.pointers(row_logits_ptr, batch, head, y_m, x_m, r, row_logits_strides, ROW_LOGITS_ALIGN)
        grad_row_ptrs = tiles.pointers(grad_row_logits_ptr, batch, head, y_m, x_m, r, grad_row_logits_strides, 1)
    col_ptrs = None
    if col_logits_ptr is not None:
        col_ptrs = tiles.pointers(col_logits_ptr, batch, head, y_m, x_m, w, col_logits_strides, COL_LOGITS_ALIGN)
        grad_col_ptrs = tiles.pointers(grad_col_logits_ptr, batch, head, y_m, x_m, w, grad_col_logits_strides, 1)

    dq = tl.zeros((BLOCK_M, BLOCK_DK), tl.float32)
    for x0 in range(0, BLOCK_W if ONE_STRIP else key_width, BLOCK_W):
        col_tile = tiles.along(col_ptrs, x0, col_logits_strides)
        live_w = (x0 + w < key_width)[None, :]
        col_logits = tiles.axis_logits(col_tile, col_scale, live_m[:, None], live_w, not EVEN_W)
        if col_logits_ptr is not None:
            d_col_logits = tl.zeros((BLOCK_M, BLOCK_W), tl.float32)
        for y0 in range(0, key_height, ROWS):
            y, x = y0 + y_n, x0 + x_n
            live_n = tiles.inside(y, x, key_height, key_width, EVEN_H and EVEN_W)[:, None]
            k_block = tiles.load_tile(key_ptr, k_offsets, y0, x0, live_n, live_k, key_strides, KEY_ALIGN)
            v_block = tiles.load_tile(value_ptr, v_offsets, y0, x0, live_n, live_v, value_strides, VALUE_ALIGN)

            s = tiles.scores(q_block, k_block, scale, ROWS, False, PRECISION)
            row_tile = tiles.along(row_ptrs, y0, row_logits_strides)
            live_r = (y0 + r < key_height)[None, :]
            s = tiles.logits(s, col_logits, row_tile, row_scale, live_m[:, None], live_r, not EVEN_H, False)
            # Times inverse_sum: the sums over keys are multiplied by it.
            p = softmax_exp(s - maximum[:, None, None], EXACT)

            dp = tiles.dot(do_block, tl.trans(v_block), None, PRECISION)
            if seed_ptr is not None:
                keep = tiles.keep(key0[:, None], key1[:, None], (y * key_width + x)[None, :], threshold)
                dp = tiles.dropped(dp, keep, keep_scale)
            if DELTA_ONLY:
                delta += tl.sum(tl.reshape(p, (BLOCK_M, BLOCK_N)) * dp, 1)
            else:
                ds = p * (tl.reshape(dp, (BLOCK_M, ROWS, BLOCK_W)) - delta[:, None, None])
                if col_logits_ptr is not None:
                    d_col_logits += tl.sum(ds, 1)
                if row_logits_ptr is not None:
                    d_row_logits = tl.sum(ds, 2) * (inverse_sum * grad_row_scale)[:, None]
                    shift = (
                        tiles.int64(y0) * grad_row_logits_strides[4]
                        + tiles.int64(x0 // BLOCK_W) * grad_row_logits_strides[5]
                    )
                    row_mask = live_m[:, None] & live_r
                    tl.store(grad_row_ptrs + shift, d_row_logits.to(grad_row_ptrs.dtype.element_ty), mask=row_mask)
                ds = tl.reshape(ds, (BLOCK_M, BLOCK_N)).to(k_block.dtype)
                if EXACT:
                    # A sum of its own for every tile, as one chain of additions over all tiles rounds more than
                    # float32 results may; the factor keeps the compiler from making one of them.
                    dq += tiles.dot(ds, k_block, None, PRECISION) * inverse_sum[:, None]
                else:
                    dq = tiles.dot(ds, k_block, dq, PRECISION)
        if (col_logits_ptr is not None) and (not DELTA_ONLY):
            d_col_logits *= (inverse_sum * grad_col_scale)[:, None]
            shift = tiles.int64(x0) * grad_col_logits_strides[4]
            col_mask = live_m[:, None] & live_w
            tl.store(grad_col_ptrs + shift, d_col_logits.to(grad_col_ptrs.dtype.element_ty), mask=col_mask)

    if DELTA_ONLY:
        tl.store(per_query_ptr + total + index, delta * inverse_sum, mask=live_m)
    else:
        dq *= grad_scale if EXACT else (inverse_sum * grad_scale)[:, None]
        tiles.store(grad_query_ptr, batch, head, y_m, x_m, d_k, grad_query_strides, dq, live_m[:, None] & live_k)


@triton.jit
def rel_attention_bwd_dkv_kernel(
    grad_out_ptr,
    query_ptr,
    key_ptr,
    value_ptr,
    row_logits_ptr,
    col_logits_ptr,
    per_query_ptr,
    grad_key_ptr,
    grad_value_ptr,
    seed_ptr,
    grad_out_strides,
    query_strides,
    key_strides,
    value_strides,
    row_logits_strides,
    col_logits_strides,
    grad_key_strides,
    grad_value_strides,
    planes,
    heads,
    query_height,
    query_width,
    key_height,
    key_width,
    scale,
    row_scale,
    col_scale,
    grad_scale,
    threshold,
    keep_scale,
    D_K: tl.constexpr,
    D_V: tl.constexpr,
    BLOCK_DK: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    QUERY_ROWS: tl.constexpr,
    QUERY_W: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_W: tl.constexpr,
    ONE_STRIP: tl.constexpr,
    EVEN_M: tl.constexpr,
    QUERY_ALIGN: tl.constexpr,
    ROW_LOGITS_ALIGN: tl.constexpr,
    COL_LOGITS_ALIGN: tl.constexpr,
    GRAD_OUT_ALIGN: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """grad_key and grad_value.

    Grid: B * heads * ceil(Hk / ROWS) * ceil(Wk / BLOCK_W) programs; each owns one key tile and loops over all queries,
    in tiles of QUERY_ROWS x QUERY_W, so that no address needs a division inside the loop.
    Scores are held transposed, (keys, queries), so that both gradients are plain products.
    """
    BLOCK_N: tl.constexpr = ROWS * BLOCK_W
    BLOCK_M: tl.constexpr = QUERY_ROWS * QUERY_W
    EXACT: tl.constexpr = query_ptr.dtype.element_ty == tl.float32
    row_tiles, strips = tl.cdiv(key_height, ROWS), tl.cdiv(key_width, BLOCK_W)
    tile = tl.program_id(0) % (row_tiles * strips)
    plane = tiles.int64(tl.program_id(0) // (row_tiles * strips))
    batch, head = plane // heads, plane % heads
    y_tile, x_tile = (tile // strips) * ROWS, (tile % strips) * BLOCK_W
    n = tl.arange(0, BLOCK_N)
    y_n, x_n = y_tile + n // BLOCK_W, x_tile + n % BLOCK_W
    d_k, d_v = tl.arange(0, BLOCK_DK), tl.arange(0, BLOCK_DV)
    live_n = tiles.inside(y_n, x_n, key_height, key_width, False)[:, None]
    live_k, live_v = (d_k < D_K)[None, :], (d_v < D_V)[None, :]

    # Padded keys need no mask on the scores: their rows of dK and dV are never stored.
    k_block = tiles.load(key_ptr, batch, head, y_n, x_n, d_k, live_n, live_k, key_strides, 1)
    v_block = tiles.load(value_ptr, batch, head, y_n, x_n, d_v, live_n, live_v, value_strides, 1)
    m = tl.arange(0, BLOCK_M)
    y_m, x_m = m // QUERY_W, m % QUERY_W
    query_ptr = tiles.plane(query_ptr, batch, head, query_strides, QUERY_ALIGN)
    q_offsets = tiles.offsets(y_m, x_m, d_k, query_strides, QUERY_ALIGN)
    grad_out_ptr = tiles.plane(grad_out_ptr, batch, head, grad_out_strides, GRAD_OUT_ALIGN)
    do_offsets = tiles.offsets(y_m, x_m, d_v, grad_out_strides, GRAD_OUT_ALIGN)
    y_r, x_w = y_tile + tl.arange(0, ROWS), x_tile + tl.arange(0, BLOCK_W)
    live_r, live_w = (y_r < key_height)[:, None], (x_w < key_width)[:, None]
    row_offsets, col_offsets = None, None
    if row_logits_ptr is not None:
        row_logits_ptr = tiles.plane(row_logits_ptr, batch, head, row_logits_strides, ROW_LOGITS_ALIGN)
        row_offsets = tl.trans(tiles.offsets(y_m, x_m, y_r, row_logits_strides, ROW_LOGITS_ALIGN))
    if col_logits_ptr is not None:
        col_logits_ptr = tiles.plane(col_logits_ptr, batch, head, col_logits_strides, COL_LOGITS_ALIGN)
        col_offsets = tl.trans(tiles.offsets(y_m, x_m, x_w, col_logits_strides, COL_LOGITS_ALIGN))

    queries = query_height * query_width
    total = tiles.int64(queries) * planes
    dk = tl.zeros((BLOCK_N, BLOCK_DK), tl.float32)
    dv = tl.zeros((BLOCK_N, BLOCK_DV), tl.float32)
    for x0 in range(0, QUERY_W if ONE_STRIP else query_width, QUERY_W):
        for y0 in range(0, query_height, QUERY_ROWS):
            live_m = tiles.inside(y0 + y_m, x0 + x_m, query_height, query_width, EVEN_M)
            q_block = tiles.load_tile(query_ptr, q_offsets, y0, x0, live_m[:, None], live_k, query_strides, QUERY_ALIGN)
            do_block = tiles.load_tile(
                grad_out_ptr, do_offsets, y0, x0, live_m[:, None], live_v, grad_out_strides, GRAD_OUT_ALIGN
            )
            index = plane * queries + y0 * query_width + x0 + (y_m * query_width + x_m)
            maximum = tl.load(per_query_ptr + index, mask=live_m, other=float("inf"))
            delta = tl.load(per_query_ptr + total + index, mask=live_m, other=0.0)
            inverse_sum = tl.load(per_query_ptr + 2 * total + index, mask=live_m, other=0.0)

            s = tiles.scores(k_block, q_block, scale, ROWS, True, PRECISION)
            col_tile = tiles.tile(col_logits_ptr, col_offsets, y0, x0, col_logits_strides, COL_LOGITS_ALIGN)
            col_logits = tiles.axis_logits(col_tile, col_scale, live_m[None, :], live_w, False)
            row_tile = tiles.tile(row_logits_ptr, row_offsets, y0, x0, row_logits_strides, ROW_LOGITS_ALIGN)
            s = tiles.logits(s, col_logits, row_tile, row_scale, live_m[None, :], live_r, False, True)
            p = softmax_exp(s - maximum[None, None, :], EXACT) * inverse_sum[None, None, :]
            p = tl.reshape(p, (BLOCK_N, BLOCK_M))

            dp = tiles.dot(v_block, tl.trans(do_block), None, PRECISION)
            if seed_ptr is not None:
                key0 = tl.load(per_query_ptr + 3 * total + index, mask=live_m, other=0.0).to(tl.uint32, bitcast=True)
                key1 = tl.load(per_query_ptr + 4 * total + index, mask=live_m, other=0.0).to(tl.uint32, bitcast=True)
                keep = tiles.keep(key0[None, :], key1[None, :], (y_n * key_width + x_n)[:, None], threshold)
                dp = tiles.dropped(dp, keep, keep_scale)
                p_kept = tiles.dropped(p, keep, keep_scale)
                dv = tiles.dot(p_kept.to(do_block.dtype), do_block, dv, PRECISION)
            else:
                dv = tiles.dot(p.to(do_block.dtype), do_block, dv, PRECISION)
            ds = p * (dp - delta[None, :])
            dk = tiles.dot(ds.to(q_block.dtype), q_block, dk, PRECISION)

    tiles.store(grad_key_ptr, batch, head, y_n, x_n, d_k, grad_key_strides, dk * grad_scale, live_n & live_k)
    tiles.store(grad_value_ptr, batch, head, y_n, x_n, d_v, grad_value_strides, dv, live_n & live_v)
