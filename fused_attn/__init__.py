"""Fused, differentiable attention ops for convolutional and hierarchical vision networks."""

from .maps import attention_maps, attention_weights
from .models import create_model, list_models
from .ops import (
    LayerCache,
    attention_residual,
    bias_attention_2d,
    decomposed_bias_attention,
    elementwise_attention,
    layer_attention,
    rel_attention_1d,
    rel_attention_2d,
    row_col_softmax,
    sam_relative_logits,
    squeeze_excite,
    weighted_layer_sum,
)
from .ops._floor.tracing import export_mode

__version__ = "0.1.0"
__all__ = [
    "LayerCache",
    "attention_maps",
    "attention_residual",
    "attention_weights",
    "bias_attention_2d",
    "create_model",
    "decomposed_bias_attention",
    "elementwise_attention",
    "export_mode",
    "layer_attention",
    "list_models",
    "rel_attention_1d",
    "rel_attention_2d",
    "row_col_softmax",
    "sam_relative_logits",
    "squeeze_excite",
    "weighted_layer_sum",
]
