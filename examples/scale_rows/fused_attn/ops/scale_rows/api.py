"""Public function: check, choose, run."""

from torch import Tensor

from .._floor import checks
from . import op


def scale_rows(x: Tensor, scale: Tensor, *, impl: str = "auto") -> Tensor:
    """Multiply every row of ``x`` (..., D) by its ``scale`` (...); dtype of ``x``, contiguous.

    Raises:
        TypeError, ValueError: dtypes, shapes or devices do not fit.
        RuntimeError: the named ``impl`` cannot run on these inputs.
    """
    checks.tensors(x=x, scale=scale)
    if x.dim() == 0 or scale.shape != x.shape[:-1]:
        raise ValueError(f"scale must have the shape of x but for its last dimension, got {tuple(scale.shape)}")
    impl, *tensors = op.scale_rows.choose(impl, x=x, scale=scale)
    return op.scale_rows.run(impl, *tensors)
