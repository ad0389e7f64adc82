"""Public function: validation, autocast and the choice of implementation."""

from torch import Tensor

from .._floor import checks, dispatch
from .op import operators


def scale_rows(x: Tensor, scale: Tensor, *, impl: str = "auto") -> Tensor:
    """Multiply every row of ``x`` (..., D) by its ``scale`` (...); dtype of ``x``, contiguous.

    Raises:
        TypeError, ValueError: dtypes, shapes or devices do not fit.
        RuntimeError: the named ``impl`` cannot run on these inputs.
    """
    checks.tensors(x=x, scale=scale)
    if x.dim() == 0 or scale.shape != x.shape[:-1]:
        raise ValueError(f"scale must have the shape of x but for its last dimension, got {tuple(scale.shape)}")
    x, scale = dispatch.autocast_maps((x, scale))
    checks.same_dtype("x", x, scale=scale)
    return operators.run(operators.choose(impl, x), x, scale)
