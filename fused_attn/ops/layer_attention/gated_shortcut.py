"""Value times a gate per group, plus shortcut times a weight per channel: the sum of MRLA-light."""

from __future__ import annotations

import torch
from torch import Tensor

from .._floor import checks, dispatch
from .._floor.tracing import leaf
from .api import weighted_layer_sum


@leaf
def gated_shortcut(gate: Tensor, value: Tensor, weight: Tensor, shortcut: Tensor, *, impl: str = "auto") -> Tensor:
    """Compute ``out[b, c] = gate[b, g(c)] * value[b, c] + weight[c] * shortcut[b, c]``, g(c) the group of channel c.

    Args:
        gate: (B, G), floating point; G divides C, and each group is C / G channels side by side.
        value: (B, C, *spatial), dtype of ``gate``.
        weight: (C,), dtype of ``gate``.
        shortcut: (B, C, *spatial), dtype of ``gate``.
        impl: as in :func:`layer_attention`.

    Returns:
        (B, C, *spatial), dtype of ``gate``, in the memory order of ``value``.

    Raises:
        TypeError: an argument is not a tensor, or not of a floating-point dtype.
        ValueError: shapes, dtypes or devices do not fit, or ``impl`` is unknown.

    Gradients reach all four tensors, with the same bits at every run.  Under autocast the maps keep their dtype, the
    wider one of value and shortcut, as in the products and the sum element by element; gate and weight are cast to it.

    Source: Fang et al. 2023, "Cross-Layer Retrospective Retrieving via Layer Attention", MRLA-light: with
    gate = sigmoid(scale * query.key) of the current layer, one step of the recurrence over layers.
    """
    inputs = {"gate": gate, "value": value, "weight": weight, "shortcut": shortcut}
    checks.tensors(**inputs)
    if value.dim() < 2:
        raise ValueError(f"value must have shape (B, C, *spatial), got {tuple(value.shape)}")
    batch, channels = value.shape[:2]
    if gate.dim() != 2 or gate.shape[0] != batch or gate.shape[1] == 0 or channels % gate.shape[1]:
        raise ValueError(
            f"gate must have shape (B, G) with B={batch} and G a divisor of C={channels}, got {tuple(gate.shape)}"
        )
    if weight.shape != (channels,):
        raise ValueError(f"weight must have shape (C,)=({channels},), got {tuple(weight.shape)}")
    if shortcut.shape != value.shape:
        raise ValueError(f"shortcut must have the shape of value, {tuple(value.shape)}, got {tuple(shortcut.shape)}")
    value, shortcut, gate, weight = dispatch.autocast_maps((value, shortcut), gate, weight)
    checks.same_dtype({"gate": gate, "value": value, "weight": weight, "shortcut": shortcut})
    # Two layers with a weight per channel: small weights, and one pass over the maps.
    gate = gate.repeat_interleave(channels // gate.shape[1], dim=1)
    weights = torch.stack((gate, weight.expand(batch, channels)), dim=-1)
    with dispatch.without_autocast(value):
        return weighted_layer_sum(weights, [value, shortcut], impl=impl)
