"""Attention over the layers of a stage, one layer after the other, with one gradient buffer per value."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.compiler import is_compiling

from .. import dispatch
from . import library, reference
from .api import check, layer_attention


class LayerCache:
    """Keys and values of the layers of one stage in one forward pass.

    A value receives gradients from its own layer and every later one.  Separate calls of :func:`layer_attention` return
    each of them as a map of its own, T²/2 maps for T layers.  Here a backward pass adds them, as it meets them, to one
    buffer per value; autograd sees one map.  Results are those of the separate calls up to the order of that sum.

    Make one for every stage and every forward pass::

        cache = LayerCache()
        for block, attention in zip(stage, attentions):
            x = block(x)
            query, key, value = attention(x)
            cache.append(key, value)
            x = x + cache.attend(query)

    For ``torch.utils.checkpoint``, make it inside the checkpointed function.  Under ``torch.compile`` it makes the
    separate calls.  No second derivative.
    """

    def __init__(self) -> None:
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []
        self._buffers: list[_Buffer] = []
        self._versions: list[int] = []

    def __len__(self) -> int:
        return len(self.keys)

    def append(self, key: Tensor, value: Tensor) -> None:
        """Add a layer: key (B, G, d), value (B, C, *spatial)."""
        buffer = _Buffer()
        if isinstance(value, Tensor) and value.requires_grad and torch.is_grad_enabled() and not is_compiling():
            value = _Collect.apply(buffer, value)
        self.keys.append(key)
        self.values.append(value)
        self._buffers.append(buffer)
        self._versions.append(0 if is_compiling() else _version(value))

    def attend(
        self,
        query: Tensor,
        *,
        scale: float | None = None,
        bias: Tensor | None = None,
        activation: str = "softmax",
        impl: str = "auto",
    ) -> Tensor:
        """:func:`layer_attention` over all layers appended so far; arguments, result and errors are its."""
        if is_compiling():
            return layer_attention(
                query, self.keys, self.values, scale=scale, bias=bias, activation=activation, impl=impl
            )
        for layer, (value, version) in enumerate(zip(self.values, self._versions, strict=True)):
            if _version(value) != version:
                raise RuntimeError(f"values[{layer}] was changed in place after it was appended to the LayerCache")
        query, keys, values, bias, scale = check(query, self.keys, self.values, scale, bias, activation)
        impl = dispatch.choose("layer_attention", impl, library.IMPLEMENTATIONS, values)
        sigmoid = activation == "sigmoid"
        if impl == "reference":
            return reference.layer_attention(query, keys, values, bias, scale, sigmoid)
        # Under autocast the values were cast: their gradients take the usual way.
        buffers = [
            buffer if value is kept else None
            for buffer, value, kept in zip(self._buffers, values, self.values, strict=True)
        ]
        return _Attend.apply(impl, scale, sigmoid, buffers, bias, query, *keys, *values)


def _version(value: object) -> int:
    """How often a tensor was written to; 0 where that is not counted (inference mode)."""
    return value._version if isinstance(value, Tensor) and not value.is_inference() else 0


class _Buffer:
    """The gradient of one value so far in the backward pass that is running.

    A pass that stopped early, or did not need this value, leaves a sum behind: it is dropped with the first addition of
    the next one.
    """

    def __init__(self) -> None:
        self.sum: Tensor | None = None
        self.task = -1

    def get(self) -> Tensor | None:
        return self.sum if self.task == torch._C._current_graph_task_id() else None

    def set(self, total: Tensor) -> None:
        self.sum, self.task = total, torch._C._current_graph_task_id()

    def take(self) -> Tensor | None:
        total, self.sum = self.get(), None
        return total


class _Collect(torch.autograd.Function):
    """The value unchanged; its gradient is what the attentions have put into the buffer, and what came otherwise.

    Autograd runs the backward pass of this function after those of all attentions over its result.
    """

    @staticmethod
    def forward(ctx, buffer, value):
        ctx.buffer = buffer
        ctx.set_materialize_grads(False)
        return value.view_as(value)

    @staticmethod
    def backward(ctx, grad):
        total = ctx.buffer.take()
        if total is None or grad is None:
            return None, grad if total is None else total
        return None, total.add_(grad)


class _Attend(torch.autograd.Function):
    @staticmethod
    def forward(ctx, impl, scale, sigmoid, buffers, bias, query, *rest):
        layers = len(rest) // 2
        keys, values = rest[:layers], rest[layers:]
        operator = getattr(torch.ops.fused_attn, f"layer_attention_{impl}").default
        out, weights = operator(query, keys, values, bias, scale, sigmoid)
        ctx.call = impl, scale, sigmoid, buffers, bias is not None, layers
        ctx.save_for_backward(weights, query, *rest)
        return out

    @staticmethod
    def backward(ctx, grad_out):
        if torch.is_grad_enabled():  # create_graph=True: what goes through the buffers is not recorded
            raise RuntimeError(
                "LayerCache: its gradients have no second derivative; use layer_attention with impl='reference' for it"
            )
        impl, scale, sigmoid, buffers, has_bias, layers = ctx.call
        weights, query, *rest = ctx.saved_tensors
        keys, values = rest[:layers], rest[layers:]
        collected = [
            buffer is not None and wanted
            for buffer, wanted in zip(buffers, ctx.needs_input_grad[-layers:], strict=True)
        ]
        into = None
        if all(collected):
            into = [buffer.get() for buffer in buffers]
            if any(total is not None for total in into):
                into = [library.zero_gradient(values) if total is None else total for total in into]
            else:
                into = None
        grad_query, grad_keys, grad_values, grad_bias = library.attention_backward(
            impl, grad_out, query, keys, values, weights, scale, sigmoid, into
        )
        if all(collected):
            for buffer, total in zip(buffers, grad_values, strict=True):
                buffer.set(total)
            grad_values = [None] * layers
        return None, None, None, None, grad_bias if has_bias else None, grad_query, *grad_keys, *grad_values
