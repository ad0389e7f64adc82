"""Registration with PyTorch: schema, fake kernels, autograd, and what each implementation can run.

One operator per implementation, all with the schema below, so that ``torch.compile``, ``opcheck`` and an explicit
``impl`` see exactly the kernel that runs.  ``statistics`` (..., L, 2) holds, per token and value, the logit and
``1 / sqrt(mean(value**2) + eps)``, in float32.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from .._floor import autograd, dispatch
from . import reference

_SCHEMA = "(Tensor[] values, Tensor query, Tensor? norm_weight, Scalar eps) -> (Tensor out, Tensor statistics)"
_BACKWARD_SCHEMA = (
    "(Tensor grad_out, Tensor[] values, Tensor query, Tensor? norm_weight, Tensor statistics) "
    "-> (Tensor[] grad_values, Tensor grad_query, Tensor grad_norm_weight)"
)


def attention(impl, values, query, norm_weight, eps) -> Tensor:
    """Run the operator of ``impl``; ``out`` only."""
    return getattr(torch.ops.fused_attn, f"attention_residual_{impl}").default(values, query, norm_weight, eps)[0]


# --- what can run -----------------------------------------------------------------------------------------------


def can_run_cpu(values: Sequence[Tensor], query: Tensor) -> str | None:
    return dispatch.cpu_reason(query)


def can_run_triton(values: Sequence[Tensor], query: Tensor) -> str | None:
    if (reason := dispatch.triton_reason(query)) is not None:
        return reason
    if len(values) > _MOST_VALUES:
        return f"it takes up to {_MOST_VALUES} values, got {len(values)}"
    if query.shape[0] > _DEEPEST:
        return f"it takes values of up to {_DEEPEST} numbers per token, got {query.shape[0]}"
    return None


def can_run_reference(values: Sequence[Tensor], query: Tensor) -> str | None:
    return None


# The Triton kernels name every value as an argument, and hold whole rows in registers.
_MOST_VALUES, _DEEPEST = 32, 8192

#: Implementations in the order ``auto`` prefers them.  The interpreter never wins over a real kernel.
IMPLEMENTATIONS = {"cpu": can_run_cpu, "triton": can_run_triton, "reference": can_run_reference}


# --- kernels ----------------------------------------------------------------------------------------------------


def rows(tensor: Tensor) -> Tensor:
    """View (..., D) as (outer, inner, D) with contiguous rows; copies only where no such view exists."""
    tensor = tensor[(None,) * (3 - tensor.dim())] if tensor.dim() < 3 else tensor.flatten(0, -3)
    return tensor if tensor.stride(-1) == 1 or tensor.shape[-1] == 1 else tensor.contiguous()


def _allocate_forward(values: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    shape = values[0].shape
    return values[0].new_empty(shape), values[0].new_empty((*shape[:-1], len(values), 2), dtype=torch.float32)


def _allocate_backward(values, query, norm_weight) -> tuple[list[Tensor], Tensor, Tensor]:
    grad_norm_weight = query.new_empty((0,) if norm_weight is None else query.shape)
    return [value.new_empty(value.shape) for value in values], query.new_empty(query.shape), grad_norm_weight


def _cpu(values, query, norm_weight, eps):
    out, statistics = _allocate_forward(values)
    torch.ops.fused_attn_cpu.attention_residual_forward(
        [rows(value) for value in values], query, norm_weight, eps, rows(out), statistics
    )
    return out, statistics


def _cpu_backward(grad_out, values, query, norm_weight, statistics):
    grads = grad_values, grad_query, grad_norm_weight = _allocate_backward(values, query, norm_weight)
    torch.ops.fused_attn_cpu.attention_residual_backward(
        rows(grad_out),
        [rows(value) for value in values],
        query,
        norm_weight,
        statistics,
        [rows(grad) for grad in grad_values],
        grad_query,
        grad_norm_weight,
    )
    return grads


def _triton(*args):
    from . import triton_launch

    return triton_launch.forward(*args)


def _triton_backward(*args):
    from . import triton_launch

    return triton_launch.backward(*args)


# --- registration -----------------------------------------------------------------------------------------------


def _fake(values, query, norm_weight, eps):
    return _allocate_forward(values)


def _fake_backward(grad_out, values, query, norm_weight, statistics):
    return _allocate_backward(values, query, norm_weight)


def _flops(values, *_, **__) -> int:
    # Mean square, inner product with the query, weighted sum.
    return 6 * len(values) * math.prod(values[0])


def _flops_backward(grad_out, values, *_, **__) -> int:
    # Inner product with the gradient, three terms of the value's gradient, one of the query's.
    return 9 * len(values) * math.prod(values[0])


def _register(impl: str, device_types: tuple[str, ...], forward, backward) -> None:
    name = f"fused_attn::attention_residual_{impl}"
    torch.library.define(name, _SCHEMA)
    torch.library.define(f"{name}_backward", _BACKWARD_SCHEMA)
    torch.library.impl(name, device_types, forward)
    torch.library.impl(f"{name}_backward", device_types, backward)
    torch.library.register_fake(name, _fake)
    torch.library.register_fake(f"{name}_backward", _fake_backward)

    operator = getattr(torch.ops.fused_attn, f"attention_residual_{impl}_backward").default
    register_flop_formula(getattr(torch.ops.fused_attn, f"attention_residual_{impl}"))(_flops)
    register_flop_formula(operator.overloadpacket)(_flops_backward)

    def setup_context(ctx, inputs, output) -> None:
        values, query, norm_weight, _ = inputs
        _, statistics = output
        ctx.mark_non_differentiable(statistics)
        ctx.save_for_backward(query, norm_weight, statistics, *values)

    def autograd_backward(ctx, grad_out, _grad_statistics):
        query, norm_weight, statistics, *values = ctx.saved_tensors
        grad_values, grad_query, grad_norm_weight = operator(grad_out, values, query, norm_weight, statistics)
        return list(grad_values), grad_query, None if norm_weight is None else grad_norm_weight, None

    autograd.register(
        "attention_residual",
        f"attention_residual_{impl}",
        autograd_backward,
        setup_context,
        reference.attention_residual,
    )


_register("cpu", ("cpu",), _cpu, _cpu_backward)
_register("triton", dispatch.TRITON_DEVICES, _triton, _triton_backward)
