"""Row/column-softmax element-wise attention and dual softmax: see README.md in this folder."""

from .api import elementwise_attention, row_col_softmax

__all__ = ["elementwise_attention", "row_col_softmax"]
