"""``torch.vmap`` of the operators: the mapped dimension becomes part of one that the kernels have.

Folded into the batch, a tensor that the whole batch shares (a table, a weight) stays one: it can neither be mapped nor
get a gradient for each mapped call.  Folded into heads or channels, which have parameters of their own, it can.  What
no fold covers is called once for each index.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from .second import Place, flatten
from .sharding import Axis


@dataclass(frozen=True)
class Folded:
    """Where a tensor takes the mapped dimension.

    Args:
        dim: the dimension that it becomes a part of, outside what is there.
        outer: size of a part of ``dim`` that stays outside the mapped dimension.
        repeats: how often the tensor is repeated along a new dimension ``dim`` first, along which gradients add up.
    """

    dim: int
    outer: int = 1
    repeats: int | None = None

    def fold(self, tensor: Tensor, mapped: int | None, size: int) -> Tensor:
        """The tensor of ``size`` calls, with its dimension ``mapped`` folded; None: all have the same tensor."""
        tensor = tensor.expand(size, *tensor.shape) if mapped is None else tensor.movedim(mapped, 0)
        dim = self.dim % (tensor.dim() - 1)
        if self.repeats is not None:
            tensor = tensor.unsqueeze(1 + dim)
            tensor = tensor.expand(*tensor.shape[: 1 + dim], self.repeats, *tensor.shape[2 + dim :])
        if self.outer != 1:
            inner = tensor.shape[1 + dim] // self.outer
            return tensor.unflatten(1 + dim, (self.outer, inner)).movedim(0, 1 + dim).flatten(dim, dim + 2)
        return tensor.movedim(0, dim).flatten(dim, dim + 1)

    def unfold(self, tensor: Tensor, size: int) -> tuple[Tensor, int]:
        """What :meth:`fold` would make ``tensor`` of, and its mapped dimension."""
        dim = self.dim % tensor.dim()
        inner = tensor.shape[dim] // size // self.outer
        if self.outer != 1:
            return tensor.unflatten(dim, (self.outer, size, inner)).movedim(dim + 1, 0).flatten(1 + dim, 2 + dim), 0
        tensor = tensor.unflatten(dim, (size, inner))
        return (tensor if self.repeats is None else tensor.sum(dim + 1)), dim


#: Of arguments and outputs by name; a gradient is folded as what it is the gradient of.
Fold = Mapping[str, Folded]
#: Of one call's arguments by name, the folds there are, best first.
Folds = Callable[[Mapping[str, Any]], Sequence[Fold]]


def along(axes: Sequence[Axis]) -> list[Fold]:
    """The folds into axes of a call: shards that are computed apart are calls of their own."""
    return [{name: Folded(dim) for name, dim in axis.dims.items()} for axis in axes]


def register(name: str, folds: Folds, given: Collection[str]) -> None:
    """Register the batching rule of the operator ``fused_attn::name``.

    Args:
        name: of the operator.
        folds: those that there are.
        given: names of arguments that may have any strides; others were saved by forward, and kernels rely on the
            layout that it gave them.
    """
    operator = getattr(torch.ops.fused_attn, name).default
    arguments = [argument.name for argument in operator._schema.arguments]
    outputs = [_of(output.name) for output in operator._schema.returns]
    is_backward = name.endswith("_backward")

    def rule(info, in_dims: tuple, *args: Any):
        size = info.batch_size
        if not size:
            raise RuntimeError(f"fused_attn::{name}: torch.vmap over a dimension of size 0 is not supported")
        mapped = flatten(arguments, in_dims)[0]
        values, form = flatten(arguments, args)

        def call(i: int) -> list[Any]:
            parts = {
                place: value if mapped[place] is None else value.select(mapped[place], i)
                for place, value in values.items()
            }
            return tree_unflatten(dense(parts), form)

        def dense(parts: Mapping[Place, Any]) -> list[Any]:
            return [part if place[0] in given else _dense(part) for place, part in parts.items()]

        one = dict(zip(arguments, call(0), strict=True))
        absent = {output for output in outputs if is_backward and one.get(output, 0) is None}
        covered = {_of(argument) for (argument, _), dim in mapped.items() if dim is not None} | {*outputs} - absent
        fold = next((fold for fold in folds(one) if covered <= fold.keys()), None)
        if fold is None:
            return _stacked([operator(*call(i)) for i in range(size)])
        folded = {
            place: fold[of].fold(value, mapped[place], size)
            if (of := _of(place[0])) in fold and isinstance(value, Tensor)
            else value
            for place, value in values.items()
        }
        results = operator(*tree_unflatten(dense(folded), form))
        if isinstance(results, Tensor):
            return fold[outputs[0]].unfold(results, size)
        results, form = flatten(outputs, results)
        pairs = [
            (result.expand(size, *result.shape), 0) if place[0] in absent else fold[place[0]].unfold(result, size)
            for place, result in results.items()
        ]
        return tuple(tuple(tree_unflatten([*part], form)) for part in zip(*pairs, strict=True))

    torch.library.register_vmap(f"fused_attn::{name}", rule)


def _of(name: str) -> str:
    """What a gradient is the gradient of; other names as they are."""
    return name.removeprefix("grad_")


def _dense(value: Any) -> Any:
    """A tensor in an order of its own: as it is where it is contiguous or channels_last, as forward saves them."""
    if not isinstance(value, Tensor) or value.is_contiguous():
        return value
    if value.dim() == 4:
        try:
            if value.is_contiguous(memory_format=torch.channels_last):
                return value
        except RuntimeError:  # it is mapped further out as well, where the rule comes back to it
            return value
    return value.contiguous()


def _stacked(calls: Sequence[Any]) -> tuple[Any, Any]:
    """The results of some calls as those of a mapped one, and the mapped dimensions."""
    results = [tree_flatten(call)[0] for call in calls]
    form = tree_flatten(calls[0])[1]
    stacked = [torch.stack(parts) for parts in zip(*results, strict=True)]
    return tree_unflatten(stacked, form), tree_unflatten([0] * len(stacked), form)
