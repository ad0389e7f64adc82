"""Triton kernels of the backward pass: dQ, dK and dV, the gradient of a free table.  See triton_kernels.py."""

import triton
import triton.language as tl

from .._floor.triton_math import softmax_exp
from . import triton_tiles as tiles


@triton.jit
def rel_attention_bwd_dq_kernel(
    grad_out_ptr,
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
    table_steps,
    prefix_key_strides,
    prefix_value_strides,
    out_strides,
    grad_query_strides,
    grad_row_logits_strides,
    grad_col_logits_strides,
    segment_sets,
    prefixes,
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
    DELTA_ONLY: tl.constexpr,
):
    """grad_query, the gradients of the row and column logits, and what the dK/dV pass needs to know of each query:
    per_query (5, B, heads, Hq, Wq), float32, is maximum and delta, inverse_sum, and the bits of both dropout keys if
    there is dropout.

    grad_row_logits is float32 where the keys are several column strips, which add to it one after another.
    Grid and ownership as in the forward kernel.

    delta, the mean over keys of the gradient of the weights, is rowsum(grad_out * out).  The rounding of ``out`` in it
    is amplified where the weights' gradients cancel; float32 sums it from the weights, in a DELTA_ONLY launch before,
    and divides by the sum of those same weights: ``inverse_sum`` is that of a sum which was rounded otherwise.
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
        delta, weight_sum = tl.zeros((BLOCK_M,), tl.float32), tl.zeros((BLOCK_M,), tl.float32)
    elif EXACT:
        delta = tl.load(per_query_ptr + total + index, mask=live_m, other=0.0)
    else:
        o_block = tiles.load(out_ptr, batch, head, y_m, x_m, d_v, live_m[:, None], live_v, out_strides, 1)
        delta = tl.sum(do_block.to(tl.float32) * o_block.to(tl.float32), 1)
        tl.store(per_query_ptr + total + index, delta, mask=live_m)
    tl.store(per_query_ptr + index, maximum, mask=live_m)
    tl.store(per_query_ptr + 2 * total + index, inverse_sum, mask=live_m)
    if key_segments_ptr is not None:
        # Where it is NaN, delta is too; but the gradients of keys that are hidden from the query are 0, and stay so.
        inverse_sum = tl.where(inverse_sum == inverse_sum, inverse_sum, 1.0)
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

    query_places, query_segment = None, None
    if table_ptr is not None:
        table_ptr += head * table_steps[0] + table_steps[1]
        inside_m = tl.minimum(m, queries - 1)
        query_places = inside_m // query_width * table_steps[2] + inside_m % query_width * table_steps[3]
    if key_segments_ptr is not None:
        segments_of = batch % segment_sets
        key_segments_ptr += segments_of * (key_height * key_width)
        query_segment = tiles.load_segments(query_segments_ptr, segments_of * queries + m, live_m, -2)

    dq = tl.zeros((BLOCK_M, BLOCK_DK), tl.float32)
    # Before the loop over the grid, which so holds no more registers than without prefix keys.
    if prefix_key_ptr is not None:
        for j0 in range(0, prefixes, BLOCK_P):
            j = j0 + tl.arange(0, BLOCK_P)
            live_j = j < prefixes
            k_block, v_block = tiles.load_prefix(
                prefix_key_ptr, prefix_value_ptr, batch, head, j, d_k, d_v, live_j[:, None], live_k, live_v,
                prefix_key_strides, prefix_value_strides,
            )  # fmt: skip
            s = tiles.dot(q_block, tl.trans(k_block), None, PRECISION) * scale
            s = tl.where(live_j[None, :], s, float("-inf"))
            p = softmax_exp(s - maximum[:, None], EXACT)
            dp = tiles.dot(do_block, tl.trans(v_block), None, PRECISION)
            if seed_ptr is not None:
                column = (key_height * key_width + j)[None, :]
                dp = tiles.dropped(dp, tiles.keep(key0[:, None], key1[:, None], column, threshold), keep_scale)
            if DELTA_ONLY:
                delta += tl.sum(p * dp, 1)
                weight_sum += tl.sum(p, 1)
            else:
                ds = (p * (dp - delta[:, None])).to(k_block.dtype)
                if EXACT:
                    dq += tiles.dot(ds, k_block, None, PRECISION) * inverse_sum[:, None]
                else:
                    dq = tiles.dot(ds, k_block, dq, PRECISION)
        if BLOCK_DK > 64:
            q_block = tiles.load_again(
                query_ptr, batch, head, y_m, x_m, d_k, live_m[:, None], live_k, query_strides, QUERY_ALIGN
            )
        if BLOCK_DV > 64:
            do_block = tiles.load_again(
                grad_out_ptr, batch, head, y_m, x_m, d_v, live_m[:, None], live_v, grad_out_strides, 1
            )
    for x0 in range(0, BLOCK_W if ONE_STRIP else key_width, BLOCK_W):
        if (row_logits_ptr is not None) and (not ONE_STRIP):
            tl.debug_barrier()  # what the strip before has written is read
        col_tile = tiles.along(col_ptrs, x0, col_logits_strides)
        live_w = (x0 + w < key_width)[None, :]
        col_logits = tiles.axis_logits(col_tile, col_scale, live_m[:, None], live_w, not EVEN_W)
        if col_logits_ptr is not None:
            d_col_logits = tl.zeros((BLOCK_M, BLOCK_W), tl.float32)
        for y0 in range(0, key_height, ROWS):
            y, x = y0 + y_n, x0 + x_n
            live_n = tiles.inside(y, x, key_height, key_width, EVEN_H and EVEN_W)[:, None]
            k_block = tiles.load_operand(
                key_ptr, k_offsets, y0, x0, y, x, key_height, key_width, d_k, live_k, key_strides, KEY_ALIGN,
                EVEN_H and EVEN_W,
            )  # fmt: skip
            v_block = tiles.load_tile(value_ptr, v_offsets, y0, x0, live_n, live_v, value_strides, VALUE_ALIGN)

            if table_ptr is not None:
                s = tiles.dot(q_block, tl.trans(k_block), None, PRECISION) * scale
                key_places = tiles.table_places(y, x, key_height, key_width, table_steps)
                bias_ptrs = table_ptr + (query_places[:, None] - key_places[None, :])
                if EVEN_H and EVEN_W:
                    s += tl.load(bias_ptrs).to(tl.float32)
                else:
                    s += tl.load(bias_ptrs, mask=tl.trans(live_n), other=float("-inf")).to(tl.float32)
            else:
                s = tiles.scores(q_block, k_block, scale, ROWS, False, PRECISION)
                row_tile = tiles.along(row_ptrs, y0, row_logits_strides)
                live_r = (y0 + r < key_height)[None, :]
                s = tiles.logits(s, col_logits, row_tile, row_scale, live_m[:, None], live_r, not EVEN_H, False)
            n_live = tiles.inside(y, x, key_height, key_width, EVEN_H and EVEN_W)
            key_segment = tiles.load_segments(key_segments_ptr, y * key_width + x, n_live, -1)
            same = tiles.same_segment(query_segment, key_segment)
            # Times inverse_sum: the sums over keys are multiplied by it.
            if table_ptr is not None:
                p = softmax_exp(s - maximum[:, None], EXACT)
            else:
                p = softmax_exp(s - maximum[:, None, None], EXACT)

            dp = tiles.dot(do_block, tl.trans(v_block), None, PRECISION)
            if seed_ptr is not None:
                keep = tiles.keep(key0[:, None], key1[:, None], (y * key_width + x)[None, :], threshold)
                dp = tiles.dropped(dp, keep, keep_scale)
            if DELTA_ONLY:
                p = tl.reshape(p, (BLOCK_M, BLOCK_N))
                delta += tl.sum(tiles.seen(p * dp, same, 0.0), 1)
                weight_sum += tl.sum(tiles.seen(p, same, 0.0), 1)
            else:
                if table_ptr is not None:
                    ds = p * (dp - delta[:, None])
                else:
                    ds = p * (tl.reshape(dp, (BLOCK_M, ROWS, BLOCK_W)) - delta[:, None, None])
                ds = tiles.seen(ds, same, 0.0)
                if col_logits_ptr is not None:
                    d_col_logits += tl.sum(ds, 1)
                if row_logits_ptr is not None:
                    d_row_logits = tl.sum(ds, 2) * (inverse_sum * grad_row_scale)[:, None]
                    row_tile = grad_row_ptrs + tiles.int64(y0) * grad_row_logits_strides[4]
                    row_mask = live_m[:, None] & live_r
                    if not ONE_STRIP:
                        d_row_logits += tl.load(row_tile, mask=row_mask & (x0 > 0), other=0.0)
                    tl.store(row_tile, d_row_logits.to(grad_row_ptrs.dtype.element_ty), mask=row_mask)
                ds = tl.reshape(ds, (BLOCK_M, BLOCK_N)).to(k_block.dtype)
                if EXACT:  # rounds less than one factor for all of the sum
                    dq += tiles.dot(ds, k_block, None, PRECISION) * inverse_sum[:, None]
                else:
                    dq = tiles.dot(ds, k_block, dq, PRECISION)
        if (col_logits_ptr is not None) and (not DELTA_ONLY):
            d_col_logits *= (inverse_sum * grad_col_scale)[:, None]
            shift = tiles.int64(x0) * grad_col_logits_strides[4]
            col_mask = live_m[:, None] & live_w
            tl.store(grad_col_ptrs + shift, d_col_logits.to(grad_col_ptrs.dtype.element_ty), mask=col_mask)

    if DELTA_ONLY:
        delta = tl.div_rn(delta, tl.where(weight_sum == 0.0, 1.0, weight_sum))
        tl.store(per_query_ptr + total + index, delta, mask=live_m)
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
    table_ptr,
    query_segments_ptr,
    key_segments_ptr,
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
    table_steps,
    grad_key_strides,
    grad_value_strides,
    segment_sets,
    first_key,
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
    key_places, key_segment = None, None
    if table_ptr is not None:
        table_ptr += head * table_steps[0] + table_steps[1]
        key_places = tiles.table_places(y_n, x_n, key_height, key_width, table_steps)
    if key_segments_ptr is not None:
        segments_of = batch % segment_sets
        query_segments_ptr += segments_of * queries
        key_segments_ptr += segments_of * (key_height * key_width)
        n_live = tiles.inside(y_n, x_n, key_height, key_width, False)
        key_segment = tiles.load_segments(key_segments_ptr, y_n * key_width + x_n, n_live, -1)
    column = y_n * key_width + x_n
    if first_key is not None:
        column += first_key
    total = tiles.int64(queries) * planes
    dk = tl.zeros((BLOCK_N, BLOCK_DK), tl.float32)
    dv = tl.zeros((BLOCK_N, BLOCK_DV), tl.float32)
    for x0 in range(0, QUERY_W if ONE_STRIP else query_width, QUERY_W):
        for y0 in range(0, query_height, QUERY_ROWS):
            live_m = tiles.inside(y0 + y_m, x0 + x_m, query_height, query_width, EVEN_M)
            q_block = tiles.load_operand(
                query_ptr, q_offsets, y0, x0, y0 + y_m, x0 + x_m, query_height, query_width, d_k, live_k, query_strides,
                QUERY_ALIGN, EVEN_M,
            )  # fmt: skip
            do_block = tiles.load_tile(
                grad_out_ptr, do_offsets, y0, x0, live_m[:, None], live_v, grad_out_strides, GRAD_OUT_ALIGN
            )
            index = plane * queries + y0 * query_width + x0 + (y_m * query_width + x_m)
            maximum = tl.load(per_query_ptr + index, mask=live_m, other=float("inf"))
            delta = tl.load(per_query_ptr + total + index, mask=live_m, other=0.0)
            inverse_sum = tl.load(per_query_ptr + 2 * total + index, mask=live_m, other=0.0)

            if table_ptr is not None:
                s = tiles.dot(k_block, tl.trans(q_block), None, PRECISION) * scale
                query_places = tiles.table_places(y0 + y_m, x0 + x_m, query_height, query_width, table_steps)
                s += tl.load(table_ptr + (query_places[None, :] - key_places[:, None])).to(tl.float32)
                p = softmax_exp(s - maximum[None, :], EXACT) * inverse_sum[None, :]
            else:
                s = tiles.scores(k_block, q_block, scale, ROWS, True, PRECISION)
                col_tile = tiles.tile(col_logits_ptr, col_offsets, y0, x0, col_logits_strides, COL_LOGITS_ALIGN)
                col_logits = tiles.axis_logits(col_tile, col_scale, live_m[None, :], live_w, False)
                row_tile = tiles.tile(row_logits_ptr, row_offsets, y0, x0, row_logits_strides, ROW_LOGITS_ALIGN)
                s = tiles.logits(s, col_logits, row_tile, row_scale, live_m[None, :], live_r, False, True)
                p = softmax_exp(s - maximum[None, None, :], EXACT) * inverse_sum[None, None, :]
                p = tl.reshape(p, (BLOCK_N, BLOCK_M))
            place = y0 * query_width + x0 + (y_m * query_width + x_m)
            query_segment = tiles.load_segments(query_segments_ptr, place, live_m, -2)
            same = tiles.same_segment(key_segment, query_segment)
            p = tiles.seen(p, same, 0.0)

            dp = tiles.dot(v_block, tl.trans(do_block), None, PRECISION)
            if seed_ptr is not None:
                key0 = tl.load(per_query_ptr + 3 * total + index, mask=live_m, other=0.0).to(tl.uint32, bitcast=True)
                key1 = tl.load(per_query_ptr + 4 * total + index, mask=live_m, other=0.0).to(tl.uint32, bitcast=True)
                keep = tiles.keep(key0[None, :], key1[None, :], column[:, None], threshold)
                dp = tiles.dropped(dp, keep, keep_scale)
                p_kept = tiles.dropped(p, keep, keep_scale)
                dv = tiles.dot(p_kept.to(do_block.dtype), do_block, dv, PRECISION)
            else:
                dv = tiles.dot(p.to(do_block.dtype), do_block, dv, PRECISION)
            ds = tiles.seen(p * (dp - delta[None, :]), same, 0.0)
            dk = tiles.dot(ds.to(q_block.dtype), q_block, dk, PRECISION)

    tiles.store(grad_key_ptr, batch, head, y_n, x_n, d_k, grad_key_strides, dk * grad_scale, live_n & live_k)
    tiles.store(grad_value_ptr, batch, head, y_n, x_n, d_v, grad_value_strides, dv, live_n & live_v)


@triton.jit
def rel_attention_bwd_table_kernel(
    grad_out_ptr,
    query_ptr,
    key_ptr,
    value_ptr,
    table_ptr,
    query_segments_ptr,
    key_segments_ptr,
    per_query_ptr,
    partial_ptr,
    seed_ptr,
    grad_out_strides,
    query_strides,
    key_strides,
    value_strides,
    table_steps,
    segment_sets,
    planes,
    batch,
    images,
    heads,
    query_height,
    query_width,
    key_height,
    key_width,
    scale,
    threshold,
    keep_scale,
    D_K: tl.constexpr,
    D_V: tl.constexpr,
    BLOCK_DK: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_W: tl.constexpr,
    QUERY_ALIGN: tl.constexpr,
    KEY_ALIGN: tl.constexpr,
    VALUE_ALIGN: tl.constexpr,
    GRAD_OUT_ALIGN: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """partial (splits, heads, tiles apart along the height, along the width, BLOCK, BLOCK), float32: the gradients of
    the logits of (queries, keys), summed over ``images`` images and over the pairs of tiles that lie so far apart.

    Tiles of queries and of keys are both ROWS x BLOCK_W; one program per element of the first four dimensions.  The
    biases of all pairs of tiles that it sees are the same.
    """
    BLOCK: tl.constexpr = ROWS * BLOCK_W
    EXACT: tl.constexpr = query_ptr.dtype.element_ty == tl.float32
    query_rows, key_rows = tl.cdiv(query_height, ROWS), tl.cdiv(key_height, ROWS)
    query_strips, key_strips = tl.cdiv(query_width, BLOCK_W), tl.cdiv(key_width, BLOCK_W)
    strips_apart, rows_apart = query_strips + key_strips - 1, query_rows + key_rows - 1
    program = tl.program_id(0)
    x_apart = program % strips_apart - (key_strips - 1)
    y_apart = program // strips_apart % rows_apart - (key_rows - 1)
    head = tiles.int64(program // (strips_apart * rows_apart) % heads)
    first_image = program // (strips_apart * rows_apart * heads) * images
    # Tiles of queries whose tile of keys is on the grid.
    first_y, first_x = tl.maximum(y_apart, 0), tl.maximum(x_apart, 0)
    pairs_x = tl.minimum(query_strips, key_strips + x_apart) - first_x
    pairs = (tl.minimum(query_rows, key_rows + y_apart) - first_y) * pairs_x

    m = tl.arange(0, BLOCK)
    y_m, x_m = m // BLOCK_W, m % BLOCK_W
    d_k, d_v = tl.arange(0, BLOCK_DK), tl.arange(0, BLOCK_DV)
    live_k, live_v = (d_k < D_K)[None, :], (d_v < D_V)[None, :]
    q_offsets = tiles.offsets(y_m, x_m, d_k, query_strides, QUERY_ALIGN)
    k_offsets = tiles.offsets(y_m, x_m, d_k, key_strides, KEY_ALIGN)
    v_offsets = tiles.offsets(y_m, x_m, d_v, value_strides, VALUE_ALIGN)
    do_offsets = tiles.offsets(y_m, x_m, d_v, grad_out_strides, GRAD_OUT_ALIGN)
    dy = y_apart * ROWS + y_m[:, None] - y_m[None, :]
    dx = x_apart * BLOCK_W + x_m[:, None] - x_m[None, :]
    in_table = (dy > -key_height) & (dy < query_height) & (dx > -key_width) & (dx < query_width)
    table_ptr += head * table_steps[0] + table_steps[1]
    biases = tl.load(table_ptr + (dy * table_steps[2] + dx * table_steps[3]), mask=in_table, other=0.0).to(tl.float32)

    queries = query_height * query_width
    total = tiles.int64(queries) * planes
    d_biases = tl.zeros((BLOCK, BLOCK), tl.float32)
    for i in range(0, (tl.minimum(first_image + images, batch) - first_image) * pairs):
        image = tiles.int64(first_image + i // pairs)
        y_tile, x_tile = first_y + i % pairs // pairs_x, first_x + i % pairs % pairs_x
        y0, x0 = y_tile * ROWS, x_tile * BLOCK_W
        key_y0, key_x0 = (y_tile - y_apart) * ROWS, (x_tile - x_apart) * BLOCK_W
        live_m = tiles.inside(y0 + y_m, x0 + x_m, query_height, query_width, False)
        live_n = tiles.inside(key_y0 + y_m, key_x0 + x_m, key_height, key_width, False)
        q_plane = tiles.plane(query_ptr, image, head, query_strides, QUERY_ALIGN)
        q_block = tiles.load_tile(q_plane, q_offsets, y0, x0, live_m[:, None], live_k, query_strides, QUERY_ALIGN)
        do_plane = tiles.plane(grad_out_ptr, image, head, grad_out_strides, GRAD_OUT_ALIGN)
        do_block = tiles.load_tile(
            do_plane, do_offsets, y0, x0, live_m[:, None], live_v, grad_out_strides, GRAD_OUT_ALIGN
        )
        k_plane = tiles.plane(key_ptr, image, head, key_strides, KEY_ALIGN)
        k_block = tiles.load_tile(k_plane, k_offsets, key_y0, key_x0, live_n[:, None], live_k, key_strides, KEY_ALIGN)
        v_plane = tiles.plane(value_ptr, image, head, value_strides, VALUE_ALIGN)
        v_block = tiles.load_tile(
            v_plane, v_offsets, key_y0, key_x0, live_n[:, None], live_v, value_strides, VALUE_ALIGN
        )
        place = (y0 + y_m) * query_width + x0 + x_m
        key_place = (key_y0 + y_m) * key_width + key_x0 + x_m
        index = (image * heads + head) * queries + place
        maximum = tl.load(per_query_ptr + index, mask=live_m, other=float("inf"))
        delta = tl.load(per_query_ptr + total + index, mask=live_m, other=0.0)
        inverse_sum = tl.load(per_query_ptr + 2 * total + index, mask=live_m, other=0.0)

        s = tiles.dot(q_block, tl.trans(k_block), None, PRECISION) * scale + biases
        p = softmax_exp(s - maximum[:, None], EXACT) * inverse_sum[:, None]
        dp = tiles.dot(do_block, tl.trans(v_block), None, PRECISION)
        if seed_ptr is not None:
            key0 = tl.load(per_query_ptr + 3 * total + index, mask=live_m, other=0.0).to(tl.uint32, bitcast=True)
            key1 = tl.load(per_query_ptr + 4 * total + index, mask=live_m, other=0.0).to(tl.uint32, bitcast=True)
            keep = tiles.keep(key0[:, None], key1[:, None], key_place[None, :], threshold)
            dp = tiles.dropped(dp, keep, keep_scale)
        seen = live_m[:, None] & live_n[None, :]
        if key_segments_ptr is not None:
            segments_of = image % segment_sets
            query_segment = tiles.load_segments(query_segments_ptr, segments_of * queries + place, live_m, -2)
            key_segment_index = segments_of * (key_height * key_width) + key_place
            key_segment = tiles.load_segments(key_segments_ptr, key_segment_index, live_n, -1)
            seen = tiles.same_segment(query_segment, key_segment)
        d_biases += tl.where(seen, p * (dp - delta[:, None]), 0.0)

    partial_ptr += tiles.int64(program) * (BLOCK * BLOCK)
    tl.store(partial_ptr + m[:, None] * BLOCK + m[None, :], d_biases)


@triton.jit
def rel_attention_bwd_table_fold_kernel(
    partial_ptr,
    grad_table_ptr,
    grad_table_steps,
    splits,
    heads,
    query_height,
    query_width,
    key_height,
    key_width,
    ROWS: tl.constexpr,
    BLOCK_W: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """grad_table, of the partial sums of the kernel above.

    Grid: heads * ceil(entries of a head / BLOCK_E) programs.  For an entry of the table, each query of a tile has one
    key, in the tile of keys that lies one certain number of tiles apart.
    """
    BLOCK: tl.constexpr = ROWS * BLOCK_W
    row_tiles, strips = tl.cdiv(key_height, ROWS), tl.cdiv(key_width, BLOCK_W)
    rows_apart = tl.cdiv(query_height, ROWS) + row_tiles - 1
    strips_apart = tl.cdiv(query_width, BLOCK_W) + strips - 1
    width = query_width + key_width - 1
    entries = (query_height + key_height - 1) * width
    programs = tl.cdiv(entries, BLOCK_E)
    head = tiles.int64(tl.program_id(0) // programs)
    entry = tl.program_id(0) % programs * BLOCK_E + tl.arange(0, BLOCK_E)
    dy, dx = entry // width - (key_height - 1), entry % width - (key_width - 1)
    m = tl.arange(0, BLOCK)
    # ROWS and BLOCK_W are powers of two: "&" is the remainder of negative numbers too.
    y_n = (m // BLOCK_W)[None, :] - dy[:, None] & ROWS - 1
    x_n = (m % BLOCK_W)[None, :] - dx[:, None] & BLOCK_W - 1
    # Divided without a remainder.
    y_apart = (dy[:, None] - (m // BLOCK_W)[None, :] + y_n) // ROWS + (row_tiles - 1)
    x_apart = (dx[:, None] - (m % BLOCK_W)[None, :] + x_n) // BLOCK_W + (strips - 1)
    live = (y_apart >= 0) & (y_apart < rows_apart) & (x_apart >= 0) & (x_apart < strips_apart)
    live &= (entry < entries)[:, None]
    tile = (head * rows_apart + y_apart) * strips_apart + x_apart
    partial_ptrs = partial_ptr + tile * (BLOCK * BLOCK) + m[None, :] * BLOCK + y_n * BLOCK_W + x_n
    split_stride = tiles.int64(heads) * rows_apart * strips_apart * (BLOCK * BLOCK)
    acc = tl.zeros((BLOCK_E, BLOCK), tl.float32)
    for split in range(0, splits):
        acc += tl.load(partial_ptrs + split * split_stride, mask=live, other=0.0)
    grad_table_ptrs = grad_table_ptr + head * grad_table_steps[0] + grad_table_steps[1]
    grad_table_ptrs += dy * grad_table_steps[2] + dx * grad_table_steps[3]
    tl.store(grad_table_ptrs, tl.sum(acc, 1).to(grad_table_ptr.dtype.element_ty), mask=entry < entries)
