"""What several ops' Triton kernels compute."""

import triton
import triton.language as tl

_INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def exp_nonpositive(x):
    """e**x of a float32 x <= 0 to 1 ulp, with additions and products only.

    ``tl.exp`` rounds x * log2(e): on a GPU its error is 2 ulp of the instruction and half an ulp per unit of ``|x|``,
    which shows in float32 gradients of a softmax.

    x = n * log(2) + r, with n in the low bits of a number so large that its last digit is 1, and e**r as a polynomial
    (coefficients: Cephes' expf).  Below -88 the result is 0, of -inf too; NaN stays.
    """
    x = tl.maximum(x, -88.0, propagate_nan=tl.PropagateNan.ALL)
    n_in_bits = x * 1.4426950408889634 + 12583039.0  # 1.5 * 2**23 + the exponent's bias
    n = n_in_bits - 12583039.0
    r = x - n * 0.693359375  # 9 bits of log(2): the product is exact
    r -= n * -2.12194440e-4
    tail = tl.fma(r, 1.9875691500e-4, 1.3981999507e-3)
    tail = tl.fma(r, tail, 8.3334519073e-3)
    tail = tl.fma(r, tail, 4.1665795894e-2)
    tail = tl.fma(r, tail, 1.6666665459e-1)
    tail = tl.fma(r, tail, 5.0000001201e-1)
    power = (n_in_bits.to(tl.int32, bitcast=True) << 23).to(tl.float32, bitcast=True)
    return (tl.fma(tail, r * r, r) + 1.0) * power


@triton.jit
def softmax_exp(x, EXACT: tl.constexpr):
    """e**x of a float32 x <= 0: to 1 ulp if EXACT, else as exactly as results that are rounded to 16 bits need.

    Not ``tl.exp``, which takes three instructions more than a product and ``exp2``, for subnormal results alone.
    """
    if EXACT:
        return exp_nonpositive(x)
    else:
        return tl.math.exp2(x * 1.4426950408889634)


@triton.jit
def reciprocal(x, EXACT: tl.constexpr = True):
    """1 / x to 2 ulp, which is what ``/`` gives on a GPU; to 1 ulp if EXACT, by a Newton step unless 1 / x is 0 or inf.

    Not ``tl.div_rn``, which may compile to a call, around which registers can spill.
    """
    near = 1.0 / x
    if EXACT:
        refined = tl.fma(near, tl.fma(-x, near, 1.0), near)
        near = tl.where((near == 0.0) | (tl.abs(near) == float("inf")), near, refined)
    return near


@triton.jit
def dot(a, b, acc, PRECISION: tl.constexpr):
    """acc + a @ b, accumulated in float32.

    A product of float32 is a chain of additions, each of which rounds: a tile's is summed before it is added, as one
    chain over all tiles errs several times as much.
    """
    if acc is not None and a.dtype == tl.float32:
        product = tl.dot(a, b, input_precision=PRECISION)
        # Not "+", of which Triton makes a product that starts from acc.
        return tl.fma(product, tl.full(product.shape, 1.0, tl.float32), acc)
    if _INTERPRETED:
        # The interpreter multiplies the bit patterns of bfloat16; products of two are exact in float32.
        return tl.dot(a.to(tl.float32), b.to(tl.float32), acc, input_precision=PRECISION)
    return tl.dot(a, b, acc, input_precision=PRECISION)
