"""The package's nn.Modules, and what some of them attend over: ``LayerCache`` and ``BlockSums``."""

from .ops.attention_residual.module import AttentionResidual, BlockSums
from .ops.layer_attention.cache import LayerCache
from .ops.layer_attention.module import LayerAttention, MRLABase, MRLALight
from .ops.rel_attention_2d.module import AttentionAugmentedConv2d, RelPosAttention2d
from .ops.squeeze_excite.module import SqueezeExcite, result_shares

__all__ = [
    "AttentionAugmentedConv2d",
    "AttentionResidual",
    "BlockSums",
    "LayerAttention",
    "LayerCache",
    "MRLABase",
    "MRLALight",
    "RelPosAttention2d",
    "SqueezeExcite",
    "result_shares",
]
