"""Triton kernels of attention residuals.  Forward reads the values once, backward twice, then from the cache.

A tile is BLOCK_T tokens by whole rows of D numbers, in registers.  With one token it has no dimension of size 1, and
what is one number per token is a scalar: as tensors of one number, Triton 3.6 spread them over a row in every thread,
passed that through shared memory for each value, and took 90 s to compile it.

The values come as a tuple of COUNT pointers, COUNT a power of two, of which the first ``count`` are values and the
others repeat the first and are not read.  Where values come from memory, the next one is loaded before the sums over
the present one, which cover its latency.

No atomics: every element is written once, and the gradient of the score vector (query * norm_weight) leaves as one
partial sum per program.
"""

import triton
import triton.language as tl

from .._floor.triton_math import exp_nonpositive, reciprocal

_INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def _load_rows(ptr, strides, outer, inner, columns, mask):
    """The rows of a tile, from an (outer, inner, D) tensor with contiguous rows."""
    offset = outer.to(tl.int64) * strides[0] + inner.to(tl.int64) * strides[1]
    return tl.load(ptr + offset + columns, mask=mask, other=0.0)


@triton.jit
def _tokens(BLOCK_T: tl.constexpr):
    """The numbers of the tokens in a tile, (BLOCK_T, 1); of one token a scalar."""
    return tl.full((), 0, tl.int32) if BLOCK_T == 1 else tl.arange(0, BLOCK_T)[:, None]


@triton.jit
def _lanes(BLOCK_T: tl.constexpr, SIZE: tl.constexpr):
    """The numbers of the elements in a row, (1, SIZE); of one token (SIZE,)."""
    return tl.arange(0, SIZE) if BLOCK_T == 1 else tl.arange(0, SIZE)[None, :]


@triton.jit
def _inside(token, tokens, lanes, size, BLOCK_T: tl.constexpr):
    """Mask of the elements of a tile that exist: token < tokens and lanes < size."""
    if BLOCK_T == 1:  # without an ``and`` of a scalar and a tensor, of which Triton's interpreter makes no mask
        return lanes < tl.where(token < tokens, size, 0)
    else:
        return (token < tokens) & (lanes < size)


@triton.jit
def _sum(x):
    """Sum of each token's row."""
    return tl.sum(x, 0) if len(x.shape) == 1 else tl.sum(x, 1, keep_dims=True)


@triton.jit
def _add(a, b, c, d):
    return a + c, b + d


@triton.jit
def _sums(x, y):
    """:func:`_sum` of both in one walk through shared memory."""
    if _INTERPRETED:  # it calls _add for every element
        return _sum(x), _sum(y)
    elif len(x.shape) == 1:
        return tl.reduce((x, y), 0, _add)
    else:
        return tl.reduce((x, y), 1, _add, keep_dims=True)


@triton.jit
def _max(x):
    """Largest number of each token's row."""
    return tl.max(x, 0) if len(x.shape) == 1 else tl.max(x, 1, keep_dims=True)


@triton.jit
def _score(query_ptr, norm_weight_ptr, query_stride, norm_weight_stride, columns, D: tl.constexpr):
    """query * norm_weight, in the shape of ``columns``."""
    inside = columns < D
    score = tl.load(query_ptr + columns * query_stride, mask=inside, other=0.0).to(tl.float32)
    if norm_weight_ptr is not None:
        score *= tl.load(norm_weight_ptr + columns * norm_weight_stride, mask=inside, other=0.0).to(tl.float32)
    return score


@triton.jit
def _unit(score):
    """The largest power of two that is at most max(abs(score)); 1 where that is subnormal or not finite.

    Divided by it, the products of ``score`` with a value are finite wherever the logit is, and no digit of them
    changes.  The division must not be ``/``, which is rounded on a GPU.
    """
    bits = tl.max(tl.abs(score)).to(tl.int32, bitcast=True) & 0x7F800000
    bits = tl.where((bits == 0) | (bits == 0x7F800000), 0x3F800000, bits)
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def _finite_shift(maximum):
    """What to subtract from the logits: 0 where all are -inf so far, as -inf - -inf is NaN."""
    return tl.where(maximum == float("-inf"), 0.0, maximum)


@triton.jit
def attention_residual_fwd_kernel(
    value_ptrs,
    value_strides,
    query_ptr,
    norm_weight_ptr,
    query_stride,
    norm_weight_stride,
    out_ptr,
    statistics_ptr,
    eps,
    count,
    tokens,
    inner_size,
    D: tl.constexpr,
    COUNT: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    token = tl.program_id(0) * BLOCK_T + _tokens(BLOCK_T)
    columns = _lanes(BLOCK_T, BLOCK_D)
    live = token < tokens
    mask = _inside(token, tokens, columns, D, BLOCK_T)
    outer, inner = token // inner_size, token % inner_size
    row = token.to(tl.int64)
    statistics_ptr += row * count * 2

    score = _score(query_ptr, norm_weight_ptr, query_stride, norm_weight_stride, columns, D)
    unit = _unit(score)
    score = tl.div_rn(score, unit)
    maximum = tl.full(token.shape, float("-inf"), tl.float32)
    total = tl.zeros(token.shape, tl.float32)
    acc = tl.zeros(mask.shape, tl.float32)
    following = _load_rows(value_ptrs[0], value_strides[0], outer, inner, columns, mask)
    for layer in tl.static_range(COUNT):
        value = following.to(tl.float32)
        if layer + 1 < COUNT:
            # Masked, not in a branch: LLVM takes several times as long over branches that each yield a tile.
            there = _inside(token, tl.where(layer + 1 < count, tokens, 0), columns, D, BLOCK_T)
            following = _load_rows(value_ptrs[layer + 1], value_strides[layer + 1], outer, inner, columns, there)
        if layer < count:
            squares, products = _sums(value * value, value * score)
            inverse_rms = reciprocal(tl.sqrt_rn(squares * (1.0 / D) + eps))
            logit = products * inverse_rms * unit
            tl.store(statistics_ptr + 2 * layer, logit, mask=live)
            tl.store(statistics_ptr + 2 * layer + 1, inverse_rms, mask=live)

            larger = tl.maximum(maximum, logit)
            shift = _finite_shift(larger)
            rescale, weight = exp_nonpositive(maximum - shift), exp_nonpositive(logit - shift)
            acc = acc * rescale + weight * value
            total = total * rescale + weight
            maximum = larger
    out = acc * reciprocal(total)
    tl.store(out_ptr + row * D + columns, out.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def attention_residual_bwd_kernel(
    grad_out_ptr,
    grad_out_strides,
    value_ptrs,
    value_strides,
    query_ptr,
    norm_weight_ptr,
    query_stride,
    norm_weight_stride,
    statistics_ptr,
    grad_value_ptrs,
    partials_ptr,
    count,
    tokens,
    inner_size,
    D: tl.constexpr,
    COUNT: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Owns the tokens of tiles program, program + programs, ..., in that order.

    The mean over the values of grad_out . value would be grad_out . out without a read of the values; but ``out`` is
    rounded, and where one weight is near 1 what remains of (grad_out . value) - mean is that.  For the same reason the
    mean is that of differences: it is ``origin``, the product of the largest weight's value, and ``delta``; so it does
    not matter that the weights' sum is 1 but for rounding.
    """
    program, programs = tl.program_id(0), tl.num_programs(0)
    columns = _lanes(BLOCK_T, BLOCK_D)
    layers = _lanes(BLOCK_T, COUNT)
    score = _score(query_ptr, norm_weight_ptr, query_stride, norm_weight_stride, columns, D)
    grad_score = tl.zeros((_tokens(BLOCK_T) + columns).shape, tl.float32)
    for tile in range(program, tl.cdiv(tokens, BLOCK_T), programs):
        token = tile * BLOCK_T + _tokens(BLOCK_T)
        live = token < tokens
        mask = _inside(token, tokens, columns, D, BLOCK_T)
        outer, inner = token // inner_size, token % inner_size
        row = token.to(tl.int64)
        offset = row * D + columns
        statistics = statistics_ptr + row * count * 2

        following = _load_rows(value_ptrs[0], value_strides[0], outer, inner, columns, mask)
        grad = _load_rows(grad_out_ptr, grad_out_strides, outer, inner, columns, mask).to(tl.float32)
        present = _inside(token, tokens, layers, count, BLOCK_T)
        logits = tl.load(statistics + 2 * layers, mask=present, other=float("-inf"))
        shift = _finite_shift(_max(logits))
        weights = exp_nonpositive(logits - shift)
        inverse_total = reciprocal(tl.where(live, _sum(weights), 1.0))
        weights *= inverse_total
        origin = tl.zeros(token.shape, tl.float32)
        delta = tl.zeros(token.shape, tl.float32)
        total = tl.zeros(token.shape, tl.float32)
        for layer in tl.static_range(COUNT):
            value = following.to(tl.float32)
            if layer + 1 < COUNT:  # noqa: SIM102 - decided when compiled
                if layer + 1 < count:
                    following = _load_rows(value_ptrs[layer + 1], value_strides[layer + 1], outer, inner, columns, mask)
            if layer < count:
                logit = tl.load(statistics + 2 * layer, mask=live, other=0.0)
                weight = exp_nonpositive(logit - shift) * inverse_total
                grad_weight = _sum(grad * value)
                nearer = tl.where(logit == shift, grad_weight, origin)
                delta += (origin - nearer) * total + weight * (grad_weight - nearer)
                origin = nearer
                total += weight

        for layer in tl.static_range(COUNT):
            if layer < count:
                value = _load_rows(value_ptrs[layer], value_strides[layer], outer, inner, columns, mask).to(tl.float32)
                logit = tl.load(statistics + 2 * layer, mask=live, other=0.0)
                inverse_rms = tl.load(statistics + 2 * layer + 1, mask=live, other=0.0)
                # Picked, not computed again: that spilled on sm_100.  Picked in the loop above as well, others spill.
                weight = _sum(tl.where(layers == layer, weights, 0.0))
                scaled = weight * ((_sum(grad * value) - origin) - delta) * inverse_rms
                grad_value = weight * grad + scaled * score
                grad_value -= (scaled * logit * inverse_rms * (1.0 / D)) * value
                grad_score += scaled * value
                pointer = grad_value_ptrs[layer]
                tl.store(pointer + offset, grad_value.to(pointer.dtype.element_ty), mask=mask)
    if BLOCK_T > 1:
        grad_score = tl.sum(grad_score, 0, keep_dims=True)
    tl.store(partials_ptr + program.to(tl.int64) * D + columns, grad_score, mask=columns < D)


@triton.jit
def attention_residual_fold_kernel(
    partials_ptr,
    query_ptr,
    norm_weight_ptr,
    grad_query_ptr,
    grad_norm_weight_ptr,
    query_stride,
    norm_weight_stride,
    count,
    D: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """The gradients of query and norm_weight, contiguous, of the ``count`` partial sums of the kernel above.

    Grid: ceil(D / BLOCK_D) programs.
    """
    columns = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    inside = columns < D
    acc = tl.zeros((BLOCK_P, BLOCK_D), tl.float32)
    for first in range(0, count, BLOCK_P):
        part = first + tl.arange(0, BLOCK_P)
        mask = (part < count)[:, None] & inside[None, :]
        acc += tl.load(partials_ptr + part[:, None] * D + columns[None, :], mask=mask, other=0.0)
    grad_score = tl.sum(acc, 0)
    grad_query = grad_score
    if norm_weight_ptr is not None:
        query = tl.load(query_ptr + columns * query_stride, mask=inside, other=0.0).to(tl.float32)
        grad_norm_weight = (grad_score * query).to(grad_norm_weight_ptr.dtype.element_ty)
        tl.store(grad_norm_weight_ptr + columns, grad_norm_weight, mask=inside)
        norm_weight = tl.load(norm_weight_ptr + columns * norm_weight_stride, mask=inside, other=0.0)
        grad_query = grad_score * norm_weight.to(tl.float32)
    tl.store(grad_query_ptr + columns, grad_query.to(grad_query_ptr.dtype.element_ty), mask=inside)
