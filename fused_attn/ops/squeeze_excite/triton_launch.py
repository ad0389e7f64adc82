"""Launches of the Triton kernels: tiles, arguments and the entry points of op.py.

A launch is planned as data (:class:`Launch`) from shapes, strides and the memory format alone.  ``forward`` and
``backward`` run the plans; ``compile_cases`` gives the same plans over meta tensors to the compile report.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import torch
import triton
from torch import Tensor

from .._floor.launch import Launch, checked, compiler_options, strides
from .._floor.layout import in_format, memory_format
from .._floor.replay import run
from . import triton_kernels, triton_layer_kernels

#: Elements of a tile: 16 for each thread of 4 warps, two 16-byte loads of bfloat16.
_TILE = 2048
#: Longest run of positions in a tile, and of channels where these lie side by side.
_POSITIONS, _CHANNELS = 1024, 128
#: Outputs of a layer, over all samples, up to which tiles are small, and numbers of a weight.
_FEW_OUTPUTS, _FEW_WEIGHTS = 2**15, 2**17


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


def _squeeze(x: Tensor, z: Tensor) -> Launch:
    """Means of ``x`` into ``z``."""
    return _plan(triton_kernels.squeeze_fwd_kernel, x, {"x_ptr": x, "z_ptr": z}, all_positions=True)


def _scale(x: Tensor, scale: Tensor, residual: Tensor | None, out: Tensor, relu: bool) -> Launch:
    """``activation(x * scale + residual)`` into ``out``."""
    arguments = {"x_ptr": x, "scale_ptr": scale, "residual_ptr": residual, "out_ptr": out, "RELU": relu}
    return _plan(triton_kernels.scale_fwd_kernel, x, arguments, all_positions=False)


def _scale_backward(
    grad_out: Tensor, out: Tensor | None, x: Tensor, scale: Tensor, gate: str, grad_residual: Tensor | None,
    grad_logits: Tensor, grad_share: Tensor | None,
) -> Launch:  # fmt: skip
    """The gradients of the gate's argument and, where tensors are given for them, of the residual and the share."""
    arguments = {
        "grad_out_ptr": grad_out,
        "out_ptr": out,
        "x_ptr": x,
        "scale_ptr": scale,
        "grad_residual_ptr": grad_residual,
        "grad_logits_ptr": grad_logits,
        "grad_share_ptr": grad_share,
        "GATE": gate,
    }
    return _plan(triton_kernels.scale_bwd_kernel, x, arguments, all_positions=True)


def _squeeze_backward(grad_out: Tensor, out: Tensor | None, scale: Tensor, grad_z: Tensor, grad_x: Tensor) -> Launch:
    """``grad_x`` from the active gradient of the output and that of the means."""
    arguments = {
        "grad_out_ptr": grad_out,
        "out_ptr": out,
        "scale_ptr": scale,
        "grad_z_ptr": grad_z,
        "grad_x_ptr": grad_x,
    }
    return _plan(triton_kernels.squeeze_bwd_kernel, grad_x, arguments, all_positions=False)


class LayerLaunch(Launch):
    """A launch over the tiles of a layer's outputs, of its inputs or of its weight."""

    __slots__ = ()

    @property
    def tile(self) -> str:
        blocks = {name: size for name, size in self.arguments.items() if name.startswith("BLOCK_")}
        return " x ".join(f"{size} {_BLOCKS[name]}" for name, size in blocks.items())

    @property
    def bytes_per_tile(self) -> int:
        """Of the two factors of a tile's product."""
        arguments = self.arguments
        *sides, inner = (size for name, size in arguments.items() if name.startswith("BLOCK_"))
        left = arguments.get("grad_ptr", arguments.get("inputs_ptr"))
        right = arguments.get("weight_ptr", arguments.get("inputs_ptr"))
        return inner * (sides[0] * left.element_size() + sides[1] * right.element_size())


_BLOCKS = {"BLOCK_B": "samples", "BLOCK_O": "outputs", "BLOCK_I": "inputs", "BLOCK_K": "terms"}


@functools.cache
def _layer_blocks(batch: int, outputs: int, terms: int) -> dict[str, int]:
    """The tile of a layer's outputs, or inputs in backward, which are sums of so many terms.

    Of few outputs a tile is small, so that there are as many programs as can be, the threads share the terms, and the
    loop over them reads ahead.  Of many, threads also share the outputs: sums over threads cost more than products.
    """
    block_b, block_o, block_k, stages = (4, 8, 128, 3) if batch * outputs <= _FEW_OUTPUTS else (8, 32, 32, 1)
    return {
        "BLOCK_B": min(triton.next_power_of_2(batch), block_b),
        "BLOCK_O": block_o,
        "BLOCK_K": min(triton.next_power_of_2(terms), block_k),
        "STAGES": stages,
    }


def _launch_layer(kernel: Any, batch: int, outputs: int, terms: int, arguments: dict[str, Any]) -> Launch:
    blocks = _layer_blocks(batch, outputs, terms)
    programs = -(-batch // blocks["BLOCK_B"]) * -(-outputs // blocks["BLOCK_O"])
    return LayerLaunch(kernel, checked(programs, "x makes"), arguments | blocks, compiler_options(4, 2))


def _layer(
    result: Tensor | None, inputs: Tensor, weight: Tensor, bias: Tensor | None, share: Tensor | None,
    activation: str | None, gate: str | None, out: Tensor,
) -> Launch:  # fmt: skip
    """``gate([result, activation(inputs)] @ weight.T + bias + share)`` into ``out``."""
    (batch, outputs), columns = out.shape, weight.shape[1]
    arguments = {
        "result_ptr": result,
        "inputs_ptr": inputs,
        "weight_ptr": weight,
        "bias_ptr": bias,
        "share_ptr": share,
        "out_ptr": out,
        "batch": batch,
        "inputs": columns,
        "outputs": outputs,
        "features": columns - inputs.shape[1],
        "result_strides": strides(result),
        "weight_strides": strides(weight)[:2],
        "bias_strides": strides(bias),
        "share_strides": strides(share),
        "ACTIVATION": activation,
        "GATE": gate,
    }
    return _launch_layer(triton_layer_kernels.layer_fwd_kernel, batch, outputs, columns, arguments)


def _layer_backward(
    grad: Tensor, weight: Tensor, activation: str | None, preactivation: Tensor | None, grad_result: Tensor | None,
    grad_inputs: Tensor, grad_share: Tensor | None,
) -> Launch:  # fmt: skip
    """The gradients of a layer's inputs from that of its outputs, with ``preactivation`` of what it activates first.

    ``grad_inputs`` holds those behind ``grad_result``, ``grad_share`` those of all, in its own dtype.
    """
    (batch, outputs), columns = grad.shape, weight.shape[1]
    arguments = {
        "grad_ptr": grad,
        "weight_ptr": weight,
        "preactivation_ptr": preactivation,
        "grad_result_ptr": grad_result,
        "grad_inputs_ptr": grad_inputs,
        "grad_share_ptr": grad_share,
        "batch": batch,
        "inputs": columns,
        "outputs": outputs,
        "features": columns - grad_inputs.shape[1],
        "weight_strides": strides(weight)[:2],
        "ACTIVATION": activation,
    }
    return _launch_layer(triton_layer_kernels.layer_bwd_kernel, batch, columns, outputs, arguments)


def _parameters_backward(
    grad: Tensor, result: Tensor | None, inputs: Tensor, activation: str | None, grad_weight: Tensor, grad_bias: Tensor
) -> Launch:
    """The gradients of a layer's weight and bias from that of its outputs."""
    (batch, outputs), columns = grad.shape, grad_weight.shape[1]
    # More stages of the larger tile, or more samples at a time, spill registers.
    block, stages = (16, 3) if outputs * columns <= _FEW_WEIGHTS else (32, 2)
    arguments = {
        "grad_ptr": grad,
        "result_ptr": result,
        "inputs_ptr": inputs,
        "grad_weight_ptr": grad_weight,
        "grad_bias_ptr": grad_bias,
        "batch": batch,
        "inputs": columns,
        "outputs": outputs,
        "features": columns - inputs.shape[1],
        "result_strides": strides(result),
        "ACTIVATION": activation,
        "BLOCK_O": block,
        "BLOCK_I": block,
        "BLOCK_K": 16,
    }
    programs = -(-outputs // block) * -(-columns // block)
    return LayerLaunch(
        triton_layer_kernels.parameters_bwd_kernel, checked(programs, "x makes"), arguments, compiler_options(4, stages)
    )


def _features(result: Tensor | None) -> Tensor | None:
    """The result, if it has any features."""
    return None if result is None or result.shape[1] == 0 else result


def plan_forward(
    x, fc1_weight, fc1_bias, fc2_weight, fc2_bias, result, result_share, residual, relu, hidden_activation, gate,
    out, z, preactivation, scale,
) -> list[Launch]:  # fmt: skip
    """The launches of a forward pass; x and the residual are in one memory format."""
    first = result, z, fc1_weight, fc1_bias, result_share, None
    if fc2_weight is None:
        layers = [_layer(*first, gate, scale)]
    else:
        layers = [
            _layer(*first, None, preactivation),
            _layer(None, preactivation, fc2_weight, fc2_bias, None, hidden_activation, gate, scale),
        ]
    return [_squeeze(x, z), *layers, _scale(x, scale, residual, out, relu)]


def plan_backward(
    grad_out, x, fc1_weight, fc2_weight, result, active, z, preactivation, scale, hidden_activation, gate, grad_x,
    grad_w1, grad_b1, grad_w2, grad_b2, grad_result, grad_share, grad_residual,
) -> list[Launch]:  # fmt: skip
    """The launches of a backward pass; the maps are in one memory format, and None is a gradient not asked for."""
    grad_first = grad_logits = scale.new_empty(scale.shape)
    grad_z = z.new_empty(z.shape)
    layers = []
    if fc2_weight is not None:
        grad_first = preactivation.new_empty(preactivation.shape)
        layers = [
            _layer_backward(grad_logits, fc2_weight, hidden_activation, preactivation, None, grad_first, grad_share),
            _parameters_backward(grad_logits, None, preactivation, hidden_activation, grad_w2, grad_b2),
        ]
    layers += [
        _parameters_backward(grad_first, result, z, None, grad_w1, grad_b1),
        _layer_backward(grad_first, fc1_weight, None, None, grad_result, grad_z, None),
    ]
    share_of_logits = grad_share if fc2_weight is None else None
    # The residual's gradient is that of the output where it was active: one map to read instead of two.
    source, signs = (grad_out, active) if grad_residual is None else (grad_residual, None)
    return [
        _scale_backward(grad_out, active, x, scale, gate, grad_residual, grad_logits, share_of_logits),
        *layers,
        _squeeze_backward(source, signs, scale, grad_z, grad_x),
    ]


def forward(x, fc1_weight, fc1_bias, fc2_weight, fc2_bias, result, result_share, residual, *arguments) -> None:
    """Forward of the operators in op.py."""
    if x.shape[0] == 0:
        return
    form = memory_format(x)
    x, residual = in_format(x, form), in_format(residual, form)
    with torch.cuda.device_of(x):
        run(
            plan_forward, x, fc1_weight, fc1_bias, fc2_weight, fc2_bias, _features(result), result_share, residual,
            *arguments,
        )  # fmt: skip


def backward(
    grad_out, x, fc1_weight, fc1_bias, fc2_weight, fc2_bias, result, result_share, active, z, preactivation, scale,
    hidden_activation, gate, residual_grad, *grads,
) -> None:  # fmt: skip
    """Backward of the operators in op.py."""
    if x.shape[0] == 0:
        for grad in grads:
            grad.zero_()
        return
    *grads, grad_result, grad_share, grad_residual = grads
    form = memory_format(x)
    x, grad_out, result = in_format(x, form), in_format(grad_out, form), _features(result)
    with torch.cuda.device_of(x):
        run(
            plan_backward, grad_out, x, fc1_weight, fc2_weight, result, active, z, preactivation, scale,
            hidden_activation, gate, *grads, None if result is None else grad_result,
            None if result_share is None else grad_share, grad_residual if residual_grad else None,
        )  # fmt: skip


#: Cases of the compile report: name -> (map, dtype, channels_last, other settings).
_COMPILE_SHAPES: dict[str, tuple] = {
    "14x14, C 512": ((512, 14, 14), torch.bfloat16, False, {}),
    "14x14, C 512, channels_last": ((512, 14, 14), torch.bfloat16, True, {}),
    "56x56, C 256": ((256, 56, 56), torch.bfloat16, False, {}),
    "56x56, C 256, channels_last": ((256, 56, 56), torch.bfloat16, True, {}),
    "7x7, C 2048": ((2048, 7, 7), torch.bfloat16, False, {}),
    "7x7, C 2048, channels_last": ((2048, 7, 7), torch.bfloat16, True, {}),
    "14x14, C 512, float32": ((512, 14, 14), torch.float32, False, {}),
    "14x14, C 512, channels_last, float32": ((512, 14, 14), torch.float32, True, {}),
    "8x8, C 1024, result of 100": ((1024, 8, 8), torch.bfloat16, False, {"features": 100}),
    "28x28, C 240": ((240, 28, 28), torch.bfloat16, False, {"block": False, "hidden_activation": "silu"}),
    "28x28, C 240, channels_last": ((240, 28, 28), torch.bfloat16, True, {"block": False, "hidden_activation": "silu"}),
    "14x14, C 360": (
        (360, 14, 14), torch.bfloat16, False,
        {"block": False, "hidden_activation": "hardswish", "gate": "hardsigmoid"},
    ),
    "14x14, C 384, GELU": ((384, 14, 14), torch.bfloat16, False, {"hidden_activation": "gelu"}),
    "28x28, C 512, one layer": (
        (512, 28, 28), torch.bfloat16, False, {"block": False, "layers": 1, "gate": "hardsigmoid"},
    ),
}  # fmt: skip


def _compile_case(
    size, dtype, channels_last, *, features=0, block=True, hidden_activation="relu", gate="sigmoid", layers=2
) -> list[Launch]:
    """Both passes; ``block``: with residual and ReLU."""
    form = torch.channels_last if channels_last else torch.contiguous_format
    x = torch.empty((128, *size), dtype=dtype, device="meta").contiguous(memory_format=form)
    batch, channels = x.shape[:2]
    hidden = channels // 16 if layers == 2 else channels
    first = x.new_empty(hidden, features + channels), x.new_empty(hidden)
    second = (x.new_empty(channels, hidden), x.new_empty(channels)) if layers == 2 else (None, None)
    z, preactivation, scale = (x.new_empty(batch, n, dtype=torch.float32) for n in (channels, hidden, channels))
    result, residual = x.new_empty(batch, features) if features else None, x if block else None
    functions, saved = (hidden_activation, gate), (z, preactivation, scale)
    return [
        *plan_forward(x, *first, *second, result, None, residual, block, *functions, x, *saved),
        *plan_backward(
            x, x, first[0], second[0], result, residual, *saved, *functions, x, *first, *second, result, None, residual
        ),
    ]


def compile_cases(arch: str) -> Iterator[tuple[str, Launch]]:
    """(case, launch) of every kernel over meta tensors, most with residual and ReLU: see compile_report.py."""
    for name, (*case, settings) in _COMPILE_SHAPES.items():
        kernels: list[str] = []
        for launch in _compile_case(*case, **settings):
            kernels.append(launch.kernel.fn.__name__)
            number = kernels.count(kernels[-1])  # one kernel is launched for each layer
            yield name if number == 1 else f"{name}, launch {number}", launch
