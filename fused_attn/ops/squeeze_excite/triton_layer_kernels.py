"""Triton kernels of squeeze-excite's layers: a layer, and the gradients of its inputs and of its parameters.

The layers are small and their sums long: launches would cost more than the products.  So activations, gates and their
derivatives are computed where a kernel reads or writes its numbers anyway, and the two parts of the first layer's
input, the result and the means, are read as the columns of one matrix.  All sums are float32, of one program, in an
order that sizes alone decide.
"""

import triton
import triton.language as tl

from .._floor.triton_math import dot, exp_nonpositive

_BELOW_ONE = tl.constexpr(1.0 - 2.0**-24)
_INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def _sigmoid(x):
    exp = exp_nonpositive(-tl.abs(x))
    return tl.div_rn(tl.where(x >= 0.0, 1.0, exp), 1.0 + exp)


@triton.jit
def _clipped(x):
    """``x`` between 0 and 6; NaN stays."""
    return tl.where(x < 0.0, 0.0, tl.where(x > 6.0, 6.0, x))


@triton.jit
def _activated(x, ACTIVATION: tl.constexpr):
    """The hidden activation of ``x``; ``x`` itself without one."""
    if ACTIVATION == "relu":
        x = tl.where(x <= 0.0, 0.0, x)
    elif ACTIVATION == "silu":
        x = x * _sigmoid(x)
    elif ACTIVATION == "gelu":
        if _INTERPRETED:
            # PyTorch's GELU of infinity is infinity on a GPU, but NaN on the CPU, where the interpreter runs.
            x = tl.where(x == float("inf"), float("nan"), x)
        x = 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    elif ACTIVATION == "hardswish":
        x = tl.div_rn(x * _clipped(x + 3.0), 6.0)
    return x


@triton.jit
def _through_activation(grad, x, ACTIVATION: tl.constexpr):
    """The gradient of the hidden activation's argument ``x`` from that of its value."""
    if ACTIVATION == "relu":
        grad = tl.where(x <= 0.0, 0.0, grad)
    elif ACTIVATION == "silu":
        sigmoid = _sigmoid(x)
        grad = grad * (sigmoid * (1.0 + x * (1.0 - sigmoid)))
    elif ACTIVATION == "gelu":
        below = 0.5 * (1.0 + tl.erf(x * 0.7071067811865476))
        density = 0.3989422804014327 * exp_nonpositive(-0.5 * x * x)
        grad = grad * (below + x * density)
    elif ACTIVATION == "hardswish":
        inside = tl.where(x < 3.0, grad * (tl.div_rn(x, 3.0) + 0.5), grad)  # NaN lets it pass, as in PyTorch
        grad = tl.where(x <= -3.0, 0.0, inside)
    return grad


@triton.jit
def _gated(x, GATE: tl.constexpr):
    """The gate of ``x``; ``x`` itself without one."""
    if GATE == "sigmoid":
        x = _sigmoid(x)
    elif GATE == "hardsigmoid":
        gate = tl.div_rn(_clipped(x + 3.0), 6.0)
        # Below 1 wherever x < 3, though x + 3 may round to 6: the scale alone then says where the gate has a slope.
        x = tl.where((x < 3.0) & (gate > _BELOW_ONE), _BELOW_ONE, gate)
    return x


@triton.jit
def through_gate(grad, scale, GATE: tl.constexpr):
    """The gradient of the gate's argument from that of its value, ``scale``."""
    if GATE == "sigmoid":
        grad = grad * (scale * (1.0 - scale))
    else:
        grad = tl.where((scale > 0.0) & (scale < 1.0), grad * (1.0 / 6.0), 0.0)
    return grad


@triton.jit
def _load(ptr, down, across, strides, live):
    """A tile of a matrix, 0 where it is not ``live``, in float32."""
    return tl.load(ptr + down[:, None] * strides[0] + across[None, :] * strides[1], live, 0.0).to(tl.float32)


@triton.jit
def _inputs(result_ptr, inputs_ptr, image, column, live, inputs, features, result_strides, ACTIVATION: tl.constexpr):
    """A tile, (images, columns), of what a layer multiplies by its weight; 0 where it is not ``live``."""
    behind = live & (column >= features)[None, :]
    tile = _load(inputs_ptr, image, column - features, (inputs - features, 1), behind)
    if result_ptr is not None:
        tile += _load(result_ptr, image, column, result_strides, live & (column < features)[None, :])
    return _activated(tile, ACTIVATION)


@triton.jit
def _tile(columns, BLOCK_DOWN: tl.constexpr, BLOCK_ACROSS: tl.constexpr):
    """Rows and columns of this program's tile of a matrix."""
    blocks = tl.cdiv(columns, BLOCK_ACROSS)
    down = tl.program_id(0) // blocks * BLOCK_DOWN + tl.arange(0, BLOCK_DOWN)
    across = tl.program_id(0) % blocks * BLOCK_ACROSS + tl.arange(0, BLOCK_ACROSS)
    return down.to(tl.int64), across.to(tl.int64)


@triton.jit
def layer_fwd_kernel(
    result_ptr,  # (batch, features), the first columns of the input; or None
    inputs_ptr,  # (batch, inputs - features) float32, the others: means, or hidden units before their activation
    weight_ptr,  # (outputs, inputs)
    bias_ptr,  # (outputs,), or None
    share_ptr,  # (batch, outputs), added; or None
    out_ptr,  # (batch, outputs) float32
    batch,
    inputs,
    outputs,
    features,
    result_strides,
    weight_strides,
    bias_strides,
    share_strides,
    ACTIVATION: tl.constexpr,  # of the input, or None
    GATE: tl.constexpr,  # of the output, or None
    BLOCK_B: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
):
    """A thread has products of few columns, of every image and output of the tile: what it reads, nobody else does."""
    image, output = _tile(outputs, BLOCK_B, BLOCK_O)
    total = tl.zeros((BLOCK_B, BLOCK_O, BLOCK_K), tl.float32)
    for start in tl.range(0, inputs, BLOCK_K, num_stages=STAGES):
        column = (start + tl.arange(0, BLOCK_K)).to(tl.int64)
        inside = (column < inputs)[None, :]
        live = (image < batch)[:, None] & inside
        left = _inputs(result_ptr, inputs_ptr, image, column, live, inputs, features, result_strides, ACTIVATION)
        right = _load(weight_ptr, output, column, weight_strides, (output < outputs)[:, None] & inside)
        total += left[:, None, :] * right[None, :, :]
    out = tl.sum(total, 2)
    live = (image < batch)[:, None] & (output < outputs)[None, :]
    if bias_ptr is not None:
        out += tl.load(bias_ptr + output * bias_strides[0], output < outputs, 0.0).to(tl.float32)[None, :]
    if share_ptr is not None:
        out += _load(share_ptr, image, output, share_strides, live)
    tl.store(out_ptr + image[:, None] * outputs + output[None, :], _gated(out, GATE), live)


@triton.jit
def layer_bwd_kernel(
    grad_ptr,  # (batch, outputs) float32
    weight_ptr,  # (outputs, inputs)
    preactivation_ptr,  # (batch, inputs) float32, which the layer takes the activation of; or None
    grad_result_ptr,  # (batch, features), or None
    grad_inputs_ptr,  # (batch, inputs - features) float32
    grad_share_ptr,  # (batch, inputs), the same gradient once more; or None
    batch,
    inputs,
    outputs,
    features,
    weight_strides,
    ACTIVATION: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
):
    """As the layer itself; it sums over the outputs."""
    image, column = _tile(inputs, BLOCK_B, BLOCK_O)
    total = tl.zeros((BLOCK_B, BLOCK_O, BLOCK_K), tl.float32)
    for start in tl.range(0, outputs, BLOCK_K, num_stages=STAGES):
        output = (start + tl.arange(0, BLOCK_K)).to(tl.int64)
        inside = (output < outputs)[None, :]
        left = _load(grad_ptr, image, output, (outputs, 1), (image < batch)[:, None] & inside)
        transposed = (weight_strides[1], weight_strides[0])
        right = _load(weight_ptr, column, output, transposed, (column < inputs)[:, None] & inside)
        total += left[:, None, :] * right[None, :, :]
    grad = tl.sum(total, 2)
    live = (image < batch)[:, None] & (column < inputs)[None, :]
    if preactivation_ptr is not None:
        grad = _through_activation(grad, _load(preactivation_ptr, image, column, (inputs, 1), live), ACTIVATION)
    if grad_share_ptr is not None:
        tl.store(grad_share_ptr + image[:, None] * inputs + column[None, :], grad, live)
    if grad_result_ptr is not None:
        offsets = image[:, None] * features + column[None, :]
        tl.store(grad_result_ptr + offsets, grad, live & (column < features)[None, :])
    offsets = image[:, None] * (inputs - features) + (column - features)[None, :]
    tl.store(grad_inputs_ptr + offsets, grad, live & (column >= features)[None, :])


@triton.jit
def parameters_bwd_kernel(
    grad_ptr,  # (batch, outputs) float32
    result_ptr,  # as in the layer
    inputs_ptr,
    grad_weight_ptr,  # (outputs, inputs)
    grad_bias_ptr,  # (outputs,)
    batch,
    inputs,
    outputs,
    features,
    result_strides,
    ACTIVATION: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Sums over the samples."""
    output, column = _tile(inputs, BLOCK_O, BLOCK_I)
    total, total_bias = tl.zeros((BLOCK_O, BLOCK_I), tl.float32), tl.zeros((BLOCK_O,), tl.float32)
    for start in range(0, batch, BLOCK_K):
        image = (start + tl.arange(0, BLOCK_K)).to(tl.int64)
        grad = _load(grad_ptr, output, image, (1, outputs), (output < outputs)[:, None] & (image < batch)[None, :])
        live = (image < batch)[:, None] & (column < inputs)[None, :]
        right = _inputs(result_ptr, inputs_ptr, image, column, live, inputs, features, result_strides, ACTIVATION)
        total = dot(grad, right, total, "ieee")
        total_bias += tl.sum(grad, 1)
    live = (output < outputs)[:, None] & (column < inputs)[None, :]
    tl.store(grad_weight_ptr + output[:, None] * inputs + column[None, :], total, live)
    if tl.program_id(0) % tl.cdiv(inputs, BLOCK_I) == 0:
        tl.store(grad_bias_ptr + output, total_bias, output < outputs)
