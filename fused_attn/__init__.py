"""Fused, differentiable attention ops for convolutional and hierarchical vision networks."""

from .models import create_model, list_models
from .ops import decomposed_bias_attention, elementwise_attention, rel_attention_2d, row_col_softmax

__version__ = "0.1.0"
__all__ = [
    "create_model",
    "decomposed_bias_attention",
    "elementwise_attention",
    "list_models",
    "rel_attention_2d",
    "row_col_softmax",
]
