"""Fused, differentiable attention ops for convolutional and hierarchical vision networks."""

from .ops import decomposed_bias_attention, rel_attention_2d

__version__ = "0.1.0"
__all__ = ["decomposed_bias_attention", "rel_attention_2d"]
