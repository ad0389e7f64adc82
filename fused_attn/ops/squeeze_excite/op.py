"""Registration with PyTorch: schema, fake kernels, autograd, and what each implementation can run.

One operator per implementation, all with the schema below, so that ``torch.compile``, ``opcheck`` and an explicit
``impl`` see exactly the kernel that runs.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from .._floor import autograd, dispatch
from . import reference

_SCHEMA = (
    "(Tensor x, Tensor fc1_weight, Tensor? fc1_bias, Tensor fc2_weight, Tensor? fc2_bias, Tensor? result, "
    "Tensor? result_share, Tensor? residual, bool relu) -> (Tensor out, Tensor z, Tensor hidden, Tensor scale)"
)
# `out` is given where there is an activation.  A residual without one has the gradient of the output.
_BACKWARD_SCHEMA = (
    "(Tensor grad_out, Tensor x, Tensor fc1_weight, Tensor fc2_weight, Tensor? result, Tensor? out, Tensor z, "
    "Tensor hidden, Tensor scale, bool share_grad, bool residual_grad) -> (Tensor grad_x, Tensor grad_fc1_weight, "
    "Tensor grad_fc1_bias, Tensor grad_fc2_weight, Tensor grad_fc2_bias, Tensor grad_result, "
    "Tensor grad_result_share, Tensor grad_residual)"
)


def excite(impl, x, fc1_weight, fc1_bias, fc2_weight, fc2_bias, result, result_share, residual, relu) -> Tensor:
    """Run the operator of ``impl``; ``out`` only."""
    operator = getattr(torch.ops.fused_attn, f"squeeze_excite_{impl}").default
    return operator(x, fc1_weight, fc1_bias, fc2_weight, fc2_bias, result, result_share, residual, relu)[0]


# --- what can run -----------------------------------------------------------------------------------------------


def can_run_cpu(x: Tensor) -> str | None:
    return dispatch.cpu_reason(x)


def can_run_triton(x: Tensor) -> str | None:
    return dispatch.triton_reason(x)


def can_run_reference(x: Tensor) -> str | None:
    return None


#: Implementations in the order ``auto`` prefers them.  The interpreter never wins over a real kernel.
IMPLEMENTATIONS = {"cpu": can_run_cpu, "triton": can_run_triton, "reference": can_run_reference}


# --- kernels ----------------------------------------------------------------------------------------------------


def memory_format(x: Tensor) -> torch.memory_format:
    """Contiguous or channels_last, whichever ``x`` is, or is nearer to."""
    if x.is_contiguous():
        return torch.contiguous_format
    if x.is_contiguous(memory_format=torch.channels_last) or x.stride(1) < x.stride(3):
        return torch.channels_last
    return torch.contiguous_format


def _empty_like(x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=memory_format(x))


def allocate_forward(x: Tensor, fc1_weight: Tensor) -> tuple[Tensor, ...]:
    """out, z, hidden, scale of the operator's schema."""
    batch, channels = x.shape[:2]
    return (
        _empty_like(x),
        *(x.new_empty((batch, width), dtype=torch.float32) for width in (channels, fc1_weight.shape[0], channels)),
    )


def allocate_backward(x, fc1_weight, fc2_weight, result, share_grad, residual_grad) -> tuple[Tensor, ...]:
    """The gradients of the operator's schema; those nobody asked for are empty."""
    hidden, (batch, channels) = fc1_weight.shape[0], x.shape[:2]
    return (
        _empty_like(x),
        x.new_empty(fc1_weight.shape),
        x.new_empty((hidden,)),
        x.new_empty(fc2_weight.shape),
        x.new_empty((channels,)),
        x.new_empty((0,) if result is None else result.shape),
        x.new_empty((batch, hidden) if share_grad else (0,)),
        _empty_like(x) if residual_grad else x.new_empty((0,)),
    )


def in_format(tensor: Tensor | None, form: torch.memory_format) -> Tensor | None:
    """``tensor`` itself where it lies so already, else a copy."""
    return None if tensor is None else tensor.contiguous(memory_format=form)


def _cpu(x, fc1_weight, fc1_bias, fc2_weight, fc2_bias, result, result_share, residual, relu):
    form, outputs = memory_format(x), allocate_forward(x, fc1_weight)
    torch.ops.fused_attn_cpu.squeeze_excite_forward(
        in_format(x, form), fc1_weight, fc1_bias, fc2_weight, fc2_bias, result, result_share,
        in_format(residual, form), relu, form == torch.channels_last, *outputs,
    )  # fmt: skip
    return outputs


def _cpu_backward(
    grad_out, x, fc1_weight, fc2_weight, result, out, z, hidden, scale, share_grad, residual_grad
):  # fmt: skip
    form = memory_format(x)
    grads = allocate_backward(x, fc1_weight, fc2_weight, result, share_grad, residual_grad)
    torch.ops.fused_attn_cpu.squeeze_excite_backward(
        in_format(grad_out, form), in_format(x, form), fc1_weight, fc2_weight, result, out, z, hidden, scale,
        form == torch.channels_last, *grads,
    )  # fmt: skip
    return grads


def _triton(*args):
    from . import triton_launch

    return triton_launch.forward(*args)


def _triton_backward(*args):
    from . import triton_launch

    return triton_launch.backward(*args)


# --- registration -----------------------------------------------------------------------------------------------


def _fake(x, fc1_weight, *_):
    return allocate_forward(x, fc1_weight)


def _fake_backward(
    grad_out, x, fc1_weight, fc2_weight, result, out, z, hidden, scale, share_grad, residual_grad
):  # fmt: skip
    return allocate_backward(x, fc1_weight, fc2_weight, result, share_grad, residual_grad)


def _setup_context(ctx, inputs, output) -> None:
    x, fc1_weight, fc1_bias, fc2_weight, fc2_bias, result, result_share, residual, relu = inputs
    out, z, hidden, scale = output
    ctx.mark_non_differentiable(z, hidden, scale)
    ctx.save_for_backward(x, fc1_weight, fc2_weight, result, out if relu else None, z, hidden, scale)
    ctx.biases = fc1_bias is not None, fc2_bias is not None
    ctx.share, ctx.residual, ctx.relu = result_share is not None, residual is not None, relu


def _flops(x, fc1_weight, *_, **__) -> int:
    hidden, columns = fc1_weight
    return 2 * x[0] * hidden * (columns + x[1])


def _flops_backward(grad_out, x, fc1_weight, *_, **__) -> int:
    return 2 * _flops(x, fc1_weight)


def _register(impl: str, device_types: tuple[str, ...], forward, backward) -> None:
    name = f"fused_attn::squeeze_excite_{impl}"
    torch.library.define(name, _SCHEMA)
    torch.library.define(f"{name}_backward", _BACKWARD_SCHEMA)
    torch.library.impl(name, device_types, forward)
    torch.library.impl(f"{name}_backward", device_types, backward)
    torch.library.register_fake(name, _fake)
    torch.library.register_fake(f"{name}_backward", _fake_backward)

    operator = getattr(torch.ops.fused_attn, f"squeeze_excite_{impl}_backward").default
    register_flop_formula(getattr(torch.ops.fused_attn, f"squeeze_excite_{impl}"))(_flops)
    register_flop_formula(operator.overloadpacket)(_flops_backward)

    def autograd_backward(ctx, grad_out, *_):
        residual_grad = ctx.residual and ctx.relu and ctx.needs_input_grad[7]
        x, fc1_weight, fc2_weight, result, out, z, hidden, scale = ctx.saved_tensors
        grad_x, grad_w1, grad_b1, grad_w2, grad_b2, grad_result, grad_share, grad_residual = operator(
            grad_out, x, fc1_weight, fc2_weight, result, out, z, hidden, scale, ctx.share, residual_grad
        )
        return (
            grad_x,
            grad_w1,
            grad_b1 if ctx.biases[0] else None,
            grad_w2,
            grad_b2 if ctx.biases[1] else None,
            grad_result if result is not None else None,
            grad_share if ctx.share else None,
            grad_residual if residual_grad else grad_out if ctx.residual else None,
            None,
        )

    autograd.register(
        "squeeze_excite", f"squeeze_excite_{impl}", autograd_backward, _setup_context, reference.squeeze_excite
    )


_register("cpu", ("cpu",), _cpu, _cpu_backward)
_register("triton", dispatch.TRITON_DEVICES, _triton, _triton_backward)
