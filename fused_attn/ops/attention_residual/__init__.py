"""Attention residuals: see README.md in this folder."""

from .api import attention_residual

__all__ = ["attention_residual"]
