"""Weights of attention on request: of one call of an op, and of every attention in a model while it runs.

The ops themselves never hold a map of all pairs.  Here the rows of chosen queries are computed in plain PyTorch.
"""

from __future__ import annotations

import contextlib
import inspect
import numbers
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from types import FrameType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .ops import (
    bias_attention_2d,
    decomposed_bias_attention,
    layer_attention,
    rel_attention_1d,
    rel_attention_2d,
    squeeze_excite,
)
from .ops._floor import dispatch, recording
from .ops._floor.operators import Arguments, Public
from .ops.bias_attention_2d import api as _bias
from .ops.bias_attention_2d.module import GridAttention2d, WindowAttention2d
from .ops.layer_attention import api as _layers
from .ops.layer_attention.reference import layer_weights
from .ops.rel_attention_2d import api as _rel
from .ops.rel_attention_2d import one_dimension as _sequence
from .ops.rel_attention_2d.reference import attention_rows
from .ops.squeeze_excite import api as _excite
from .ops.squeeze_excite.reference import scales

#: Positions: (y, x) pairs or flat indices, as a list, an integer tensor or an array; or ``"all"``.
Queries = Sequence[int] | Sequence[Sequence[int]] | Tensor | str

_PUBLIC: dict[Callable[..., Tensor], Public] = {
    rel_attention_2d: _rel.run_rel,
    rel_attention_1d: _sequence.run,
    decomposed_bias_attention: _rel.run_decomposed,
    bias_attention_2d: _bias.run,
    layer_attention: _layers.run_attention,
    squeeze_excite: _excite.run,
}


class AttentionWeights(NamedTuple):
    """Weights of one call; float32, or float64 of float64 inputs."""

    #: Over a grid: (B, heads, Q, Hk, Wk); a sequence: (B, heads, Q, Lk); layers: (B, G, L); channels: (B, C).
    weights: Tensor
    #: Of the prefix keys, (B, heads, Q, P); None where there are none.  With ``weights`` a query's sum to 1.
    prefix: Tensor | None = None


def attention_weights(
    op: Callable[..., Tensor], /, *args: Any, queries: Queries | None = None, **kwargs: Any
) -> AttentionWeights:
    """Compute the weights with which an op, called with the same arguments, sums its values.

    Args:
        op: ``rel_attention_2d``, ``rel_attention_1d``, ``decomposed_bias_attention`` or ``bias_attention_2d``: the rows
            of the attention matrix that belong to ``queries``.  ``layer_attention``: the weights of the layers.
            ``squeeze_excite``: the gates of the channels.
        args, kwargs: the op's.  ``dropout_p`` is left out of account; ``impl`` is not used.
        queries: of attention over a grid: a list of positions (y, x) or of flat indices y * Wq + x; of a sequence, of
            positions; an integer tensor or array (Q, 2) or (Q,) does too.  ``"all"``: every query, which is a matrix
            of N x N.  None for the other two.

    Returns:
        :class:`AttentionWeights`: ``weights``, and ``prefix`` where there are prefix keys.  Rows of queries without a
        key are zeros.

    Raises:
        TypeError, ValueError: ``op`` has no such weights, ``queries`` are missing, not integers or not on the grid, or
            the arguments are not those of ``op``, with the error that it raises.

    In plain PyTorch, in float32 or, for float64, in float64; differentiable.  Memory O(Q x keys).
    """
    if not callable(op) or op not in _PUBLIC:
        expected = ", ".join(function.__name__ for function in _PUBLIC)
        raise ValueError(f"op must be one of {expected}, got {getattr(op, '__name__', repr(op))}")
    bound = inspect.signature(op).bind(*args, **kwargs)
    bound.apply_defaults()
    values, public = bound.arguments, _PUBLIC[op]
    if op is rel_attention_1d:
        names = inspect.signature(_sequence.grid_arguments).parameters
        values |= dict(zip(names, _sequence.grid_arguments(*(values[name] for name in names)), strict=True))
    arguments = public.arguments(*map(values.get, public.parameters))
    if arguments.operators != "rel_attention_2d":
        if queries is not None:
            raise ValueError(f"queries must be None for {op.__name__}, which has none, got {queries!r}")
        return _weights(arguments)
    if queries is None:
        raise ValueError(f"queries must be positions, or 'all', for {op.__name__}, got None")
    query = arguments.values[0]
    return _weights(arguments, _flat(queries, query.shape[2:4], op is rel_attention_1d).to(query.device))


def _weights(arguments: Arguments, queries: Tensor | None = None) -> AttentionWeights:
    """Of the operator's arguments; ``queries`` (Q,): flat positions."""
    values = arguments.values
    first = values[0] if isinstance(values[0], Tensor) else values[0][0]
    dtype = torch.promote_types(first.dtype, torch.float32)
    with dispatch.without_autocast(first):
        if arguments.operators == "rel_attention_2d":
            return _rows(arguments, queries)
        if arguments.operators == "layer_attention":
            query, keys, _, bias, scale, sigmoid = values
            query, *keys = (tensor.to(dtype) for tensor in (query, *keys))
            return AttentionWeights(layer_weights(query, keys, bias, scale, sigmoid))
        if arguments.operators == "weighted_layer_sum":
            return AttentionWeights(values[0].to(dtype))
        means = values[0].mean((2, 3), keepdim=True, dtype=dtype)
        fc1_weight, fc1_bias, fc2_weight, fc2_bias, result, share = (
            each if each is None else each.to(dtype) for each in values[1:7]
        )
        options = values[-2:]  # the activation of the hidden layer, the gate
        return AttentionWeights(scales(means, fc1_weight, fc1_bias, fc2_weight, fc2_bias, result, share, *options))


def _rows(arguments: Arguments, queries: Tensor | None) -> AttentionWeights:
    (
        query, key, _, row_term, col_term, bias_table, query_segments, key_segments, prefix_key, _, scale, rel_scale,
        key_minus_query, _,
    ) = arguments.values  # fmt: skip
    rows = attention_rows(
        query,
        key,
        row_term,
        col_term,
        bias_table,
        None if query_segments is None else (query_segments, key_segments),
        prefix_key,
        queries,
        scale=scale,
        rel_scale=rel_scale,
        index="key_minus_query" if key_minus_query else "query_minus_key",
    )
    height, width = key.shape[2:4]
    weights = rows[..., : height * width].unflatten(-1, (height, width))
    if arguments.op == "rel_attention_1d":
        weights = weights.squeeze(3)
    return AttentionWeights(weights, None if prefix_key is None else rows[..., height * width :])


def _flat(queries: Queries, grid: Sequence[int], is_sequence: bool = False) -> Tensor:
    """Flat positions, (Q,), int64, on the CPU."""
    height, width = grid
    count = height * width
    if isinstance(queries, str):
        if queries != "all":
            raise ValueError(f"queries must be positions or 'all', got {queries!r}")
        return torch.arange(count)
    if isinstance(queries, tuple) and len(queries) == 2 and all(isinstance(each, numbers.Integral) for each in queries):
        y, x = queries
        raise ValueError(
            f"queries must be a list of positions, got {queries}: [({y}, {x})] is one position, [{y}, {x}] are two"
        )
    try:
        positions = torch.as_tensor(queries).detach().cpu()
    except Exception as error:
        raise TypeError(f"queries must be a list or a tensor of positions, got {queries!r}") from error
    if positions.is_floating_point() and positions.numel():
        raise TypeError(f"queries must be integers, got {positions.dtype}")
    if positions.is_complex() or positions.dtype == torch.bool:
        raise TypeError(f"queries must be integers, got {positions.dtype}")
    positions = positions.long()
    pairs = positions.dim() == 2 and positions.shape[1] == 2 and not is_sequence
    if positions.numel() == 0 or not (pairs or positions.dim() == 1):
        expected = "(Q,)" if is_sequence else "(Q, 2) or (Q,)"
        raise ValueError(f"queries must have shape {expected} with at least one, got {tuple(positions.shape)}")
    limits = torch.tensor([height, width] if pairs else [count])
    if ((positions < 0) | (positions >= limits)).any():
        place = f"on the grid of queries (H, W)={(height, width)}"
        expected = f"{place}, y * W + x from 0 to {count - 1}" if not is_sequence else f"from 0 to {count - 1}"
        raise ValueError(f"queries must be {expected}, got {positions.tolist()}")
    return positions @ torch.tensor([width, 1]) if pairs else positions


@dataclass(frozen=True, eq=False)
class AttentionMap:
    """Weights of one call of an op within a model."""

    #: Of the module that called the op, as in ``model.named_modules()``.
    name: str
    #: Name of the op.
    op: str
    #: (Q, 2), int64: (y, x) on the map of queries, in whose rows the weights are; None without queries.
    queries: Tensor | None
    #: As in :class:`AttentionWeights`.
    weights: Tensor
    #: As in :class:`AttentionWeights`.
    prefix: Tensor | None


#: Operators whose weights are recorded.
_RECORDED = ("rel_attention_2d", "layer_attention", "weighted_layer_sum", "squeeze_excite")
_WINDOWED = (WindowAttention2d, GridAttention2d)


@contextlib.contextmanager
def attention_maps(
    model: nn.Module, *, points: Sequence[Sequence[float]] = ((0.5, 0.5),), queries: Queries | None = None
) -> Iterator[list[AttentionMap]]:
    """Record the weights of every attention of a model while it runs, without changing what it computes.

    ::

        with attention_maps(model, points=[(0.25, 0.5)]) as maps:
            model(images)
        for each in maps:
            print(each.name, each.weights.shape)

    Args:
        model: any that calls the ops: this package's, one with its modules, or one whose layers
            ``fused_attn.integrations.convert`` has replaced.
        points: whose rows are recorded: (y, x) from 0 to 1 in the image, (0, 0) its upper left corner.  A layer of
            H x W positions has the query (floor(y * H), floor(x * W)) for it; a sequence, floor(x * L).
        queries: positions as in :func:`attention_weights` instead, which every layer must have.

    Yields:
        A list that grows by an :class:`AttentionMap` for every call of an op, in their order.  Recorded are
        ``rel_attention_2d``, ``rel_attention_1d``, ``decomposed_bias_attention``, ``bias_attention_2d``,
        ``layer_attention`` (that of ``LayerCache`` too), ``weighted_layer_sum`` and ``squeeze_excite``; with dropout
        the weights before it.  It stays empty if the model calls none of them.

    Raises:
        TypeError, ValueError: ``points`` or ``queries`` are none, or a layer does not have them.
        RuntimeError: a call within transforms of ``torch.func``, whose tensors must not leave them.

    The weights are float32 or float64, on the device of the model, and have no gradient.  Memory O(Q x keys) for every
    call.  ``WindowAttention2d`` and ``GridAttention2d`` give the rows on their whole map, (B, heads, Q, H, W), zeros
    outside a query's window; weights of padding are left out.  In other windowed models (converted ones) the grid is
    the window and B counts windows.  What runs again in a backward pass, for checkpoints, is not recorded again.
    Models in ``torch.compile`` are compiled anew, with a break at every op; record one thread at a time.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a module, got {type(model).__name__}")
    recorder = _Recorder(model, _checked_points(points), queries)
    listener: Callable[[Public, tuple[Any, ...]], None] = recorder.listen
    if "torch._dynamo" in sys.modules:
        listener = torch.compiler.disable(listener)
    windowed = [module for module in model.modules() if isinstance(module, _WINDOWED)]
    handles = [module.register_forward_pre_hook(recorder.enter, with_kwargs=True) for module in windowed]
    handles += [module.register_forward_hook(recorder.leave, always_call=True) for module in windowed]
    recording.LISTENERS.append(listener)
    try:
        yield recorder.maps
    finally:
        recording.LISTENERS.remove(listener)
        for handle in handles:
            handle.remove()


def _checked_points(points: Sequence[Sequence[float]]) -> list[tuple[float, float]]:
    try:
        checked = [(float(y), float(x)) for y, x in points]
    except (TypeError, ValueError) as error:
        raise TypeError(f"points must be a list of pairs (y, x), got {points!r}") from error
    if not checked or not all(0.0 <= each <= 1.0 for point in checked for each in point):
        raise ValueError(f"points must be at least one pair (y, x) of numbers from 0 to 1, got {points!r}")
    return checked


class _Recorder:
    def __init__(self, model: nn.Module, points: list[tuple[float, float]], queries: Queries | None) -> None:
        self.names = {module: name for name, module in model.named_modules()}
        self.points, self.queries = points, queries
        self.maps: list[AttentionMap] = []
        #: What a windowed module is cutting: (H, W) of the map, and the size of this call's windows, if it has its own.
        self.cuts: dict[nn.Module, tuple[Sequence[int], Any]] = {}

    def enter(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x = args[0] if args else kwargs.get("x")
        if isinstance(x, Tensor):
            self.cuts[module] = x.shape[2:], args[1] if len(args) > 1 else kwargs.get(module.size_name)

    def leave(self, module: nn.Module, *_: Any) -> None:
        self.cuts.pop(module, None)

    def listen(self, public: Public, args: tuple[Any, ...]) -> None:
        in_backward = torch._C._current_graph_task_id() != -1
        module = None if in_backward else self._caller()
        if module is None:
            return
        if torch._C._are_functorch_transforms_active():
            raise RuntimeError("attention_maps must not be used on calls within transforms of torch.func")
        with torch.no_grad():
            arguments = public.arguments(*args)
            if arguments.operators not in _RECORDED:
                return
            positions, found = None, None
            if arguments.operators != "rel_attention_2d":
                found = _weights(arguments)
            else:
                query = arguments.values[0]
                grid, size = self.cuts.get(module, (query.shape[2:4], None))
                try:
                    flat = self._flat(grid, arguments.op == "rel_attention_1d").to(query.device)
                except ValueError as error:
                    raise ValueError(f"{self.names[module] or 'the model'}: {error}") from error
                if module in self.cuts:
                    found = _of_windows(arguments, flat, grid, _positions(module, grid, size, query.device))
                else:
                    found = _weights(arguments, flat)
                positions = torch.stack((flat // grid[1], flat % grid[1]), dim=-1)
        self.maps.append(AttentionMap(self.names[module], arguments.op, positions, *found))

    def _caller(self) -> nn.Module | None:
        """The innermost module of the model whose method, or a function given to it, is running."""
        frame: FrameType | None = sys._getframe(2)
        while frame is not None:
            code = frame.f_code
            if code.co_argcount:
                first = frame.f_locals.get(code.co_varnames[0])
                if isinstance(first, nn.Module) and first in self.names:
                    return first
            frame = frame.f_back
        return None

    def _flat(self, grid: Sequence[int], is_sequence: bool) -> Tensor:
        if self.queries is not None:
            return _flat(self.queries, grid, is_sequence)
        height, width = grid
        if height * width == 0:
            raise ValueError(f"points must lie on a grid of queries, got one of (H, W)={(height, width)}")
        rows = [min(int(y * height), height - 1) for y, _ in self.points]
        columns = [min(int(x * width), width - 1) for _, x in self.points]
        return torch.tensor(rows) * width + torch.tensor(columns)


def _positions(module: Any, grid: Sequence[int], size: Any, device: torch.device) -> Tensor:
    positions: Tensor = module.positions(grid, size, device)
    return positions


def _of_windows(arguments: Arguments, queries: Tensor, grid: Sequence[int], positions: Tensor) -> AttentionWeights:
    """Rows of positions of a map, (B, heads, Q, H, W), from the windows that they lie in, at ``positions`` of it."""
    positions = positions.flatten(1)
    places = (positions.flatten() == queries[:, None]).int().argmax(1)
    windows, within = places // positions.shape[1], places % positions.shape[1]
    rows = _weights(arguments, within).weights.flatten(3)  # (B * windows, heads, Q, positions of a window)
    rows = rows.unflatten(0, (-1, len(positions)))
    maps = rows.new_zeros(rows.shape[0], rows.shape[2], len(queries), grid[0] * grid[1])
    for number, window in enumerate(windows.tolist()):
        inside = positions[window] >= 0
        maps[:, :, number, positions[window][inside]] = rows[:, window, :, number][..., inside]
    return AttentionWeights(maps.unflatten(-1, tuple(grid)))
