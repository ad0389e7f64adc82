"""The package's nn.Modules."""

from .ops.rel_attention_2d.module import AttentionAugmentedConv2d, RelPosAttention2d

__all__ = ["AttentionAugmentedConv2d", "RelPosAttention2d"]
