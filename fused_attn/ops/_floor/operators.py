"""Registration of an op's operators with PyTorch, and the way to them.

One pair of operators (forward, backward) per implementation, all with the same schemas, so that ``torch.compile``,
``opcheck`` and an explicit ``impl`` see exactly the kernel that runs.
"""

from __future__ import annotations

import importlib
import inspect
import itertools
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from ... import _extension
from . import autograd, batching, checks, dispatch, recording, sharding
from .declarations import OpSpec
from .layout import empty_contiguous
from .plain_calls import Guard, any_autocast, getter, in_no_mode, signature
from .second import Blocks
from .tracing import exports_plainly

#: Fills outputs that it is given, behind the arguments of the operator.
Kernel = Callable[..., None]
#: Of a value that backward needs: (arguments and outputs of forward, which arguments need a gradient) -> value.
Derived = Callable[[Sequence[Any], Sequence[bool]], Any]

#: Implementation -> device types that its operators are registered for.
DEVICES = {"cpu": ("cpu",), "triton": dispatch.TRITON_DEVICES, "cuda": ("cuda",)}


def cpp(name: str, *, dense: bool = False) -> Kernel:
    """The C++ function ``fused_attn_cpu::name``.

    With ``dense`` it gets contiguous copies of arguments that are not; the outputs must be contiguous.
    """

    function = getattr(torch.ops.fused_attn_cpu, name, None)
    if function is None:  # the extension is missing, or was built without this op

        def missing(*_) -> None:
            raise RuntimeError(f"fused_attn_cpu::{name} is not there: {_extension.reason() or 'it was not built'}")

        return missing
    kernel = function.default
    return (lambda *args: kernel(*autograd.map_tensors(Tensor.contiguous, args))) if dense else kernel


def triton(package: str, name: str) -> Kernel:
    """The function ``name`` of ``triton_launch.py`` in ``package``, which is imported when it is called."""

    def kernel(*args, **options) -> None:
        getattr(importlib.import_module(f"{package}.triton_launch"), name)(*args, **options)

    return kernel


class Operators:
    """The operators ``fused_attn::<name>_<impl>`` and ``fused_attn::<name>_<impl>_backward``.

    Args:
        name: of the op; a public one.
        schema: of forward.  Its first output alone is differentiable.
        backward_schema: of backward: ``grad_out``, then what it needs, by the names of forward's arguments and outputs
            and of ``derived``; its outputs are named ``grad_<argument>``.
        allocate: ``allocate(*arguments)``: a tuple of unwritten outputs; the fake kernel too.
        allocate_backward: likewise, of the arguments of backward, with None for the gradient of None; without it, every
            gradient is contiguous, in the shape and dtype of its argument, which must be an argument of backward too.
        kernels: implementation -> (forward, backward), which fill outputs that follow their arguments.
        can_run: implementation -> why it cannot run on the tensors that :meth:`choose` gets, or None; for those that
            ask for more than device and dtype of the first one.  ``auto`` prefers them in the order of ``kernels``, the
            reference last: the interpreter never wins over a real kernel.
        reference: forward's first output, or all outputs that a caller reads, in plain PyTorch.
        autocast: a rule of :mod:`dispatch` for all tensors that :meth:`choose` gets.
        or_float32: names of tensors that autocast leaves alone, and that may be float32 whatever the others are.
        apart: names of tensors that autocast, the check of dtypes and ``can_run`` leave alone.
        drawn: ``drawn(*arguments)``: the last argument, made of the others anew for every call.
        flops, flops_backward: of the shapes of forward's and backward's arguments; 0 for an op without products.
        derived: what backward needs beside arguments and outputs.
        complete: ``complete(arguments of backward, gradients)`` gives the gradients, for those that no kernel forms.
        axes: along which a call falls into calls of its own: DTensors may be sharded along them, and ``torch.vmap``
            folds into them.  Of the arguments of forward and of backward.
        folds: as in :func:`batching.register`, where there are more than those into ``axes``.
    """

    def __init__(
        self,
        name: str,
        schema: str,
        backward_schema: str,
        *,
        allocate: Callable[..., tuple[Tensor, ...]],
        kernels: Mapping[str, tuple[Kernel, Kernel]],
        reference: Callable[..., Any],
        autocast: Callable[..., Sequence[Tensor | None]] = dispatch.autocast,
        or_float32: Collection[str] = (),
        apart: Collection[str] = (),
        drawn: Callable[..., Any] | None = None,
        allocate_backward: Callable[..., tuple] | None = None,
        can_run: Mapping[str, dispatch.CanRun] | None = None,
        flops: Callable[..., int] = lambda *shapes, **_: 0,
        flops_backward: Callable[..., int] = lambda *shapes, **_: 0,
        derived: Mapping[str, Derived] | None = None,
        complete: Callable[[tuple, tuple], tuple] | None = None,
        recompute: Callable[..., Tensor] | None = None,
        blocks: Blocks | None = None,
        axes: sharding.Axes = lambda call: (),
        folds: batching.Folds | None = None,
    ) -> None:
        self.name, self.reference, self.kernels = name, reference, kernels
        usual = {impl: _USUAL_REASONS[impl] for impl in kernels if impl in _USUAL_REASONS}
        self.can_run = {**usual, **(can_run or {}), "reference": lambda *tensors: None}
        self._autocast, self._or_float32, self._drawn = autocast, or_float32, drawn
        self._complete, self._derived = complete, tuple((derived or {}).values())
        forward, backward = (torch._C.parse_schema(f"fused_attn::{name}{text}") for text in (schema, backward_schema))
        self.arguments = [argument.name for argument in forward.arguments]
        self._asked = {
            argument.name: place
            for place, argument in enumerate(forward.arguments)
            if (_is_tensor(argument) or autograd.is_list(argument)) and argument.name not in apart
        }
        self._lists = [place for place, argument in enumerate(forward.arguments) if autograd.is_list(argument)]
        # What backward needs is among the arguments and outputs of forward and what is derived of them, in this order.
        # It is saved as tensors, then lists of them, and kept if it is neither.
        names = [argument.name for argument in (*forward.arguments, *forward.returns)] + [*(derived or {})]
        places = {"tensors": [], "lists": [], "others": []}
        needed = backward.arguments[1:]
        for argument in needed:
            kind = "lists" if autograd.is_list(argument) else "tensors" if _is_tensor(argument) else "others"
            places[kind].append(names.index(argument.name))
        self._needed_tensors, self._needed_lists, self._needed_others = map(getter, places.values())
        self._saves_lists = bool(places["lists"])
        saved = [place for kind in places.values() for place in kind]
        self._in_order = getter([0, *(1 + saved.index(names.index(argument.name)) for argument in needed)])
        # Of every argument of forward, the place of its gradient; of those without one and of lists, the last: None.
        grads = [output.name for output in backward.returns]
        self._grads = getter(
            [
                grads.index(f"grad_{argument.name}")
                if f"grad_{argument.name}" in grads and not autograd.is_list(argument)
                else -1
                for argument in forward.arguments
            ]
        )
        self._grads_of_lists = [grads.index(f"grad_{forward.arguments[place].name}") for place in self._lists]
        if allocate_backward is None:
            names = [argument.name for argument in backward.arguments]
            allocate_backward = _like_arguments([names.index(grad.removeprefix("grad_")) for grad in grads])
        self._operators, self._plain = {}, {}
        for impl, (kernel, backward_kernel) in kernels.items():
            full = f"fused_attn::{name}_{impl}"
            for suffix, text, outputs_of, fill, formula in (
                ("", schema, allocate, kernel, flops),
                ("_backward", backward_schema, allocate_backward, backward_kernel, flops_backward),
            ):
                torch.library.define(full + suffix, text)
                torch.library.impl(full + suffix, DEVICES[impl], _unwrapped(_filled(_complete(outputs_of), fill)))
                torch.library.register_fake(full + suffix, _unwrapped(_complete(outputs_of)))
                register_flop_formula(getattr(torch.ops.fused_attn, f"{name}_{impl}{suffix}"))(formula)
                batching.register(
                    f"{name}_{impl}{suffix}",
                    folds or (lambda call: batching.along(axes(call))),
                    {*self.arguments, "grad_out"},
                )
            forward_operator, backward_operator = (
                getattr(torch.ops.fused_attn, f"{name}_{impl}{suffix}").default for suffix in ("", "_backward")
            )
            self._operators[impl] = forward_operator, backward_operator
            for operator in self._operators[impl]:
                sharding.declare(operator, axes)
            autograd.register(
                f"{name}_{impl}",
                self._backward_with(backward_operator),
                self._save,
                reference,
                recompute or self._reference_by_name,
                blocks,
                self._lists,
            )
            function = autograd.plain_function(f"{name}_{impl}", self._save, self._lists)
            self._plain[impl] = function, allocate, kernel, allocate_backward, backward_kernel

    def public(
        self, check: Callable[..., tuple], *, op: str | None = None, names: Mapping[str, str] | None = None
    ) -> Public:
        """What a public function does with its arguments: check, choose, run.

        Args:
            check: ``check(*arguments)`` raises, or gives the arguments of the operator, without one that is ``drawn``.
            op: the public name, where several share the operators.
            names: argument of the operator -> the name that the user knows, where that is another.
        """
        return Public(self, check, op or self.name, names or {})

    def choose(
        self, impl: str, args: Sequence[Any], *, op: str | None = None, names: Mapping[str, str] | None = None
    ) -> tuple[str, tuple]:
        """What follows the checks of a public function: autocast, one dtype and device, the choice of implementation.

        Args:
            impl: as the user gave it.
            args: the operator's.
            op, names: as in :meth:`public`.

        Returns:
            the implementation to run, and the arguments as it takes them.

        Raises:
            ValueError, RuntimeError: as :func:`checks.same_dtype` and :func:`dispatch.choose`.
        """
        known = names or {}
        tensors = {known.get(name, name): args[place] for name, place in self._asked.items()}
        if any_autocast() and dispatch.autocast_dtype(_first(args)) is not None:
            tensors = self._cast(tensors)
        checks.same_dtype(tensors, self._or_float32)
        impl = dispatch.choose(op or self.name, impl, self.can_run, *tensors.values())
        chosen = [*args]
        for place, tensor in zip(self._asked.values(), tensors.values(), strict=True):
            chosen[place] = tensor
        return impl, tuple(chosen)

    def _cast(self, tensors: Mapping[str, Any]) -> dict[str, Any]:
        cast = {name: value for name, value in tensors.items() if name not in self._or_float32}
        flat = [value if isinstance(value, (list, tuple)) else [value] for value in cast.values()]
        results = iter(self._autocast(*itertools.chain(*flat)))
        for name, value in cast.items():
            cast[name] = [next(results) for _ in value] if isinstance(value, (list, tuple)) else next(results)
        return {**tensors, **cast}

    def run(self, impl: str, *args: Any) -> tuple[Tensor, ...]:
        """All outputs of the operator of ``impl``, or what ``reference`` gives, with autocast off."""
        if any_autocast() and dispatch.autocast_dtype(_first(args)) is not None:
            with torch.autocast(_first(args).device.type, enabled=False):
                return self.run(impl, *args)
        if impl != "reference" and not torch.compiler.is_compiling() and signature(args) is not None:
            return self.plain(impl, args)(*args)
        if impl != "reference":
            sharding.register()
        outputs = self.reference(*args) if impl == "reference" else self._operators[impl][0](*args)
        return outputs if isinstance(outputs, tuple) else (outputs,)

    def draw(self, args: tuple) -> tuple:
        """The arguments, with the one that is drawn for every call."""
        return args if self._drawn is None else (*args, self._drawn(*args))

    def plain(self, impl: str, args: tuple) -> Callable[..., tuple[Tensor, ...]]:
        """What gives the outputs of plain calls whose arguments have the :func:`signature` of these.

        It goes straight to the kernel: the way there through PyTorch's dispatcher, in Python, takes longer than the
        kernel of a small call.
        """
        function, allocate, kernel, allocate_backward, backward_kernel = self._plain[impl]
        run = _filled(_Again(allocate), kernel)
        needs = [isinstance(arg, Tensor) and arg.requires_grad for arg in autograd.flat(args, self._lists)]
        if not torch.is_grad_enabled() or not any(needs):
            return run
        run_backward = _filled(_Again(allocate_backward), backward_kernel)
        return function(needs, run, self._backward_with(run_backward, self._operators[impl][1]))

    def calls(self, impl: str, *args: Any) -> tuple[tuple[Any, tuple], ...]:
        """Both operators with the arguments of one call, for ``torch.library.opcheck``; none for the reference."""
        if impl == "reference":
            return ()
        forward, backward = self._operators[impl]
        detached = autograd.map_tensors(Tensor.detach, args)
        with torch.no_grad():
            outputs = forward(*detached)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        tensors, lists, others = self._needed((*detached, *outputs), [True] * len(args))
        arguments = self._in_order((torch.randn_like(outputs[0]), *tensors, *lists, *others))
        return (forward, tuple(args)), (backward, arguments)

    def spec(self, function: Callable[..., Tensor], *, asked: Sequence[str] | None = None, **fields: Any) -> OpSpec:
        """The spec of a public function that takes the operator's arguments, by the same names.

        Args:
            function: the public function.
            asked: names of the inputs that ``can_run`` asks about; None: the first.
            fields: of :class:`OpSpec`, beside those that follow.
        """
        return OpSpec(
            name=self.name,
            function=function,
            implementations=self.implementations(*(asked or self.arguments[:1])),
            operators=lambda impl, inputs: self.calls(impl, *map(inputs.get, self.arguments)),
            **fields,
        )

    def implementations(self, *names: str) -> dict[str, Callable[[Mapping[str, Any]], str | None]]:
        """``OpSpec.implementations``, where ``can_run`` asks about the inputs of these names, its first."""

        def asked(can_run: dispatch.CanRun) -> Callable[[Mapping[str, Any]], str | None]:
            return lambda inputs: can_run(*(inputs[name] for name in names))

        return {impl: asked(can_run) for impl, can_run in self.can_run.items()}

    def _needed(self, values: tuple, needs: Sequence[bool]) -> tuple[tuple, tuple, tuple]:
        """Of arguments and outputs, the tensors, lists of tensors and other values that backward needs."""
        for value_of in self._derived:
            values += (value_of(values, needs),)
        return self._needed_tensors(values), self._needed_lists(values), self._needed_others(values)

    def _save(self, ctx, args: tuple, outputs: tuple, needs: Sequence[bool]) -> None:
        tensors, lists, ctx.others = self._needed((*args, *outputs), needs)
        if lists:
            ctx.lengths = len(tensors), *map(len, lists)
            tensors = *tensors, *itertools.chain(*lists)
        ctx.save_for_backward(*tensors)

    def _reference_by_name(self, **values: Any) -> Tensor:
        """What the reference gives first, of values by the names of arguments, among others."""
        out = self.reference(*(values[name] for name in self.arguments))
        return out[0] if isinstance(out, tuple) else out

    def _backward_with(self, kernel: Callable[..., tuple], recorded: Callable[..., tuple] | None = None):
        """The backward pass with ``kernel``; with ``recorded`` where it is itself to be differentiated."""

        def backward(ctx, grad_out: Tensor, *_) -> tuple[Tensor | None, ...]:
            saved = ctx.saved_tensors
            if saves_lists:
                first, *lengths = ctx.lengths
                rest = iter(saved[first:])
                saved = *saved[:first], *([*itertools.islice(rest, length)] for length in lengths)
            arguments = in_order((grad_out, *saved, *ctx.others))
            # A graph of plain calls may be gone back through within a transform or a mode, for which the operator is.
            direct = recorded is None or (not torch.is_grad_enabled() and in_no_mode())
            run = kernel if direct else recorded
            grads = run(*arguments)
            if complete is not None:
                grads = complete(arguments, grads)
            flat = grads_of((*grads, None))
            return (*flat, *itertools.chain(*(grads[place] for place in grads_of_lists))) if grads_of_lists else flat

        in_order, complete, grads_of, grads_of_lists = (
            self._in_order, self._complete, self._grads, self._grads_of_lists
        )  # fmt: skip
        saves_lists = self._saves_lists
        return backward


def _is_tensor(argument: torch._C.Argument) -> bool:
    return argument.type.isSubtypeOf(torch.OptionalType(torch.TensorType.get()))


def _first(args: Iterable[Any]) -> Tensor:
    first = next(iter(args))
    return first if isinstance(first, Tensor) else first[0]


#: Implementation -> why it cannot run on the inputs at hand, where their first tensor decides.
_USUAL_REASONS: dict[str, dispatch.CanRun] = {
    "cpu": lambda *inputs: dispatch.cpu_reason(_first(inputs)),
    "triton": lambda *inputs: dispatch.triton_reason(_first(inputs)),
}


def _like_arguments(places: Sequence[int]) -> Callable[..., tuple]:
    """Allocates a gradient of each argument of backward at ``places``."""

    def empty(like: Any) -> Any:
        return (
            like
            if like is None
            else empty_contiguous(like)
            if isinstance(like, Tensor)
            else [*map(empty_contiguous, like)]
        )

    return lambda *args: tuple([empty(args[place]) for place in places])


def _complete(allocate: Callable[..., tuple]) -> Callable[..., tuple]:
    """What ``allocate`` gives, with an empty tensor for None: an operator gives tensors."""
    return lambda *args: tuple(_first(args).new_empty(0) if output is None else output for output in allocate(*args))


class _Again:
    """``allocate`` for calls of one :func:`signature`: it is asked twice; ``empty_like`` takes half the time.

    Outputs that are None become one empty tensor, which no kernel writes.  Autograd keeps it, so it is the one that an
    operator would give: where one call is plain and its repetition is not, a checkpoint compares them.
    """

    def __init__(self, allocate: Callable[..., tuple]) -> None:
        self._allocate, self._layouts, self._nothing = allocate, None, None

    def __call__(self, *args) -> tuple:
        if not self._layouts:
            if self._nothing is None:
                self._nothing = _first(args).new_empty(0)
            outputs = [self._nothing if output is None else output for output in self._allocate(*args)]
            if self._layouts is None:  # of a call that may be the only one
                self._layouts = []
                return tuple(outputs)
            self._layouts = autograd.map_tensors(self._without_memory, outputs)
        return tuple(
            [
                layout
                if layout is self._nothing
                else torch.empty_like(layout)
                if isinstance(layout, Tensor)
                else [*map(torch.empty_like, layout)]
                for layout in self._layouts
            ]
        )

    def _without_memory(self, output: Tensor) -> Tensor:
        """The same tensor, which is dense, as nothing but a model for ``empty_like``."""
        if output is not self._nothing:
            output.untyped_storage().resize_(0)
        return output


def _filled(allocate: Callable[..., tuple], kernel: Kernel) -> Callable[..., tuple]:
    """A function that allocates the outputs, has ``kernel`` fill them, and returns them."""

    def run(*args):
        outputs = allocate(*args)
        kernel(*args, *outputs)
        return outputs

    return run


def _unwrapped(function: Callable[..., tuple]) -> Callable:
    """Return a single output itself, as an operator does, not a tuple of one."""

    def run(*args):
        outputs = function(*args)
        return outputs if len(outputs) > 1 else outputs[0]

    return run


class Arguments(NamedTuple):
    """Of one call: name of the public function, name of its operators, and their arguments."""

    op: str
    operators: str
    values: tuple


class Public:
    """Check, choose, run: see :meth:`Operators.public`.

    Checks and choices look at the :func:`signature` of the arguments alone.  What they conclude of a plain call is kept
    for the next one of the same signature: they would take longer than the kernel of a small call.
    """

    #: Signatures that are kept, and those among them that are looked at one by one.
    _MOST, _GUARDED = 1024, 4

    def __init__(self, operators: Operators, check: Callable[..., tuple], op: str, names: Mapping[str, str]) -> None:
        self._operators, self._check, self._op, self._names = operators, check, op, names
        self.parameters = parameters = [*inspect.signature(check).parameters]
        #: Of every argument of the operator, the place of the argument of ``check`` that goes there, or None.
        self._places = [
            parameters.index(user) if (user := names.get(name, name)) in parameters else None
            for name in operators.arguments
        ]
        self._plans: dict[tuple, _Plan] = {}
        self._latest: tuple[_Plan, ...] = ()

    def __call__(self, impl: str, *args: Any) -> tuple[Tensor, ...]:
        """All outputs of the operator, or of the reference, for the arguments of ``check``."""
        if recording.LISTENERS:
            recording.tell(self, args)
        operators, key = self._operators, None
        if not torch.compiler.is_compiling() and not exports_plainly():
            call = impl, *args
            for plan in self._latest:
                if plan.guard(call):
                    return plan.run(*operators.draw(plan.pick((*args, *plan.constants))))
            key = signature(call)
            plan = None if key is None else self._plans.get(key)
            if plan is not None:
                self._guard(plan, call)
                return plan.run(*operators.draw(plan.pick((*args, *plan.constants))))
        impl, chosen = operators.choose(impl, self._check(*args), op=self._op, names=self._names)
        drawn = operators.draw(chosen)
        if key is None or impl == "reference":
            return operators.run(impl, *drawn)
        run = operators.plain(impl, drawn)
        self._keep(key, run, args, chosen)
        return run(*drawn)

    def arguments(self, *args: Any) -> Arguments:
        """What the operators would get, as the reference takes it."""
        chosen = self._operators.choose("reference", self._check(*args), op=self._op, names=self._names)[1]
        return Arguments(self._op, self._operators.name, chosen)

    def _keep(self, key: tuple, run: Callable[..., tuple], args: tuple, chosen: tuple) -> None:
        """Keep how ``chosen`` is made of ``args``: tensors as they are, numbers that follow from the signature."""
        places, constants, passed = [], [], set()
        for place, value in zip(self._places, chosen, strict=False):
            if place is not None and args[place] is value:
                places.append(place)
                passed.add(place)
            elif isinstance(value, (Tensor, list, tuple)):
                return  # a copy
            else:
                places.append(len(args) + len(constants))
                constants.append(value)
        if any(isinstance(arg, (Tensor, list, tuple)) and place not in passed for place, arg in enumerate(args)):
            return  # a number may have been read from it
        if len(self._plans) >= self._MOST:
            self._plans.clear()
        self._plans[key] = _Plan(run, getter(places), tuple(constants))

    def _guard(self, plan: _Plan, call: tuple) -> None:
        """Try ``plan`` before others from now on."""
        if plan.guard is None and Guard.serves(call):
            plan.guard = Guard(call)
        if plan.guard is not None:
            self._latest = plan, *self._latest[: self._GUARDED - 1]


@dataclass(slots=True, eq=False)
class _Plan:
    """How calls of one signature are made: ``run`` of what ``pick`` takes of the arguments and the constants."""

    run: Callable[..., tuple]
    pick: Callable[[Sequence], tuple]
    constants: tuple
    guard: Guard | None = None
