"""Public functions: validation, autocast and the choice of implementation."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import dispatch
from . import reference

ACTIVATIONS = ("softmax", "sigmoid")
IMPLEMENTATIONS = {"reference": lambda *inputs: None}


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
    """Compute a weighted sum of the layers of a network, with weights from attention over them.

    ``out[b, c] = sum_l a[b, g(c), l] * values[l][b, c]``, with ``a[b, g]`` the activation over l of
    ``scale * query[b, g].keys[l][b, g] + bias[l, g]`` and g(c) the group of channel c: C / G channels side by side.

    Args:
        query: (B, G, d), floating point, or (G, d) for one query for all samples.
        keys: L tensors (B, G, d), L at least 1, dtype of ``query``.
        values: L tensors (B, C, *spatial), G a divisor of C, dtype of ``query``.
        scale: factor of the products; ``d**-0.5`` when None.
        bias: (L, G), dtype of ``query``; None: no term.
        activation: ``"softmax"`` over the layers, or ``"sigmoid"`` of each.
        impl: ``"auto"`` or ``"reference"``.

    Returns:
        (B, C, *spatial), dtype of ``query``.

    Raises:
        TypeError: an argument is not a tensor, or not of a floating-point dtype.
        ValueError: shapes, dtypes, devices or the numbers of keys and values do not fit, or an option is unknown.

    Gradients reach query, keys, values and bias.  Values are not copied.  Under autocast the inputs are cast to the
    autocast dtype.

    Source: Luo, "Self-Attentive Layer Aggregation", eq. 4; Fang et al. 2023, "Cross-Layer Retrospective Retrieving via
    Layer Attention", MRLA-base.
    """
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation must be one of {', '.join(map(repr, ACTIVATIONS))}, got {activation!r}")
    keys, values = list(keys), list(values)
    if not keys or len(keys) != len(values):
        raise ValueError(f"keys and values must be as many, and at least one, got {len(keys)} and {len(values)}")
    _check_tensors(query, keys, values, bias)
    query, bias, *layers = dispatch.autocast(query, bias, *keys, *values)
    keys, values = layers[: len(keys)], layers[len(keys) :]
    for name, tensor in _named(keys, values, bias):
        if tensor.dtype != query.dtype:
            raise ValueError(f"{name} must have the dtype of query, {query.dtype}, got {tensor.dtype}")
        if tensor.device != query.device:
            raise ValueError(f"{name} must be on the device of query, {query.device}, got {tensor.device}")
    dispatch.choose("layer_attention", impl, IMPLEMENTATIONS, query, keys, values)
    scale = query.shape[-1] ** -0.5 if scale is None else float(scale)
    return reference.layer_attention(query, keys, values, scale, bias, activation)


class LayerCache:
    """Keys and values of the layers of one stage, in one forward pass.

    :meth:`append` what a layer has to offer, and :meth:`attend` to all that was appended so far.  Values are kept by
    reference: a stage of T layers holds T of them, however often they are attended to.
    """

    def __init__(self) -> None:
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []
        self._versions: list[int] = []

    def __len__(self) -> int:
        return len(self.values)

    def append(self, key: Tensor, value: Tensor) -> None:
        """Add a layer: key (B, G, d) and value (B, C, *spatial), shaped as those before it."""
        self.keys.append(key)
        self.values.append(value)
        if not torch.compiler.is_compiling():
            self._versions.append(value._version)

    def attend(
        self,
        query: Tensor,
        *,
        scale: float | None = None,
        bias: Tensor | None = None,
        activation: str = "softmax",
        impl: str = "auto",
    ) -> Tensor:
        """Sum the layers so far; arguments and errors as in :func:`layer_attention`.

        Raises:
            RuntimeError: a value was changed in place after it was appended.
        """
        for index, (value, version) in enumerate(zip(self.values, self._versions, strict=False)):
            if value._version != version:
                raise RuntimeError(f"values[{index}] must stay as it was appended, but was changed in place")
        return layer_attention(query, self.keys, self.values, scale=scale, bias=bias, activation=activation, impl=impl)


def _named(keys: list[Tensor], values: list[Tensor], bias: Tensor | None) -> list[tuple[str, Tensor]]:
    named = [(f"keys[{index}]", key) for index, key in enumerate(keys)]
    named += [(f"values[{index}]", value) for index, value in enumerate(values)]
    return named if bias is None else [*named, ("bias", bias)]


def _check_tensors(query: Tensor, keys: list[Tensor], values: list[Tensor], bias: Tensor | None) -> None:
    for name, tensor in [("query", query), *_named(keys, values, bias)]:
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}")
        if not tensor.is_floating_point():
            raise TypeError(f"{name} must have a floating-point dtype, got {tensor.dtype}")
    if query.dim() not in (2, 3) or 0 in query.shape[-2:]:
        raise ValueError(f"query must have shape (B, G, d) or (G, d), G and d at least 1, got {tuple(query.shape)}")
    if values[0].dim() < 2 or values[0].shape[1] % query.shape[-2]:
        raise ValueError(
            f"values[0] must have shape (B, C, *spatial), C a multiple of G={query.shape[-2]}, "
            f"got {tuple(values[0].shape)}"
        )
    if query.dim() == 3 and query.shape[0] != values[0].shape[0]:
        raise ValueError(f"query must have the batch of the values, {values[0].shape[0]}, got {tuple(query.shape)}")
    expected = (values[0].shape[0], *query.shape[-2:])
    for index, key in enumerate(keys):
        if tuple(key.shape) != expected:
            raise ValueError(f"keys[{index}] must have shape (B, G, d)={expected}, got {tuple(key.shape)}")
    for index, value in enumerate(values):
        if value.shape != values[0].shape:
            raise ValueError(
                f"values[{index}] must have the shape of values[0], {tuple(values[0].shape)}, got {tuple(value.shape)}"
            )
    if bias is not None and tuple(bias.shape) != (len(keys), query.shape[-2]):
        raise ValueError(f"bias must have shape (L, G)={(len(keys), query.shape[-2])}, got {tuple(bias.shape)}")
