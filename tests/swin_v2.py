"""Swin V2's window attention, composed of the op as its README shows."""

import math

import torch
import torch.nn.functional as F
from torch import nn

from fused_attn import bias_attention_2d


def coordinates(window):
    """Offsets of the table's places on a logarithmic scale: (2h-1, 2w-1, 2)."""
    axes = [torch.arange(1 - size, size) * 8 / max(size - 1, 1) for size in window]
    offsets = torch.stack(torch.meshgrid(*axes, indexing="ij"), -1)
    return offsets.sign() * (offsets.abs() + 1).log2() / 3


class SwinV2Attention(nn.Module):
    """Windows (N, h, w, dim) -> (N, h, w, dim), without the last linear layer."""

    def __init__(self, dim, heads, window, impl):
        super().__init__()
        self.heads, self.window, self.impl = heads, window, impl
        self.qkv = nn.Linear(dim, 3 * dim)
        self.logit_scale = nn.Parameter(torch.full((heads, 1, 1, 1), math.log(10.0)))
        self.mlp = nn.Sequential(nn.Linear(2, 512), nn.ReLU(), nn.Linear(512, heads, bias=False))

    def forward(self, windows, segments=None):
        return self.attend(*self.qkv(windows).chunk(3, -1), self.logit_scale, self.mlp, segments)

    def attend(self, query, key, value, logit_scale, mlp, segments):
        query, key, value = (x.unflatten(-1, (self.heads, -1)).permute(0, 3, 1, 2, 4) for x in (query, key, value))
        table = 16 * torch.sigmoid(mlp(coordinates(self.window))).permute(2, 0, 1)
        out = bias_attention_2d(
            F.normalize(query, dim=-1) * logit_scale.clamp(max=math.log(100.0)).exp(),
            F.normalize(key, dim=-1),
            value,
            table,
            query_segments=segments,
            key_segments=segments,
            scale=1.0,
            impl=self.impl,
        )
        return out.permute(0, 2, 3, 1, 4).flatten(3)
