"""transformers' attention, squeeze-excite and matching layers."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops.elementwise_attention.api import row_col_softmax
from ..ops.squeeze_excite.api import squeeze_excite
from . import host
from .host import Host, has_hooks, original, passes_over

VERSIONS = ("5.24", "6")


def wants_attentions(module: nn.Module, output_attentions: Any = None) -> bool:
    """Whether the caller asks for attention weights, by the argument or by what transformers records in this call."""
    if output_attentions:
        return True
    from transformers.utils.output_capturing import _active_collector

    # Where a layer is compiled and not the model around it, the ContextVar cannot be traced; transformers' own hook,
    # which is there once a call has asked for weights, breaks the graph as well.
    if torch.compiler.is_compiling() and not _active_collector.compiling and not module._forward_hooks:
        return False
    recorded = _active_collector.get()
    return recorded is not None and any("attentions" in key for key in recorded)


# --- SAM, ViTDet, SegGPT ----------------------------------------------------------------------------------------------


class SamVisionAttention(nn.Module):
    """``SamVisionAttention`` and its copies in other models."""

    can_torch_compile = True
    has_backward = True

    def forward(self: Any, hidden_states: Tensor, output_attentions: bool | None = None) -> tuple[Tensor, None]:
        if wants_attentions(self, output_attentions):
            return original(self, hidden_states, output_attentions)
        return _sam_attention(self, hidden_states, self.dropout if self.training else 0.0), None


class SamVisionSdpaAttention(nn.Module):
    """``SamVisionSdpaAttention`` and its copies, which neither drop nor return attention weights."""

    can_torch_compile = True
    has_backward = True

    def forward(self: Any, hidden_states: Tensor, output_attentions: bool = False) -> tuple[Tensor, None]:
        if output_attentions:
            return original(self, hidden_states, output_attentions)  # which warns
        return _sam_attention(self, hidden_states, 0.0), None


class VitDetAttention(nn.Module):
    """``VitDetAttention``."""

    can_torch_compile = True
    has_backward = True

    def forward(self: Any, hidden_state: Tensor, output_attentions: bool = False) -> tuple[Tensor, ...]:
        if wants_attentions(self, output_attentions):
            return original(self, hidden_state, output_attentions)
        return (_sam_attention(self, hidden_state, 0.0, self.num_heads),)


class SegGptAttention(nn.Module):
    """``SegGptAttention``."""

    can_torch_compile = True
    has_backward = True

    def forward(self: Any, hidden_states: Tensor, output_attentions: bool = False) -> tuple[Tensor, Tensor | None]:
        if wants_attentions(self, output_attentions):
            return original(self, hidden_states, output_attentions)
        return _sam_attention(self, hidden_states, 0.0), None


def _sam_attention(module: Any, hidden_states: Tensor, dropout_p: float, heads: int | None = None) -> Tensor:
    query, key, value = host.heads_of_grid(module.qkv(hidden_states), heads or module.num_attention_heads)
    out = host.decomposed_attention(query, key, value, module.rel_pos_h, module.rel_pos_w, module.scale, dropout_p)
    return module.proj(host.joined_heads(out))


_PLAIN = "without relative positions it is plain attention, which PyTorch has"


def _sam_reason(module: Any) -> str | None:
    return None if module.use_rel_pos else _PLAIN


def _vitdet_reason(module: Any) -> str | None:
    return None if module.use_relative_position_embeddings else _PLAIN


# --- Swin -------------------------------------------------------------------------------------------------------------


class SwinAttention(nn.Module):
    """``SwinAttention``."""

    can_torch_compile = True
    has_backward = True

    def forward(
        self: Any, hidden_states: Tensor, attention_mask: Tensor | None = None, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        size = self.relative_position_bias.window_size
        served, segments = _segments(hidden_states, attention_mask, size)
        if not served or _other_attention(self) or wants_attentions(self, kwargs.get("output_attentions")):
            return original(self, hidden_states, attention_mask, **kwargs)
        parts = (layer(hidden_states) for layer in (self.q_proj, self.k_proj, self.v_proj))
        query, key, value = (part.unflatten(-1, (-1, self.head_dim)) for part in parts)
        table = host.table_by_heads(self.relative_position_bias.relative_position_bias_table, size)
        dropout_p = self.attention_dropout if self.training else 0.0
        out = host.window_attention(query, key, value, table, size, segments, self.scaling, dropout_p)
        return self.o_proj(out), None


class SwinSelfAttention(nn.Module):
    """``DonutSwinSelfAttention``, ``MaskFormerSwinSelfAttention``, ``ClapAudioSelfAttention``."""

    can_torch_compile = True
    has_backward = True

    def forward(
        self: Any,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        output_attentions: bool | None = False,
    ) -> tuple[Tensor, ...]:
        served, segments = _segments(hidden_states, attention_mask, self.window_size)
        if not served or wants_attentions(self, output_attentions):
            return original(self, hidden_states, attention_mask, output_attentions)
        query, key, value = _projected(self, hidden_states)
        table = host.table_by_heads(self.relative_position_bias_table, self.window_size)
        scale = 1 / math.sqrt(self.attention_head_size)
        dropout_p = self.dropout.p if self.dropout.training else 0.0
        return (host.window_attention(query, key, value, table, self.window_size, segments, scale, dropout_p),)


class SwinV2SelfAttention(nn.Module):
    """``Swinv2SelfAttention`` and ``Swin2SRSelfAttention``: cosines as logits, a computed table."""

    can_torch_compile = True
    has_backward = True

    def forward(
        self: Any,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        output_attentions: bool | None = False,
    ) -> tuple[Tensor, ...]:
        served, segments = _segments(hidden_states, attention_mask, self.window_size)
        if not served or wants_attentions(self, output_attentions):
            return original(self, hidden_states, attention_mask, output_attentions)
        query, key, value = _projected(self, hidden_states)
        scale = self.logit_scale.clamp(max=math.log(1.0 / 0.01)).exp()
        query, key = F.normalize(query, dim=-1) * scale.flatten(1), F.normalize(key, dim=-1)
        table = 16 * self.continuous_position_bias_mlp(self.relative_coords_table)[0].sigmoid().permute(2, 0, 1)
        dropout_p = self.dropout.p if self.dropout.training else 0.0
        return (host.window_attention(query, key, value, table, self.window_size, segments, 1.0, dropout_p),)


def _projected(module: Any, hidden_states: Tensor) -> Iterator[Tensor]:
    """Queries, keys and values, (B, N, heads, d)."""
    for layer in (module.query, module.key, module.value):
        yield layer(hidden_states).unflatten(-1, (-1, module.attention_head_size))


def _segments(hidden_states: Tensor, mask: Tensor | None, size: Sequence[int]) -> tuple[bool, Tensor | None]:
    """Whether the op computes windows with such a mask, and the segments that stand for it."""
    if hidden_states.shape[1] != size[0] * size[1]:
        return False, None
    if mask is None:
        return True, None
    segments = host.checked_segments(mask)
    return segments is not None, segments


def _other_attention(module: Any) -> str | None:
    """The attention that its model was told to use, if it is not one of transformers' own of this computation."""
    name = module.config._attn_implementation
    return None if name in (None, "eager", "sdpa", "fused_attn") else name


def _swin_reason(module: Any) -> str | None:
    if (name := _other_attention(module)) is not None:
        return f"its model is set to the attention {name!r}"
    bias = module.relative_position_bias
    if (kind := host.class_path(type(bias))) != "transformers.models.swin.modeling_swin:SwinRelativePositionBias":
        return f"relative_position_bias is a {kind}"
    index = host.unusual_index(bias.relative_position_index, bias.window_size)
    return index or has_hooks(module, "relative_position_bias")


def _swin_self_reason(module: Any) -> str | None:
    index = host.unusual_index(module.relative_position_index, module.window_size)
    return index or passes_over(module, dropout=nn.Dropout)


# --- squeeze-excite ---------------------------------------------------------------------------------------------------


class RegNetSELayer(nn.Module):
    """``RegNetSELayer``."""

    can_torch_compile = True
    has_backward = True

    def forward(self: Any, hidden_state: Tensor) -> Tensor:
        return host.scaled_map(hidden_state, *self.attention)


def _regnet_reason(module: Any) -> str | None:
    if len(module.attention) != 4:
        return "it is not two layers with their activations"
    return host.unusual_gates(module, "attention.0", "attention.1", "attention.2", "attention.3") or has_hooks(
        module, "pooler", "attention"
    )


class EfficientNetSqueezeExciteLayer(nn.Module):
    """``EfficientNetSqueezeExciteLayer`` and ``AlignVisionSqueezeExciteLayer``."""

    can_torch_compile = True
    has_backward = True

    def forward(self: Any, hidden_states: Tensor) -> Tensor:
        return host.scaled_map(hidden_states, self.reduce, self.act_reduce, self.expand, self.act_expand)


def _efficientnet_reason(module: Any) -> str | None:
    return host.unusual_gates(module, "reduce", "act_reduce", "expand", "act_expand") or has_hooks(module, "squeeze")


class PPLCNetSqueezeExcitationModule(nn.Module):
    """``PPLCNetSqueezeExcitationModule``, and those of its versions 3 and 4."""

    can_torch_compile = True
    has_backward = True

    def forward(self: Any, hidden_state: Tensor) -> Tensor:
        return host.scaled_map(hidden_state, *self.convolutions)


def _pplcnet_reason(module: Any) -> str | None:
    if len(module.convolutions) != 4:
        return "it is not two layers with their activations"
    names = [f"convolutions.{i}" for i in range(4)]
    return host.unusual_gates(module, *names) or has_hooks(module, "avg_pool")


class PPOCRSqueezeExcitationModule(nn.Module):
    """``PPOCRV5MobileDetSqueezeExcitationModule`` and ``PPOCRV6SmallDetSqueezeExcitationModule``."""

    can_torch_compile = True
    has_backward = True

    def forward(self: Any, hidden_states: Tensor) -> Tensor:
        steeper = 6 * 0.2  # Their gate is clamp(0.2 x + 0.5), PyTorch's hardsigmoid clamp(x / 6 + 0.5).
        return squeeze_excite(
            hidden_states,
            self.conv1.weight,
            self.conv1.bias,
            steeper * self.conv2.weight,
            None if self.conv2.bias is None else steeper * self.conv2.bias,
            hidden_activation=host.HIDDEN_ACTIVATIONS[host.class_path(type(self.act_fn))],
            gate="hardsigmoid",
        )


def _ppocr_reason(module: Any) -> str | None:
    return host.unusual_gates(module, "conv1", "act_fn", "conv2") or has_hooks(module, "avg_pool")


# --- matching ---------------------------------------------------------------------------------------------------------


class EfficientLoFTRCoarseMatching(nn.Module):
    """``EfficientLoFTRForKeypointMatching._coarse_matching`` by dual softmax."""

    can_torch_compile = True
    has_backward = True

    def forward(self: Any, coarse_features: Tensor, coarse_scale: float) -> tuple[Tensor, Tensor, Tensor]:
        grid = coarse_features.shape[3:]
        features_0, features_1 = (coarse_features.flatten(3).mT / coarse_features.shape[2] ** 0.5).unbind(1)
        similarity = features_0 @ features_1.mT
        confidence = row_col_softmax(similarity.unsqueeze(1), temperature=self.config.coarse_matching_temperature)
        indices, scores = self._get_matches_from_scores(confidence.squeeze(1).unflatten(2, grid).unflatten(1, grid))
        keypoints = torch.stack([indices % grid[1], indices // grid[1]], -1) * coarse_scale
        return keypoints, scores, indices


def _coarse_reason(module: Any) -> str | None:
    if module.config.coarse_matching_skip_softmax:
        return "matching without softmax is not computed"
    return None


class LightGlueMatchAssignmentLayer(nn.Module):
    """``LightGlueMatchAssignmentLayer``, masked or not."""

    can_torch_compile = True
    has_backward = True

    def forward(self: Any, descriptors: Tensor, mask: Tensor) -> Tensor:
        projected = self.final_projection(descriptors) / self.descriptor_dim**0.25
        similarity = projected[::2] @ projected[1::2].mT
        if mask is not None:
            # Not the op's masks: where neither takes part, the host has -log(N) twice, and they -inf.
            excluded = mask[::2, :, None] * mask[1::2, None] == 0
            similarity = similarity.masked_fill(excluded, torch.finfo(similarity.dtype).min)
        matchability = self.matchability(descriptors).squeeze(-1)
        certainty, doubt = F.logsigmoid(matchability), F.logsigmoid(-matchability)
        batch, count, _ = similarity.shape
        scores = similarity.new_zeros(batch, count + 1, count + 1)
        matches = row_col_softmax(similarity.unsqueeze(1), log=True).squeeze(1)
        scores[:, :-1, :-1] = matches + certainty[::2, :, None] + certainty[1::2, None]
        scores[:, :-1, -1], scores[:, -1, :-1] = doubt[::2], doubt[1::2]
        return scores


def _lightglue_reason(module: Any) -> str | None:
    return None


_SAM = Host("rel_attention_2d", SamVisionAttention, _sam_reason)
_SAM_SDPA = Host("rel_attention_2d", SamVisionSdpaAttention, _sam_reason)
_SWIN_SELF = Host("bias_attention_2d", SwinSelfAttention, _swin_self_reason)
_SWIN_V2 = Host("bias_attention_2d", SwinV2SelfAttention, _swin_self_reason)
_EFFICIENTNET = Host("squeeze_excite", EfficientNetSqueezeExciteLayer, _efficientnet_reason, False)
_PPLCNET = Host("squeeze_excite", PPLCNetSqueezeExcitationModule, _pplcnet_reason, False)
_PPOCR = Host("squeeze_excite", PPOCRSqueezeExcitationModule, _ppocr_reason, False)
_MODELS = {
    "sam.modeling_sam:SamVisionAttention": _SAM,
    "sam.modeling_sam:SamVisionSdpaAttention": _SAM_SDPA,
    "sam_hq.modeling_sam_hq:SamHQVisionAttention": _SAM,
    "sam_hq.modeling_sam_hq:SamHQVisionSdpaAttention": _SAM_SDPA,
    "got_ocr2.modeling_got_ocr2:GotOcr2VisionAttention": _SAM,
    "deepseek_ocr2.modeling_deepseek_ocr2:DeepseekOcr2SamVisionAttention": _SAM,
    "deepseek_ocr2.modeling_deepseek_ocr2:DeepseekOcr2SamVisionSdpaAttention": _SAM_SDPA,
    "unlimited_ocr.modeling_unlimited_ocr:UnlimitedOcrSamVisionAttention": _SAM,
    "unlimited_ocr.modeling_unlimited_ocr:UnlimitedOcrSamVisionSdpaAttention": _SAM_SDPA,
    "pp_formulanet.modeling_pp_formulanet:PPFormulaNetVisionAttention": _SAM,
    "slanext.modeling_slanext:SLANeXtVisionAttention": _SAM,
    "vitdet.modeling_vitdet:VitDetAttention": Host("rel_attention_2d", VitDetAttention, _vitdet_reason),
    "seggpt.modeling_seggpt:SegGptAttention": Host("rel_attention_2d", SegGptAttention, _vitdet_reason),
    "swin.modeling_swin:SwinAttention": Host("bias_attention_2d", SwinAttention, _swin_reason),
    "donut.modeling_donut_swin:DonutSwinSelfAttention": _SWIN_SELF,
    "maskformer.modeling_maskformer_swin:MaskFormerSwinSelfAttention": _SWIN_SELF,
    "clap.modeling_clap:ClapAudioSelfAttention": _SWIN_SELF,
    "swinv2.modeling_swinv2:Swinv2SelfAttention": _SWIN_V2,
    "swin2sr.modeling_swin2sr:Swin2SRSelfAttention": _SWIN_V2,
    "regnet.modeling_regnet:RegNetSELayer": Host("squeeze_excite", RegNetSELayer, _regnet_reason, False),
    "efficientnet.modeling_efficientnet:EfficientNetSqueezeExciteLayer": _EFFICIENTNET,
    "align.modeling_align:AlignVisionSqueezeExciteLayer": _EFFICIENTNET,
    "pp_lcnet.modeling_pp_lcnet:PPLCNetSqueezeExcitationModule": _PPLCNET,
    "pp_lcnet_v3.modeling_pp_lcnet_v3:PPLCNetV3SqueezeExcitationModule": _PPLCNET,
    "pp_lcnet_v4.modeling_pp_lcnet_v4:PPLCNetV4SqueezeExcitationModule": _PPLCNET,
    "pp_ocrv5_mobile_det.modeling_pp_ocrv5_mobile_det:PPOCRV5MobileDetSqueezeExcitationModule": _PPOCR,
    "pp_ocrv6_small_det.modeling_pp_ocrv6_small_det:PPOCRV6SmallDetSqueezeExcitationModule": _PPOCR,
    "efficientloftr.modeling_efficientloftr:EfficientLoFTRForKeypointMatching._coarse_matching": Host(
        "row_col_softmax", EfficientLoFTRCoarseMatching, _coarse_reason, False
    ),
    "lightglue.modeling_lightglue:LightGlueMatchAssignmentLayer": Host(
        "row_col_softmax", LightGlueMatchAssignmentLayer, _lightglue_reason
    ),
}
HOSTS: dict[str, Host] = {f"transformers.models.{name}": entry for name, entry in _MODELS.items()}
