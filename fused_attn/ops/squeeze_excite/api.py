"""Public function: check, choose, run."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .._floor import checks
from .._floor.tracing import leaf
from . import op, reference

ACTIVATIONS = (None, "relu")
HIDDEN_ACTIVATIONS, GATES = tuple(reference.HIDDEN_ACTIVATIONS), tuple(reference.GATES)


@leaf
def squeeze_excite(
    x: Tensor,
    fc1_weight: Tensor,
    fc1_bias: Tensor | None,
    fc2_weight: Tensor | None = None,
    fc2_bias: Tensor | None = None,
    *,
    result: Tensor | None = None,
    result_share: Tensor | None = None,
    residual: Tensor | None = None,
    activation: str | None = None,
    hidden_activation: str = "relu",
    gate: str = "sigmoid",
    impl: str = "auto",
) -> Tensor:
    """Scale every channel of a feature map by a gate computed from the channel means, and add the block's shortcut.

    ``z = mean of x over H, W;  s = gate(fc2_weight hidden_activation(fc1_weight [result, z] + fc1_bias) + fc2_bias);
    out = activation(x * s + residual)``.

    Without ``fc2_weight`` there is one layer, as in Effective SE: ``s = gate(fc1_weight [result, z] + fc1_bias)``.

    Args:
        x: (B, C, H, W), float32, float16 or bfloat16 (float64: reference only), at least one channel and position.
            Contiguous and channels_last are read in place; other strides cost a copy.
        fc1_weight: (hidden, C), or (hidden, n + C) with a result, whose n columns come first; dtype of ``x``.  Of one
            layer, hidden is C.  The weight of a 1x1 convolution, (hidden, C, 1, 1), is taken as it is, and its
            gradient has its shape.
        fc1_bias: (hidden,) or None.
        fc2_weight: (C, hidden) or (C, hidden, 1, 1); None: one layer.
        fc2_bias: (C,) or None; None with one layer.
        result: (B, n), what an auxiliary classifier says of each sample; joins z.  None: plain squeeze-excite.
        result_share: (B, hidden), the result's part of the first layer, ``result @ fc1_weight[:, :n].T``, computed
            beforehand (for all blocks of a stage in one product: :func:`result_shares`).  ``fc1_weight`` is then
            (hidden, C).  Not together with ``result``.
        residual: (B, C, H, W), added to the scaled map.
        activation: None, or ``"relu"`` after the addition.
        hidden_activation: ``"relu"``, ``"silu"``, ``"gelu"`` (the exact one, with erf) or ``"hardswish"``, as PyTorch
            defines them; ``"relu"`` with one layer, which has no use for it.
        gate: ``"sigmoid"`` or ``"hardsigmoid"``, as PyTorch defines them.
        impl: ``"auto"``, ``"reference"``, ``"cpu"`` or ``"triton"``.

    Returns:
        (B, C, H, W), dtype and memory format of ``x``.

    Raises:
        TypeError: an argument is not a tensor, or not of a floating-point dtype.
        ValueError: shapes, dtypes or devices do not fit, or an option is out of range.
        RuntimeError: the named ``impl`` cannot run on these inputs.

    Gradients reach every tensor; they are computed without atomics, and ``cpu`` gives the same bits at every run and
    number of threads.  x is read twice and out written once; what is saved for backward beside the inputs is z, s and,
    with two layers, the output of the first in float32, and, with an activation, out, whose sign says where it was
    active.  Under autocast the maps keep their dtype, the wider one of x and the residual, as in ``x * s + residual``;
    the rest is cast to it.

    Source: Hu et al. 2017, "Squeeze-and-Excitation Networks", eq. 2-4; Ye, "Introduce the Result Into Self-Attention",
    eq. 4-6; one layer: Lee and Park 2019, "CenterMask: Real-Time Anchor-Free Instance Segmentation", eq. 2-3.
    """
    return run(
        impl, x, fc1_weight, fc1_bias, fc2_weight, fc2_bias, result, result_share, residual, activation,
        hidden_activation, gate,
    )[0]  # fmt: skip


def _check(
    x: Tensor, fc1_weight: Tensor, fc1_bias: Tensor | None, fc2_weight: Tensor | None, fc2_bias: Tensor | None,
    result: Tensor | None, result_share: Tensor | None, residual: Tensor | None, activation: str | None,
    hidden_activation: str, gate: str,
) -> tuple[Any, ...]:  # fmt: skip
    """The arguments of the operator."""
    _check_tensor("x", x, 4, "(B, C, H, W)")
    batch, channels, height, width = x.shape
    if channels == 0 or height == 0 or width == 0:
        raise ValueError(f"x must have at least one channel and one position, got shape {tuple(x.shape)}")
    features = 0
    if result is not None:
        _check_tensor("result", result, 2, "(B, n)")
        if result_share is not None:
            raise ValueError("result_share must be None where a result is given: it stands for the result")
        if result.shape[0] != batch:
            raise ValueError(f"result must have the batch of x, {batch}, got {result.shape[0]}")
        features = result.shape[1]
    hidden, columns = _check_weight("fc1_weight", fc1_weight, "hidden, n + C")
    if hidden == 0:
        raise ValueError(f"fc1_weight must have at least one hidden channel, got shape {tuple(fc1_weight.shape)}")
    if columns != features + channels:
        if result is None:
            raise ValueError(
                f"fc1_weight must have one column per channel, C={channels}, where no result is given, got {columns}"
            )
        raise ValueError(
            f"fc1_weight must have n + C = {features} + {channels} columns for a result of n={features} features, "
            f"got {columns}"
        )
    checks.one_of("hidden_activation", hidden_activation, HIDDEN_ACTIVATIONS)
    checks.one_of("gate", gate, GATES)
    if fc2_weight is None:
        _check_one_layer(channels, hidden, fc2_bias, hidden_activation)
    elif _check_weight("fc2_weight", fc2_weight, "C, hidden") != (channels, hidden):
        raise ValueError(
            f"fc2_weight must have shape (C, hidden)=({channels}, {hidden}), got {tuple(fc2_weight.shape)}"
        )
    if fc1_bias is not None:
        _check_shape("fc1_bias", fc1_bias, "(hidden,)", (hidden,))
    if fc2_bias is not None:
        _check_shape("fc2_bias", fc2_bias, "(C,)", (channels,))
    if result_share is not None:
        _check_shape("result_share", result_share, "(B, hidden)", (batch, hidden))
    if residual is not None:
        _check_shape("residual", residual, "(B, C, H, W)", (batch, channels, height, width))
    checks.one_of("activation", activation, ACTIVATIONS)
    relu = activation == "relu"
    return (
        x, fc1_weight, fc1_bias, fc2_weight, fc2_bias, result, result_share, residual, relu, hidden_activation, gate
    )  # fmt: skip


def _check_one_layer(channels: int, hidden: int, fc2_bias: Tensor | None, hidden_activation: str) -> None:
    if hidden != channels:
        raise ValueError(
            f"fc1_weight must have one row per channel, C={channels}, where fc2_weight is None, got {hidden}"
        )
    if fc2_bias is not None:
        raise ValueError("fc2_bias must be None where fc2_weight is None: there is no second layer")
    if hidden_activation != "relu":
        raise ValueError(
            "hidden_activation must be left at 'relu' where fc2_weight is None: there is no hidden layer, "
            f"got {hidden_activation!r}"
        )


def _check_weight(name: str, weight: Tensor, sizes: str) -> tuple[int, int]:
    """Rows and columns of the weight of a linear layer or a 1x1 convolution."""
    checks.tensor(name, weight)
    if weight.dim() != 2 and (weight.dim() != 4 or weight.shape[2:] != (1, 1)):
        raise ValueError(f"{name} must have shape ({sizes}) or ({sizes}, 1, 1), got {tuple(weight.shape)}")
    return weight.shape[0], weight.shape[1]


def _check_tensor(name: str, tensor: Tensor, dimensions: int, layout: str) -> None:
    checks.tensor(name, tensor)
    if tensor.dim() != dimensions:
        raise ValueError(f"{name} must have shape {layout}, got {tuple(tensor.shape)}")


def _check_shape(name: str, tensor: Tensor, layout: str, expected: tuple[int, ...]) -> None:
    checks.tensor(name, tensor)
    if tensor.shape != expected:
        raise ValueError(f"{name} must have shape {layout}={expected}, got {tuple(tensor.shape)}")


run = op.squeeze_excite.public(_check)
