"""Public functions: check, choose, run; and the running statistics."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from .._floor import checks
from .._floor.tracing import leaf, pinned
from . import op


@leaf
def row_col_softmax(
    x: Tensor,
    weight_row: Tensor | None = None,
    weight_col: Tensor | None = None,
    row_mask: Tensor | None = None,
    col_mask: Tensor | None = None,
    *,
    temperature: float = 1.0,
    log: bool = False,
    impl: str = "auto",
) -> Tensor:
    """Compute the softmax along the rows times the softmax along the columns.

    ``out[b,h,c] = softmax over W of (x[b,c] * weight_row[h,c]) * softmax over H of (x[b,c] * weight_col[h,c])``, every
    product element by element.  Without weights it is the dual softmax of ``logits = x / temperature``, the matching
    probability of feature matching: ``out = logits.softmax(3) * logits.softmax(2)``, or with ``log`` its logarithm
    ``logits.log_softmax(3) + logits.log_softmax(2)``.  Masks, temperature and logarithm go with that form alone.

    Args:
        x: (B, C, H, W), float32, float16 or bfloat16 (float64: reference only).  Any strides, any H and W.
        weight_row: (heads, C, H, W), dtype of ``x``, for the softmax over W; None together with ``weight_col``.
        weight_col: (heads, C, H, W), dtype of ``x``, for the softmax over H.
        row_mask: (B, H), bool: True for rows that take part (``mask0`` of LoFTR).
        col_mask: (B, W), bool: True for columns that take part (``mask1``).
        temperature: positive; a factor within the kernels.
        log: return the logarithm, which is not formed of the product: it stays finite where that underflows.
        impl: ``"auto"``, ``"cpu"``, ``"triton"`` or ``"reference"``.

    Returns:
        (B, heads, C, H, W), or (B, C, H, W) without weights; contiguous, dtype of ``x``.

    Raises:
        TypeError: an argument is not a tensor or of another type, or not of a floating-point dtype; a mask is not bool.
        ValueError: shapes, dtypes or devices do not fit, one weight is given without the other, masks, temperature or
            logarithm with weights, or the temperature is not positive.
        RuntimeError: the named ``impl`` cannot run on these inputs.

    Softmax statistics are float32.  Gradients reach x and both weights; they are computed without atomics and are
    bitwise the same at every run and number of threads.  Saved for backward: the inputs and two float32 numbers per
    row and column of each plane; the output is not.

    An element whose row or column is masked is in no softmax: the output there is 0 (-inf with ``log``) and the
    gradient of x 0, whatever x holds there.  LoFTR instead gives such elements the logit -1e9: the same where row and
    column take part, but where neither does 1/(H*W) and the like, if all of a row and of a column is masked.

    Under autocast it computes as ``x.softmax(3) * x.softmax(2)`` does: in float32 on GPUs, on the CPU in the widest
    dtype of the inputs.  Lower precision would not hold the logits: a mask of -1e9, or the difference of 50.0 and 50.1.

    Source: Araujo Bacochina and de Souza 2023, "Element-Wise Attention Layers", eq. 4-7; without weights Sun et al.
    2021, "LoFTR", eq. 2 (dual softmax), and Lindenberger et al. 2023, "LightGlue", eq. 8 (its logarithm).
    """
    return _run_softmax(impl, x, weight_row, weight_col, row_mask, col_mask, temperature, log)[0]


@leaf
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
    updated = (1.0 - momentum) * running.to(batch.dtype) + momentum * batch
    try:
        running.copy_(updated)
    except RuntimeError as error:
        if not torch._C._are_functorch_transforms_active():
            raise
        raise RuntimeError(
            "elementwise_attention: torch.vmap cannot update running_mean and running_var where x or the weights are "
            "mapped and they are not; pass training=False, or None for both"
        ) from error


def _check_softmax(
    x: Tensor, weight_row: Tensor | None, weight_col: Tensor | None, row_mask: Tensor | None, col_mask: Tensor | None,
    temperature: object, log: bool,
) -> tuple[Any, ...]:  # fmt: skip
    """The arguments of the operator."""
    _check_x(x)
    if (weight_row is None) != (weight_col is None):
        missing, given = ("weight_row", "weight_col") if weight_row is None else ("weight_col", "weight_row")
        raise ValueError(f"{missing} must be given together with {given}, got None")
    if weight_row is not None:
        _check_weights(x, weight_row, weight_col)
    temperature = check_options(temperature, log)
    _check_mask("row_mask", "(B, H)", row_mask, x, 2)
    _check_mask("col_mask", "(B, W)", col_mask, x, 3)
    options = {"row_mask": row_mask is not None, "col_mask": col_mask is not None, "log": log}
    for option, is_given in {**options, "temperature": temperature != 1.0}.items():
        if is_given and weight_row is not None:
            raise ValueError(f"{option} must not be given together with weight_row and weight_col")
    if weight_row is not None or row_mask is not None or col_mask is not None:
        x = pinned(x)
    return x, pinned(weight_row, 0), pinned(weight_col, 0), pinned(row_mask), pinned(col_mask), temperature, log


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
        running_mean = running_var = None
    return (
        pinned(x), pinned(weight_row, 0), pinned(weight_col, 0), pinned(running_mean, 0), pinned(running_var, 0), eps,
    )  # fmt: skip


def check_options(temperature: object, log: object) -> float:
    """The temperature, as a float."""
    temperature = checks.number("temperature", temperature)
    if not 0.0 < temperature < math.inf:
        raise ValueError(f"temperature must be positive and finite, got {temperature}")
    if not isinstance(log, bool):
        raise TypeError(f"log must be a bool, got {type(log).__name__}")
    return temperature


def _check_mask(name: str, sizes: str, mask: object, x: Tensor, dim: int) -> None:
    if mask is None:
        return
    if not isinstance(mask, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(mask).__name__}")
    if mask.dtype != torch.bool:
        raise TypeError(f"{name} must have the dtype torch.bool, got {mask.dtype}")
    expected = x.shape[0], x.shape[dim]
    if mask.shape != expected:
        raise ValueError(f"{name} must have shape {sizes}={tuple(expected)}, got {tuple(mask.shape)}")
    if mask.device != x.device:
        raise ValueError(f"{name} must be on the device of x, {x.device}, got {mask.device}")


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
