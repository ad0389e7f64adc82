"""The package's nn.Modules, and the cache that MRLABase fills."""

from .ops.layer_attention.cache import LayerCache
from .ops.layer_attention.module import LayerAttention, MRLABase, MRLALight
from .ops.rel_attention_2d.module import AttentionAugmentedConv2d, RelPosAttention2d
from .ops.squeeze_excite.module import SqueezeExcite, result_shares

__all__ = [
    "AttentionAugmentedConv2d",
    "LayerAttention",
    "LayerCache",
    "MRLABase",
    "MRLALight",
    "RelPosAttention2d",
    "SqueezeExcite",
    "result_shares",
]
