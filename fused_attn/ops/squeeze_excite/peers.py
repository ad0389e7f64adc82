"""What a user would otherwise write for ``squeeze_excite``: each exact, differentiable, and as fast as it can be."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .._floor.declarations import Peer, compiled


def _finish(x: Tensor, scale: Tensor, residual: Tensor | None, activation: str | None) -> Tensor:
    # In place, as networks write it: one buffer instead of three.
    out = x * scale
    if residual is not None:
        out += residual
    return F.relu(out, inplace=True) if activation == "relu" else out


#: PyTorch's own, in place where it can; those of the reference have derivatives that these lack.
_HIDDEN_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": partial(F.relu, inplace=True),
    "silu": partial(F.silu, inplace=True),
    "gelu": F.gelu,
    "hardswish": partial(F.hardswish, inplace=True),
}
_GATES: dict[str, Callable[[Tensor], Tensor]] = {
    "sigmoid": torch.sigmoid,
    "hardsigmoid": partial(F.hardsigmoid, inplace=True),
}


def _linear(inputs: Mapping[str, Any]) -> Callable[..., Tensor]:
    """Pooling and ``Linear`` layers (SENet, the paper's networks)."""

    def run(
        x, fc1_weight, fc1_bias, fc2_weight=None, fc2_bias=None, *, result=None, result_share=None, residual=None,
        activation=None, hidden_activation="relu", gate="sigmoid",
    ):  # fmt: skip
        z = x.mean((2, 3))
        if result is not None:
            z = torch.cat((result, z), 1)
        logits = F.linear(z, fc1_weight.flatten(1), fc1_bias)
        if result_share is not None:
            logits = logits + result_share
        if fc2_weight is not None:
            logits = F.linear(_HIDDEN_ACTIVATIONS[hidden_activation](logits), fc2_weight.flatten(1), fc2_bias)
        return _finish(x, _GATES[gate](logits)[:, :, None, None], residual, activation)

    return run


def _kernels_1x1(weight: Tensor) -> Tensor:
    return weight if weight.dim() == 4 else weight[:, :, None, None]


def _convolution(inputs: Mapping[str, Any]) -> Callable[..., Tensor]:
    """Adaptive pooling and 1x1 convolutions (torchvision, timm)."""

    def run(
        x, fc1_weight, fc1_bias, fc2_weight=None, fc2_bias=None, *, result=None, result_share=None, residual=None,
        activation=None, hidden_activation="relu", gate="sigmoid",
    ):  # fmt: skip
        z = F.adaptive_avg_pool2d(x, 1)
        if result is not None:
            z = torch.cat((result[:, :, None, None], z), 1)
        logits = F.conv2d(z, _kernels_1x1(fc1_weight), fc1_bias)
        if result_share is not None:
            logits = logits + result_share[:, :, None, None]
        if fc2_weight is not None:
            logits = F.conv2d(_HIDDEN_ACTIVATIONS[hidden_activation](logits), _kernels_1x1(fc2_weight), fc2_bias)
        return _finish(x, _GATES[gate](logits), residual, activation)

    return run


PEERS = (
    Peer("eager, Linear", _linear),
    Peer("eager, 1x1 convolution", _convolution),
    Peer("torch.compile, Linear", compiled(_linear)),
    Peer("torch.compile, 1x1 convolution", compiled(_convolution)),
)
