"""The fused ops, one folder each."""

from .rel_attention_2d import decomposed_bias_attention, rel_attention_2d

__all__ = ["decomposed_bias_attention", "rel_attention_2d"]
