"""Layer attention in plain PyTorch: the oracle."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def layer_attention(
    query: Tensor, keys: Sequence[Tensor], values: Sequence[Tensor], scale: float, bias: Tensor | None, activation: str
) -> Tensor:
    """As the public function.  Values are read where they are: neither stacked nor copied, and saved by reference."""
    logits = scale * torch.stack([(query * key).sum(dim=-1) for key in keys], dim=-1)
    if bias is not None:
        logits = logits + bias.mT
    weights = logits.softmax(dim=-1) if activation == "softmax" else logits.sigmoid()
    batch, channels, *spatial = values[0].shape
    weights = weights.repeat_interleave(channels // weights.shape[1], dim=1).unsqueeze(-1)
    weights = weights.view(batch, channels, len(values), *(1 for _ in spatial))
    out = weights[:, :, 0] * values[0]
    for index in range(1, len(values)):
        out = torch.addcmul(out, weights[:, :, index], values[index])
    return out
