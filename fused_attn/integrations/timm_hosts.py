"""timm's attention and squeeze-excite layers."""

from __future__ import annotations

import itertools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops.bias_attention_2d.api import bias_attention_2d
from ..ops.rel_attention_2d.api import decomposed_bias_attention, rel_attention_2d
from ..ops.rel_attention_2d.conventions import sam_relative_logits
from ..ops.squeeze_excite.api import squeeze_excite
from . import host
from .host import Host, class_path, has_hooks, original, passes_over

VERSIONS = ("1.0.31", "2")


def _dropout_p(module: Any) -> float:
    """Who decides depends on timm's flag ``fused_attn``, which means SDPA."""
    return module.attn_drop.p if (module if module.fused_attn else module.attn_drop).training else 0.0


# --- SAM --------------------------------------------------------------------------------------------------------------


class SamAttention(nn.Module):
    """``timm.models.vision_transformer_sam.Attention`` with relative positions."""

    can_torch_compile = True
    has_backward = True

    def forward(self: Any, x: Tensor) -> Tensor:
        query, key, value = host.heads_of_grid(self.qkv(x), self.num_heads)
        query, key = self.q_norm(query), self.k_norm(key)
        dropout_p = _dropout_p(self)
        out = host.decomposed_attention(query, key, value, self.rel_pos_h, self.rel_pos_w, self.scale, dropout_p)
        return self.proj_drop(self.proj(host.joined_heads(out)))


_LAST_AXIS_NORMS = {
    "torch.nn.modules.linear:Identity",
    "torch.nn.modules.normalization:LayerNorm",
    "torch.nn.modules.normalization:RMSNorm",
    "timm.layers.norm:LayerNorm",
    "timm.layers.norm:RmsNorm",
}


def _sam_reason(module: Any) -> str | None:
    if not module.use_rel_pos:
        return "without relative positions it is plain attention, which PyTorch has"
    for name in ("q_norm", "k_norm"):  # called with heads and grid on other axes than timm's
        if (kind := class_path(type(module.get_submodule(name)))) not in _LAST_AXIS_NORMS:
            return f"{name} is a {kind}"
    return passes_over(module, attn_drop=nn.Dropout)


# --- BoTNet -----------------------------------------------------------------------------------------------------------


class BottleneckAttn(nn.Module):
    """``timm.layers.bottleneck_attn.BottleneckAttn``."""

    can_torch_compile = True
    has_backward = True

    def forward(self: Any, x: Tensor) -> Tensor:
        if x.shape[2] != self.pos_embed.height or x.shape[3] != self.pos_embed.width:
            return original(self, x)
        parts = self.qkv(x).split([self.dim_out_qk, self.dim_out_qk, self.dim_out_v], 1)
        query, key, value = (part.unflatten(1, (self.num_heads, -1)).permute(0, 1, 3, 4, 2) for part in parts)
        out = rel_attention_2d(
            query, key, value, self.pos_embed.height_rel, self.pos_embed.width_rel,
            scale=self.scale, rel_scale=None if self.scale_pos_embed else 1.0,
        )  # fmt: skip
        return self.pool(out.permute(0, 1, 4, 2, 3).flatten(1, 2))


def _bottleneck_reason(module: Any) -> str | None:
    if (kind := class_path(type(module.pos_embed))) != "timm.layers.bottleneck_attn:PosEmbedRel":
        return f"pos_embed is a {kind}"
    return has_hooks(module, "pos_embed")


# --- HaloNet ----------------------------------------------------------------------------------------------------------


class HaloAttn(nn.Module):
    """``timm.layers.halo_attn.HaloAttn``: blocks of queries, each with a window of keys that reaches beyond it."""

    can_torch_compile = True
    has_backward = True

    def forward(self: Any, x: Tensor) -> Tensor:
        batch, _, height, width = x.shape
        if height % self.block_size or width % self.block_size:
            return original(self, x)
        blocks = height // self.block_size, width // self.block_size
        block, window = self.block_size_ds, self.win_size
        query = self.q(x).unflatten(1, (self.num_heads, -1))
        query = query.unflatten(4, (-1, block)).unflatten(3, (-1, block)).permute(0, 3, 5, 1, 4, 6, 2).flatten(0, 2)
        # Dynamo traces no function with a derivative of its own in forward mode.
        windows = _Windows.forward if torch.compiler.is_compiling() else _Windows.apply
        key, value = windows(self.kv(x), self.num_heads, self.dim_head_qk, self.block_size, self.halo_size)
        # The table is one for queries as many as keys.
        rel_h, rel_w = (table[window - block :] for table in (self.pos_embed.height_rel, self.pos_embed.width_rel))
        out = rel_attention_2d(
            query, key, value, rel_h, rel_w, scale=self.scale, rel_scale=None if self.scale_pos_embed else 1.0
        )
        out = out.unflatten(0, (batch, *blocks)).permute(0, 3, 6, 1, 4, 2, 5)
        return self.pool(out.flatten(5, 6).flatten(3, 4).flatten(1, 2))


class _Windows(torch.autograd.Function):
    """Blocks of a map and what lies around them, zeros beyond the map, as keys and values.

    Differentiable, as ``unfold`` is; but that sums the gradients of overlapping windows number by number, this one rows
    of channels.  The training step of the layer takes a sixth less time.

    Args:
        kv: (B, heads * (d_k + d_v), H, W), H and W multiples of ``block``.

    Returns:
        (B * blocks, heads, window, window, d_k), and the same of d_v; window = block + 2 * halo.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(kv: Tensor, heads: int, d_k: int, block: int, halo: int) -> tuple[Tensor, Tensor]:
        window = block + 2 * halo
        padded = F.pad(kv, [halo] * 4).unflatten(1, (heads, -1))
        windows = padded.unfold(3, window, block).unfold(4, window, block).permute(0, 3, 4, 1, 5, 6, 2).flatten(0, 2)
        return windows[..., :d_k], windows[..., d_k:]

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        kv, *ctx.sizes = inputs
        ctx.shape = kv.shape

    @staticmethod
    def backward(ctx: Any, grad_key: Tensor, grad_value: Tensor) -> tuple[Tensor | None, ...]:
        (batch, channels, height, width), (heads, d_k, block, halo) = ctx.shape, ctx.sizes
        rows, cols = height // block, width // block
        # A window is cut up where blocks of the padded map begin: such parts of all windows do not overlap.
        parts = [slice(start, min(start + block, block + 2 * halo)) for start in range(0, block + 2 * halo, block)]
        grid = rows + len(parts) - 1, block, cols + len(parts) - 1, block
        grad = grad_key.new_zeros(batch, heads, *grid, channels // heads)
        for to, windows in ((grad[..., :d_k], grad_key), (grad[..., d_k:], grad_value)):
            windows = windows.unflatten(0, (batch, rows, cols)).permute(0, 3, 1, 4, 2, 5, 6)
            for (i, y), (j, x) in itertools.product(enumerate(parts), repeat=2):
                part = windows[:, :, :, y, :, x]
                to[:, :, i : i + rows, : part.shape[3], j : j + cols, : part.shape[5]].add_(part)
        grad = grad.flatten(4, 5).flatten(2, 3)[:, :, halo : halo + height, halo : halo + width]
        return grad.permute(0, 1, 4, 2, 3).flatten(1, 2), None, None, None, None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
        return _Windows.forward(tangent, *ctx.sizes)


def _halo_reason(module: Any) -> str | None:
    if (kind := class_path(type(module.pos_embed))) != "timm.layers.halo_attn:PosEmbedRel":
        return f"pos_embed is a {kind}"
    return has_hooks(module, "pos_embed")


# --- MViTv2 -----------------------------------------------------------------------------------------------------------


class MultiScaleAttention(nn.Module):
    """``timm.models.mvitv2.MultiScaleAttention``: pooled keys, and a class token without relative positions."""

    can_torch_compile = True
    has_backward = True

    def forward(self: Any, x: Tensor, feat_size: list[int]) -> tuple[Tensor, list[int]]:
        query, key, value = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind()
        cls = int(self.has_cls_token)
        query, grid = _pooled(query, feat_size, cls, self.pool_q, self.norm_q)
        key, key_grid = _pooled(key, feat_size, cls, self.pool_k, self.norm_k)
        value, _ = _pooled(value, feat_size, cls, self.pool_v, self.norm_v)
        # The table is never resized: where it does not fit, neither does the original run.
        if any(2 * max(pair) - 1 != table.shape[0] for pair, table in zip(
            zip(grid, key_grid, strict=True), (self.rel_pos_h, self.rel_pos_w), strict=True
        )):  # fmt: skip
            return original(self, x, feat_size)
        on_grid = query[:, :, cls:].unflatten(2, tuple(grid))
        bias_h, bias_w = sam_relative_logits(on_grid, self.rel_pos_h, self.rel_pos_w, (key_grid[0], key_grid[1]))
        out = decomposed_bias_attention(
            on_grid,
            key[:, :, cls:].unflatten(2, tuple(key_grid)),
            value[:, :, cls:].unflatten(2, tuple(key_grid)),
            bias_h,
            bias_w,
            scale=self.scale,
            prefix_key=key[:, :, :cls] if cls else None,
            prefix_value=value[:, :, :cls] if cls else None,
        ).flatten(2, 3)
        if cls:
            weights = ((query[:, :, :1] * self.scale) @ key.mT).softmax(-1)
            out = torch.cat((weights @ value, out), 2)
        if self.residual_pooling:
            out = out + query
        return self.proj(out.transpose(1, 2).flatten(2)), grid


def _pooled(
    x: Tensor, grid: list[int], cls: int, pool: nn.Module | None, norm: nn.Module | None
) -> tuple[Tensor, list[int]]:
    """(B, heads, N, d) pooled over the grid, class token in front, and the grid that is left."""
    if pool is not None:
        maps = x[:, :, cls:].flatten(0, 1).unflatten(1, tuple(grid)).permute(0, 3, 1, 2).contiguous()
        pooled = pool(maps)
        grid = [pooled.shape[2], pooled.shape[3]]
        pooled = pooled.flatten(2).transpose(1, 2).unflatten(0, (-1, x.shape[1]))
        x = torch.cat((x[:, :, :cls], pooled), 2) if cls else pooled
    return (x if norm is None else norm(x)), grid


def _mvit_reason(module: Any) -> str | None:
    if module.rel_pos_type != "spatial":
        return f"relative positions of type {module.rel_pos_type!r} are not computed"
    if module.unshared:
        return "pooling with weights of its own for every head is not computed"
    return None


# --- Swin -------------------------------------------------------------------------------------------------------------


class WindowAttention(nn.Module):
    """``timm.models.swin_transformer.WindowAttention``, shifted or not."""

    can_torch_compile = True
    has_backward = True

    def forward(self: Any, x: Tensor, mask: Tensor | None = None) -> Tensor:
        segments = None if mask is None else host.checked_segments(mask)
        if x.shape[1] != self.window_area or (segments is None) != (mask is None):
            return original(self, x, mask)
        query, key, value = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).unbind(2)
        table = host.table_by_heads(self.relative_position_bias_table, self.window_size)
        dropout_p = _dropout_p(self)
        out = host.window_attention(query, key, value, table, self.window_size, segments, self.scale, dropout_p)
        return self.proj_drop(self.proj(out))


def _window_reason(module: Any) -> str | None:
    index = host.unusual_index(module.relative_position_index, module.window_size)
    if index is None and module.softmax.dim not in (-1, 3):
        return f"a softmax along dimension {module.softmax.dim} is not computed"
    return index or passes_over(module, attn_drop=nn.Dropout, softmax=nn.Softmax)


# --- MaxViT, CoAtNet --------------------------------------------------------------------------------------------------

_REL_POS = "timm.layers.pos_embed_rel:"


class Attention2d(nn.Module):
    """``timm.models.maxxvit.Attention2d``: maps (B, C, H, W) that are one window."""

    can_torch_compile = True
    has_backward = True

    def forward(self: Any, x: Tensor, shared_rel_pos: Tensor | None = None) -> Tensor:
        if tuple(x.shape[2:]) != tuple(self.rel_pos.window_size):
            return original(self, x, shared_rel_pos)
        qkv = self.qkv(x)
        if self.head_first:
            parts = qkv.unflatten(1, (self.num_heads, 3, -1)).unbind(2)
        else:
            parts = qkv.unflatten(1, (3, self.num_heads, -1)).unbind(1)
        query, key, value = (part.permute(0, 1, 3, 4, 2) for part in parts)
        out = _attend_with_table(self, query, key, value)
        return self.proj_drop(self.proj(out.permute(0, 1, 4, 2, 3).flatten(1, 2)))


class AttentionCl(nn.Module):
    """``timm.models.maxxvit.AttentionCl``: windows (B, h, w, C)."""

    can_torch_compile = True
    has_backward = True

    def forward(self: Any, x: Tensor, shared_rel_pos: Tensor | None = None) -> Tensor:
        if tuple(x.shape[1:-1]) != tuple(self.rel_pos.window_size):
            return original(self, x, shared_rel_pos)
        qkv = self.qkv(x)
        if self.head_first:
            parts = qkv.unflatten(-1, (self.num_heads, 3, -1)).unbind(4)
        else:
            parts = qkv.unflatten(-1, (3, self.num_heads, -1)).unbind(3)
        query, key, value = (part.permute(0, 3, 1, 2, 4) for part in parts)
        out = _attend_with_table(self, query, key, value)
        return self.proj_drop(self.proj(host.joined_heads(out)))


def _attend_with_table(module: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    rel_pos, index = module.rel_pos, "query_minus_key"
    kind = class_path(type(rel_pos)).removeprefix(_REL_POS)
    if kind == "RelPosBiasTf":
        table, index = rel_pos.relative_position_bias_table, "key_minus_query"
    elif kind == "RelPosMlp":
        table = rel_pos.bias_act(rel_pos.mlp(rel_pos.rel_coords_log).permute(2, 0, 1))
        if rel_pos.bias_gain is not None:
            table = rel_pos.bias_gain * table
    else:
        table = host.table_by_heads(rel_pos.relative_position_bias_table, rel_pos.window_size)
    dropout_p = _dropout_p(module)
    return bias_attention_2d(query, key, value, table, index=index, scale=module.scale, dropout_p=dropout_p)


def _maxxvit_reason(module: Any) -> str | None:
    rel_pos = module.rel_pos
    if rel_pos is None:
        return "without relative positions of its own it is plain attention, which PyTorch has"
    kind = class_path(type(rel_pos))
    if kind not in [f"{_REL_POS}{name}" for name in ("RelPosBias", "RelPosBiasTf", "RelPosMlp")]:
        return f"relative positions of class {kind} are not computed"
    if getattr(rel_pos, "prefix_tokens", 0):
        return "prefix tokens have a bias, which the op does not compute"
    index = getattr(rel_pos, "relative_position_index", None)
    if index is not None and (reason := host.unusual_index(index, rel_pos.window_size)):
        return reason
    return has_hooks(module, "rel_pos") or passes_over(module, attn_drop=nn.Dropout)


# --- LeViT ------------------------------------------------------------------------------------------------------------


class LevitAttention(nn.Module):
    """``timm.models.levit.Attention``: a bias for every distance along both axes."""

    can_torch_compile = True
    has_backward = True

    def forward(self: Any, x: Tensor) -> Tensor:
        height, width = self.resolution
        if (tuple(x.shape[2:]) != (height, width)) if self.use_conv else (x.shape[1] != height * width):
            return original(self, x)
        sizes = [self.key_dim, self.key_dim, self.val_dim]
        if self.use_conv:
            parts = self.qkv(x).unflatten(1, (self.num_heads, -1)).permute(0, 1, 3, 4, 2).split(sizes, -1)
        else:
            qkv = self.qkv(x).unflatten(1, (height, width)).unflatten(3, (self.num_heads, -1))
            parts = qkv.permute(0, 3, 1, 2, 4).split(sizes, -1)
        quarter = self.attention_biases.unflatten(1, (height, width))
        half = torch.cat((quarter[:, 1:].flip(1), quarter), 1)
        table = torch.cat((half[:, :, 1:].flip(2), half), 2)
        query, key, value = parts
        out = bias_attention_2d(query, key, value, table, scale=self.scale)
        if self.use_conv:
            return self.proj(out.permute(0, 1, 4, 2, 3).flatten(1, 2))
        return self.proj(host.joined_heads(out).flatten(1, 2))


def _levit_reason(module: Any) -> str | None:
    return None


# --- squeeze-excite ---------------------------------------------------------------------------------------------------


class SEModule(nn.Module):
    """``timm.layers.squeeze_excite.SEModule``."""

    can_torch_compile = True
    has_backward = True

    def forward(self: Any, x: Tensor) -> Tensor:
        return host.scaled_map(x, self.fc1, self.act, self.fc2, self.gate)


def _se_reason(module: Any) -> str | None:
    if module.add_maxpool:
        return "a maximum among what is squeezed is not computed"
    return passes_over(module, bn=nn.Identity) or host.unusual_gates(module, "fc1", "act", "fc2", "gate")


class SENetModule(nn.Module):
    """``timm.models.senet.SEModule``."""

    can_torch_compile = True
    has_backward = True

    def forward(self: Any, x: Tensor) -> Tensor:
        return host.scaled_map(x, self.fc1, self.relu, self.fc2, self.sigmoid)


def _senet_reason(module: Any) -> str | None:
    return host.unusual_gates(module, "fc1", "relu", "fc2", "sigmoid")


class SqueezeExcite(nn.Module):
    """``timm.models._efficientnet_blocks.SqueezeExcite``."""

    can_torch_compile = True
    has_backward = True

    def forward(self: Any, x: Tensor) -> Tensor:
        return host.scaled_map(x, self.conv_reduce, self.act1, self.conv_expand, self.gate)


class EffectiveSEModule(nn.Module):
    """``timm.layers.squeeze_excite.EffectiveSEModule``: one layer."""

    can_torch_compile = True
    has_backward = True

    def forward(self: Any, x: Tensor) -> Tensor:
        gate = host.GATES[class_path(type(self.gate))]
        return squeeze_excite(x, self.fc.weight, self.fc.bias, gate=gate)


def _effective_reason(module: Any) -> str | None:
    if module.add_maxpool:
        return "a maximum among what is squeezed is not computed"
    return host.unusual_gates(module, "fc", "gate")


def _efficientnet_reason(module: Any) -> str | None:
    return host.unusual_gates(module, "conv_reduce", "act1", "conv_expand", "gate")


HOSTS: dict[str, Host] = {
    "timm.models.vision_transformer_sam:Attention": Host("rel_attention_2d", SamAttention, _sam_reason),
    "timm.layers.bottleneck_attn:BottleneckAttn": Host("rel_attention_2d", BottleneckAttn, _bottleneck_reason, False),
    "timm.layers.halo_attn:HaloAttn": Host("rel_attention_2d", HaloAttn, _halo_reason),
    "timm.models.mvitv2:MultiScaleAttention": Host("rel_attention_2d", MultiScaleAttention, _mvit_reason, False),
    "timm.models.swin_transformer:WindowAttention": Host("bias_attention_2d", WindowAttention, _window_reason),
    "timm.models.maxxvit:Attention2d": Host("bias_attention_2d", Attention2d, _maxxvit_reason),
    "timm.models.maxxvit:AttentionCl": Host("bias_attention_2d", AttentionCl, _maxxvit_reason),
    "timm.models.levit:Attention": Host("bias_attention_2d", LevitAttention, _levit_reason, False),
    "timm.layers.squeeze_excite:SEModule": Host("squeeze_excite", SEModule, _se_reason, False),
    "timm.layers.squeeze_excite:EffectiveSEModule": Host("squeeze_excite", EffectiveSEModule, _effective_reason, False),
    "timm.models.senet:SEModule": Host("squeeze_excite", SENetModule, _senet_reason, False),
    "timm.models._efficientnet_blocks:SqueezeExcite": Host(
        "squeeze_excite", SqueezeExcite, _efficientnet_reason, False
    ),
}
