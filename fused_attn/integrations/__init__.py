"""Fused ops in models of timm, transformers, kornia and lucidrains::

    from fused_attn import integrations

    report = integrations.convert(model)
    print(report)
    integrations.restore(model)

No host is imported: a model that holds one of its classes has done so.
"""

from . import opacus, transformers
from .convert import convert, restore
from .report import Candidate, Report

__all__ = ["Candidate", "Report", "convert", "opacus", "restore", "transformers"]
