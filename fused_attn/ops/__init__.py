"""The fused ops, one folder each, on one floor (``_floor``)."""

import importlib
import pkgutil
from typing import Any

from .attention_residual import attention_residual
from .bias_attention_2d import bias_attention_2d
from .elementwise_attention import elementwise_attention, row_col_softmax
from .layer_attention import LayerCache, layer_attention, weighted_layer_sum
from .rel_attention_2d import decomposed_bias_attention, rel_attention_1d, rel_attention_2d, sam_relative_logits
from .squeeze_excite import squeeze_excite

__all__ = [
    "SPECS",
    "LayerCache",
    "attention_residual",
    "bias_attention_2d",
    "decomposed_bias_attention",
    "elementwise_attention",
    "layer_attention",
    "rel_attention_1d",
    "rel_attention_2d",
    "row_col_softmax",
    "sam_relative_logits",
    "squeeze_excite",
    "weighted_layer_sum",
]


def __getattr__(name: str) -> Any:
    # Samples and peers are for tests and benchmarks; importing the package does not build them.
    if name == "SPECS":
        folders = sorted(module.name for module in pkgutil.iter_modules(__path__) if module.name != "_floor")
        specs = (importlib.import_module(f"{__name__}.{folder}.spec") for folder in folders)
        return tuple(spec for module in specs for spec in module.SPECS)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
