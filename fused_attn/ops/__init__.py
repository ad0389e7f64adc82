"""The fused ops, one folder each."""

from .attention_residual import attention_residual
from .layer_attention import LayerCache, layer_attention, weighted_layer_sum
from .rel_attention_2d import decomposed_bias_attention, rel_attention_2d
from .squeeze_excite import squeeze_excite

__all__ = [
    "SPECS",
    "LayerCache",
    "attention_residual",
    "decomposed_bias_attention",
    "layer_attention",
    "rel_attention_2d",
    "squeeze_excite",
    "weighted_layer_sum",
]


def __getattr__(name: str):
    # Samples, bad inputs and peers are for tests and benchmarks; importing the package does not build them.
    if name == "SPECS":
        from .attention_residual import spec as attention_residual_spec
        from .layer_attention import spec as layer_attention_spec
        from .rel_attention_2d import spec as rel_attention_2d_spec
        from .squeeze_excite import spec as squeeze_excite_spec

        modules = rel_attention_2d_spec, layer_attention_spec, attention_residual_spec, squeeze_excite_spec
        return tuple(spec for module in modules for spec in module.SPECS)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
