"""Attention over the layers of a network."""

from .api import layer_attention, weighted_layer_sum

__all__ = ["layer_attention", "weighted_layer_sum"]
