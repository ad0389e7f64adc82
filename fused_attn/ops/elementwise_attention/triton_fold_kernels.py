"""Triton kernels that finish what the programs of triton_kernels.py leave in memory: each adds up partial results in
one fixed order, a few numbers for each column, weight or channel, and so in one launch what takes PyTorch many.

A tile is PARTS partial results of COLUMNS columns; every lane adds up its own, and the lanes are added up at the end.
Batch statistics are sums in float64, of (image, head, channel, chunk, 2) moments, by one program for each head and
channel, MOMENTS at a time.
"""

import triton
import triton.language as tl

from .._floor.triton_math import exp_nonpositive
from .triton_kernels import _finite, _int64, _settled


@triton.jit
def _means(moments_ptr, images, chunks, count, MOMENTS: tl.constexpr):
    """Means of both moments of the head and channel of this program over ``count`` values."""
    channel, channels = tl.program_id(0), tl.num_programs(0)
    first, second = tl.zeros((MOMENTS,), tl.float64), tl.zeros((MOMENTS,), tl.float64)
    for start in tl.range(0, images * chunks, MOMENTS):
        i = start + tl.arange(0, MOMENTS)
        inside = i < images * chunks
        at = moments_ptr + (((i // chunks).to(tl.int64) * channels + channel) * chunks + i % chunks) * 2
        first += tl.load(at, mask=inside, other=0.0).to(tl.float64)
        second += tl.load(at + 1, mask=inside, other=0.0).to(tl.float64)
    values = _int64(count).to(tl.float64)
    return tl.sum(first, 0) / values, tl.sum(second, 0) / values


@triton.jit
def _deviation(var, eps):
    """1 / sqrt(var + eps) in float64, where neither ``/`` nor the root is an approximate instruction."""
    return 1.0 / tl.sqrt(var.to(tl.float64) + eps)


@triton.jit
def row_col_batch_kernel(
    moments_ptr, mean_ptr, var_ptr, mean_used_ptr, var_used_ptr, scale_ptr, mean_strides, var_strides,
    images, chunks, count, shift, eps, MOMENTS: tl.constexpr,
):  # fmt: skip
    """Mean and variance to normalise with and 1 / sqrt(variance + eps), float32: given, or of the batch's moments."""
    channel = tl.program_id(0)
    if moments_ptr is None:
        mean = tl.load(mean_ptr + channel * mean_strides[0]).to(tl.float32)
        var = tl.load(var_ptr + channel * var_strides[0]).to(tl.float32)
    else:
        first, second = _means(moments_ptr, images, chunks, count, MOMENTS)
        mean = (first + shift).to(tl.float32)
        spread = second - first * first
        var = tl.where(spread < 0.0, 0.0, spread).to(tl.float32)  # not tl.maximum: NaN stays
    tl.store(mean_used_ptr + channel, mean)
    tl.store(var_used_ptr + channel, var)
    tl.store(scale_ptr + channel, _deviation(var, eps).to(tl.float32))


@triton.jit
def row_col_grad_batch_kernel(
    moments_ptr, var_ptr, scale_ptr, grad_mean_ptr, grad_var_ptr, images, chunks, count, eps, MOMENTS: tl.constexpr
):
    """1 / sqrt(variance + eps), and what the batch statistics pass on, of the gradient's moments; 0 without moments.

    Zeros rather than None, for which the kernels that take them would be compiled once more, one of them to spill.
    """
    channel = tl.program_id(0)
    deviation = _deviation(tl.load(var_ptr + channel), eps)
    if moments_ptr is None:
        grad_mean, grad_var = tl.full((), 0.0, tl.float64), tl.full((), 0.0, tl.float64)
    else:
        grad_mean, second = _means(moments_ptr, images, chunks, count, MOMENTS)
        grad_var = second * (deviation * deviation)
    tl.store(scale_ptr + channel, deviation.to(tl.float32))
    tl.store(grad_mean_ptr + channel, grad_mean.to(tl.float32))
    tl.store(grad_var_ptr + channel, grad_var.to(tl.float32))


@triton.jit
def row_col_combine_kernel(
    partials_ptr, col_mask_ptr, col_stats_ptr, planes, channels, width, count, blocks,
    PARTS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Column statistics (plane, 2, width) of those of ``count`` chunks, (chunk, plane, 2, width), and settles them."""
    plane = _int64(tl.program_id(0) // blocks)
    x = tl.program_id(0) % blocks * COLUMNS + tl.arange(0, COLUMNS)
    part = tl.arange(0, PARTS)
    largest = tl.full((PARTS, COLUMNS), float("-inf"), tl.float32)
    for start in tl.range(0, count, PARTS):
        inside = (start + part < count)[:, None] & (x < width)[None, :]
        at = partials_ptr + ((start + part).to(tl.int64)[:, None] * planes + plane) * 2 * width + x[None, :]
        largest = tl.maximum(largest, tl.load(at, mask=inside, other=float("-inf")))
    maximum = tl.max(largest, 0)
    total = tl.zeros((PARTS, COLUMNS), tl.float32)
    for start in tl.range(0, count, PARTS):
        inside = (start + part < count)[:, None] & (x < width)[None, :]
        at = partials_ptr + ((start + part).to(tl.int64)[:, None] * planes + plane) * 2 * width + x[None, :]
        behind = tl.load(at, mask=inside, other=float("-inf")) - _finite(maximum)[None, :]
        total += tl.load(at + width, mask=inside, other=0.0) * exp_nonpositive(behind)
    maximum, sums = _settled(col_mask_ptr, plane // channels, x, width, maximum, tl.sum(total, 0))
    to = col_stats_ptr + plane * 2 * width + x
    tl.store(to, maximum, mask=x < width)
    tl.store(to + width, sums, mask=x < width)


@triton.jit
def _sums(partials_ptr, columns, count, size, PARTS: tl.constexpr, COLUMNS: tl.constexpr):
    """Sums over ``count`` rows of ``size`` numbers, of some columns."""
    part = tl.arange(0, PARTS)
    total = tl.zeros((PARTS, COLUMNS), tl.float32)
    for start in tl.range(0, count, PARTS):
        inside = (start + part < count)[:, None] & (columns < size)[None, :]
        at = partials_ptr + (start + part).to(tl.int64)[:, None] * size + columns[None, :]
        total += tl.load(at, mask=inside, other=0.0)
    return tl.sum(total, 0)


@triton.jit
def row_col_fold_kernel(
    partials_ptr, out_ptr, other_partials_ptr, other_out_ptr, count, size,
    PARTS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Sums of ``count`` partial results of ``size`` numbers each; of others too where there are any."""
    columns = _int64(tl.program_id(0)) * COLUMNS + tl.arange(0, COLUMNS)
    total = _sums(partials_ptr, columns, count, size, PARTS, COLUMNS)
    tl.store(out_ptr + columns, total.to(out_ptr.dtype.element_ty), mask=columns < size)
    if other_partials_ptr is not None:
        total = _sums(other_partials_ptr, columns, count, size, PARTS, COLUMNS)
        tl.store(other_out_ptr + columns, total.to(other_out_ptr.dtype.element_ty), mask=columns < size)
