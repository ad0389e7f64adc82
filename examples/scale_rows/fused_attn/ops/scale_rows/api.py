"""Public function: check, choose, run."""

from torch import Tensor

from .._floor import checks
from . import op


def scale_rows(x: Tensor, scale: Tensor, *, impl: str = "auto") -> Tensor:
    """Multiply every row of ``x`` (..., D) by its ``scale`` (...); dtype of ``x``, contiguous.

    Raises TypeError or ValueError where dtypes, shapes or devices do not fit, RuntimeError where ``impl`` cannot run.
    """
    return _run(impl, x, scale)[0]


def _check(x: Tensor, scale: Tensor) -> tuple:
    checks.tensors(x=x, scale=scale)
    if x.dim() == 0 or scale.shape != x.shape[:-1]:
        raise ValueError(f"scale must have the shape of x but for its last dimension, got {tuple(scale.shape)}")
    return x, scale


_run = op.scale_rows.public(_check)
