"""Registration with PyTorch: schema, fake kernels, autograd, and what each implementation can run.

One operator per implementation, all with the schema below, so that ``torch.compile``, ``opcheck`` and an
explicit ``impl`` see exactly the kernel that runs.  ``row`` and ``col`` are either tables (2 or 3 dimensions,
multiplied with the query inside the operator) or finished logits (5 dimensions), or None.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from .._floor import autograd, dispatch
from .._floor.layout import empty_like_heads
from . import reference

#: Of the public functions that share the operators, for error texts.
_NAMES = "rel_attention_2d and decomposed_bias_attention"

_SCHEMA = (
    "(Tensor query, Tensor key, Tensor value, Tensor? row, Tensor? col, Scalar scale, Scalar rel_scale, "
    "bool key_minus_query, Scalar dropout_p, Tensor? seed) -> (Tensor out, Tensor lse)"
)
_BACKWARD_SCHEMA = (
    "(Tensor grad_out, Tensor query, Tensor key, Tensor value, Tensor? row, Tensor? col, Tensor out, Tensor lse, "
    "Scalar scale, Scalar rel_scale, bool key_minus_query, Scalar dropout_p, Tensor? seed) "
    "-> (Tensor grad_query, Tensor grad_key, Tensor grad_value, Tensor grad_row, Tensor grad_col)"
)


def attention(impl, query, key, value, row, col, scale, rel_scale, key_minus_query, dropout_p, seed) -> Tensor:
    """Run the operator of ``impl``; ``out`` only."""
    operator = getattr(torch.ops.fused_attn, f"rel_attention_2d_{impl}").default
    return operator(query, key, value, row, col, scale, rel_scale, key_minus_query, dropout_p, seed)[0]


# --- what can run -----------------------------------------------------------------------------------------------


def can_run_cpu(query: Tensor, key: Tensor, value: Tensor) -> str | None:
    return dispatch.cpu_reason(query)


def can_run_triton(query: Tensor, key: Tensor, value: Tensor) -> str | None:
    if (reason := dispatch.triton_reason(query)) is not None:
        return reason
    depth, deepest = max(query.shape[-1], value.shape[-1]), 128 if query.dtype == torch.float32 else 256
    if depth > deepest:
        return f"it computes depths up to 128 in float32 and 256 in float16 and bfloat16, got {depth} in {query.dtype}"
    return None


def can_run_reference(query: Tensor, key: Tensor, value: Tensor) -> str | None:
    return None


#: Implementations in the order ``auto`` prefers them.  The interpreter never wins over a real kernel.
IMPLEMENTATIONS = {"cpu": can_run_cpu, "triton": can_run_triton, "reference": can_run_reference}


# --- kernels ----------------------------------------------------------------------------------------------------


def _allocate_forward(query: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    # Per query the maximum and the sum of the exponentials: the rounding of their log-sum-exp would be an error
    # common to a whole row of weights.
    statistics = query.new_empty((*query.shape[:4], 2), dtype=torch.float32)
    return empty_like_heads(query, value.shape[-1]), statistics


def _allocate_backward(query, key, value, row, col) -> tuple[Tensor, ...]:
    grads = [empty_like_heads(tensor, tensor.shape[-1]) for tensor in (query, key, value)]
    for term in (row, col):
        grads.append(query.new_empty((0,)) if term is None else term.new_empty(term.shape))
    return tuple(grads)


def _cpu(query, key, value, row, col, scale, rel_scale, key_minus_query, dropout_p, seed):
    out, statistics = _allocate_forward(query, value)
    torch.ops.fused_attn_cpu.attention_2d_forward(
        query, key, value, row, col, scale, rel_scale, key_minus_query, dropout_p, seed, out, statistics
    )
    return out, statistics


def _cpu_backward(grad_out, query, key, value, row, col, out, lse, scale, rel_scale, key_minus_query, dropout_p, seed):
    grads = _allocate_backward(query, key, value, row, col)
    torch.ops.fused_attn_cpu.attention_2d_backward(
        grad_out, query, key, value, row, col, out, lse, scale, rel_scale, key_minus_query, dropout_p, seed, *grads
    )
    return grads


def _triton(*args):
    from . import triton_launch

    return triton_launch.forward(*args)


def _triton_backward(*args):
    from . import triton_launch

    return triton_launch.backward(*args)


# --- registration -----------------------------------------------------------------------------------------------


def _fake(query, key, value, *_):
    return _allocate_forward(query, value)


def _fake_backward(grad_out, query, key, value, row, col, out, lse, scale, rel_scale, key_minus_query, dropout_p, seed):
    return _allocate_backward(query, key, value, row, col)


def _setup_context(ctx, inputs, output) -> None:
    query, key, value, row, col, *options, seed = inputs
    out, lse = output
    ctx.mark_non_differentiable(lse)
    ctx.save_for_backward(query, key, value, row, col, out, lse, seed)
    ctx.options = options


def _reference(query, key, value, row, col, scale, rel_scale, key_minus_query, dropout_p, seed) -> Tensor:
    if any(term is not None and term.dim() == 5 for term in (row, col)):
        return reference.decomposed_bias_attention(query, key, value, row, col, scale, dropout_p, seed)
    index = "key_minus_query" if key_minus_query else "query_minus_key"
    return reference.rel_attention_2d(query, key, value, row, col, scale, rel_scale, index, dropout_p, seed)


def _score_elements(query_shape, key_shape) -> int:
    return math.prod(query_shape[:4]) * math.prod(key_shape[2:4])


def _table_elements(query_shape, key_shape, row_shape, col_shape) -> int:
    """Query-position pairs along the axes that have a table; finished logits cost no product."""
    keys = sum(
        key_shape[axis] for axis, shape in ((2, row_shape), (3, col_shape)) if shape is not None and len(shape) < 5
    )
    return math.prod(query_shape[:4]) * keys


def _flops(query, key, value, row, col, *_, **__) -> int:
    products = _score_elements(query, key) * (query[4] + value[4]) + _table_elements(query, key, row, col) * query[4]
    return 2 * products


def _flops_backward(grad_out, query, key, value, row, col, *_, **__) -> int:
    # As PyTorch counts its own fused attention: the logits once more, then two products for each forward one.
    elements = _score_elements(query, key)
    products = elements * (3 * query[4] + 2 * value[4]) + 3 * _table_elements(query, key, row, col) * query[4]
    return 2 * products


def _register(impl: str, device_types: tuple[str, ...], forward, backward) -> None:
    name = f"fused_attn::rel_attention_2d_{impl}"
    torch.library.define(name, _SCHEMA)
    torch.library.define(f"{name}_backward", _BACKWARD_SCHEMA)
    torch.library.impl(name, device_types, forward)
    torch.library.impl(f"{name}_backward", device_types, backward)
    torch.library.register_fake(name, _fake)
    torch.library.register_fake(f"{name}_backward", _fake_backward)

    operator = getattr(torch.ops.fused_attn, f"rel_attention_2d_{impl}_backward").default
    register_flop_formula(getattr(torch.ops.fused_attn, f"rel_attention_2d_{impl}"))(_flops)
    register_flop_formula(operator.overloadpacket)(_flops_backward)

    def autograd_backward(ctx, grad_out, _grad_lse):
        query, key, value, row, col, out, lse, seed = ctx.saved_tensors
        grads = operator(grad_out, query, key, value, row, col, out, lse, *ctx.options, seed)
        grad_row = grads[3] if row is not None else None
        grad_col = grads[4] if col is not None else None
        return (*grads[:3], grad_row, grad_col, None, None, None, None, None)

    autograd.register(_NAMES, f"rel_attention_2d_{impl}", autograd_backward, _setup_context, _reference)


_register("cpu", ("cpu",), _cpu, _cpu_backward)
_register("triton", dispatch.TRITON_DEVICES, _triton, _triton_backward)
