"""Derivatives of the operators in both modes, registered alike for every op.

``torch.library.register_autograd`` knows reverse mode alone: where no input requires a gradient, it runs the operator
below autograd, and the tangents of forward mode are gone without a word.  It also refuses ``torch.func.grad``.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import _SingleLevelFunction

from .second import Blocks, Second, make_dual, tangent_of_reference, unpack

_LIBRARY = torch.library.Library("fused_attn", "FRAGMENT")


def register(
    name: str,
    backward: Callable[..., Sequence],
    save: Callable[[Any, tuple, tuple, Sequence[bool]], None],
    reference: Callable[..., Any],
    recompute: Callable[..., Tensor],
    blocks: Blocks | None,
    lists: Sequence[int],
) -> None:
    """Register the derivatives of the operator ``fused_attn::name`` and of ``fused_attn::name_backward``.

    Args:
        name: of the operator, whose first output alone is differentiable; ``<base>_<impl>``.
        backward: ``backward(ctx, grad_out)`` gives the gradients of the operator's :func:`flat` arguments, anything for
            those that need none.
        save: ``save(ctx, arguments, outputs, needs)`` keeps what backward needs; ``needs`` says of every flat argument
            whether it needs a gradient.
        reference: the same function of the same arguments in plain PyTorch.  In forward mode it gives the tangent;
            the output itself comes from the operator.
        recompute, blocks: as in :class:`Second`, for the derivatives of the gradients; ``blocks`` for the tangent too.
        lists: places of the arguments that are lists of tensors.
    """

    def save_first(ctx, args: tuple, outputs: tuple, needs: Sequence[bool]) -> None:
        ctx.mark_non_differentiable(*outputs[1:])
        save(ctx, args, outputs, needs)

    forward_schema, backward_schema = (
        getattr(torch.ops.fused_attn, operator).default._schema for operator in (name, f"{name}_backward")
    )
    names = [argument.name for argument in forward_schema.arguments]

    def tangent(operator, args: tuple):
        outputs = operator(*map_tensors(lambda tensor: unpack(tensor)[0], args))
        first, rest = (outputs[0], outputs[1:]) if isinstance(outputs, tuple) else (outputs, None)
        tangent = tangent_of_reference(reference, names, args, blocks)
        if tangent is not None:
            first = make_dual(first, tangent.to(first.dtype))
        return first if rest is None else (first, *rest)

    second = Second(backward_schema, recompute, blocks)
    backward_lists = [place for place, argument in enumerate(backward_schema.arguments) if is_list(argument)]
    _register(name, lists, backward, save_first, tangent)
    _register(f"{name}_backward", backward_lists, second.backward, second.save, second.tangent)


def plain_function(
    name: str, save: Callable[[Any, tuple, tuple, Sequence[bool]], None], lists: Sequence[int]
) -> Callable[..., Callable[..., tuple[Tensor, ...]]]:
    """Makes functions with a derivative in reverse mode, for use outside all transforms and modes.

    ``make(needs, run, backward)``: ``needs`` says of every flat argument whether it needs a gradient, ``run`` gives the
    outputs.  Other arguments as in :func:`register`.
    """

    class Plain(_SingleLevelFunction):
        @staticmethod
        def forward(ctx, call, *_):
            args, needs, run, ctx.run_backward, others = call
            outputs = run(*args)
            save(ctx, args, outputs, needs)
            ctx.needs = needs
            others += outputs[1:]
            return outputs[0]  # alone: for each further output, PyTorch would make a gradient of zeros

        @staticmethod
        def backward(ctx, grad_out):
            return None, *itertools.compress(ctx.run_backward(ctx, grad_out), ctx.needs)

    _rename(Plain, name)

    def make(needs: Sequence[bool], run: Callable[..., tuple], backward) -> Callable[..., tuple[Tensor, ...]]:
        def function(*args):
            others = []
            call = args, needs, run, backward, others
            return Plain.apply(call, *itertools.compress(flat(args, lists), needs)), *others

        return function

    return make


def _register(name: str, lists: Sequence[int], backward, save, forward_mode) -> None:
    operator = getattr(torch.ops.fused_attn, name).default

    # The kernel below runs within one level of torch.func, so its function has to know nothing of the others.
    class Reverse(_SingleLevelFunction):
        @staticmethod
        def forward(ctx, call, *flat):
            with _Recording():
                outputs = call.run()
            outputs = outputs if isinstance(outputs, tuple) else (outputs,)
            save(ctx, call.args, outputs, ctx.needs_input_grad[1:])
            call.outputs, tensors = separate(outputs)
            return tuple(tensors)

        @staticmethod
        def backward(ctx, *grads_out):
            needs = ctx.needs_input_grad[1:]
            grads = backward(ctx, *grads_out)
            return None, *(grad if needed else None for grad, needed in zip(grads, needs, strict=True))

    _rename(Reverse, name)

    class Call:
        """One call on its way through ``Reverse.apply``, which takes and returns tensors, not lists of them."""

        def __init__(self, keyset, args: tuple) -> None:
            self.keyset, self.args = keyset, args

        def run(self):
            with torch._C._AutoDispatchBelowAutograd():
                return operator.redispatch(self.keyset & torch._C._after_autograd_keyset, *self.args)

    def kernel(keyset, *args):
        if any(map(_has_tangent, args)):
            return forward_mode(operator, args)
        call = Call(keyset, args)
        if not torch.is_grad_enabled() or not torch._C._any_requires_grad(*args):
            return call.run()
        with _AllowedInTorchFunc():
            tensors = Reverse.apply(call, *flat(args, lists))
        outputs = together(call.outputs, tensors)
        return tuple(outputs) if len(outputs) > 1 else outputs[0]

    _LIBRARY.impl(name, kernel, "Autograd", with_keyset=True)


def _rename(function: type[_SingleLevelFunction], name: str) -> None:
    """Name an autograd function after its operator: its nodes in graphs are then called ``<name>Backward``."""
    function.__name__ = function.__qualname__ = name
    function._backward_cls.__name__ = function._backward_cls.__qualname__ = f"{name}Backward"


class _Recording:
    """Turns on, within ``forward``, the recording that ``apply`` turned off: outer transforms of torch.func need it."""

    def __enter__(self) -> None:
        self.before = torch.is_grad_enabled(), torch._C._is_fwd_grad_enabled()
        torch._C._set_grad_enabled(True)
        torch._C._set_fwd_grad_enabled(True)

    def __exit__(self, *_) -> None:
        torch._C._set_grad_enabled(self.before[0])
        torch._C._set_fwd_grad_enabled(self.before[1])


class _AllowedInTorchFunc:
    """Lets a single-level function run under torch.func, which otherwise asks for one with ``setup_context``."""

    def __enter__(self) -> None:
        self.before = torch._C._functorch.get_single_level_autograd_function_allowed()
        torch._C._functorch.set_single_level_autograd_function_allowed(True)

    def __exit__(self, *_) -> None:
        torch._C._functorch.set_single_level_autograd_function_allowed(self.before)


def _has_tangent(arg: object) -> bool:
    if isinstance(arg, Tensor):
        return unpack(arg)[1] is not None
    return isinstance(arg, (list, tuple)) and any(map(_has_tangent, arg))


def map_tensors(function: Callable[[Tensor], Tensor], args: Sequence) -> list:
    """``function`` of every tensor among ``args`` and in their lists."""
    return [
        function(arg) if isinstance(arg, Tensor) else [*map(function, arg)] if isinstance(arg, (list, tuple)) else arg
        for arg in args
    ]


def is_list(argument: torch._C.Argument) -> bool:
    """Whether an argument of a schema is a list of tensors."""
    return isinstance(argument.type, torch.ListType)


def flat(args: tuple, lists: Sequence[int]) -> tuple:
    """The arguments, then the tensors of those in ``lists``, which autograd does not see inside a list."""
    return (*args, *itertools.chain.from_iterable(args[place] for place in lists)) if lists else args


def separate(values: Sequence[Any]) -> tuple[list[Any], list[Tensor]]:
    """(the values with a mark in place of each tensor and each list of tensors, the tensors)."""
    kept, tensors = [], []
    for value in values:
        if isinstance(value, Tensor):
            kept.append(_TENSOR)
            tensors.append(value)
        else:
            kept.append(len(value))
            tensors.extend(value)
    return kept, tensors


def together(kept: Sequence[Any], tensors: Sequence[Any]) -> list[Any]:
    """The values that :func:`separate` took apart, or others in the places of the tensors."""
    values, first = [], 0
    for value in kept:
        if value is _TENSOR:
            values.append(tensors[first])
            first += 1
        else:
            values.append(list(tensors[first : first + value]))
            first += value
    return values


#: Stands for a tensor.
_TENSOR = object()
