"""Attention over the layers of a network."""

from .api import LayerCache, layer_attention
from .gated_shortcut import gated_shortcut

__all__ = ["LayerCache", "gated_shortcut", "layer_attention"]
