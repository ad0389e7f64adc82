"""Triton kernels of attention residuals.  Forward reads the values once, backward twice, then from the cache.

A tile is BLOCK_T tokens by whole rows of D numbers, in registers.  The values come as a tuple of COUNT pointers, COUNT
a power of two, of which the first ``count`` are values and the others repeat the first and are not read.  Where values
come from memory, the next one is loaded before the sums over the present one, which cover its latency.

No atomics: every element is written once, and the gradient of the score vector (query * norm_weight) leaves as one
partial sum per program.
"""

import triton
import triton.language as tl

from .._floor.triton_math import exp_nonpositive, reciprocal


@triton.jit
def _load_rows(ptr, strides, outer, inner, columns, mask):
    """(BLOCK_T, BLOCK_D) rows of a (outer, inner, D) tensor with contiguous rows."""
    offset = outer.to(tl.int64) * strides[0] + inner.to(tl.int64) * strides[1]
    return tl.load(ptr + offset[:, None] + columns[None, :], mask=mask, other=0.0)


@triton.jit
def _score(query_ptr, norm_weight_ptr, query_stride, norm_weight_stride, columns, D: tl.constexpr):
    """(1, BLOCK_D): query * norm_weight."""
    inside = columns < D
    score = tl.load(query_ptr + columns * query_stride, mask=inside, other=0.0).to(tl.float32)
    if norm_weight_ptr is not None:
        score *= tl.load(norm_weight_ptr + columns * norm_weight_stride, mask=inside, other=0.0).to(tl.float32)
    return score[None, :]


@triton.jit
def _unit(score):
    """The power of two below the largest number of ``score``: divided by it, but not by ``/``, which is rounded, no
    digit of a product changes, and the product with a value is finite wherever the logit is."""
    bits = tl.max(tl.max(tl.abs(score), 1), 0).to(tl.int32, bitcast=True) & 0x7F800000
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
    token = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    columns = tl.arange(0, BLOCK_D)
    live = token < tokens
    mask = live[:, None] & (columns < D)[None, :]
    outer, inner = token // inner_size, token % inner_size
    row = token.to(tl.int64)
    statistics_ptr += row * count * 2

    score = _score(query_ptr, norm_weight_ptr, query_stride, norm_weight_stride, columns, D)
    unit = _unit(score)
    score = tl.div_rn(score, unit)
    maximum = tl.full((BLOCK_T,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_T,), tl.float32)
    acc = tl.zeros((BLOCK_T, BLOCK_D), tl.float32)
    following = _load_rows(value_ptrs[0], value_strides[0], outer, inner, columns, mask)
    for layer in tl.static_range(COUNT):
        value = following.to(tl.float32)
        if layer + 1 < COUNT:  # noqa: SIM102 - decided when compiled
            if layer + 1 < count:
                following = _load_rows(value_ptrs[layer + 1], value_strides[layer + 1], outer, inner, columns, mask)
        if layer < count:
            inverse_rms = reciprocal(tl.sqrt_rn(tl.sum(value * value, 1) * (1.0 / D) + eps))
            logit = tl.sum(value * score, 1) * inverse_rms * unit
            tl.store(statistics_ptr + 2 * layer, logit, mask=live)
            tl.store(statistics_ptr + 2 * layer + 1, inverse_rms, mask=live)

            larger = tl.maximum(maximum, logit)
            shift = _finite_shift(larger)
            rescale, weight = exp_nonpositive(maximum - shift), exp_nonpositive(logit - shift)
            acc = acc * rescale[:, None] + weight[:, None] * value
            total = total * rescale + weight
            maximum = larger
    out = acc * reciprocal(total)[:, None]
    tl.store(out_ptr + row[:, None] * D + columns[None, :], out.to(out_ptr.dtype.element_ty), mask=mask)


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

    The sum over the values of weight * (grad_out . value), here delta, would be grad_out . out without a read of the
    values; but ``out`` is rounded, and where one weight is near 1 what remains of (grad_out . value) - delta is that.
    """
    program, programs = tl.program_id(0), tl.num_programs(0)
    columns = tl.arange(0, BLOCK_D)
    layers = tl.arange(0, COUNT)
    score = _score(query_ptr, norm_weight_ptr, query_stride, norm_weight_stride, columns, D)
    grad_score = tl.zeros((BLOCK_T, BLOCK_D), tl.float32)
    for tile in range(program, tl.cdiv(tokens, BLOCK_T), programs):
        token = tile * BLOCK_T + tl.arange(0, BLOCK_T)
        live = token < tokens
        mask = live[:, None] & (columns < D)[None, :]
        outer, inner = token // inner_size, token % inner_size
        row = token.to(tl.int64)
        offset = row[:, None] * D + columns[None, :]
        statistics = statistics_ptr + row * count * 2

        following = _load_rows(value_ptrs[0], value_strides[0], outer, inner, columns, mask)
        grad = _load_rows(grad_out_ptr, grad_out_strides, outer, inner, columns, mask).to(tl.float32)
        present = live[:, None] & (layers < count)[None, :]
        logits = tl.load(statistics[:, None] + 2 * layers[None, :], mask=present, other=float("-inf"))
        shift = _finite_shift(tl.max(logits, 1))
        inverse_total = reciprocal(tl.where(live, tl.sum(exp_nonpositive(logits - shift[:, None]), 1), 1.0))
        delta = tl.zeros((BLOCK_T,), tl.float32)
        for layer in tl.static_range(COUNT):
            value = following.to(tl.float32)
            if layer + 1 < COUNT:  # noqa: SIM102 - decided when compiled
                if layer + 1 < count:
                    following = _load_rows(value_ptrs[layer + 1], value_strides[layer + 1], outer, inner, columns, mask)
            if layer < count:
                logit = tl.load(statistics + 2 * layer, mask=live, other=0.0)
                delta += exp_nonpositive(logit - shift) * inverse_total * tl.sum(grad * value, 1)

        for layer in tl.static_range(COUNT):
            if layer < count:
                value = _load_rows(value_ptrs[layer], value_strides[layer], outer, inner, columns, mask).to(tl.float32)
                logit = tl.load(statistics + 2 * layer, mask=live, other=0.0)
                inverse_rms = tl.load(statistics + 2 * layer + 1, mask=live, other=0.0)
                weight = exp_nonpositive(logit - shift) * inverse_total
                scaled = weight * (tl.sum(grad * value, 1) - delta) * inverse_rms
                grad_value = weight[:, None] * grad + scaled[:, None] * score
                grad_value -= (scaled * logit * inverse_rms * (1.0 / D))[:, None] * value
                grad_score += scaled[:, None] * value
                pointer = grad_value_ptrs[layer]
                tl.store(pointer + offset, grad_value.to(pointer.dtype.element_ty), mask=mask)
    pointer = partials_ptr + program.to(tl.int64) * D + columns
    tl.store(pointer, tl.sum(grad_score, 0), mask=columns < D)
