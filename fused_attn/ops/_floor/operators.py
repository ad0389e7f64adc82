"""Registration of an op's operators with PyTorch, and the way to them.

One pair of operators (forward, backward) per implementation, all with the same schemas, so that ``torch.compile``,
``opcheck`` and an explicit ``impl`` see exactly the kernel that runs.
"""

from __future__ import annotations

import importlib
import itertools
import operator
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import Parameter
from torch.utils.flop_counter import register_flop_formula

from ... import _extension
from . import autograd, checks, dispatch
from .declarations import OpSpec
from .layout import empty_contiguous

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
        allocate_backward: likewise, of the arguments of backward; without it, every gradient is contiguous, in the
            shape and dtype of its argument, which must be an argument of backward too; that of None is empty.
        kernels: implementation -> (forward, backward), which fill outputs that follow their arguments.
        can_run: implementation -> why it cannot run on the tensors that :meth:`choose` gets, or None; for those that
            ask for more than device and dtype of the first one.  ``auto`` prefers them in the order of ``kernels``, the
            reference last: the interpreter never wins over a real kernel.
        reference: forward's first output, or all outputs that a caller reads, in plain PyTorch.
        autocast: a rule of :mod:`dispatch` for all tensors that :meth:`choose` gets.
        or_float32: names of tensors that autocast leaves alone, and that may be float32 whatever the others are.
        flops, flops_backward: of the shapes of forward's and backward's arguments; 0 for an op without products.
        derived: what backward needs beside arguments and outputs.
        complete: ``complete(arguments of backward, gradients)`` gives the gradients, for those that no kernel forms.
        public: names for error texts, where several public functions share the operators.
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
        allocate_backward: Callable[..., tuple] | None = None,
        can_run: Mapping[str, dispatch.CanRun] | None = None,
        flops: Callable[..., int] = lambda *shapes, **_: 0,
        flops_backward: Callable[..., int] = lambda *shapes, **_: 0,
        derived: Mapping[str, Derived] | None = None,
        complete: Callable[[tuple, tuple], tuple] | None = None,
        public: str | None = None,
    ) -> None:
        self.name, self.reference, self.kernels = name, reference, kernels
        usual = {impl: _USUAL_REASONS[impl] for impl in kernels if impl in _USUAL_REASONS}
        self.can_run = {**usual, **(can_run or {}), "reference": lambda *tensors: None}
        self._autocast, self._or_float32 = autocast, or_float32
        self._complete, self._derived = complete, tuple((derived or {}).values())
        forward, backward = (torch._C.parse_schema(f"fused_attn::{name}{text}") for text in (schema, backward_schema))
        self._arguments = [argument.name for argument in forward.arguments]
        self._lists = [place for place, argument in enumerate(forward.arguments) if autograd.is_list(argument)]
        # What backward needs is among the arguments and outputs of forward and what is derived of them, in this order.
        # It is saved as tensors, then lists of them, and kept if it is neither.
        names = [argument.name for argument in (*forward.arguments, *forward.returns)] + [*(derived or {})]
        places = {"tensors": [], "lists": [], "others": []}
        needed = backward.arguments[1:]
        for argument in needed:
            kind = "lists" if autograd.is_list(argument) else "tensors" if _is_tensor(argument) else "others"
            places[kind].append(names.index(argument.name))
        self._needed_tensors, self._needed_lists, self._needed_others = map(_getter, places.values())
        self._saves_lists = bool(places["lists"])
        saved = [place for kind in places.values() for place in kind]
        self._in_order = _getter([0, *(1 + saved.index(names.index(argument.name)) for argument in needed)])
        # Of every argument of forward, the place of its gradient; of those without one and of lists, the last: None.
        grads = [output.name for output in backward.returns]
        self._grads = _getter(
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
        self._operators, self._direct, self._functions = {}, {}, {}
        for impl, (kernel, backward_kernel) in kernels.items():
            full = f"fused_attn::{name}_{impl}"
            for suffix, text, outputs_of, fill, formula in (
                ("", schema, allocate, kernel, flops),
                ("_backward", backward_schema, allocate_backward, backward_kernel, flops_backward),
            ):
                torch.library.define(full + suffix, text)
                torch.library.impl(full + suffix, DEVICES[impl], _unwrapped(_filled(outputs_of, fill)))
                torch.library.register_fake(full + suffix, _unwrapped(outputs_of))
                register_flop_formula(getattr(torch.ops.fused_attn, f"{name}_{impl}{suffix}"))(formula)
            forward_operator, backward_operator = (
                getattr(torch.ops.fused_attn, f"{name}_{impl}{suffix}").default for suffix in ("", "_backward")
            )
            self._operators[impl] = forward_operator, backward_operator
            autograd.register(
                public or name,
                f"{name}_{impl}",
                self._backward_with(backward_operator),
                self._save,
                reference,
                self._lists,
            )
            self._direct[impl] = _filled(allocate, kernel)
            self._functions[impl] = autograd.plain_function(
                f"{name}_{impl}",
                allocate,
                kernel,
                self._save,
                self._backward_with(_filled(allocate_backward, backward_kernel), backward_operator),
                self._lists,
            )

    def choose(self, impl: str, *, op: str | None = None, **tensors: Tensor | Sequence[Tensor] | None) -> tuple:
        """What follows the checks of a public function: autocast, one dtype and device, the choice of implementation.

        Args:
            impl: as the user gave it.
            op: the public name, where several share the operators.
            tensors: by the names that the user knows, the one that the others have to fit first.

        Returns:
            the implementation to run, then the tensors as it takes them.

        Raises:
            ValueError, RuntimeError: as :func:`checks.same_dtype` and :func:`dispatch.choose`.
        """
        if _any_autocast() and dispatch.autocast_dtype(_first(tensors.values())) is not None:
            tensors = self._cast(tensors)
        checks.same_dtype(tensors, self._or_float32)
        values = tensors.values()
        return dispatch.choose(op or self.name, impl, self.can_run, *values), *values

    def _cast(self, tensors: Mapping[str, Any]) -> dict[str, Any]:
        cast = {name: value for name, value in tensors.items() if name not in self._or_float32}
        flat = [value if isinstance(value, (list, tuple)) else [value] for value in cast.values()]
        results = iter(self._autocast(*itertools.chain(*flat)))
        for name, value in cast.items():
            cast[name] = [next(results) for _ in value] if isinstance(value, (list, tuple)) else next(results)
        return {**tensors, **cast}

    def run(self, impl: str, *args: Any) -> Tensor:
        """The first output, of the operator or of ``reference``, with autocast off."""
        return self.run_all(impl, *args)[0]

    def run_all(self, impl: str, *args: Any) -> tuple[Tensor, ...]:
        """All that the operator or ``reference`` gives, with autocast off."""
        if _any_autocast() and dispatch.autocast_dtype(_first(args)) is not None:
            with torch.autocast(_first(args).device.type, enabled=False):
                return self.run_all(impl, *args)
        if impl != "reference":
            return self.outputs(impl, *args)
        outputs = self.reference(*args)
        return outputs if isinstance(outputs, tuple) else (outputs,)

    def __call__(self, impl: str, *args: Any) -> Tensor:
        """The first output of the operator of ``impl``."""
        return self.outputs(impl, *args)[0]

    def outputs(self, impl: str, *args: Any) -> tuple[Tensor, ...]:
        """All outputs of the operator of ``impl``.

        Plain tensors outside every transform and mode of PyTorch's go straight to the kernel: the way there through the
        dispatcher, in Python, takes longer than the kernel of a small call.
        """
        if torch.compiler.is_compiling() or not is_plain(args):
            outputs = self._operators[impl][0](*args)
            return outputs if isinstance(outputs, tuple) else (outputs,)
        if torch.is_grad_enabled() and torch._C._any_requires_grad(*args):
            return self._functions[impl](args)
        return self._direct[impl](*args)

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
            implementations=self.implementations(*(asked or self._arguments[:1])),
            operators=lambda impl, inputs: self.calls(impl, *map(inputs.get, self._arguments)),
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

    def _backward_with(self, kernel: Callable[..., tuple], recorded: Callable[..., tuple] | None = None):
        """The backward pass with ``kernel``; with ``recorded`` where it is itself to be differentiated."""

        def backward(ctx, grad_out: Tensor, needs: Sequence[bool]) -> list[Tensor | None]:
            saved = ctx.saved_tensors
            if saves_lists:
                first, *lengths = ctx.lengths
                rest = iter(saved[first:])
                saved = *saved[:first], *([*itertools.islice(rest, length)] for length in lengths)
            arguments = in_order((grad_out, *saved, *ctx.others))
            run = kernel if recorded is None or not torch.is_grad_enabled() else recorded
            grads = run(*arguments)
            if complete is not None:
                grads = complete(arguments, grads)
            flat = grads_of((*grads, None))
            if grads_of_lists:
                flat = *flat, *itertools.chain(*(grads[place] for place in grads_of_lists))
            return [grad if needed else None for grad, needed in zip(flat, needs, strict=True)]

        in_order, complete, grads_of, grads_of_lists = (
            self._in_order, self._complete, self._grads, self._grads_of_lists
        )  # fmt: skip
        saves_lists = self._saves_lists
        return backward


def _getter(places: Sequence[int]) -> Callable[[Sequence], tuple]:
    """The items at these places, as a tuple whatever their number."""
    if len(places) > 1:
        return operator.itemgetter(*places)
    return lambda values: tuple(values[place] for place in places)


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

    def empty(like: Any, args: tuple) -> Any:
        if like is None:
            return _first(args).new_empty(0)
        return empty_contiguous(like) if isinstance(like, Tensor) else [*map(empty_contiguous, like)]

    return lambda *args: tuple(empty(args[place], args) for place in places)


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


# --- plain calls ------------------------------------------------------------------------------------------------------


_any_autocast = torch._C._is_any_autocast_enabled
_dispatch_keys, _included, _excluded = (
    getattr(torch._C, f"_dispatch_{name}") for name in ("keys", "tls_local_include_set", "tls_local_exclude_set")
)


def _state() -> tuple[int, int]:
    """The dispatch keys that active modes, transforms and guards add to every call, and those that they leave out."""
    return _included().raw_repr(), _excluded().raw_repr()


def _keys(device: str) -> set[int]:
    """The sets of dispatch keys that dense tensors on a device have: made outside and inside inference mode."""
    usual = torch.empty(0, device=device)
    with torch.inference_mode():
        return {_dispatch_keys(tensor).raw_repr() for tensor in (usual, torch.empty(0, device=device))}


def _plain() -> tuple[set[tuple[int, int]], set[int]]:
    states = {_state()}
    with torch.inference_mode():
        states.add(_state())
    return states, _keys("cpu")


# In a thread of its own, which has no modes: the package may be imported within some.
with ThreadPoolExecutor(1) as _thread:
    _PLAIN_STATES, _PLAIN_KEYS = _thread.submit(_plain).result()
_PLAIN_DEVICES = {"cpu"}
_PLAIN_KINDS = frozenset({type(None), float, bool, int})


def is_plain(args: Sequence[Any]) -> bool:
    """Whether only tensors as users make them are among ``args``, and no mode or transform of PyTorch's is active."""
    if _state() not in _PLAIN_STATES or forward_ad._current_level >= 0:
        return False
    for arg in args:
        kind = type(arg)
        if kind is Tensor or kind is Parameter:
            if _dispatch_keys(arg).raw_repr() not in _PLAIN_KEYS and not _is_plain_tensor(arg):
                return False
        elif kind is list or kind is tuple:
            for item in arg:
                kind = type(item)
                if not ((kind is Tensor or kind is Parameter) and _is_plain_tensor(item)):
                    return False
        elif kind not in _PLAIN_KINDS:  # a subclass, a symbolic number
            return False
    return True


def _is_plain_tensor(tensor: Tensor) -> bool:
    if _dispatch_keys(tensor).raw_repr() in _PLAIN_KEYS:
        return True
    device = tensor.device.type
    if device != "cuda" or device in _PLAIN_DEVICES:
        return False
    _PLAIN_DEVICES.add(device)
    _PLAIN_KEYS.update(_keys(device))
    return _is_plain_tensor(tensor)
