"""Squeeze-excite, conditioned on a result if one is given: see README.md in this folder."""

from .api import squeeze_excite

__all__ = ["squeeze_excite"]
