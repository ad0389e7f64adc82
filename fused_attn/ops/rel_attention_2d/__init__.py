"""Relative-position 2D attention: see README.md in this folder."""

from .api import decomposed_bias_attention, rel_attention_2d
from .conventions import sam_relative_logits

__all__ = ["decomposed_bias_attention", "rel_attention_2d", "sam_relative_logits"]
