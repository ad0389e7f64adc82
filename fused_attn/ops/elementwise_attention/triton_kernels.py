"""Triton kernels of row/column softmax and element-wise attention.

A program owns a tile of ROWS rows of one plane (image, head, channel) and walks along them COLUMNS columns at a time;
WHOLE says that the tile is the whole plane.  x is indexed by (image, channel, y, x) strides, weights by (head, channel,
y, x), gradients of the output by (image, head, channel, y, x); outputs are contiguous.  Addresses are 64-bit.

Without weights, ``factor`` (None: 1) makes logits of x, ``row_mask`` (image, y) and ``col_mask`` (image, x) say what
takes part, and LOG asks for the logarithm.

No atomics: every element is written once.  Column statistics, sums and moments of a tile go to memory, and
the kernels of triton_fold_kernels.py add them up in a fixed order.
"""

import triton
import triton.language as tl

from .._floor.triton_math import reciprocal, softmax_exp


@triton.jit
def _int64(x):
    return tl.full((), 0, tl.int64) + x


@triton.jit
def _tile(plane_ptr, y, x, y_stride, x_stride, inside):
    """A tile of a plane in float32, 0 outside."""
    offsets = y.to(tl.int64)[:, None] * y_stride + x.to(tl.int64)[None, :] * x_stride
    return tl.load(plane_ptr + offsets, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _kept(row_mask_ptr, col_mask_ptr, image, y, x, height, width, inside):
    """What of a tile takes part."""
    if row_mask_ptr is not None:
        inside = inside & (tl.load(row_mask_ptr + image * height + y, mask=y < height, other=0) != 0)[:, None]
    if col_mask_ptr is not None:
        inside = inside & (tl.load(col_mask_ptr + image * width + x, mask=x < width, other=0) != 0)[None, :]
    return inside


@triton.jit
def _where_kept(kept, value, row_mask_ptr, col_mask_ptr, LOG: tl.constexpr):
    """A tile of the output, or of the gradient of logits, where it takes part."""
    if (row_mask_ptr is not None) or (col_mask_ptr is not None):
        value = tl.where(kept, value, float("-inf") if LOG else 0.0)
    return value


@triton.jit
def _settled(mask_ptr, image, i, size, maximum, total):
    """Statistics of rows or columns, those that take no part with a sum that exponentials of 0 can be divided by."""
    if mask_ptr is not None:
        kept = tl.load(mask_ptr + image * size + i, mask=i < size, other=0) != 0
        maximum, total = tl.where(kept, maximum, 0.0), tl.where(kept, total, 1.0)
    return maximum, total


@triton.jit
def _inputs(x_ptr, row_ptr, col_ptr, factor, x_strides, row_strides, col_strides, image, head, channel, y, x, inside):
    """Values, weights and row and column logits of a tile; logits are -inf outside.  Where the op has no weights, those
    returned are not to be read."""
    value = _tile(x_ptr + image * x_strides[0] + channel * x_strides[1], y, x, x_strides[2], x_strides[3], inside)
    if row_ptr is not None:
        row = row_ptr + head * row_strides[0] + channel * row_strides[1]
        col = col_ptr + head * col_strides[0] + channel * col_strides[1]
        weight_row = _tile(row, y, x, row_strides[2], row_strides[3], inside)
        weight_col = _tile(col, y, x, col_strides[2], col_strides[3], inside)
        row_logit = tl.where(inside, value * weight_row, float("-inf"))
        col_logit = tl.where(inside, value * weight_col, float("-inf"))
    else:
        weight_row, weight_col = value, value
        logit = value
        if factor is not None:
            logit = value * factor
        row_logit = tl.where(inside, logit, float("-inf"))
        col_logit = row_logit
    return value, weight_row, weight_col, row_logit, col_logit


@triton.jit
def _finite(maximum):
    """What to subtract: 0 where every logit so far is -inf, whose sum then stays 0."""
    return tl.where(maximum == float("-inf"), 0.0, maximum)


@triton.jit
def _statistics(row_stats_ptr, col_stats_ptr, plane, y, x, height, width):
    """Maximum and sum of the rows of a tile, and of its columns."""
    rows, cols = row_stats_ptr + plane * 2 * height + y, col_stats_ptr + plane * 2 * width + x
    row_max = tl.load(rows, mask=y < height, other=0.0)
    row_sum = tl.load(rows + height, mask=y < height, other=1.0)
    col_max = tl.load(cols, mask=x < width, other=0.0)
    col_sum = tl.load(cols + width, mask=x < width, other=1.0)
    return row_max[:, None], row_sum[:, None], col_max[None, :], col_sum[None, :]


@triton.jit
def _softmaxes(row_logit, col_logit, row_stats_ptr, col_stats_ptr, plane, y, x, height, width, EXACT: tl.constexpr):
    """Row and column softmax of a tile from the statistics."""
    row_max, row_sum, col_max, col_sum = _statistics(row_stats_ptr, col_stats_ptr, plane, y, x, height, width)
    row = softmax_exp(row_logit - row_max, EXACT) * reciprocal(row_sum, EXACT)
    return row, softmax_exp(col_logit - col_max, EXACT) * reciprocal(col_sum, EXACT)


@triton.jit
def _product(
    row_logit, col_logit, row_stats_ptr, col_stats_ptr, plane, y, x, height, width, EXACT: tl.constexpr,
    LOG: tl.constexpr = False,
):  # fmt: skip
    """Product of the row and the column softmax of a tile, with one exponential, or its logarithm."""
    row_max, row_sum, col_max, col_sum = _statistics(row_stats_ptr, col_stats_ptr, plane, y, x, height, width)
    if LOG:
        return (row_logit - row_max - tl.log(row_sum)) + (col_logit - col_max - tl.log(col_sum))
    both = softmax_exp((row_logit - row_max) + (col_logit - col_max), EXACT)
    return both * reciprocal(row_sum, EXACT) * reciprocal(col_sum, EXACT)


@triton.jit
def _position(chunks, heads, channels):
    """chunk, plane, image, head and channel of a program; chunks vary fastest."""
    pid = tl.program_id(0)
    plane = _int64(pid // chunks)
    return pid % chunks, plane, plane // channels // heads, plane // channels % heads, plane % channels


@triton.jit
def _add_moments(product, inside, shift, first, second):
    """Sums of (product - shift) and of its square, lane by lane."""
    d = tl.where(inside, product - shift, 0.0)
    return first + tl.sum(d, 1), second + tl.sum(d * d, 1)


@triton.jit
def row_col_stats_kernel(
    x_ptr, row_ptr, col_ptr, row_mask_ptr, col_mask_ptr, out_ptr, row_stats_ptr, col_stats_ptr, moments_ptr, factor,
    x_strides, row_strides, col_strides, planes, heads, channels, height, width, chunks, shift,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, WHOLE: tl.constexpr, LOG: tl.constexpr,
):  # fmt: skip
    """Statistics of the rows of a tile, and of its columns.

    WHOLE: the columns are finished; ``out`` or ``moments`` (plane, 2) are written where they are not None.  Otherwise
    ``col_stats`` is (chunk, plane, 2, width) and holds maximum and sum of the tile, not settled.
    """
    EXACT: tl.constexpr = x_ptr.dtype.element_ty == tl.float32
    chunk, plane, image, head, channel = _position(chunks, heads, channels)
    y = chunk * ROWS + tl.arange(0, ROWS)
    row_max = tl.full((ROWS,), float("-inf"), tl.float32)
    row_sum = tl.zeros((ROWS,), tl.float32)
    cols = col_stats_ptr + (_int64(chunk) * planes + plane) * 2 * width
    rows = row_stats_ptr + plane * 2 * height + y
    for start in tl.range(0, width, COLUMNS):
        x = start + tl.arange(0, COLUMNS)
        inside = (y < height)[:, None] & (x < width)[None, :]
        kept = _kept(row_mask_ptr, col_mask_ptr, image, y, x, height, width, inside)
        _, _, _, row_logit, col_logit = _inputs(
            x_ptr, row_ptr, col_ptr, factor, x_strides, row_strides, col_strides, image, head, channel, y, x, kept
        )
        new_max = tl.maximum(row_max, tl.max(row_logit, 1))
        e_row = softmax_exp(row_logit - _finite(new_max)[:, None], EXACT)
        row_sum = row_sum * softmax_exp(row_max - _finite(new_max), EXACT) + tl.sum(e_row, 1)
        row_max = new_max
        col_max = tl.max(col_logit, 0)
        e_col = softmax_exp(col_logit - _finite(col_max)[None, :], EXACT)
        col_sum = tl.sum(e_col, 0)
        if WHOLE:
            col_max, col_sum = _settled(col_mask_ptr, image, x, width, col_max, col_sum)
        tl.store(cols + x, col_max, mask=x < width)
        tl.store(cols + width + x, col_sum, mask=x < width)
        if WHOLE:
            # One tile to the plane.  A row or column of -inf alone has a sum of 0: 0 / 0, as in the reference.
            if LOG:
                product = row_logit - row_max[:, None] - tl.log(row_sum)[:, None]
                product += col_logit - col_max[None, :] - tl.log(col_sum)[None, :]
            else:
                product = e_row * reciprocal(row_sum, EXACT)[:, None] * (e_col * reciprocal(col_sum, EXACT)[None, :])
            product = _where_kept(kept, product, row_mask_ptr, col_mask_ptr, LOG)
            if out_ptr is not None:
                at = plane * height * width + y.to(tl.int64)[:, None] * width + x[None, :]
                tl.store(out_ptr + at, product.to(out_ptr.dtype.element_ty), mask=inside)
            if moments_ptr is not None:
                zero = tl.zeros((ROWS,), tl.float32)
                first, second = _add_moments(product, inside, shift, zero, zero)
                tl.store(moments_ptr + plane * 2, tl.sum(first, 0))
                tl.store(moments_ptr + plane * 2 + 1, tl.sum(second, 0))
    row_max, row_sum = _settled(row_mask_ptr, image, y, height, row_max, row_sum)
    tl.store(rows, row_max, mask=y < height)
    tl.store(rows + height, row_sum, mask=y < height)


@triton.jit
def row_col_moments_kernel(
    x_ptr, row_ptr, col_ptr, row_stats_ptr, col_stats_ptr, moments_ptr,
    x_strides, row_strides, col_strides, heads, channels, height, width, chunks, shift,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Moments (plane, chunk, 2) of the product, for planes of several tiles."""
    EXACT: tl.constexpr = x_ptr.dtype.element_ty == tl.float32
    chunk, plane, image, head, channel = _position(chunks, heads, channels)
    y = chunk * ROWS + tl.arange(0, ROWS)
    first, second = tl.zeros((ROWS,), tl.float32), tl.zeros((ROWS,), tl.float32)
    for start in tl.range(0, width, COLUMNS):
        x = start + tl.arange(0, COLUMNS)
        inside = (y < height)[:, None] & (x < width)[None, :]
        _, _, _, row_logit, col_logit = _inputs(
            x_ptr, row_ptr, col_ptr, None, x_strides, row_strides, col_strides, image, head, channel, y, x, inside
        )
        product = _product(row_logit, col_logit, row_stats_ptr, col_stats_ptr, plane, y, x, height, width, EXACT)
        first, second = _add_moments(product, inside, shift, first, second)
    at = moments_ptr + (plane * chunks + chunk) * 2
    tl.store(at, tl.sum(first, 0))
    tl.store(at + 1, tl.sum(second, 0))


@triton.jit
def row_col_output_kernel(
    x_ptr, row_ptr, col_ptr, row_mask_ptr, col_mask_ptr, out_ptr, row_stats_ptr, col_stats_ptr, mean_ptr, scale_ptr,
    factor,
    x_strides, row_strides, col_strides, heads, channels, height, width, chunks,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, LOG: tl.constexpr,
):  # fmt: skip
    """The product of the softmaxes; normalised and times x where there is a mean."""
    EXACT: tl.constexpr = x_ptr.dtype.element_ty == tl.float32
    chunk, plane, image, head, channel = _position(chunks, heads, channels)
    y = chunk * ROWS + tl.arange(0, ROWS)
    for start in tl.range(0, width, COLUMNS):
        x = start + tl.arange(0, COLUMNS)
        inside = (y < height)[:, None] & (x < width)[None, :]
        kept = _kept(row_mask_ptr, col_mask_ptr, image, y, x, height, width, inside)
        value, _, _, row_logit, col_logit = _inputs(
            x_ptr, row_ptr, col_ptr, factor, x_strides, row_strides, col_strides, image, head, channel, y, x, kept
        )
        out = _product(row_logit, col_logit, row_stats_ptr, col_stats_ptr, plane, y, x, height, width, EXACT, LOG)
        out = _where_kept(kept, out, row_mask_ptr, col_mask_ptr, LOG)
        if mean_ptr is not None:
            at = head * channels + channel
            out = (out - tl.load(mean_ptr + at)) * tl.load(scale_ptr + at) * value
        offsets = plane * height * width + y.to(tl.int64)[:, None] * width + x[None, :]
        tl.store(out_ptr + offsets, out.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _grad_out(ptr, strides, image, head, channel, y, x, inside):
    plane = ptr + image * strides[0] + head * strides[1] + channel * strides[2]
    return _tile(plane, y, x, strides[3], strides[4], inside)


@triton.jit
def row_col_grad_moments_kernel(
    grad_out_ptr, x_ptr, row_ptr, col_ptr, row_stats_ptr, col_stats_ptr, mean_ptr, moments_ptr,
    grad_out_strides, x_strides, row_strides, col_strides, heads, channels, height, width, chunks,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Moments (plane, chunk, 2): sums of grad_out * x and of grad_out * x * (product - mean)."""
    EXACT: tl.constexpr = x_ptr.dtype.element_ty == tl.float32
    chunk, plane, image, head, channel = _position(chunks, heads, channels)
    y = chunk * ROWS + tl.arange(0, ROWS)
    mean = tl.load(mean_ptr + head * channels + channel)
    first = tl.zeros((ROWS, COLUMNS), tl.float32)
    second = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in tl.range(0, width, COLUMNS):
        x = start + tl.arange(0, COLUMNS)
        inside = (y < height)[:, None] & (x < width)[None, :]
        value, _, _, row_logit, col_logit = _inputs(
            x_ptr, row_ptr, col_ptr, None, x_strides, row_strides, col_strides, image, head, channel, y, x, inside
        )
        product = _product(row_logit, col_logit, row_stats_ptr, col_stats_ptr, plane, y, x, height, width, EXACT)
        d = value * _grad_out(grad_out_ptr, grad_out_strides, image, head, channel, y, x, inside)
        first += d
        second += tl.where(inside, d * (product - mean), 0.0)
    at = moments_ptr + (plane * chunks + chunk) * 2
    tl.store(at, tl.sum(tl.sum(first, 1), 0))
    tl.store(at + 1, tl.sum(tl.sum(second, 1), 0))


@triton.jit
def _grad_product(grad, value, product, mean_ptr, scale_ptr, grad_mean_ptr, grad_var_ptr, at):
    """Gradient of the product of the softmaxes."""
    if mean_ptr is not None:
        centred = product - tl.load(mean_ptr + at)
        towards = grad * value - tl.load(grad_mean_ptr + at) - centred * tl.load(grad_var_ptr + at)
        return tl.load(scale_ptr + at) * towards
    else:
        return grad


@triton.jit
def row_col_sums_kernel(
    grad_out_ptr, x_ptr, row_ptr, col_ptr, row_mask_ptr, col_mask_ptr, row_stats_ptr, col_stats_ptr, mean_ptr,
    scale_ptr, grad_mean_ptr, grad_var_ptr, row_sums_ptr, col_sums_ptr, factor,
    grad_out_strides, x_strides, row_strides, col_strides, planes, heads, channels, height, width, chunks,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, LOG: tl.constexpr,
):  # fmt: skip
    """Sums of probability times its gradient, with LOG of the gradient alone: of rows (plane, height), of columns of a
    tile (chunk, plane, width)."""
    EXACT: tl.constexpr = x_ptr.dtype.element_ty == tl.float32
    chunk, plane, image, head, channel = _position(chunks, heads, channels)
    y = chunk * ROWS + tl.arange(0, ROWS)
    sums = tl.zeros((ROWS,), tl.float32)
    for start in tl.range(0, width, COLUMNS):
        x = start + tl.arange(0, COLUMNS)
        inside = (y < height)[:, None] & (x < width)[None, :]
        kept = _kept(row_mask_ptr, col_mask_ptr, image, y, x, height, width, inside)
        if LOG:
            grad = _grad_out(grad_out_ptr, grad_out_strides, image, head, channel, y, x, kept)
            sums += tl.sum(grad, 1)
            to = col_sums_ptr + (_int64(chunk) * planes + plane) * width + x
            tl.store(to, tl.sum(grad, 0), mask=x < width)
        else:
            value, _, _, row_logit, col_logit = _inputs(
                x_ptr, row_ptr, col_ptr, factor, x_strides, row_strides, col_strides, image, head, channel, y, x, kept
            )
            row, col = _softmaxes(row_logit, col_logit, row_stats_ptr, col_stats_ptr, plane, y, x, height, width, EXACT)
            grad = _grad_out(grad_out_ptr, grad_out_strides, image, head, channel, y, x, kept)
            at = head * channels + channel
            d = _grad_product(grad, value, row * col, mean_ptr, scale_ptr, grad_mean_ptr, grad_var_ptr, at)
            sums += tl.sum(row * (col * d), 1)
            to = col_sums_ptr + (_int64(chunk) * planes + plane) * width + x
            tl.store(to, tl.sum(col * (row * d), 0), mask=x < width)
    tl.store(row_sums_ptr + plane * height + y, sums, mask=y < height)


@triton.jit
def _gradients(
    grad_out_ptr, x_ptr, row_ptr, col_ptr, row_mask_ptr, col_mask_ptr, row_stats_ptr, col_stats_ptr, mean_ptr,
    scale_ptr, grad_mean_ptr, grad_var_ptr, row_sums_ptr, col_sums_ptr, factor,
    grad_out_strides, x_strides, row_strides, col_strides, image, head, channel, plane, channels, height, width,
    y, x, inside, WHOLE: tl.constexpr, LOG: tl.constexpr,
):  # fmt: skip
    """Gradients of the row and of the column logits of a tile; values and gradient of x."""
    EXACT: tl.constexpr = x_ptr.dtype.element_ty == tl.float32
    kept = _kept(row_mask_ptr, col_mask_ptr, image, y, x, height, width, inside)
    value, weight_row, weight_col, row_logit, col_logit = _inputs(
        x_ptr, row_ptr, col_ptr, factor, x_strides, row_strides, col_strides, image, head, channel, y, x, kept
    )
    row, col = _softmaxes(row_logit, col_logit, row_stats_ptr, col_stats_ptr, plane, y, x, height, width, EXACT)
    grad = _grad_out(grad_out_ptr, grad_out_strides, image, head, channel, y, x, kept)
    at = head * channels + channel
    product = row * col
    d = _grad_product(grad, value, product, mean_ptr, scale_ptr, grad_mean_ptr, grad_var_ptr, at)
    by_row, by_col = col * d, row * d
    if WHOLE:
        if LOG:
            row_sum, col_sum = tl.sum(d, 1), tl.sum(d, 0)
        else:
            row_sum, col_sum = tl.sum(row * by_row, 1), tl.sum(col * by_col, 0)
    else:
        row_sum = tl.load(row_sums_ptr + plane * height + y, mask=y < height, other=0.0)
        col_sum = tl.load(col_sums_ptr + plane * width + x, mask=x < width, other=0.0)
    if LOG:
        d_row, d_col = d - row * row_sum[:, None], d - col * col_sum[None, :]
    else:
        # The difference first: where one probability is near 1 it cancels.
        d_row, d_col = row * (by_row - row_sum[:, None]), col * (by_col - col_sum[None, :])
    if row_ptr is not None:
        d_x = d_row * weight_row + d_col * weight_col
    else:
        d_x = _where_kept(kept, d_row + d_col, row_mask_ptr, col_mask_ptr, False)
        if factor is not None:
            d_x *= factor
    if mean_ptr is not None:
        d_x += grad * ((product - tl.load(mean_ptr + at)) * tl.load(scale_ptr + at))
    return value, d_row, d_col, d_x


@triton.jit
def row_col_bwd_x_kernel(
    grad_out_ptr, x_ptr, row_ptr, col_ptr, row_mask_ptr, col_mask_ptr, row_stats_ptr, col_stats_ptr, mean_ptr,
    scale_ptr, grad_mean_ptr, grad_var_ptr, row_sums_ptr, col_sums_ptr, grad_x_ptr, factor,
    grad_out_strides, x_strides, row_strides, col_strides, heads, channels, height, width, chunks,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, WHOLE: tl.constexpr, LOG: tl.constexpr,
):  # fmt: skip
    """Gradient of x: a program owns rows of one image and channel and adds up the heads."""
    chunk, plane_x, image, _head, channel = _position(chunks, 1, channels)
    y = chunk * ROWS + tl.arange(0, ROWS)
    for start in tl.range(0, width, COLUMNS):
        x = start + tl.arange(0, COLUMNS)
        inside = (y < height)[:, None] & (x < width)[None, :]
        total = tl.zeros((ROWS, COLUMNS), tl.float32)
        for head in tl.range(0, heads):
            plane = (image * heads + head) * channels + channel
            _value, _d_row, _d_col, d_x = _gradients(
                grad_out_ptr, x_ptr, row_ptr, col_ptr, row_mask_ptr, col_mask_ptr, row_stats_ptr, col_stats_ptr,
                mean_ptr, scale_ptr, grad_mean_ptr, grad_var_ptr, row_sums_ptr, col_sums_ptr, factor,
                grad_out_strides, x_strides, row_strides, col_strides, image, head, channel, plane, channels, height,
                width, y, x, inside, WHOLE, LOG,
            )  # fmt: skip
            total += d_x
        offsets = plane_x * height * width + y.to(tl.int64)[:, None] * width + x[None, :]
        tl.store(grad_x_ptr + offsets, total.to(grad_x_ptr.dtype.element_ty), mask=inside)


@triton.jit
def row_col_bwd_weight_kernel(
    grad_out_ptr, x_ptr, row_ptr, col_ptr, row_stats_ptr, col_stats_ptr, mean_ptr, scale_ptr, grad_mean_ptr,
    grad_var_ptr, row_sums_ptr, col_sums_ptr, grad_row_ptr, grad_col_ptr,
    grad_out_strides, x_strides, row_strides, col_strides, batch, images, heads, channels, height, width, chunks,
    column_tiles,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """Gradients of both weights, (group, head, channel, y, x): a program adds up ``images`` images for one tile."""
    pid = tl.program_id(0)
    tile, rest = pid % (chunks * column_tiles), pid // (chunks * column_tiles)
    y = tile % chunks * ROWS + tl.arange(0, ROWS)
    x = tile // chunks * COLUMNS + tl.arange(0, COLUMNS)
    channel, head = _int64(rest % channels), _int64(rest // channels % heads)
    group = rest // channels // heads
    inside = (y < height)[:, None] & (x < width)[None, :]
    grad_row = tl.zeros((ROWS, COLUMNS), tl.float32)
    grad_col = tl.zeros((ROWS, COLUMNS), tl.float32)
    for image in tl.range(group * images, tl.minimum((group + 1) * images, batch)):
        image = _int64(image)
        plane = (image * heads + head) * channels + channel
        value, d_row, d_col, _ = _gradients(
            grad_out_ptr, x_ptr, row_ptr, col_ptr, None, None, row_stats_ptr, col_stats_ptr, mean_ptr,
            scale_ptr, grad_mean_ptr, grad_var_ptr, row_sums_ptr, col_sums_ptr, None,
            grad_out_strides, x_strides, row_strides, col_strides, image, head, channel, plane, channels, height,
            width, y, x, inside, WHOLE, False,
        )  # fmt: skip
        grad_row += d_row * value
        grad_col += d_col * value
    plane = (_int64(group) * heads + head) * channels + channel
    offsets = plane * height * width + y.to(tl.int64)[:, None] * width + x[None, :]
    tl.store(grad_row_ptr + offsets, grad_row.to(grad_row_ptr.dtype.element_ty), mask=inside)
    tl.store(grad_col_ptr + offsets, grad_col.to(grad_col_ptr.dtype.element_ty), mask=inside)
