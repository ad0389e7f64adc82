"""What the three Triton kernels share: tiles in memory, their logits, dropout, softmax statistics.

Where a function gives None it has no return: Triton 3.6 compiles no ``return None``.
"""

import triton
import triton.language as tl

from .._floor.triton_math import dot


@triton.jit
def int64(x):
    return tl.full((), 0, tl.int64) + x


@triton.jit
def plane(ptr, batch, head, strides, ALIGN: tl.constexpr):
    """Pointer to a (batch, head) plane.  ALIGN elements divide its address and every stride but that of the depth."""
    ptr += batch * strides[0] + head * strides[1]
    if ALIGN > 1:
        ptr = tl.multiple_of(ptr, ALIGN * (ptr.dtype.element_ty.primitive_bitwidth // 8))
    return ptr


@triton.jit
def offsets(y, x, depth, strides, ALIGN: tl.constexpr):
    """(positions, depth) offsets inside a plane."""
    positions = y.to(tl.int64) * strides[2] + x.to(tl.int64) * strides[3]
    if ALIGN > 1:
        positions = tl.multiple_of(positions, ALIGN)
    return positions[:, None] + (depth.to(tl.int64) * strides[4])[None, :]


@triton.jit
def _shift(y, x, strides, ALIGN: tl.constexpr):
    """Offset of the tile whose first position is (y, x)."""
    shift = int64(y) * strides[2] + int64(x) * strides[3]
    if ALIGN > 1:
        shift = tl.multiple_of(shift, ALIGN)
    return shift


@triton.jit
def pointers(ptr, batch, head, y, x, depth, strides, ALIGN: tl.constexpr):
    """(positions, depth) pointers into a (batch, head) plane."""
    return plane(ptr, batch, head, strides, ALIGN) + offsets(y, x, depth, strides, ALIGN)


@triton.jit
def load(ptr, batch, head, y, x, depth, live, live_depth, strides, ALIGN: tl.constexpr):
    """(positions, depth) block of a plane; 0 where masked."""
    return tl.load(pointers(ptr, batch, head, y, x, depth, strides, ALIGN), mask=live & live_depth, other=0.0)


@triton.jit
def load_again(ptr, batch, head, y, x, depth, live, live_depth, strides, ALIGN: tl.constexpr):
    """As ``load``, of a block that an earlier loop used: one load would keep the block for both loops in the layouts of
    both, which deep ones have no registers for.  Volatile, or the compiler makes one load of the two."""
    block_ptrs = pointers(ptr, batch, head, y, x, depth, strides, ALIGN)
    return tl.load(block_ptrs, mask=live & live_depth, other=0.0, volatile=True)


@triton.jit
def along(pointers, first, strides):
    """Pointers from ``first`` of the depth on, if any."""
    if pointers is not None:
        return pointers + int64(first) * strides[4]


@triton.jit
def tile(plane_ptr, offsets, y, x, strides, ALIGN: tl.constexpr):
    """Pointers, if any, to the tile whose first position is (y, x); ``offsets`` are those of every tile."""
    if plane_ptr is not None:
        return plane_ptr + _shift(y, x, strides, ALIGN) + offsets


@triton.jit
def load_tile(plane_ptr, offsets, y, x, live, live_depth, strides, ALIGN: tl.constexpr):
    """As ``load``, in loops."""
    return tl.load(tile(plane_ptr, offsets, y, x, strides, ALIGN), mask=live & live_depth, other=0.0)


@triton.jit
def load_operand(
    plane_ptr, offsets_of_tile, y0, x0, y, x, height, width, depth, live_depth, strides, ALIGN: tl.constexpr,
    EVEN: tl.constexpr,
):  # fmt: skip
    """As ``load_tile``, of a factor of the scores; where tiles do not divide the grid (not EVEN), positions past it
    repeat its edge.  A vector of zeros there would make NaN of an infinity, and no -inf that is added makes a logit of
    that again; what an element of the grid makes of it, the grid has itself.
    """
    if EVEN:
        return tl.load(tile(plane_ptr, offsets_of_tile, y0, x0, strides, ALIGN), mask=live_depth, other=0.0)
    else:
        edge = offsets(tl.minimum(y, height - 1), tl.minimum(x, width - 1), depth, strides, ALIGN)
        return tl.load(plane_ptr + edge, mask=live_depth, other=0.0)


@triton.jit
def load_prefix(
    key_ptr, value_ptr, batch, head, j, d_k, d_v, live, live_k, live_v, key_strides, value_strides
):  # fmt: skip
    """Prefix keys ``j`` and their values, which are a grid of one row: (positions, depth) blocks."""
    y = tl.zeros_like(j)
    k_block = load(key_ptr, batch, head, y, j, d_k, live, live_k, key_strides, 1)
    return k_block, load(value_ptr, batch, head, y, j, d_v, live, live_v, value_strides, 1)


@triton.jit
def store(ptr, batch, head, y, x, depth, strides, block, mask):
    """Write a (positions, depth) block to a plane."""
    tl.store(pointers(ptr, batch, head, y, x, depth, strides, 1), block.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def inside(y, x, height, width, EVEN: tl.constexpr):
    """Which positions lie on the grid; all where tiles divide it (EVEN)."""
    on_grid = (y < height) & (x < width)
    if EVEN:
        on_grid = tl.full(on_grid.shape, 1, tl.int1)
    return on_grid


@triton.jit
def own_queries(heads, queries, BLOCK_M: tl.constexpr):
    """The queries that this program owns: their plane of batch * heads, batch, head, and (BLOCK_M,) indices in it."""
    tiles = tl.cdiv(queries, BLOCK_M)
    plane = int64(tl.program_id(0) // tiles)
    return plane, plane // heads, plane % heads, (tl.program_id(0) % tiles) * BLOCK_M + tl.arange(0, BLOCK_M)


@triton.jit
def axis_logits(pointers, scale, live_m, live_n, PAD: tl.constexpr):
    """Row or column logits of a tile, (queries, keys of one axis) or transposed like the pointers and masks.  PAD: -inf
    where a key is past the grid.  Without pointers zeros, or None where nothing is to be padded."""
    past: tl.constexpr = float("-inf") if PAD else 0.0
    if pointers is not None:
        return tl.load(pointers, mask=live_m & live_n, other=past).to(tl.float32) * scale
    elif PAD:
        return tl.where(live_n, 0.0, past)


@triton.jit
def scores(left, right, scale, ROWS: tl.constexpr, KEYS_FIRST: tl.constexpr, PRECISION: tl.constexpr):
    """scale * q.k of a tile: (queries, rows, columns) from queries and keys; with KEYS_FIRST (rows, columns, queries)
    from keys and queries."""
    s = dot(left, tl.trans(right), None, PRECISION)
    if KEYS_FIRST:
        s = tl.reshape(s, (ROWS, s.shape[0] // ROWS, s.shape[1]))
    else:
        s = tl.reshape(s, (s.shape[0], ROWS, s.shape[1] // ROWS))
    return s * scale


@triton.jit
def logits(scores, col_logits, row_pointers, row_scale, live_m, live_r, PAD: tl.constexpr, KEYS_FIRST: tl.constexpr):
    """Logits of a tile: its scores, in their layout, with the terms there are.

    Row logits are read here, after the products: read before, they make some kernels take 30 registers more.
    """
    if col_logits is not None:
        scores += tl.expand_dims(col_logits, 0 if KEYS_FIRST else 1)
    row_logits = axis_logits(row_pointers, row_scale, live_m, live_r, PAD)
    if row_logits is not None:
        scores += tl.expand_dims(row_logits, 1 if KEYS_FIRST else 2)
    return scores


@triton.jit
def table_places(y, x, height, width, steps):
    """Of positions, int32 numbers such that those of a query less those of a key are the place of their bias in the
    head's table; past the grid, those of its edge: every place is in the table."""
    return tl.minimum(y, height - 1) * steps[2] + tl.minimum(x, width - 1) * steps[3]


@triton.jit
def load_segments(ptr, index, live, NONE: tl.constexpr):
    """Segments at ``index``; NONE for negative ones and those that are not ``live``."""
    if ptr is not None:
        segment = tl.load(ptr + index, mask=live, other=-1)
        return tl.where(segment < 0, NONE, segment)


@triton.jit
def same_segment(left, right):
    """Which of ``left`` (axis 0) and ``right`` (axis 1) see each other, if there are segments."""
    if left is not None:
        return left[:, None] == right[None, :]


@triton.jit
def seen(x, same, other: tl.constexpr):
    """``x``, but ``other`` where a key is hidden from a query, whatever is there."""
    if same is None:
        return x
    else:
        return tl.where(tl.reshape(same, x.shape), x, other)


@triton.jit
def row_keys(seed_ptr, row):
    """Two 32-bit keys for every int64 ``row`` of the dropout mask: fused_attn/ops/_floor/dropout.py, bit for bit."""
    z = tl.load(seed_ptr).to(tl.uint64, bitcast=True)
    z = z + (row + 1).to(tl.uint64, bitcast=True) * 0x9E3779B97F4A7C15
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB
    z = z ^ (z >> 31)
    return z.to(tl.uint32), (z >> 32).to(tl.uint32)


@triton.jit
def keep(key0, key1, column, threshold):
    """Dropout mask of row keys against int32 ``column`` indices, broadcast."""
    x = column.to(tl.uint32, bitcast=True) * tl.full((), 0x9E3779B1, tl.uint32) + key0
    x = (x ^ (x >> 16)) * tl.full((), 0x21F0AAAD, tl.uint32)
    x = x ^ (x >> 15) ^ key1
    x = x * tl.full((), 0x735A2D97, tl.uint32)
    x = x ^ (x >> 15)
    return x >= int64(threshold).to(tl.uint32)


@triton.jit
def dropped(x, keep, keep_scale):
    """Dropout of weights, or of their gradient."""
    return tl.where(keep, x * keep_scale, 0.0)


@triton.jit
def load_statistics(statistics_ptr, query, live):
    """(maximum, inverse_sum) such that a softmax weight is e**(logit - maximum) * inverse_sum; 0 for a masked query.

    Two numbers, not a log-sum-exp: its rounding error would be that of a whole row of float32 weights, and the sum
    would vanish in it beside a large maximum (a query with every key at -1e9).
    """
    maximum = tl.load(statistics_ptr + 2 * query, mask=live, other=0.0)
    total = tl.load(statistics_ptr + 2 * query + 1, mask=live, other=0.0)
    return tl.where(total == 0.0, float("inf"), maximum), tl.where(total == 0.0, 0.0, tl.div_rn(1.0, total))
