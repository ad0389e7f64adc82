"""Plain PyTorch reference of squeeze-excite: the oracle, not a kernel."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor


def _silu(x: Tensor) -> Tensor:
    return x * x.sigmoid()  # the gradient of F.silu has no forward mode


HIDDEN_ACTIVATIONS: dict[str, Callable[..., Tensor]] = {
    "relu": F.relu,
    "silu": _silu,
    "gelu": F.gelu,
    "hardswish": F.hardswish,
}


def _hardsigmoid(x: Tensor) -> Tensor:
    # F.hardsigmoid has no second derivative.  Its gradient outside the ramp, and of NaN, is 0.
    return torch.where((x > -3.0) & (x < 3.0), (x + 3.0) / 6.0, F.hardsigmoid(x.detach()))


GATES: dict[str, Callable[[Tensor], Tensor]] = {"sigmoid": torch.sigmoid, "hardsigmoid": _hardsigmoid}


def scales(
    x, fc1_weight, fc1_bias, fc2_weight, fc2_bias, result=None, result_share=None, hidden_activation="relu",
    gate="sigmoid",
):  # fmt: skip
    """s of every sample and channel, (B, C); arguments as in the public function."""
    z = x.mean((2, 3))
    if result is not None:
        z = torch.cat((result, z), 1)
    first = F.linear(z, fc1_weight.flatten(1), fc1_bias)
    if result_share is not None:
        first = first + result_share
    if fc2_weight is None:
        return GATES[gate](first)
    hidden = HIDDEN_ACTIVATIONS[hidden_activation](first)
    return GATES[gate](F.linear(hidden, fc2_weight.flatten(1), fc2_bias))


def squeeze_excite(
    x, fc1_weight, fc1_bias, fc2_weight, fc2_bias, result, result_share, residual, relu, hidden_activation, gate
):
    """``x`` scaled per sample and channel, plus the residual; shapes as in the public function."""
    s = scales(x, fc1_weight, fc1_bias, fc2_weight, fc2_bias, result, result_share, hidden_activation, gate)
    out = x * s[:, :, None, None]
    if residual is not None:
        out = out + residual
    return F.relu(out) if relu else out
