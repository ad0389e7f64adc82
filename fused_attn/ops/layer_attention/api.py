"""Public functions: check, choose, run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from .._floor import checks
from .._floor.tracing import leaf
from . import op

ACTIVATIONS = ("softmax", "sigmoid")


@leaf
def layer_attention(
    query: Tensor,
    keys: Sequence[Tensor],
    values: Sequence[Tensor],
    *,
    scale: float | None = None,
    bias: Tensor | None = None,
    activation: str = "softmax",
    impl: str = "auto",
) -> Tensor:
    """Attention of one layer over the outputs of several, with one weight per image, group of channels and layer.

    ``out[b, c] = sum_l a[b, g(c), l] * values[l][b, c]`` with
    ``a[b, g, :] = softmax_l(scale * query[b, g].keys[l][b, g] + bias[l, g])``, g(c) the group of channel c.

    Args:
        query: (B, G, d), or (G, d) for one learned query that all images share.
        keys: L tensors (B, G, d).
        values: L tensors (B, C, *spatial), C a multiple of G; a group is C / G channels side by side.  They stay where
            they are: nothing is stacked, concatenated or copied, unless their memory order is neither that of a
            contiguous tensor nor channels_last, or not that of ``values[0]``.
        scale: factor of the products; ``d**-0.5`` when None.
        bias: (L, G), added to the scores; dtype of ``query``, or float32.  None: none.
        activation: ``"softmax"`` over the layers, or ``"sigmoid"`` of each.
        impl: ``"auto"``, ``"cpu"``, ``"triton"`` or ``"reference"``.

    Returns:
        (B, C, *spatial), dtype of the inputs, memory order of ``values[0]``.

    Raises:
        TypeError: an argument is not a tensor, or not of a floating-point dtype.
        ValueError: shapes, dtypes or devices do not fit, there is no layer, or an option is unknown.
        RuntimeError: the chosen ``impl`` cannot run on these inputs.

    The inputs share one dtype (float32, float16, bfloat16; the reference computes any); weights and sums are float32.
    Under autocast all but the bias are cast to its dtype, as the products of the published formulation are.
    Deterministic, with the same bits at any number of threads.  Saved for backward: the inputs and the weights.  Every
    call gives each value a gradient of its own; over the layers of a stage, :class:`LayerCache` gives them one.

    Source: Fang et al. 2023, "Cross-Layer Retrospective Retrieving via Layer Attention", eq. 4-6 (MRLA-base); Luo,
    "Self-Attentive Layer Aggregation", eq. 1-4 (one group).
    """
    return run_attention(impl, query, keys, values, bias, scale, activation)[0]


@leaf
def weighted_layer_sum(weights: Tensor, values: Sequence[Tensor], *, impl: str = "auto") -> Tensor:
    """``out[b, c] = sum_l weights[b, g(c), l] * values[l][b, c]``: :func:`layer_attention` with its weights given.

    Args:
        weights: (B, G, L).
        values: L tensors (B, C, *spatial), C a multiple of G, dtype of ``weights``.
        impl: as in :func:`layer_attention`.

    Returns:
        (B, C, *spatial), dtype of the inputs, memory order of ``values[0]``.

    Raises, determinism: as in :func:`layer_attention`.  Under autocast the inputs are cast to its dtype, as ``einsum``
    does.
    """
    return _run_sum(impl, weights, values)[0]


def _check_sum(weights: Tensor, values: Sequence[Tensor]) -> tuple[Any, ...]:
    """The arguments of the operator."""
    checks.tensor("weights", weights)
    _check_values(values)
    batch, channels = values[0].shape[:2]
    if weights.dim() != 3 or weights.shape[0] != batch or weights.shape[2] != len(values):
        raise ValueError(f"weights must have shape (B, G, L)=({batch}, G, {len(values)}), got {tuple(weights.shape)}")
    _check_groups("weights", weights.shape[1], channels)
    return weights, values


def check(
    query: Tensor,
    keys: Sequence[Tensor],
    values: Sequence[Tensor],
    bias: Tensor | None,
    scale: float | None,
    activation: str,
) -> tuple[Any, ...]:
    """Check the arguments of :func:`layer_attention`; those of the operator."""
    checks.tensor("query", query)
    _check_list("keys", keys)
    _check_values(values)
    if bias is not None:
        checks.tensor("bias", bias)
    checks.one_of("activation", activation, ACTIVATIONS)
    if len(keys) != len(values):
        raise ValueError(f"keys must be as many as values, {len(values)}, got {len(keys)}")
    if query.dim() not in (2, 3):
        raise ValueError(f"query must have shape (B, G, d) or (G, d), got {tuple(query.shape)}")
    batch, channels = values[0].shape[:2]
    if query.dim() == 2:
        query = query.expand(batch, *query.shape)
    if query.shape[0] != batch:
        raise ValueError(f"query must have the batch of values, {batch}, got shape {tuple(query.shape)}")
    if query.shape[2] == 0:
        raise ValueError(f"query must have a depth d of at least 1, got shape {tuple(query.shape)}")
    _check_groups("query", query.shape[1], channels)
    for layer, key in enumerate(keys):
        if key.shape != query.shape:
            raise ValueError(f"keys[{layer}] must have shape (B, G, d)={tuple(query.shape)}, got {tuple(key.shape)}")
    if bias is not None and tuple(bias.shape) != (len(keys), query.shape[1]):
        raise ValueError(f"bias must have shape (L, G)={(len(keys), query.shape[1])}, got {tuple(bias.shape)}")
    scale = checks.number("scale", query.shape[2] ** -0.5 if scale is None else scale)
    return query, keys, values, bias, scale, activation == "sigmoid"


def _check_list(name: str, tensors: object) -> None:
    if not isinstance(tensors, (list, tuple)):
        raise TypeError(f"{name} must be a list of tensors, one for each layer, got {type(tensors).__name__}")
    if not tensors:
        raise ValueError(f"{name} must hold at least one layer, got none")
    for layer, tensor in enumerate(tensors):
        checks.tensor(f"{name}[{layer}]", tensor)


def _check_values(values: Sequence[Tensor]) -> None:
    _check_list("values", values)
    shape = values[0].shape
    if len(shape) < 2:
        raise ValueError(f"values[0] must have shape (B, C, *spatial), got {tuple(shape)}")
    for layer, value in enumerate(values):
        if value.shape != shape:
            raise ValueError(
                f"values[{layer}] must have the shape of values[0], {tuple(shape)}, got {tuple(value.shape)}"
            )


def _check_groups(name: str, groups: int, channels: int) -> None:
    if groups == 0 or channels % groups:
        raise ValueError(f"{name} must have a number of groups G that divides the C={channels} channels, got {groups}")


run_attention, _run_sum = op.layer_attention.public(check), op.weighted_layer_sum.public(_check_sum)
