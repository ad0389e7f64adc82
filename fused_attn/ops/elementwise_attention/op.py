"""Registration with PyTorch: schemas, fake kernels, autograd, and what each implementation can run.

Two operators per implementation, one for each public function, both functional: ``elementwise_attention`` returns the
statistics of the batch, and api.py updates the running ones.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .._floor import autograd, dispatch
from . import reference

# Statistics: per plane (batch, head, channel) and per row or column, a shift (the maximum of the logits or near it) and
# the sum of e^(logit - shift).  The pair rather than a log-sum-exp, whose rounding a whole row would share.
_STATISTICS = "Tensor row_stats, Tensor col_stats"
_SOFTMAX = f"(Tensor x, Tensor? weight_row, Tensor? weight_col) -> (Tensor out, {_STATISTICS})"
_SOFTMAX_BACKWARD = (
    f"(Tensor grad_out, Tensor x, Tensor? weight_row, Tensor? weight_col, {_STATISTICS}) "
    "-> (Tensor grad_x, Tensor grad_weight_row, Tensor grad_weight_col)"
)
# mean and var None: normalise with the statistics of the batch.  Both come back as they were used, float32.
_ATTENTION = (
    "(Tensor x, Tensor weight_row, Tensor weight_col, Tensor? mean, Tensor? var, Scalar eps) "
    f"-> (Tensor out, {_STATISTICS}, Tensor mean_used, Tensor var_used)"
)
_ATTENTION_BACKWARD = (
    f"(Tensor grad_out, Tensor x, Tensor weight_row, Tensor weight_col, {_STATISTICS}, Tensor mean, Tensor var, "
    "bool training, Scalar eps) -> (Tensor grad_x, Tensor grad_weight_row, Tensor grad_weight_col)"
)


def row_col_softmax(impl: str, x: Tensor, weight_row: Tensor | None, weight_col: Tensor | None) -> Tensor:
    """Run the operator of ``impl``; ``out`` only."""
    return getattr(torch.ops.fused_attn, f"row_col_softmax_{impl}").default(x, weight_row, weight_col)[0]


def elementwise_attention(impl: str, x, weight_row, weight_col, mean, var, eps) -> tuple[Tensor, Tensor, Tensor]:
    """Run the operator of ``impl``; ``out`` and the mean and biased variance it normalised with."""
    operator = getattr(torch.ops.fused_attn, f"elementwise_attention_{impl}").default
    out, _, _, mean, var = operator(x, weight_row, weight_col, mean, var, eps)
    return out, mean, var


# --- what can run -----------------------------------------------------------------------------------------------


def can_run_cpu(x: Tensor) -> str | None:
    return dispatch.cpu_reason(x)


def can_run_triton(x: Tensor) -> str | None:
    return dispatch.triton_reason(x)


def can_run_reference(x: Tensor) -> str | None:
    return None


#: Implementations in the order ``auto`` prefers them.  The interpreter never wins over a real kernel.
IMPLEMENTATIONS = {"cpu": can_run_cpu, "triton": can_run_triton, "reference": can_run_reference}


# --- allocation -------------------------------------------------------------------------------------------------


def _allocate_statistics(x: Tensor, heads: int) -> tuple[Tensor, Tensor]:
    batch, channels, height, width = x.shape
    return tuple(x.new_empty((batch, heads, channels, 2, size), dtype=torch.float32) for size in (height, width))


def _allocate_softmax(x: Tensor, weight_row: Tensor | None, *_) -> tuple[Tensor, Tensor, Tensor]:
    batch, channels, height, width = x.shape
    if weight_row is None:
        return x.new_empty(x.shape), *_allocate_statistics(x, 1)
    heads = weight_row.shape[0]
    return x.new_empty((batch, heads, channels, height, width)), *_allocate_statistics(x, heads)


def _allocate_attention(x: Tensor, weight_row: Tensor, *_) -> tuple[Tensor, ...]:
    batch, channels, height, width = x.shape
    heads = weight_row.shape[0]
    out = x.new_empty((batch, heads * channels, height, width))
    mean, var = (x.new_empty((heads * channels,), dtype=torch.float32) for _ in range(2))
    return out, *_allocate_statistics(x, heads), mean, var


def _allocate_backward(x: Tensor, weight_row: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    shape = (0,) if weight_row is None else weight_row.shape
    return x.new_empty(x.shape), x.new_empty(shape), x.new_empty(shape)


# --- kernels ----------------------------------------------------------------------------------------------------


def _cpu_softmax(x, weight_row, weight_col):
    outputs = _allocate_softmax(x, weight_row)
    torch.ops.fused_attn_cpu.row_col_softmax_forward(x, weight_row, weight_col, *outputs)
    return outputs


def _cpu_softmax_backward(grad_out, x, weight_row, weight_col, row_stats, col_stats):
    grads = _allocate_backward(x, weight_row)
    if grad_out.numel() == 0:
        return tuple(grad.zero_() for grad in grads)
    torch.ops.fused_attn_cpu.row_col_softmax_backward(grad_out, x, weight_row, weight_col, row_stats, col_stats, *grads)
    return grads


def _cpu_attention(x, weight_row, weight_col, mean, var, eps):
    outputs = _allocate_attention(x, weight_row)
    training = mean is None
    if not training:
        outputs[3].copy_(mean), outputs[4].copy_(var)
    torch.ops.fused_attn_cpu.elementwise_attention_forward(x, weight_row, weight_col, training, eps, *outputs)
    return outputs


def _cpu_attention_backward(grad_out, x, weight_row, weight_col, row_stats, col_stats, mean, var, training, eps):
    grads = _allocate_backward(x, weight_row)
    if grad_out.numel() == 0:
        return tuple(grad.zero_() for grad in grads)
    torch.ops.fused_attn_cpu.elementwise_attention_backward(
        grad_out, x, weight_row, weight_col, row_stats, col_stats, mean, var, training, eps, *grads
    )
    return grads


def _triton(entry_point: str):
    """An entry point of triton_launch.py, which is imported on the first call."""

    def run(*args):
        from . import triton_launch

        return getattr(triton_launch, entry_point)(*args)

    return run


# --- registration -----------------------------------------------------------------------------------------------


def _setup_softmax(ctx, inputs, output) -> None:
    _, row_stats, col_stats = output
    ctx.mark_non_differentiable(row_stats, col_stats)
    ctx.save_for_backward(*inputs, row_stats, col_stats)


def _setup_attention(ctx, inputs, output) -> None:
    x, weight_row, weight_col, mean, _, eps = inputs
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(x, weight_row, weight_col, *output[1:])
    ctx.options = mean is None, eps


def _reference_attention(x, weight_row, weight_col, mean, var, eps) -> Tensor:
    return reference.elementwise_attention(x, weight_row, weight_col, mean, var, eps)[0]


def _register(
    op: str, impl: str, device_types, schemas, kernels, allocate, allocate_backward, setup, backward, plain
) -> None:
    name = f"fused_attn::{op}_{impl}"
    for suffix, schema, kernel, fake in (
        ("", schemas[0], kernels[0], allocate),
        ("_backward", schemas[1], kernels[1], allocate_backward),
    ):
        torch.library.define(name + suffix, schema)
        torch.library.impl(name + suffix, device_types, kernel)
        torch.library.register_fake(name + suffix, fake)
    operator = getattr(torch.ops.fused_attn, f"{op}_{impl}_backward").default

    def autograd_backward(ctx, grad_out, *_):
        return backward(operator, ctx, grad_out)

    autograd.register(op, f"{op}_{impl}", autograd_backward, setup, plain)


def _softmax_backward(operator, ctx, grad_out):
    saved = ctx.saved_tensors  # read once: under torch.utils.checkpoint a second reading is an error
    grads = operator(grad_out, *saved)
    return grads if saved[1] is not None else (grads[0], None, None)


def _attention_backward(operator, ctx, grad_out):
    return (*operator(grad_out, *ctx.saved_tensors, *ctx.options), None, None, None)


def _fake_backward(grad_out, x, weight_row, *_):
    return _allocate_backward(x, weight_row)


def _register_all(impl: str, device_types: tuple[str, ...], softmax, attention) -> None:
    _register(
        "row_col_softmax", impl, device_types, (_SOFTMAX, _SOFTMAX_BACKWARD), softmax, _allocate_softmax,
        _fake_backward, _setup_softmax, _softmax_backward, reference.row_col_softmax,
    )  # fmt: skip
    _register(
        "elementwise_attention", impl, device_types, (_ATTENTION, _ATTENTION_BACKWARD), attention, _allocate_attention,
        _fake_backward, _setup_attention, _attention_backward, _reference_attention,
    )  # fmt: skip


_register_all("cpu", ("cpu",), (_cpu_softmax, _cpu_softmax_backward), (_cpu_attention, _cpu_attention_backward))
_register_all(
    "triton",
    dispatch.TRITON_DEVICES,
    (_triton("softmax_forward"), _triton("softmax_backward")),
    (_triton("attention_forward"), _triton("attention_backward")),
)
