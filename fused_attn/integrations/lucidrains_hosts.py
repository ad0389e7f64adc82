"""The attention of lucidrains' bottleneck transformer."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ..ops.rel_attention_2d.api import rel_attention_2d
from .host import Host, class_path, has_hooks, original

VERSIONS = ("0.1.4", "1")

_MODULE = "bottleneck_transformer_pytorch.bottleneck_transformer_pytorch"


class BottleneckTransformerAttention(nn.Module):
    """``bottleneck_transformer_pytorch.bottleneck_transformer_pytorch.Attention`` with relative positions."""

    can_torch_compile = True
    has_backward = True

    def forward(self: Any, fmap: Tensor) -> Tensor:
        if tuple(fmap.shape[2:]) != self.pos_emb.fmap_size:
            return original(self, fmap)
        qkv = self.to_qkv(fmap).unflatten(1, (3, self.heads, -1))
        query, key, value = qkv.permute(1, 0, 2, 4, 5, 3).unbind()
        out = rel_attention_2d(
            query, key, value, self.pos_emb.rel_height, self.pos_emb.rel_width, scale=self.scale
        )  # fmt: skip
        return out.permute(0, 1, 4, 2, 3).flatten(1, 2)


def _reason(module: Any) -> str | None:
    kind = class_path(type(module.pos_emb))
    if kind == f"{_MODULE}:AbsPosEmb":
        return "absolute positions are added to the keys: plain attention, which PyTorch has"
    if kind != f"{_MODULE}:RelPosEmb":
        return f"pos_emb is a {kind}"
    return has_hooks(module, "pos_emb")


HOSTS: dict[str, Host] = {f"{_MODULE}:Attention": Host("rel_attention_2d", BottleneckTransformerAttention, _reason)}
