"""Triton kernels of attention over layers: the weights, the weighted sum, and the backward pass of both.

Values come as a tuple of pointers, one per layer, in buckets of 1, 2, 4, ... 32: entries past the run-time number
``layers`` repeat a pointer and are masked off, which moves no memory.  More layers come in several launches, the layers
``[first, first + layers)`` of ``all_layers`` in each; the later ones add to what is there.

An image is a matrix of ``rows`` by ``columns`` elements, dense.  Channels first, a row is a group's channels and
positions, and has one weight (ROW_WEIGHTS).  Channels last, a row is a position and a column a channel, which has the
weight of its group of ``per_group`` channels.

No atomics: sums of grad_out * value leave every program as one partial per row or column, and the kernel of the heads
adds them in a fixed order.
"""

import triton
import triton.language as tl

from .._floor.triton_math import exp_nonpositive, reciprocal

# A value of its own for every one of these would compile the kernels again for every number of layers.
_LAYER_COUNTS = ["layers", "first", "all_layers"]


@triton.jit
def _tile(rows, columns, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """This program's image (64 bits), tile indices, row and column numbers, start in the image, offsets from there."""
    column_tiles = tl.cdiv(columns, COLUMNS)
    row_tiles = tl.cdiv(rows, ROWS)
    program = tl.program_id(0)
    column_tile = program % column_tiles
    row_tile = program // column_tiles % row_tiles
    image = (program // column_tiles // row_tiles).to(tl.int64)
    lanes = tl.arange(0, ROWS)
    row = row_tile * ROWS + lanes
    column = column_tile * COLUMNS + tl.arange(0, COLUMNS)
    start = (row_tile * ROWS).to(tl.int64) * columns
    return image, row_tile, column_tile, row, column, start, lanes[:, None] * columns + column[None, :]


@triton.jit(do_not_specialize=_LAYER_COUNTS)
def layer_sum_fwd_kernel(
    value_ptrs,
    weights_ptr,
    out_ptr,
    value_strides,
    rows,
    columns,
    groups,
    per_group,
    layers,
    first,
    all_layers,
    ROW_WEIGHTS: tl.constexpr,
    ADD: tl.constexpr,
    LAYERS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """One tile of out = sum over layers of weight * value, or of what is to be added to it."""
    image, _, _, row, column, start, offsets = _tile(rows, columns, ROWS, COLUMNS)
    live = (row < rows)[:, None] & (column < columns)[None, :]
    if ROW_WEIGHTS:
        weight_ptrs = weights_ptr + (image * groups + row) * all_layers + first
        index, indices = row, rows
    else:
        weight_ptrs = weights_ptr + (image * groups + column // per_group) * all_layers + first
        index, indices = column, columns
    out_ptrs = out_ptr + image * rows * columns + start + offsets

    if ADD:  # noqa: SIM108 - a constexpr flag chooses the code
        acc = tl.load(out_ptrs, mask=live, other=0.0).to(tl.float32)
    else:
        acc = tl.zeros((ROWS, COLUMNS), tl.float32)
    for layer in tl.static_range(LAYERS):
        there = live & (row < tl.where(layers > layer, rows, 0))[:, None]
        live_weight = index < tl.where(layers > layer, indices, 0)
        weight = tl.load(weight_ptrs + layer, mask=live_weight, other=0.0)
        value_ptr = value_ptrs[layer] + image * value_strides[layer] + start
        value = tl.load(value_ptr + offsets, mask=there, other=0.0).to(tl.float32)
        if ROW_WEIGHTS:
            acc += weight[:, None] * value
        else:
            acc += weight[None, :] * value
    tl.store(out_ptrs, acc.to(out_ptr.dtype.element_ty), mask=live)


@triton.jit(do_not_specialize=_LAYER_COUNTS)
def layer_sum_bwd_kernel(
    grad_out_ptr,
    value_ptrs,
    weights_ptr,
    grad_value_ptrs,
    partials_ptr,
    grad_out_stride,
    value_strides,
    rows,
    columns,
    groups,
    per_group,
    layers,
    first,
    all_layers,
    ROW_WEIGHTS: tl.constexpr,
    ADD: tl.constexpr,
    LAYERS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """One tile of every grad_value = weight * grad_out (added to it if ADD), and its sums of grad_out * value.

    grad_out is read once and stays in registers while the layers pass by.  ``partials`` is (images, column tiles,
    all_layers, groups) with ROW_WEIGHTS, else (images, row tiles, all_layers, channels).
    """
    image, row_tile, column_tile, row, column, start, offsets = _tile(rows, columns, ROWS, COLUMNS)
    live = (row < rows)[:, None] & (column < columns)[None, :]
    if ROW_WEIGHTS:
        weight_ptrs = weights_ptr + (image * groups + row) * all_layers + first
        index, indices = row, rows
        part = image * tl.cdiv(columns, COLUMNS) + column_tile
        partial_ptrs, width = partials_ptr + (part * all_layers + first) * rows + row, rows
    else:
        weight_ptrs = weights_ptr + (image * groups + column // per_group) * all_layers + first
        index, indices = column, columns
        part = image * tl.cdiv(rows, ROWS) + row_tile
        partial_ptrs, width = partials_ptr + (part * all_layers + first) * columns + column, columns

    grad = tl.load(grad_out_ptr + image * grad_out_stride + start + offsets, mask=live, other=0.0).to(tl.float32)
    grad_start = image * rows * columns + start
    for layer in tl.static_range(LAYERS):
        there = live & (row < tl.where(layers > layer, rows, 0))[:, None]
        live_weight = index < tl.where(layers > layer, indices, 0)
        weight = tl.load(weight_ptrs + layer, mask=live_weight, other=0.0)
        value_ptr = value_ptrs[layer] + image * value_strides[layer] + start
        value = tl.load(value_ptr + offsets, mask=there, other=0.0).to(tl.float32)
        if ROW_WEIGHTS:
            grad_value = weight[:, None] * grad
            partial = tl.sum(grad * value, axis=1)
        else:
            grad_value = weight[None, :] * grad
            partial = tl.sum(grad * value, axis=0)
        tl.store(partial_ptrs + layer * width, partial, mask=live_weight)
        grad_ptr = grad_value_ptrs[layer] + grad_start
        if ADD:
            grad_value += tl.load(grad_ptr + offsets, mask=there, other=0.0).to(tl.float32)
        tl.store(grad_ptr + offsets, grad_value.to(grad_ptr.dtype.element_ty), mask=there)


@triton.jit(do_not_specialize=_LAYER_COUNTS)
def layer_weights_fwd_kernel(
    query_ptr,
    key_ptrs,
    bias_ptr,
    weights_ptr,
    query_strides,
    bias_strides,
    scale,
    groups,
    depth,
    layers,
    first,
    all_layers,
    SIGMOID: tl.constexpr,
    FIRST: tl.constexpr,
    LAST: tl.constexpr,
    LAYERS: tl.constexpr,
    BLOCK_L: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """The weights of one head (image and group); its scores so far until the LAST launch.  Keys are contiguous."""
    head = tl.program_id(0).to(tl.int64)
    image, group = head // groups, head % groups
    lanes = tl.arange(0, BLOCK_L)
    chunk = (lanes >= first) & (lanes < first + layers)
    weight_ptrs = weights_ptr + head * all_layers + lanes

    query_ptr += image * query_strides[0] + group * query_strides[1]
    dots = tl.zeros((BLOCK_L,), tl.float32)
    for start in range(0, depth, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)
        query = tl.load(query_ptr + d.to(tl.int64) * query_strides[2], mask=d < depth, other=0.0).to(tl.float32)
        for layer in tl.static_range(LAYERS):
            key_ptr = key_ptrs[layer] + head * depth
            key = tl.load(key_ptr + d, mask=d < tl.where(layers > layer, depth, 0), other=0.0).to(tl.float32)
            dots += tl.where(lanes == first + layer, tl.sum(query * key), 0.0)

    scores = scale * dots
    if bias_ptr is not None:
        bias_ptrs = bias_ptr + lanes.to(tl.int64) * bias_strides[0] + group * bias_strides[1]
        scores += tl.load(bias_ptrs, mask=chunk, other=0.0).to(tl.float32)
    if not FIRST:
        scores = tl.where(chunk, scores, tl.load(weight_ptrs, mask=lanes < first, other=0.0))
    live = lanes < first + layers
    if LAST:
        if SIGMOID:
            small = exp_nonpositive(-tl.abs(scores))
            scores = tl.where(scores < 0.0, small, 1.0) * reciprocal(1.0 + small)
        else:
            scores = tl.where(live, scores, float("-inf"))
            weights = tl.where(live, exp_nonpositive(scores - tl.max(scores)), 0.0)
            scores = weights * reciprocal(tl.sum(weights))
    tl.store(weight_ptrs, scores, mask=live)


@triton.jit(do_not_specialize=_LAYER_COUNTS)
def layer_heads_bwd_kernel(
    partials_ptr,
    weights_ptr,
    grad_weights_ptr,
    query_ptr,
    key_ptrs,
    grad_query_ptr,
    grad_key_ptrs,
    query_strides,
    scale,
    groups,
    depth,
    parts,
    span,
    layers,
    first,
    all_layers,
    GIVEN: tl.constexpr,
    SIGMOID: tl.constexpr,
    FIRST: tl.constexpr,
    LAYERS: tl.constexpr,
    BLOCK_L: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """The small gradients of one head: of its weights if they were GIVEN, else of its scores, query and keys.

    The FIRST launch adds up the partials, ``span`` side by side in each of ``parts``, and writes ``grad_weights``,
    which receives the gradient of the scores unless GIVEN.
    """
    head = tl.program_id(0).to(tl.int64)
    image, group = head // groups, head % groups
    lanes = tl.arange(0, BLOCK_L)
    live = lanes < all_layers
    grad_weight_ptrs = grad_weights_ptr + head * all_layers + lanes

    if FIRST:
        sums = tl.zeros((BLOCK_L, BLOCK_P), tl.float32)
        for begin in range(0, parts * span, BLOCK_P):
            i = begin + tl.arange(0, BLOCK_P)
            slot = (image * parts + i // span)[None, :] * all_layers + lanes[:, None]
            partial_ptrs = partials_ptr + slot * (groups * span) + (group * span + i % span)[None, :]
            sums += tl.load(partial_ptrs, mask=live[:, None] & (i < parts * span)[None, :], other=0.0)
        grad = tl.sum(sums, axis=1)
        if not GIVEN:
            weight = tl.load(weights_ptr + head * all_layers + lanes, mask=live, other=0.0)
            if SIGMOID:
                grad = weight * (1.0 - weight) * grad
            else:
                # Twice: weights do not sum to exactly 1, and where one is near 1 the difference is small.
                grad -= tl.sum(weight * grad)
                grad = weight * (grad - tl.sum(weight * grad))
            grad = tl.where(live, grad, 0.0)
        tl.store(grad_weight_ptrs, grad.to(grad_weights_ptr.dtype.element_ty), mask=live)
    else:
        grad = tl.load(grad_weight_ptrs, mask=live, other=0.0)

    if not GIVEN:
        query_ptr += image * query_strides[0] + group * query_strides[1]
        for start in range(0, depth, BLOCK_D):
            d = start + tl.arange(0, BLOCK_D)
            query = tl.load(query_ptr + d.to(tl.int64) * query_strides[2], mask=d < depth, other=0.0).to(tl.float32)
            grad_query_ptrs = grad_query_ptr + head * depth + d
            if FIRST:
                grad_query = tl.zeros((BLOCK_D,), tl.float32)
            else:
                grad_query = tl.load(grad_query_ptrs, mask=d < depth, other=0.0).to(tl.float32)
            for layer in tl.static_range(LAYERS):
                there = d < tl.where(layers > layer, depth, 0)
                grad_score = scale * tl.sum(tl.where(lanes == first + layer, grad, 0.0))
                key = tl.load(key_ptrs[layer] + head * depth + d, mask=there, other=0.0).to(tl.float32)
                grad_query += grad_score * key
                grad_key_ptr = grad_key_ptrs[layer] + head * depth
                tl.store(grad_key_ptr + d, (grad_score * query).to(grad_key_ptr.dtype.element_ty), mask=there)
            tl.store(grad_query_ptrs, grad_query.to(grad_query_ptr.dtype.element_ty), mask=d < depth)
