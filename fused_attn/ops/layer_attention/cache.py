"""Attention over the layers of a stage, one layer after the other, with one gradient buffer per value."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.compiler import is_compiling

from .._floor import dispatch, recording, sharding
from .._floor.tracing import is_traced
from . import op
from .api import check, layer_attention, run_attention


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

    ``keys`` and ``values`` are the tensors that were appended: gradients with respect to them, retained ones and hooks
    are those of the separate calls, as are second derivatives.  Under ``torch.compile``, in function transforms and of
    DTensors it makes the separate calls.

    With ``torch.utils.checkpoint``, whose functions run a second time in the backward pass, do one of:

    - make the cache inside the checkpointed function;
    - append and attend outside it (values have to be kept for the later layers anyway);
    - share the cache, and tell the checkpoint how long it was:
      ``checkpoint(block, x, cache, use_reentrant=False, context_fn=cache.checkpoint_contexts)``.

    A function that changes or reads a shared cache a second time without that is a ``RuntimeError``.
    """

    def __init__(self) -> None:
        self._layers: list[_Layer] = []
        #: the backward pass that the cache was made in, or put back in; -1: none
        self._pass = _running_pass()

    def __len__(self) -> int:
        return len(self._layers)

    @property
    def keys(self) -> tuple[Tensor, ...]:
        """The keys that were appended."""
        return tuple(layer.key for layer in self._layers)

    @property
    def values(self) -> tuple[Tensor, ...]:
        """The values that were appended."""
        return tuple(layer.value for layer in self._layers)

    def append(self, key: Tensor, value: Tensor) -> None:
        """Add a layer: key (B, G, d), value (B, C, *spatial)."""
        self._check_pass("append")
        layer = _Layer(key, value, _version(value))
        needs_gradient = isinstance(value, Tensor) and value.requires_grad and torch.is_grad_enabled()
        if needs_gradient and not _makes_separate_calls(key, value):
            layer.buffer = _Buffer()
            layer.collected = _Collect.apply(layer.buffer, value)
        self._layers.append(layer)

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
        self._check_pass("attend")
        for number, layer in enumerate(self._layers):
            if _version(layer.value) != layer.version:
                raise RuntimeError(f"values[{number}] was changed in place after it was appended to the LayerCache")
        if _makes_separate_calls(query, bias, *self.keys, *self.values):
            return layer_attention(
                query, self.keys, self.values, scale=scale, bias=bias, activation=activation, impl=impl
            )
        if recording.LISTENERS:
            recording.tell(run_attention, (query, self.keys, self.values, bias, scale, activation))
        args = check(query, self.keys, self.values, bias, scale, activation)
        impl, (query, keys, values, bias, scale, sigmoid) = op.layer_attention.choose(impl, args)
        if impl == "reference":
            return op.layer_attention.run(impl, query, keys, values, bias, scale, sigmoid)[0]
        # Under autocast the values were cast: their gradients take the usual way, as those of values without a buffer.
        buffers = [
            layer.buffer if value is layer.value else None for layer, value in zip(self._layers, values, strict=True)
        ]
        values = [
            value if buffer is None else layer.collected
            for layer, value, buffer in zip(self._layers, values, buffers, strict=True)
        ]
        with dispatch.without_autocast(query):
            return _Attend.apply(impl, scale, sigmoid, buffers, bias, query, *keys, *values)

    def checkpoint_contexts(self) -> tuple[AbstractContextManager, AbstractContextManager]:
        """``context_fn`` of ``torch.utils.checkpoint`` for a function that appends to this cache or attends over it.

        When the function runs again, in the backward pass, the cache is as long as it was at its first start.
        """
        return nullcontext(), _PutBack(self, len(self))

    def _check_pass(self, method: str) -> None:
        running = _running_pass()
        if running not in (-1, self._pass):
            raise RuntimeError(
                f"LayerCache: {method} on a cache of {len(self)} layers ran again in the backward pass, as in "
                "torch.utils.checkpoint: make the cache inside the checkpointed function, append and attend outside "
                "it, or pass use_reentrant=False, context_fn=cache.checkpoint_contexts"
            )


class _PutBack:
    """A context in which a cache has its first layers only."""

    def __init__(self, cache: LayerCache, length: int) -> None:
        self.cache, self.length = cache, length

    def __enter__(self) -> None:
        cache = self.cache
        self.kept = cache._layers, cache._pass
        cache._layers, cache._pass = cache._layers[: self.length], _running_pass()

    def __exit__(self, *_) -> None:
        self.cache._layers, self.cache._pass = self.kept


def _makes_separate_calls(*tensors: Any) -> bool:
    """Whether what goes through the buffers would not be seen: in a compiler, a trace, a transform, forward mode.

    So it is with tensors that wrap others: the kernels, which are called here themselves, see only what is within.
    """
    return (
        is_compiling()
        or torch.jit.is_tracing()
        or torch._C._are_functorch_transforms_active()
        or forward_ad._current_level >= 0
        or is_traced(tensors)
        or any(isinstance(tensor, Tensor) and sharding.is_wrapper(tensor) for tensor in tensors)
    )


def _running_pass() -> int:
    """The number of the backward pass that is running in this thread; -1: none."""
    return -1 if is_compiling() else torch._C._current_graph_task_id()


def _version(value: object) -> int:
    """How often a tensor was written to; 0 where that is not counted (in a compiler, in inference mode)."""
    return value._version if isinstance(value, Tensor) and not is_compiling() and not value.is_inference() else 0


class _Buffer:
    """The gradient of one value so far in the backward pass that is running.

    Passes are told apart, because a hook may run one inside another.
    """

    def __init__(self) -> None:
        self.sums: dict[int, Tensor] = {}

    def get(self) -> Tensor | None:
        return self.sums.get(_running_pass())

    def set(self, total: Tensor) -> None:
        running = _running_pass()
        if running not in self.sums:
            # Nobody takes the sum in a pass that is not asked for a gradient of the value.
            torch.autograd.Variable._execution_engine.queue_callback(lambda: self.sums.pop(running, None))
        self.sums[running] = total

    def take(self) -> Tensor | None:
        return self.sums.pop(_running_pass(), None)


@dataclass
class _Layer:
    key: Tensor
    value: Tensor
    version: int
    #: where its gradient is added up, and the value as the attentions get it; None: its gradient takes the usual way
    buffer: _Buffer | None = None
    collected: Tensor | None = None


class _Collect(torch.autograd.Function):
    """The value unchanged; its gradient is what the attentions have put into the buffer, and what they returned.

    Autograd runs the backward pass of this function after those of all attentions over its result.  That only they see:
    a user has the value above this node, where the gradient is whole.
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
        ctx.call = impl, scale, sigmoid, buffers, layers
        ctx.save_for_backward(weights, bias, query, *rest)
        return out

    @staticmethod
    def backward(ctx, grad_out):
        impl, scale, sigmoid, buffers, layers = ctx.call
        weights, bias, query, *rest = ctx.saved_tensors
        keys, values = rest[:layers], rest[layers:]
        transformed = torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0
        if torch.is_grad_enabled() or transformed:  # what goes through the buffers would not be seen
            operator = getattr(torch.ops.fused_attn, f"layer_attention_{impl}_backward").default
            grad_query, grad_keys, grad_values, grad_bias = operator(
                grad_out, query, keys, values, bias, weights, scale, sigmoid
            )
            grad_bias = None if bias is None else grad_bias
            return None, None, None, None, grad_bias, grad_query, *grad_keys, *grad_values
        collected = [
            buffer is not None and wanted
            for buffer, wanted in zip(buffers, ctx.needs_input_grad[-layers:], strict=True)
        ]
        into = None
        if all(collected):
            into = [buffer.get() for buffer in buffers]
            if any(total is not None for total in into):
                into = [op.zero_gradient(values) if total is None else total for total in into]
            else:
                into = None
        grad_query, grad_keys, grad_values, grad_bias = op.attention_backward(
            impl, grad_out, query, keys, values, bias, weights, scale, sigmoid, into=into
        )
        if all(collected):
            for buffer, total in zip(buffers, grad_values, strict=True):
                buffer.set(total)
            grad_values = [None] * layers
        return None, None, None, None, grad_bias, grad_query, *grad_keys, *grad_values
