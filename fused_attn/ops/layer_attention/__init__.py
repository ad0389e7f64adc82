"""Attention over the layers of a network."""

from .api import layer_attention, weighted_layer_sum
from .cache import LayerCache

__all__ = ["LayerCache", "layer_attention", "weighted_layer_sum"]
