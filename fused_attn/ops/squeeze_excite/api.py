"""Public function: check, choose, run."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .._floor import checks
from . import op

ACTIVATIONS = (None, "relu")


def squeeze_excite(
    x: Tensor,
    fc1_weight: Tensor,
    fc1_bias: Tensor | None,
    fc2_weight: Tensor,
    fc2_bias: Tensor | None,
    *,
    result: Tensor | None = None,
    result_share: Tensor | None = None,
    residual: Tensor | None = None,
    activation: str | None = None,
    impl: str = "auto",
) -> Tensor:
    """Scale every channel of a feature map by a gate computed from the channel means, and add the block's shortcut.

    ``z = mean of x over H, W;  s = sigmoid(fc2_weight relu(fc1_weight [result, z] + fc1_bias) + fc2_bias);
    out = activation(x * s + residual)``.

    Args:
        x: (B, C, H, W), float32, float16 or bfloat16 (float64: reference only), at least one channel and position.
            Contiguous and channels_last are read in place; other strides cost a copy.
        fc1_weight: (hidden, C), or (hidden, n + C) with a result, whose n columns come first; dtype of ``x``.
        fc1_bias: (hidden,) or None.
        fc2_weight: (C, hidden).
        fc2_bias: (C,) or None.
        result: (B, n), what an auxiliary classifier says of each sample; joins z.  None: plain squeeze-excite.
        result_share: (B, hidden), the result's part of the first layer, ``result @ fc1_weight[:, :n].T``, computed
            beforehand (for all blocks of a stage in one product: :func:`result_shares`).  ``fc1_weight`` is then
            (hidden, C).  Not together with ``result``.
        residual: (B, C, H, W), added to the scaled map.
        activation: None, or ``"relu"`` after the addition.
        impl: ``"auto"``, ``"reference"``, ``"cpu"`` or ``"triton"``.

    Returns:
        (B, C, H, W), dtype and memory format of ``x``.

    Raises:
        TypeError: an argument is not a tensor, or not of a floating-point dtype.
        ValueError: shapes, dtypes or devices do not fit, or an option is out of range.
        RuntimeError: the named ``impl`` cannot run on these inputs.

    Gradients reach every tensor; they are computed without atomics, and ``cpu`` gives the same bits at every run and
    number of threads.  x is read twice and out written once; what is saved for backward beside the inputs is z, s and
    the hidden units in float32, and, with an activation, out, whose sign says where it was active.  Under autocast
    the maps keep their dtype, the wider one of x and the residual, as in ``x * s + residual``; the rest is cast to it.

    Source: Hu et al. 2017, "Squeeze-and-Excitation Networks", eq. 2-4; Ye, "Introduce the Result Into Self-Attention",
    eq. 4-6.
    """
    return _run(
        impl, x, fc1_weight, fc1_bias, fc2_weight, fc2_bias, result, result_share, residual, activation
    )[0]  # fmt: skip


def _check(
    x: Tensor, fc1_weight: Tensor, fc1_bias: Tensor | None, fc2_weight: Tensor, fc2_bias: Tensor | None,
    result: Tensor | None, result_share: Tensor | None, residual: Tensor | None, activation: str | None,
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
    _check_tensor("fc1_weight", fc1_weight, 2, "(hidden, n + C)")
    hidden, columns = fc1_weight.shape
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
    _check_shape("fc2_weight", fc2_weight, "(C, hidden)", (channels, hidden))
    if fc1_bias is not None:
        _check_shape("fc1_bias", fc1_bias, "(hidden,)", (hidden,))
    if fc2_bias is not None:
        _check_shape("fc2_bias", fc2_bias, "(C,)", (channels,))
    if result_share is not None:
        _check_shape("result_share", result_share, "(B, hidden)", (batch, hidden))
    if residual is not None:
        _check_shape("residual", residual, "(B, C, H, W)", (batch, channels, height, width))
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation must be one of {', '.join(map(repr, ACTIVATIONS))}, got {activation!r}")
    relu = activation == "relu"
    return x, fc1_weight, fc1_bias, fc2_weight, fc2_bias, result, result_share, residual, relu


def _check_tensor(name: str, tensor: Tensor, dimensions: int, layout: str) -> None:
    checks.tensor(name, tensor)
    if tensor.dim() != dimensions:
        raise ValueError(f"{name} must have shape {layout}, got {tuple(tensor.shape)}")


def _check_shape(name: str, tensor: Tensor, layout: str, expected: tuple[int, ...]) -> None:
    checks.tensor(name, tensor)
    if tensor.shape != expected:
        raise ValueError(f"{name} must have shape {layout}={expected}, got {tuple(tensor.shape)}")


_run = op.squeeze_excite.public(_check)
