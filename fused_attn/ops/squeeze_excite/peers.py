"""What a user would otherwise write for ``squeeze_excite``: each exact, differentiable, and as fast as it can be."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .._floor.declarations import Peer


def _finish(x: Tensor, scale: Tensor, residual: Tensor | None, activation: str | None) -> Tensor:
    # In place, as networks write it: one buffer instead of three.
    out = x * scale
    if residual is not None:
        out += residual
    return F.relu(out, inplace=True) if activation == "relu" else out


def _linear(inputs: Mapping[str, Any]) -> Callable[..., Tensor]:
    """Pooling and two ``Linear`` layers (SENet, the paper's networks)."""

    def run(
        x, fc1_weight, fc1_bias, fc2_weight, fc2_bias, *, result=None, result_share=None, residual=None, activation=None
    ):
        z = x.mean((2, 3))
        if result is not None:
            z = torch.cat((result, z), 1)
        hidden = F.linear(z, fc1_weight, fc1_bias)
        if result_share is not None:
            hidden = hidden + result_share
        scale = F.linear(F.relu(hidden, inplace=True), fc2_weight, fc2_bias).sigmoid()
        return _finish(x, scale[:, :, None, None], residual, activation)

    return run


def _convolution(inputs: Mapping[str, Any]) -> Callable[..., Tensor]:
    """Adaptive pooling and two 1x1 convolutions (torchvision, timm)."""

    def run(
        x, fc1_weight, fc1_bias, fc2_weight, fc2_bias, *, result=None, result_share=None, residual=None, activation=None
    ):
        z = F.adaptive_avg_pool2d(x, 1)
        if result is not None:
            z = torch.cat((result[:, :, None, None], z), 1)
        hidden = F.conv2d(z, fc1_weight[:, :, None, None], fc1_bias)
        if result_share is not None:
            hidden = hidden + result_share[:, :, None, None]
        scale = F.conv2d(F.relu(hidden, inplace=True), fc2_weight[:, :, None, None], fc2_bias).sigmoid()
        return _finish(x, scale, residual, activation)

    return run


def _compiled(build: Callable[[Mapping[str, Any]], Callable[..., Tensor]]):
    """``torch.compile`` of another peer, specialised to the shape."""
    return lambda inputs: torch.compile(build(inputs), fullgraph=True, dynamic=False)


PEERS = (
    Peer("eager, Linear", _linear),
    Peer("eager, 1x1 convolution", _convolution),
    Peer("torch.compile, Linear", _compiled(_linear)),
    Peer("torch.compile, 1x1 convolution", _compiled(_convolution)),
)
