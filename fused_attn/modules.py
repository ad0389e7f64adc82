"""The package's nn.Modules, what some of them attend over (``LayerCache``, ``BlockSums``), and their tables resized."""

from .ops._floor.positions import resize_state_dict
from .ops.attention_residual.module import AttentionResidual, BlockSums
from .ops.bias_attention_2d.module import GridAttention2d, WindowAttention2d
from .ops.elementwise_attention.module import DualSoftmax, ElementwiseAttention, ElementwiseAttentionBlock
from .ops.layer_attention.cache import LayerCache
from .ops.layer_attention.module import LayerAttention, MRLABase, MRLALight
from .ops.rel_attention_2d.module import AttentionAugmentedConv2d, RelPosAttention2d
from .ops.rel_attention_2d.module_1d import AttentionAugmentedConv1d, RelPosAttention1d
from .ops.squeeze_excite.module import SqueezeExcite, can_share_result, result_shares

__all__ = [
    "AttentionAugmentedConv1d",
    "AttentionAugmentedConv2d",
    "AttentionResidual",
    "BlockSums",
    "DualSoftmax",
    "ElementwiseAttention",
    "ElementwiseAttentionBlock",
    "GridAttention2d",
    "LayerAttention",
    "LayerCache",
    "MRLABase",
    "MRLALight",
    "RelPosAttention1d",
    "RelPosAttention2d",
    "SqueezeExcite",
    "WindowAttention2d",
    "can_share_result",
    "resize_state_dict",
    "result_shares",
]
