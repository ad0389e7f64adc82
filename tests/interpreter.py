"""Triton's interpreter without what it does anew at every launch, call and operation.  What kernels compute stays.

``conftest.py`` imports it in the interpreter's processes.
"""

import dataclasses
import functools

import numpy as np
from triton.language import core
from triton.runtime import interpreter

patch_lang_of_a_call = interpreter._patch_lang
get_np_dtype_of_any = interpreter._get_np_dtype
get_np_dtype_of_scalar = functools.cache(get_np_dtype_of_any)


@functools.cache
def patch_lang(function):
    """``triton.language`` as it has to be in a call of ``function``, once and to stay."""
    scope = patch_lang_of_a_call(function)
    if scope is not None:
        scope.restore = lambda: None
    return scope


def get_np_dtype(dtype):
    return get_np_dtype_of_any(dtype) if dtype.scalar.is_ptr() else get_np_dtype_of_scalar(dtype.scalar)


@functools.cache
def shapes(*sizes):
    """The shapes of a block type and of its tensors, the number of elements, and the shape's text."""
    shape = core.tuple(sizes)
    return shape, core.tuple([core.constexpr(size) for size in sizes]), core.validate_block_shape(shape), str(shape)


def init_block_type(self, element_ty, shape):
    shape = shape.value if isinstance(shape, core.constexpr) else shape
    if not shape:
        raise TypeError("0d block_type is forbidden")
    shape, _, self.numel, text = shapes(*(size.value if isinstance(size, core.constexpr) else size for size in shape))
    self.element_ty, self.shape, self.name = element_ty, shape, f"<{text}, {element_ty}>"


def init_tensor(self, handle, type):
    self.handle, self.type, self.dtype = handle, type, type.scalar
    _, self.shape, numel, _ = shapes(*(type.shape if type.is_block() else ()))
    self.numel = core.constexpr(numel)


interpreter._patch_lang = patch_lang
interpreter._get_np_dtype = get_np_dtype
core.block_type.__init__ = init_block_type
core.tensor.__init__ = init_tensor
# Checks for integer overflow, whose result the interpreter drops.
assert not interpreter.interpreter_builder.options.debug
interpreter.interpreter_builder.options = dataclasses.replace(
    interpreter.interpreter_builder.options, sanitize_overflow=False
)

#: What a GPU computes by an approximate instruction in float32, and the largest relative error of it (PTX ISA 8.7:
#: ex2.approx, lg2.approx, sqrt.approx, rsqrt.approx; of div.full.f32, which "/" is, 2 units in the last place).
APPROXIMATE = {
    "create_exp2": 2**-22,
    "create_log2": 2**-22,
    "create_sqrt": 2**-23,
    "create_rsqrt": 2**-22.9,
    "create_fdiv": 2**-22,
}


def approximate(builder, seed):
    """Lets the interpreter's ``builder`` err in these as much as a GPU may, up or down: which, the bits of the result
    and ``seed`` decide, so that equal operands have equal results.  To stay: for a process of its own.

    ``tl.exp`` and ``tl.log`` are of a product with log2(e) or log(2) that is rounded as well.  A product of matrices in
    float32 is a chain of fused multiplications and additions, each of which rounds.
    """

    def rough(exact, largest):
        def compute(*operands):
            result = exact(*operands)
            if result.data.dtype != np.float32:
                return result
            bits = np.atleast_1d(result.data).view(np.uint32).reshape(result.data.shape) ^ np.uint32(seed)
            up = (bits * np.uint32(2654435761)) >> np.uint32(31)
            with np.errstate(all="ignore"):
                result.data = (result.data.astype(np.float64) * (1 + largest * (2.0 * up - 1))).astype(np.float32)
            return result

        return compute

    def with_factor(argument, factor):
        product = argument.data * argument.data.dtype.type(factor)
        return interpreter.TensorHandle(product, argument.dtype.scalar)

    def dot(a, b, acc, precision, most_imprecise):
        if a.data.dtype != np.float32 or acc.data.dtype != np.float32:
            return exact_dot(a, b, acc, precision, most_imprecise)
        total = acc.data
        with np.errstate(all="ignore"):
            for k in range(a.data.shape[-1]):
                product = a.data[..., :, k, None].astype(np.float64) * b.data[..., None, k, :]
                total = (total + product).astype(np.float32)
        return interpreter.TensorHandle(total, acc.dtype.scalar)

    exact_dot, builder.create_dot = builder.create_dot, dot
    for name, largest in APPROXIMATE.items():
        setattr(builder, name, rough(getattr(builder, name), largest))
    builder.create_exp = lambda argument: builder.create_exp2(with_factor(argument, 1.4426950408889634))
    builder.create_log = lambda argument: with_factor(builder.create_log2(argument), 0.6931471805599453)
