"""Plain PyTorch reference of squeeze-excite: the oracle, not a kernel."""

from __future__ import annotations

import torch
import torch.nn.functional as F


def scales(x, fc1_weight, fc1_bias, fc2_weight, fc2_bias, result=None, result_share=None):
    """s of every sample and channel, (B, C); arguments as in the public function."""
    z = x.mean((2, 3))
    if result is not None:
        z = torch.cat((result, z), 1)
    hidden = F.linear(z, fc1_weight, fc1_bias)
    if result_share is not None:
        hidden = hidden + result_share
    return torch.sigmoid(F.linear(F.relu(hidden), fc2_weight, fc2_bias))


def squeeze_excite(x, fc1_weight, fc1_bias, fc2_weight, fc2_bias, result, result_share, residual, relu):
    """``x`` scaled per sample and channel, plus the residual; shapes as in the public function."""
    s = scales(x, fc1_weight, fc1_bias, fc2_weight, fc2_bias, result, result_share)
    out = x * s[:, :, None, None]
    if residual is not None:
        out = out + residual
    return F.relu(out) if relu else out
