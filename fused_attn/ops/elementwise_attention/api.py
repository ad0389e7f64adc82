"""Public functions: check, choose, run; and the running statistics."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .._floor import checks
from . import op


def row_col_softmax(
    x: Tensor, weight_row: Tensor | None = None, weight_col: Tensor | None = None, *, impl: str = "auto"
) -> Tensor:
    """Compute the softmax along the rows times the softmax along the columns.

    ``out[b,h,c] = softmax over W of (x[b,c] * weight_row[h,c]) * softmax over H of (x[b,c] * weight_col[h,c])``, every
    product element by element.  Without weights it is the dual softmax of x itself, the matching probability of
    feature matching: ``out = x.softmax(3) * x.softmax(2)``.

    Args:
        x: (B, C, H, W), float32, float16 or bfloat16 (float64: reference only).  Any strides, any H and W.
        weight_row: (heads, C, H, W), dtype of ``x``, for the softmax over W; None together with ``weight_col``.
        weight_col: (heads, C, H, W), dtype of ``x``, for the softmax over H.
        impl: ``"auto"``, ``"cpu"``, ``"triton"`` or ``"reference"``.

    Returns:
        (B, heads, C, H, W), or (B, C, H, W) without weights; contiguous, dtype of ``x``.

    Raises:
        TypeError: an argument is not a tensor, or not of a floating-point dtype.
        ValueError: shapes, dtypes or devices do not fit, or one weight is given without the other.
        RuntimeError: the named ``impl`` cannot run on these inputs.

    Softmax statistics are float32.  Gradients reach x and both weights; they are computed without atomics and are
    bitwise the same at every run and number of threads.  Saved for backward: the inputs and two float32 numbers per
    row and column of each plane; the output is not.

    Under autocast it computes as ``x.softmax(3) * x.softmax(2)`` does: in float32 on GPUs, on the CPU in the widest
    dtype of the inputs.  Lower precision would not hold the logits: a mask of -1e9, or the difference of 50.0 and 50.1.

    Source: Araujo Bacochina and de Souza 2023, "Element-Wise Attention Layers", eq. 4-7; without weights Sun et al.
    2021, "LoFTR", eq. 2 (dual softmax).
    """
    return _run_softmax(impl, x, weight_row, weight_col)[0]


def elementwise_attention(
    x: Tensor,
    weight_row: Tensor,
    weight_col: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    *,
    training: bool,
    momentum: float = 0.1,
    eps: float = 1e-5,
    impl: str = "auto",
) -> Tensor:
    """Compute element-wise attention: the normalised product of row and column softmax, times the input.

    ``out[b, h*C + c] = batch_norm(row_col_softmax(x, weight_row, weight_col))[b, h, c] * x[b, c]``, with the batch
    normalisation of ``torch.nn.BatchNorm2d(heads*C, affine=False)``.

    Args:
        x: (B, C, H, W), float32, float16 or bfloat16 (float64: reference only).  Any strides.
        weight_row: (heads, C, H, W), dtype of ``x``: weights of the softmax over W ("x weights" in the paper).
        weight_col: (heads, C, H, W), dtype of ``x``: weights of the softmax over H ("y weights").
        running_mean: (heads*C,), floating point; head h, channel c is entry h*C + c.  None in training: not kept.
        running_var: (heads*C,), floating point, likewise.
        training: normalise with the statistics of the batch and update the running ones, in place; otherwise
            normalise with the running ones.
        momentum: share of the batch in the updated running statistics.  (A cumulative average, ``momentum=None`` of
            ``BatchNorm2d``, needs a count of batches: the module ``ElementwiseAttention`` keeps one.)
        eps: added to the variance.
        impl: ``"auto"``, ``"cpu"``, ``"triton"`` or ``"reference"``.

    Returns:
        (B, heads*C, H, W), contiguous, dtype of ``x``.

    Raises:
        TypeError: an argument is not of its type, or not of a floating-point dtype.
        ValueError: shapes, dtypes or devices do not fit; in training, x has one value per channel; otherwise, a running
            statistic is missing.
        RuntimeError: the named ``impl`` cannot run on these inputs.

    Gradients reach x and both weights, in training through the batch statistics; they are computed without atomics and
    are bitwise the same at every run and number of threads.  Saved for backward: the inputs, two float32 numbers per
    row and column of each plane, and the statistics; the output is not.  ``running_var`` takes the unbiased variance,
    as in ``BatchNorm2d``; an empty batch leaves both as they are.

    Autocast is as in :func:`row_col_softmax`.  Where that casts x to float32, the copy is saved for backward; it has
    1/heads of the elements of the output, which is not saved.

    Source: Araujo Bacochina and de Souza 2023, "Element-Wise Attention Layers", section 2.2.
    """
    momentum = checks.number("momentum", momentum)
    args = x, weight_row, weight_col, running_mean, running_var, training, eps
    out, *_, mean, var = _run_attention(impl, *args)
    values = x.shape[0] * x.shape[2] * x.shape[3]
    if training and running_mean is not None and running_var is not None and values > 0:
        _update(running_mean, mean, momentum)
        _update(running_var, var * (values / (values - 1)), momentum)
    return out


def _update(running: Tensor, batch: Tensor, momentum: float) -> None:
    # Detached rather than under no_grad, which torch.export makes a subgraph without outputs of: it cannot save that.
    running = running.detach()
    running.copy_((1.0 - momentum) * running.to(batch.dtype) + momentum * batch)


def _check_softmax(x: Tensor, weight_row: Tensor | None, weight_col: Tensor | None) -> tuple[Any, ...]:
    """The arguments of the operator."""
    _check_x(x)
    if (weight_row is None) != (weight_col is None):
        missing, given = ("weight_row", "weight_col") if weight_row is None else ("weight_col", "weight_row")
        raise ValueError(f"{missing} must be given together with {given}, got None")
    if weight_row is not None:
        _check_weights(x, weight_row, weight_col)
    return x, weight_row, weight_col


def _check_attention(
    x: Tensor, weight_row: Tensor, weight_col: Tensor, running_mean: Tensor | None, running_var: Tensor | None,
    training: bool, eps: object,
) -> tuple[Any, ...]:  # fmt: skip
    """The arguments of the operator."""
    _check_x(x)
    _check_weights(x, weight_row, weight_col)
    eps = checks.number("eps", eps)
    channels = weight_row.shape[0] * x.shape[1]
    for name, value in (("running_mean", running_mean), ("running_var", running_var)):
        _check_running(name, value, x, channels, training)
    if (running_mean is None) != (running_var is None):
        missing, given = ("mean", "var") if running_mean is None else ("var", "mean")
        raise ValueError(f"running_{missing} must be given together with running_{given}, got None")
    if training and x.shape[0] * x.shape[2] * x.shape[3] == 1:
        raise ValueError(
            f"Expected more than 1 value per channel when training: x must have B*H*W > 1, got shape {tuple(x.shape)}"
        )
    if training or running_mean is None or running_var is None:
        return x, weight_row, weight_col, None, None, eps
    return x, weight_row, weight_col, running_mean, running_var, eps


def _check_x(x: Tensor) -> None:
    checks.tensor("x", x)
    if x.dim() != 4:
        raise ValueError(f"x must have 4 dimensions (B, C, H, W), got shape {tuple(x.shape)}")


def _check_weights(x: Tensor, weight_row: Any, weight_col: Any) -> None:
    for name, weight in (("weight_row", weight_row), ("weight_col", weight_col)):
        checks.tensor(name, weight)
        if weight.dim() != 4 or weight.shape[1:] != x.shape[1:]:
            _, channels, height, width = x.shape
            raise ValueError(
                f"{name} must have shape (heads, C, H, W)=(heads, {channels}, {height}, {width}), "
                f"got {tuple(weight.shape)}"
            )
    if weight_col.shape[0] != weight_row.shape[0]:
        raise ValueError(
            f"weight_col must have the heads of weight_row, {weight_row.shape[0]}, got {weight_col.shape[0]}"
        )


def _check_running(name: str, value: Tensor | None, x: Tensor, channels: int, training: bool) -> None:
    if value is None:
        if not training:
            raise ValueError(f"{name} must be a tensor when training is False, got None")
        return
    checks.tensor(name, value)
    if tuple(value.shape) != (channels,):
        raise ValueError(f"{name} must have shape (heads*C,)=({channels},), got {tuple(value.shape)}")
    if value.device != x.device:
        raise ValueError(f"{name} must be on the device of x, {x.device}, got {value.device}")


_run_softmax = op.row_col_softmax.public(_check_softmax)
_run_attention = op.elementwise_attention.public(_check_attention, names={"mean": "running_mean", "var": "running_var"})
