"""The operators: schemas, allocation, what each implementation can run, and FLOPs."""

from __future__ import annotations

import torch
from torch import Tensor

from .._floor import dispatch
from .._floor.layout import empty_contiguous, in_format, memory_format
from .._floor.operators import Operators, cpp, triton
from .._floor.sharding import Axis
from . import reference


def _empty_like(x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=memory_format(x))


def _allocate(x: Tensor, fc1_weight: Tensor, fc1_bias, fc2_weight, *_) -> tuple[Tensor | None, ...]:
    batch, channels = x.shape[:2]

    def of_width(width: int) -> Tensor:
        return x.new_empty(batch, width, dtype=torch.float32)

    return (
        _empty_like(x),
        of_width(channels),
        None if fc2_weight is None else of_width(fc1_weight.shape[0]),
        of_width(channels),
    )


def _allocate_backward(
    grad_out, x, fc1_weight, fc1_bias, fc2_weight, fc2_bias, result, result_share, active, z, preactivation, scale,
    hidden_activation, gate, residual_grad,
) -> tuple[Tensor | None, ...]:  # fmt: skip
    """The gradients, unwritten; None for those that were not asked for."""
    width, (batch, channels) = fc1_weight.shape[0], x.shape[:2]
    return (
        _empty_like(x),
        empty_contiguous(fc1_weight),
        x.new_empty(width),
        None if fc2_weight is None else empty_contiguous(fc2_weight),
        None if fc2_weight is None else x.new_empty(channels),
        None if result is None else empty_contiguous(result),
        None if result_share is None else x.new_empty(batch, width),
        _empty_like(x) if residual_grad else None,
    )


_cpp_forward, _cpp_backward = cpp("squeeze_excite_forward"), cpp("squeeze_excite_backward")
#: The numbers by which csrc/squeeze_excite/kernels.h knows the functions.
_HIDDEN_ACTIVATIONS, _GATES = (
    {name: place for place, name in enumerate(names)} for names in (reference.HIDDEN_ACTIVATIONS, reference.GATES)
)


def _forward(
    x, fc1_weight, fc1_bias, fc2_weight, fc2_bias, result, result_share, residual, relu, hidden_activation, gate,
    *outputs,
) -> None:  # fmt: skip
    form = memory_format(x)
    _cpp_forward(
        in_format(x, form), fc1_weight, fc1_bias, fc2_weight, fc2_bias, result, result_share,
        in_format(residual, form), relu, _HIDDEN_ACTIVATIONS[hidden_activation], _GATES[gate],
        form == torch.channels_last, *outputs,
    )  # fmt: skip


def _backward(
    grad_out, x, fc1_weight, fc1_bias, fc2_weight, fc2_bias, result, result_share, active, z, preactivation, scale,
    hidden_activation, gate, residual_grad, *grads,
) -> None:  # fmt: skip
    form = memory_format(x)
    _cpp_backward(
        in_format(grad_out, form), in_format(x, form), fc1_weight, fc2_weight, result, active, z, preactivation, scale,
        _HIDDEN_ACTIVATIONS[hidden_activation], _GATES[gate], form == torch.channels_last, *grads,
    )  # fmt: skip


#: Places among the operator's arguments and outputs.
_RESIDUAL, _RELU, _OUT = 7, 8, 11


def _complete(arguments: tuple, grads: tuple) -> tuple:
    """The gradients, with that of a residual without activation, which no kernel forms: it is the output's gradient."""
    *others, grad_residual = grads
    grad_out, *_, residual_grad = arguments
    return (*others, grad_residual if residual_grad else grad_out)


def _recompute(
    x, fc1_weight, fc1_bias, fc2_weight, fc2_bias, result, result_share, active, hidden_activation, gate, residual=None,
    **_,
) -> Tensor:  # fmt: skip
    """The output up to a residual, which no derivative of the gradients depends on, of backward's arguments."""
    parameters = fc1_weight, fc1_bias, fc2_weight, fc2_bias, result, result_share
    out = reference.squeeze_excite(x, *parameters, residual, False, hidden_activation, gate)
    return out if active is None else torch.where(active > 0, out, torch.zeros_like(out))


def _autocast(x: Tensor, *rest: Tensor | None) -> tuple:
    *parameters, residual = rest
    x, residual, *parameters = dispatch.autocast_maps((x, residual), *parameters)
    return (x, *parameters, residual)


def _flops(x, fc1_weight, fc1_bias, fc2_weight, *_, **__) -> int:
    rows, columns = fc1_weight[:2]
    return 2 * x[0] * rows * (columns + (0 if fc2_weight is None else x[1]))


#: Every gate is of all channels, so only images are on their own.
_IMAGES = Axis(
    dict.fromkeys(("x", "result", "result_share", "residual", "out", "active", "z", "preactivation", "scale"), 0)
)

squeeze_excite = Operators(
    "squeeze_excite",
    "(Tensor x, Tensor fc1_weight, Tensor? fc1_bias, Tensor? fc2_weight, Tensor? fc2_bias, Tensor? result, "
    "Tensor? result_share, Tensor? residual, bool relu, str hidden_activation, str gate) -> (Tensor out, Tensor z, "
    "Tensor preactivation, Tensor scale)",
    # The biases and the share are there for the derivatives of the gradients.
    "(Tensor grad_out, Tensor x, Tensor fc1_weight, Tensor? fc1_bias, Tensor? fc2_weight, Tensor? fc2_bias, "
    "Tensor? result, Tensor? result_share, Tensor? active, Tensor z, Tensor preactivation, Tensor scale, "
    "str hidden_activation, str gate, bool residual_grad) -> "
    "(Tensor grad_x, Tensor grad_fc1_weight, Tensor grad_fc1_bias, Tensor grad_fc2_weight, Tensor grad_fc2_bias, "
    "Tensor grad_result, Tensor grad_result_share, Tensor grad_residual)",
    allocate=_allocate,
    allocate_backward=_allocate_backward,
    kernels={
        "cpu": (_forward, _backward),
        "triton": (triton(__package__, "forward"), triton(__package__, "backward")),
    },
    autocast=_autocast,
    reference=reference.squeeze_excite,
    flops=_flops,
    flops_backward=lambda grad_out, *shapes, **_: 2 * _flops(*shapes),
    derived={
        # The output, whose sign says where the activation let pass.
        "active": lambda values, needs: values[_OUT] if values[_RELU] else None,
        "residual_grad": lambda values, needs: values[_RESIDUAL] is not None and values[_RELU] and needs[_RESIDUAL],
    },
    complete=_complete,
    recompute=_recompute,
    axes=lambda call: [_IMAGES],
)
