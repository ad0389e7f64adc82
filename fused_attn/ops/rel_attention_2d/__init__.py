"""Relative-position 2D attention: see README.md in this folder."""

from .api import decomposed_bias_attention, rel_attention_2d
from .conventions import sam_relative_logits
from .one_dimension import rel_attention_1d

__all__ = ["decomposed_bias_attention", "rel_attention_1d", "rel_attention_2d", "sam_relative_logits"]
