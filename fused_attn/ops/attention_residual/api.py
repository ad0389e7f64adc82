"""Public function: check, choose, run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from .._floor import checks
from .._floor.tracing import leaf
from . import op


@leaf
def attention_residual(
    values: Sequence[Tensor],
    query: Tensor,
    *,
    norm_weight: Tensor | None = None,
    eps: float = 1e-6,
    impl: str = "auto",
) -> Tensor:
    """Compute attention over the depth of a network: every token chooses among the outputs of earlier layers.

    ``out = sum_l a_l values[l]`` with ``a = softmax_l(query . RMSNorm(values[l]))``, for every token on its own, where
    ``RMSNorm(v) = v / sqrt(mean(v**2) + eps) * norm_weight``.

    Args:
        values: L >= 1 tensors, all (B, T, D), or all (..., D); float32, float16 or bfloat16 (float64: reference only).
            Read where they lie, never stacked or concatenated: rows of D contiguous numbers, with any strides
            otherwise.  A tensor whose last dimension is strided, or whose leading dimensions but the last two cannot be
            viewed as one, is copied.
        query: (D,), dtype of the values.
        norm_weight: (D,), dtype of the values; None: ones.
        eps: added to the mean square, at least 0.
        impl: ``"auto"``, ``"cpu"``, ``"triton"`` or ``"reference"``.

    Returns:
        (B, T, D), or (..., D), contiguous; dtype of the values.

    Raises:
        TypeError: ``values`` is no list or tuple, an argument is not a tensor, or not of a floating-point dtype, or
            ``eps`` is no number.
        ValueError: ``values`` is empty, shapes, dtypes or devices do not fit, or ``eps`` is negative.
        RuntimeError: the named ``impl`` cannot run on these inputs.

    Gradients reach every value, the query and norm_weight; they are computed without atomics and are bitwise the same
    at every run and number of threads.  Saved for backward beside the inputs: two float32 numbers per value and token.
    Under autocast the inputs are cast to the autocast dtype, which copies values that are not in it already: the rule
    of matrix products.  A logit is a sum of D products, in float32, which no rounding of a single input decides.

    Source: Kimi Team 2026, "Attention Residuals" (arXiv:2603.15031).
    """
    return _run(impl, values, query, norm_weight, eps)[0]


def _check(values: object, query: Tensor, norm_weight: Tensor | None, eps: object) -> tuple[Any, ...]:
    """The arguments of the operator."""
    if not isinstance(values, (list, tuple)):
        hint = "; unbind() makes one of a stacked tensor" if isinstance(values, Tensor) else ""
        raise TypeError(f"values must be a list or tuple of tensors, got {type(values).__name__}{hint}")
    if not values:
        raise ValueError("values must hold at least one tensor, got none")
    for i, value in enumerate(values):
        checks.tensor(f"values[{i}]", value)
        if i == 0 and (value.dim() == 0 or value.shape[-1] == 0):
            raise ValueError(f"values[0] must have shape (..., D) with D >= 1, got shape {tuple(value.shape)}")
        if value.shape != values[0].shape:
            raise ValueError(
                f"values[{i}] must have the shape of values[0], {tuple(values[0].shape)}, got {tuple(value.shape)}"
            )
    depth = values[0].shape[-1]
    vectors = {"query": query} if norm_weight is None else {"query": query, "norm_weight": norm_weight}
    for name, tensor in vectors.items():
        checks.tensor(name, tensor)
        if tuple(tensor.shape) != (depth,):
            raise ValueError(f"{name} must have shape (D,)=({depth},), got {tuple(tensor.shape)}")
    eps = checks.number("eps", eps)
    if not eps >= 0.0:
        raise ValueError(f"eps must be at least 0, got {eps}")
    return values, query, norm_weight, eps


_run = op.attention_residual.public(_check)
