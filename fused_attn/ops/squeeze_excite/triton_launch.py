"""Launches of the Triton kernels: tiles, arguments, the small layers between them, and the entry points of op.py.

A launch is planned as data (:class:`Launch`) from shapes and the memory format alone.  ``forward`` and ``backward`` run
the plans; ``compile_cases`` gives the same plans over meta tensors to the compile report.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
import triton
from torch import Tensor

from .._floor.launch import Launch, checked, compiler_options
from .._floor.layout import in_format, memory_format
from .._floor.replay import run
from . import reference, triton_kernels

#: Elements of a tile: 16 for each thread of 4 warps, two 16-byte loads of bfloat16.
_TILE = 2048
#: Longest run of positions in a tile, and of channels where these lie side by side.
_POSITIONS, _CHANNELS = 1024, 128


class MapLaunch(Launch):
    """A launch over the tiles of maps."""

    __slots__ = ()

    @property
    def tile(self) -> str:
        order = "channels last" if self.arguments["CHANNELS_LAST"] else "contiguous"
        return f"{self.arguments['BLOCK_C']} channels x {self.arguments['BLOCK_P']} positions, {order}"

    @property
    def bytes_per_tile(self) -> int:
        """Of the maps that are read or written."""
        maps = (value for value in self.arguments.values() if isinstance(value, Tensor) and value.dim() == 4)
        elements = self.arguments["BLOCK_C"] * self.arguments["BLOCK_P"]
        return elements * sum(tensor.element_size() for tensor in maps)


@functools.cache
def _blocks(channels: int, positions: int, channels_last: bool) -> tuple[int, int]:
    """Channels and positions of a tile."""
    if channels_last:
        block_c = min(triton.next_power_of_2(channels), _CHANNELS)
        return block_c, min(triton.next_power_of_2(positions), _TILE // block_c)
    block_p = min(triton.next_power_of_2(positions), _POSITIONS)
    return min(triton.next_power_of_2(channels), _TILE // block_p), block_p


def _plan(kernel: Any, x: Tensor, arguments: dict[str, Any], *, all_positions: bool) -> Launch:
    """A launch over the tiles of ``x``; with ``all_positions`` a program walks over those of its channels."""
    batch, channels, height, width = x.shape
    positions, channels_last = height * width, memory_format(x) == torch.channels_last
    block_c, block_p = _blocks(channels, positions, channels_last)
    programs = batch * -(-channels // block_c) * (1 if all_positions else -(-positions // block_p))
    arguments = arguments | {
        "CHANNELS": channels,
        "POSITIONS": positions,
        "CHANNELS_LAST": channels_last,
        "BLOCK_C": block_c,
        "BLOCK_P": block_p,
    }
    return MapLaunch(kernel, checked(programs, "x makes"), arguments, compiler_options(4, 2))


def plan_squeeze(x: Tensor, z: Tensor) -> Launch:
    """Means of ``x`` into ``z``."""
    return _plan(triton_kernels.squeeze_fwd_kernel, x, {"x_ptr": x, "z_ptr": z}, all_positions=True)


def plan_scale(x: Tensor, scale: Tensor, residual: Tensor | None, out: Tensor, relu: bool) -> Launch:
    """``activation(x * scale + residual)`` into ``out``."""
    arguments = {"x_ptr": x, "scale_ptr": scale, "residual_ptr": residual, "out_ptr": out, "RELU": relu}
    return _plan(triton_kernels.scale_fwd_kernel, x, arguments, all_positions=False)


def plan_scale_backward(
    grad_out: Tensor, out: Tensor | None, x: Tensor, grad_residual: Tensor | None, grad_scale: Tensor
) -> Launch:
    """The gradients of ``scale`` and, where a tensor is given for it, of the residual."""
    arguments = {
        "grad_out_ptr": grad_out,
        "out_ptr": out,
        "x_ptr": x,
        "grad_residual_ptr": grad_residual,
        "grad_scale_ptr": grad_scale,
    }
    return _plan(triton_kernels.scale_bwd_kernel, x, arguments, all_positions=True)


def plan_squeeze_backward(
    grad_out: Tensor, out: Tensor | None, scale: Tensor, grad_z: Tensor, grad_x: Tensor
) -> Launch:
    """``grad_x`` from the active gradient of the output and that of the means."""
    arguments = {
        "grad_out_ptr": grad_out,
        "out_ptr": out,
        "scale_ptr": scale,
        "grad_z_ptr": grad_z,
        "grad_x_ptr": grad_x,
    }
    return _plan(triton_kernels.squeeze_bwd_kernel, grad_x, arguments, all_positions=False)


def _float(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.float()


def _matrix(weight: Tensor) -> Tensor:
    """The weight of a linear layer or a 1x1 convolution, in float32."""
    return weight.flatten(1).float()


_BELOW_ONE = 1.0 - torch.finfo(torch.float32).eps / 2
#: name -> gradient of the hidden activation's argument, of the gradient of its value and of the argument.
_ACTIVATION_BACKWARD: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "relu": lambda grad, x: torch.ops.aten.threshold_backward(grad, x, 0),
    "silu": torch.ops.aten.silu_backward,
    "gelu": torch.ops.aten.gelu_backward,
    "hardswish": torch.ops.aten.hardswish_backward,
}


def _scale_of(logits: Tensor, gate: str) -> Tensor:
    scale = reference.GATES[gate](logits)
    if gate == "hardsigmoid":
        # Below 1 wherever x < 3, though x + 3 may round to 6: the scale alone then says where the gate has a slope.
        scale = torch.where(logits < 3.0, scale.clamp(max=_BELOW_ONE), scale)
    return scale


def _through_gate(grad: Tensor, scale: Tensor, gate: str) -> Tensor:
    """The gradient of the gate's argument from that of its value, ``scale``."""
    if gate == "sigmoid":
        return grad.mul_(scale * (1.0 - scale))
    return torch.where((scale > 0.0) & (scale < 1.0), grad * (1.0 / 6.0), 0.0)


def forward(
    x, fc1_weight, fc1_bias, fc2_weight, fc2_bias, result, result_share, residual, relu, hidden_activation, gate,
    out, z, preactivation, scale,
) -> None:  # fmt: skip
    """Forward of the operators in op.py."""
    if x.shape[0] == 0:
        return
    form = memory_format(x)
    x, residual = in_format(x, form), in_format(residual, form)
    features = 0 if result is None else result.shape[1]
    weight = _matrix(fc1_weight)
    with torch.cuda.device_of(x):
        run(plan_squeeze, x, z)
        first = F.linear(z, weight[:, features:], _float(fc1_bias))
        if result is not None:
            first.addmm_(result.float(), weight[:, :features].t())
        if result_share is not None:
            first += result_share
        if fc2_weight is not None:
            preactivation.copy_(first)
            hidden = reference.HIDDEN_ACTIVATIONS[hidden_activation](first)
            first = F.linear(hidden, _matrix(fc2_weight), _float(fc2_bias))
        scale.copy_(_scale_of(first, gate))
        run(plan_scale, x, scale, residual, out, relu)


def backward(
    grad_out, x, fc1_weight, fc2_weight, result, active, z, preactivation, scale, hidden_activation, gate, share_grad,
    residual_grad, *grads,
) -> None:  # fmt: skip
    """Backward of the operators in op.py."""
    if x.shape[0] == 0:
        for grad in grads:
            grad.zero_()
        return
    grad_x, grad_w1, grad_b1, grad_w2, grad_b2, grad_result, grad_share, grad_residual = grads
    form = memory_format(x)
    x, grad_out = in_format(x, form), in_format(grad_out, form)
    features = 0 if result is None else result.shape[1]
    weight, grad_w1 = _matrix(fc1_weight), grad_w1.flatten(1)
    with torch.cuda.device_of(x):
        grad_first = torch.empty_like(scale)
        run(plan_scale_backward, grad_out, active, x, grad_residual if residual_grad else None, grad_first)
        grad_first = _through_gate(grad_first, scale, gate)
        if fc2_weight is not None:
            hidden = reference.HIDDEN_ACTIVATIONS[hidden_activation](preactivation)
            grad_w2.flatten(1).copy_(grad_first.t() @ hidden)
            grad_b2.copy_(grad_first.sum(0))
            grad_hidden = grad_first @ _matrix(fc2_weight)
            grad_first = _ACTIVATION_BACKWARD[hidden_activation](grad_hidden, preactivation)
        grad_w1[:, features:].copy_(grad_first.t() @ z)
        grad_b1.copy_(grad_first.sum(0))
        if result is not None:
            grad_w1[:, :features].copy_(grad_first.t() @ result.float())
            grad_result.copy_(grad_first @ weight[:, :features])
        if share_grad:
            grad_share.copy_(grad_first)
        # The residual's gradient is that of the output where it was active: one map to read instead of two.
        source, signs = (grad_residual, None) if residual_grad else (grad_out, active)
        run(plan_squeeze_backward, source, signs, scale, grad_first @ weight[:, features:], grad_x)


#: Cases of the compile report: name -> (map, dtype, channels_last).  C 240 is EfficientNet's: the gate alone.
_COMPILE_SHAPES: dict[str, tuple] = {
    "14x14, C 512": ((512, 14, 14), torch.bfloat16, False),
    "14x14, C 512, channels_last": ((512, 14, 14), torch.bfloat16, True),
    "56x56, C 256": ((256, 56, 56), torch.bfloat16, False),
    "56x56, C 256, channels_last": ((256, 56, 56), torch.bfloat16, True),
    "7x7, C 2048": ((2048, 7, 7), torch.bfloat16, False),
    "7x7, C 2048, channels_last": ((2048, 7, 7), torch.bfloat16, True),
    "14x14, C 512, float32": ((512, 14, 14), torch.float32, False),
    "14x14, C 512, channels_last, float32": ((512, 14, 14), torch.float32, True),
    "28x28, C 240": ((240, 28, 28), torch.bfloat16, False),
    "28x28, C 240, channels_last": ((240, 28, 28), torch.bfloat16, True),
}


def compile_cases(arch: str) -> Iterator[tuple[str, Launch]]:
    """(case, launch) of every kernel, most with residual and ReLU, over meta tensors: see compile_report.py.

    Hidden activations, gates and the number of layers are no part of these kernels.
    """
    for name, (size, dtype, channels_last) in _COMPILE_SHAPES.items():
        form = torch.channels_last if channels_last else torch.contiguous_format
        x = torch.empty((128, *size), dtype=dtype, device="meta").contiguous(memory_format=form)
        per_channel = torch.empty((128, size[0]), dtype=torch.float32, device="meta")
        block = None if size[0] == 240 else x
        for launch in (
            plan_squeeze(x, per_channel),
            plan_scale(x, per_channel, block, x, block is not None),
            plan_scale_backward(x, block, x, block, per_channel),
            plan_squeeze_backward(x, None, per_channel, per_channel, x),
        ):
            yield name, launch
