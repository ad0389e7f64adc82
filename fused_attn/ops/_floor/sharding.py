"""Operators on tensors of ``torch.distributed.tensor``: which shards they compute on where they lie.

Every call on DTensors gives what one process gives on the whole tensors.  An op declares its axes; along any other one,
and along an axis that the processes do not divide evenly, the tensors are gathered first.

The rules are ``torch_dispatch`` rules of DTensor rather than those of ``register_sharding``, which knows no operator
that returns a list of tensors and cannot give each shard its own part of a dropout mask.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from . import autograd


@dataclass(frozen=True)
class Axis:
    """An axis of a call whose shards can be computed apart from each other.

    Args:
        dims: argument or output -> the dimension of it that lies along the axis; in a list, of every tensor.  What is
            not named is whole in every shard, and its gradient is the sum of theirs.
        unit: positions along the axis that must not be parted.
        localise: ``localise(arguments of a shard, its number)`` changes those that depend on where the shard lies.
    """

    dims: Mapping[str, int]
    unit: int = 1
    localise: Callable[[dict[str, Any], int], None] | None = None


#: The axes of a call, of its arguments by name: those of forward or those of backward, whichever operator is called.
Axes = Callable[[Mapping[str, Any]], Sequence[Axis]]

#: Operators whose rules DTensor does not have yet.
_WAITING: list[tuple[Any, Axes]] = []


def declare(operator: torch._ops.OpOverload, axes: Axes) -> None:
    """Make a rule for ``operator``, for :func:`register` to register."""
    _WAITING.append((operator, axes))


def register() -> None:
    """Register the rules once there are DTensors: importing them takes longer than the rest of the package."""
    if _WAITING and "torch.distributed.tensor" in sys.modules:
        from torch.distributed.tensor import DTensor

        while _WAITING:
            operator, axes = _WAITING.pop()
            torch.library.register_torch_dispatch(operator, DTensor, _rule(axes))


# A compiler runs it, and what it does is not part of the graph.
register._dynamo_marked_constant = True  # type: ignore[attr-defined]


def is_wrapper(tensor: Tensor) -> bool:
    """Whether a tensor is of a class that wraps others, such as DTensor: no kernel may be given it."""
    return is_traceable_wrapper_subclass(tensor)


def beside(other: Tensor, tensor: Tensor, *, drawn: bool = False) -> Tensor:
    """``tensor``, which every process has made; where ``other`` is a DTensor, a replicated one on its mesh.

    Args:
        drawn: the processes may have drawn different numbers: those of the first count.
    """
    module = sys.modules.get("torch.distributed.tensor")
    if module is None or not isinstance(other, module.DTensor):
        return tensor
    mesh: Any = other.device_mesh
    return module.DTensor.from_local(tensor, mesh, [module.Replicate()] * mesh.ndim, run_check=drawn)


def _rule(axes: Axes) -> Callable[..., Any]:
    from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard

    def rule(cls: type, operator: torch._ops.OpOverload, types: Any, args: tuple, kwargs: Mapping[str, Any] | None):
        names = [argument.name for argument in operator._schema.arguments]
        call = {**dict(zip(names, args, strict=False)), **(kwargs or {})}
        mesh = _mesh(operator, call, DTensor)
        chosen = _choose(axes(call), call, mesh)

        def placements(name: str, whole: Placement) -> list[Placement]:
            of = name.removeprefix("grad_")
            return [
                Replicate() if axis is None else Shard(axis.dims[of]) if of in axis.dims else whole for axis in chosen
            ]

        def wrap(name: str, local: Any) -> Any:
            if isinstance(local, (list, tuple)):
                return [wrap(name, each) for each in local]
            is_gradient = name.startswith("grad_")
            if is_gradient and call.get(name.removeprefix("grad_"), local) is None:
                return DTensor.from_local(local, mesh)  # of nothing: an empty tensor
            return DTensor.from_local(local, mesh, placements(name, Partial() if is_gradient else Replicate()))

        with torch.no_grad():  # below autograd, which has seen the DTensors
            for name, value in call.items():
                there = placements(name, Replicate())
                (call[name],) = autograd.map_tensors(
                    lambda tensor, there=there: tensor.redistribute(placements=there).to_local(), [value]
                )
            for axis in {id(axis): axis for axis in chosen if axis is not None and axis.localise is not None}.values():
                axis.localise(call, _number(mesh, [axis is each for each in chosen]))
            outputs = operator(*(call[name] for name in names))
            returns = [output.name for output in operator._schema.returns]
            if len(returns) == 1:
                return wrap(returns[0], outputs)
            return tuple(map(wrap, returns, outputs))

    return rule


def _mesh(operator: torch._ops.OpOverload, call: Mapping[str, Any], kind: type) -> Any:
    """The mesh of all tensors of a call."""
    mesh = first = None
    for name, tensor in _tensors(call):
        if isinstance(tensor, kind):
            mesh, first = (tensor.device_mesh, name) if mesh is None else (mesh, first)
            if tensor.device_mesh != mesh:
                raise ValueError(f"{operator}: {name} must be on the mesh of {first}, {mesh}, got {tensor.device_mesh}")
    for name, tensor in _tensors(call):
        if not isinstance(tensor, kind):
            raise TypeError(
                f"{operator}: {name} must be a DTensor, as {first} is, got a {type(tensor).__name__}; "
                "torch.distributed.tensor.distribute_tensor makes one"
            )
    if mesh.get_coordinate() is None:
        raise RuntimeError(f"{operator}: the process must be one of those of the mesh of {first}, {mesh}")
    return mesh


def _choose(axes: Sequence[Axis], call: Mapping[str, Any], mesh: Any) -> list[Axis | None]:
    """For every dimension of the mesh the axis along which most numbers lie in shards already; None: there is none."""
    chosen: list[Axis | None] = []
    for dim in range(mesh.ndim):
        best, most = None, 0
        for axis in axes:
            shards = mesh.size(dim) * math.prod(mesh.size(i) for i, other in enumerate(chosen) if other is axis)
            in_place = 0
            for name, tensor in _tensors(call):
                if name not in axis.dims:
                    continue
                if tensor.shape[axis.dims[name]] % (shards * axis.unit):
                    break
                if tensor.placements[dim].is_shard(axis.dims[name]):
                    in_place += tensor.numel()
            else:
                if in_place > most:
                    best, most = axis, in_place
        chosen.append(best)
    return chosen


def _number(mesh: Any, along: Sequence[bool]) -> int:
    """The number of this process's shard along an axis that lies ``along`` some dimensions of the mesh."""
    number = 0
    for dim, is_along in enumerate(along):
        if is_along:
            number = number * mesh.size(dim) + mesh.get_local_rank(dim)
    return number


def _tensors(call: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """Every tensor of a call, with the name of its argument."""
    return [
        (name, tensor)
        for name, value in call.items()
        for tensor in (value if isinstance(value, (list, tuple)) else (value,))
        if isinstance(tensor, Tensor)
    ]
