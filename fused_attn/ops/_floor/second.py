"""Derivatives that no kernel computes, from the formulas of the reference: forward mode, and those of the gradients.

Where nothing further is recorded they are computed block by block, so that attention never holds the logits of all
pairs.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._pytree import TreeSpec, tree_flatten, tree_leaves, tree_unflatten

from . import dispatch

#: A tensor or other value among arguments or results: its name, and its number in a list.
Place = tuple[str, int]
#: Of some tensors by name, the part that takes part: (dim, start, stop); gradients have the part of their argument.
Block = Mapping[str, tuple[int, int, int]]
#: Of arguments by name, the blocks: the output is that of each one, ``Block["out"]`` of it.
Blocks = Callable[[Mapping[str, Any]], Iterable[Block]]
#: The only level of ``forward_ad`` there is: PyTorch refuses to nest them, and ``torch.func.jvp`` nests by wrapping
#: tensors.
_LEVEL = 0


class Second:
    """The derivatives of a backward operator.

    Args:
        schema: of the backward operator.
        recompute: the output of forward in plain PyTorch, of the arguments of the backward operator by name; and of
            zeros as ``argument`` where it has none of which it gives the ``grad_argument``.
        blocks: without it, all is one block.
    """

    def __init__(
        self,
        schema: torch.FunctionSchema,
        recompute: Callable[..., Tensor],
        blocks: Blocks | None = None,
    ) -> None:
        self._names = [argument.name for argument in schema.arguments]
        self._grads = [output.name.removeprefix("grad_") for output in schema.returns]
        self._recompute, self._blocks = recompute, blocks

    def save(self, ctx, args: tuple, outputs: tuple, needs: Sequence[bool]) -> None:
        """Keep all arguments."""
        ctx.set_materialize_grads(False)
        values, ctx.form = flatten(self._names, args)
        ctx.others = {place: None if isinstance(value, Tensor) else value for place, value in values.items()}
        ctx.tensors = [place for place, value in values.items() if isinstance(value, Tensor)]
        ctx.outputs = [*flatten(self._grads, outputs)[0]]
        ctx.save_for_backward(*(values[place] for place in ctx.tensors))

    def backward(self, ctx, *cotangents: Tensor | None) -> tuple[Tensor | None, ...]:
        """The gradients of the arguments of the backward operator, then of the tensors of those that are lists."""
        values = ctx.others | dict(zip(ctx.tensors, ctx.saved_tensors, strict=True))
        outer = {place: grad for place, grad in zip(ctx.outputs, cotangents, strict=True) if grad is not None}
        recorded = torch.is_grad_enabled()
        wanted = [place for place in ctx.tensors if self._differentiable(place)]

        def leaf(tensor: Tensor) -> Tensor:
            # One tensor may be several arguments, each of which has its own gradient.
            return tensor.view_as(tensor) if recorded and tensor.requires_grad else _leaf(tensor)

        def of_block(block: Block) -> Iterator[tuple[Place, Tensor | None]]:
            leaves = self._leaves(values, outer, block, leaf)
            first = self._first(leaves, ctx.form, outer, create_graph=True)
            pairs = [
                (grad, _part(outer[place], place, block))
                for place, grad in first.items()
                if grad is not None and grad.requires_grad
            ]
            if pairs:
                grads, parts = zip(*pairs, strict=True)
                targets = [leaves[place] for place in wanted]
                results = torch.autograd.grad(grads, targets, parts, create_graph=recorded, allow_unused=True)
                yield from zip(wanted, results, strict=True)

        if torch._C._are_functorch_transforms_active():
            total = self._transformed(values, outer, wanted, ctx.form)
        else:
            total = self._sum(of_block, values, ctx.form, recorded, values)
        grads = tree_unflatten([total.get(place) for place in values], ctx.form)
        lists = [grad for grad in grads if isinstance(grad, (list, tuple))]
        return *(None if isinstance(grad, (list, tuple)) else grad for grad in grads), *itertools.chain(*lists)

    def _transformed(
        self, values: Mapping[Place, Any], outer: Mapping[Place, Tensor], wanted: Sequence[Place], form: TreeSpec
    ) -> dict[Place, Tensor]:
        """Gradients at ``wanted`` by torch.func, within whose transforms no tensor can be made a leaf."""
        zeros = {
            place: torch.zeros_like(grad)
            for place, grad in outer.items()
            if place[0] not in self._names and grad.numel()
        }
        of = [place for place in outer if place in wanted or place in zeros]
        if not of:
            return {}

        def first(*leaves: Tensor) -> tuple[Tensor, ...]:
            here = {**values, **zeros, **dict(zip(wanted, leaves, strict=True))}

            def recomputed(*at: Tensor) -> Tensor:
                return self._recomputed({**here, **dict(zip(of, at, strict=True))}, form)

            grads: tuple[Tensor, ...] = torch.func.vjp(recomputed, *map(here.get, of))[1](here["grad_out", 0])
            return grads

        with dispatch.without_autocast(values["grad_out", 0]):
            pull = torch.func.vjp(first, *(values[place] for place in wanted))[1]
            return dict(zip(wanted, pull(tuple(outer[place] for place in of)), strict=True))

    def tangent(self, operator: Callable[..., Any], args: tuple) -> Any:
        """What the backward operator gives, with tangents."""
        values, form = flatten(self._names, args)
        primals = [unpack(value)[0] if isinstance(value, Tensor) else value for value in values.values()]
        outputs = operator(*tree_unflatten(primals, form))
        results, form_of_results = flatten(self._grads, outputs if isinstance(outputs, tuple) else (outputs,))
        recorded = torch.is_grad_enabled() and torch._C._any_requires_grad(*primals)

        def leaf(tensor: Tensor) -> Tensor:
            primal, tangent = unpack(tensor)
            primal = primal.view_as(primal) if recorded and primal.requires_grad else _leaf(primal)
            return primal if tangent is None else make_dual(primal, tangent)

        def of_block(block: Block) -> Iterator[tuple[Place, Tensor | None]]:
            leaves = self._leaves(values, results, block, leaf)
            for place, grad in self._first(leaves, form, results, create_graph=recorded).items():
                yield place, None if grad is None else unpack(grad)[1]

        for place, tangent in self._sum(of_block, values, form, recorded, results).items():
            results[place] = make_dual(results[place], tangent.to(results[place].dtype))
        duals = tuple(tree_unflatten([*results.values()], form_of_results))
        return duals if len(duals) > 1 else duals[0]

    def _differentiable(self, place: Place) -> bool:
        return place[0] == "grad_out" or place[0] in self._grads

    def _leaves(
        self,
        values: Mapping[Place, Any],
        outputs: Mapping[Place, Tensor],
        block: Block,
        leaf: Callable[[Tensor], Tensor],
    ) -> dict[Place, Any]:
        """The block's part of all values, as leaves where there is a gradient; then zeros for what is no argument."""
        leaves = {}
        for place, value in values.items():
            if isinstance(value, Tensor):
                value = _part(value, place, block)
                value = leaf(value) if self._differentiable(place) else value
            leaves[place] = value
        for place, output in outputs.items():
            if place[0] not in self._names and output.numel():
                leaves[place] = _leaf(torch.zeros_like(output))
        return leaves

    def _first(
        self, leaves: Mapping[Place, Any], form: TreeSpec, of: Iterable[Place], create_graph: bool
    ) -> dict[Place, Tensor | None]:
        """The first derivatives at the leaves among ``of``."""
        of = [place for place in of if isinstance(leaves.get(place), Tensor)]
        if not of:
            return {}
        grads = torch.autograd.grad(
            self._recomputed(leaves, form),
            [leaves[place] for place in of],
            leaves["grad_out", 0],
            create_graph=create_graph,
            allow_unused=True,
        )
        return dict(zip(of, grads, strict=True))

    def _recomputed(self, leaves: Mapping[Place, Any], form: TreeSpec) -> Tensor:
        args = dict(zip(self._names, tree_unflatten([*leaves.values()][: form.num_leaves], form), strict=True))
        further = {name: leaf for (name, _), leaf in leaves.items() if name not in args}
        return self._recompute(**args, **further)

    def _sum(
        self,
        of_block: Callable[[Block], Iterable[tuple[Place, Tensor | None]]],
        values: Mapping[Place, Any],
        form: TreeSpec,
        recorded: bool,
        whole: Mapping[Place, Tensor],
    ) -> dict[Place, Tensor]:
        """The sum over all blocks."""
        total: dict[Place, Tensor] = {}
        args = dict(zip(self._names, tree_unflatten([*values.values()], form), strict=True))
        with torch.enable_grad(), dispatch.without_autocast(values["grad_out", 0]):
            for block in [{}] if recorded or self._blocks is None else self._blocks(args):
                for place, part in of_block(block):
                    if part is not None:
                        part = _padded(part, place, block, whole[place])
                        total[place] = total[place] + part if place in total else part
        return total


def tangent_of_reference(
    reference: Callable[..., Any], names: Sequence[str], args: tuple, blocks: Blocks | None
) -> Tensor | None:
    """The tangent of the reference's first output, block by block where nothing is recorded for reverse mode."""
    values = dict(zip(names, args, strict=True))
    recorded = torch.is_grad_enabled() and torch._C._any_requires_grad(*tree_leaves(args))
    tangents = []
    for block in [{}] if recorded or blocks is None else blocks(values):
        out = reference(*(_part(arg, (name, 0), block) for name, arg in values.items()))
        tangents.append(unpack(out[0] if isinstance(out, tuple) else out)[1])
    return tangents[0] if len(tangents) == 1 or tangents[0] is None else torch.cat(tangents, block["out"][0])


def unpack(tensor: Tensor) -> tuple[Tensor, Tensor | None]:
    """Primal and tangent; the tangent is None outside forward mode.

    ``forward_ad.unpack_dual`` would ask Python's count of levels, which a compiled graph does not update.
    """
    return torch._VF._unpack_dual(tensor, level=_LEVEL)


def make_dual(primal: Tensor, tangent: Tensor) -> Tensor:
    """What :func:`unpack` takes apart."""
    return torch._VF._make_dual(primal, tangent, level=_LEVEL)


def flatten(names: Sequence[str], args: Sequence[Any]) -> tuple[dict[Place, Any], TreeSpec]:
    """The values of ``args`` and of the lists among them, and how they are put together again."""
    values, form = tree_flatten([*args])
    places = [(name, i) for name, arg in zip(names, args, strict=True) for i in range(len(tree_leaves(arg)))]
    return dict(zip(places, values, strict=True)), form


def _leaf(tensor: Tensor) -> Tensor:
    # torch.func forbids this to the functions of users, for whose tensors it would do nothing.
    allowed = torch._C._functorch.get_inplace_requires_grad_allowed()
    torch._C._functorch.set_inplace_requires_grad_allowed(True)
    try:
        return tensor.detach().requires_grad_()
    finally:
        torch._C._functorch.set_inplace_requires_grad_allowed(allowed)


def _part(value: Any, place: Place, block: Block) -> Any:
    """The block's part of a tensor."""
    if place[0] not in block or not isinstance(value, Tensor):
        return value
    dim, start, stop = block[place[0]]
    return value.narrow(dim, start, stop - start)


def _padded(part: Tensor, place: Place, block: Block, whole: Tensor) -> Tensor:
    """The part in its place among zeros."""
    if place[0] not in block:
        return part
    dim, start, stop = block[place[0]]
    return F.pad(part, [*([0, 0] * (part.dim() - 1 - dim)), start, whole.shape[dim] - stop])
