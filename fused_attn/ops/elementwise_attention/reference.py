"""Plain PyTorch reference of the row/column softmax and of element-wise attention: the oracle, not a kernel."""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F


def row_col_softmax(x, weight_row=None, weight_col=None, row_mask=None, col_mask=None, temperature=1.0, log=False):
    """Softmax along the rows times softmax along the columns; shapes as in the public function."""
    if weight_row is not None:
        x = x.unsqueeze(1)
        return (x * weight_row).softmax(4) * (x * weight_col).softmax(3)
    x = x if temperature == 1.0 else x / temperature
    excluded = _excluded(row_mask, col_mask)
    if excluded is not None:
        x = x.masked_fill(excluded, float("-inf"))
    factors = [x.log_softmax(dim) if log else x.softmax(dim) for dim in (3, 2)]
    if excluded is not None:
        # Each, and not their product: a row that is all excluded is NaN in one, which times 0 would go on in gradients.
        factors = [factor.masked_fill(excluded, float("-inf") if log else 0.0) for factor in factors]
    row, col = factors
    return row + col if log else row * col


def _excluded(row_mask, col_mask):
    """What takes no part, to broadcast to (B, C, H, W); None: nothing."""
    masks = [(row_mask, (1, 3)), (col_mask, (1, 2))]
    excluded = [~mask.unsqueeze(dims[0]).unsqueeze(dims[1]) for mask, dims in masks if mask is not None]
    return functools.reduce(torch.logical_or, excluded) if excluded else None


def statistics_dtype(x: torch.Tensor) -> torch.dtype:
    """Dtype of batch statistics: float32, float64 for float64 inputs."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def elementwise_attention(x, weight_row, weight_col, mean, var, eps):
    """The batch-normalised product of the two softmaxes times x.

    Args:
        x, weight_row, weight_col: as in the public function.
        mean, var: (heads*C,) statistics to normalise with; None: those of the batch.
        eps: added to the variance.

    Returns:
        out (B, heads*C, H, W), mean and biased variance that were used, both without gradient.
    """
    product = row_col_softmax(x, weight_row, weight_col)
    flat, dtype = product.flatten(1, 2), statistics_dtype(x)
    training = mean is None
    if training:
        values = flat.detach()
        mean = values.mean((0, 2, 3), dtype=dtype)
        var = (values - mean.view(-1, 1, 1)).square().mean((0, 2, 3))
        normalised = F.batch_norm(flat, None, None, training=True, eps=eps)
    else:
        mean, var = mean.detach().to(dtype), var.detach().to(dtype)
        normalised = F.batch_norm(flat, mean, var, training=False, eps=eps)
    return (normalised.view(product.shape) * x.unsqueeze(1)).flatten(1, 2), mean, var
