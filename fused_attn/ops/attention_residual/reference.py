"""Plain PyTorch reference of attention residuals.  Stacks the values: the oracle, not a kernel."""

from __future__ import annotations

import torch
import torch.nn.functional as F


def attention_residual(values, query, norm_weight, eps):
    """softmax over the values of query . RMSNorm(value), times the values; shapes as in the public function."""
    stacked = torch.stack(values)
    keys = F.rms_norm(stacked, query.shape, norm_weight, eps)
    weights = (keys * query).sum(-1).softmax(0)
    return (weights.unsqueeze(-1) * stacked).sum(0)
