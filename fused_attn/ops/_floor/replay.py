"""Launches made again without planning them: on small maps, planning takes longer than the kernels.

A planner makes launches of the geometry of tensors and of other arguments alone.  The second call with the same ones
plans once more over meta tensors, which tells what is made of what; from then on the compiled kernels get the addresses
of the call's tensors, and of scratch memory for tensors that the planner makes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from .launch import Launch
from .plain_calls import HAS_GUARDS, guard_on

#: ``planner(*args)``: a launch, or several in order.  Of tensors it makes views, and new ones by ``new_empty``, which
#: hold nothing before a launch writes them and are not kept.
Planner = Callable[..., Launch | Sequence[Launch]]

#: (planner, other arguments, shape of the first tensor) -> calls seen so far.
_seen: dict[tuple, list[_Call]] = {}
#: Kept in all, and for one key: those that differ in the other tensors.
_MOST, _MOST_ALIKE = 1024, 16
_TENSOR = object()


def run(planner: Planner, *args: Any) -> None:
    """Run the launches that ``planner`` makes of ``args``, numbers and tensors, these also in tuples and lists.

    The tensors are on one device, the current one.
    """
    places: dict[Tensor, int] = {}
    others: list[Any] = [planner]
    _take_apart(args, places, others)
    tensors = [*places]
    key = *others, tensors[0].shape
    calls = _seen.get(key)
    if calls is None:
        if len(_seen) >= _MOST:
            _seen.clear()
        calls = _seen[key] = []
    for call in calls:
        if call.guard(*tensors):
            call.run(planner, args, tensors)
            return
    for launch in _launches(planner, args):
        launch.run()
    if HAS_GUARDS and len(calls) < _MOST_ALIKE:
        calls.append(_Call(tensors))


def _take_apart(args: Iterable[Any], places: dict[Tensor, int], others: list[Any]) -> None:
    """Number the tensors, each once: no guard has one twice.  Which are the same one stands among the others."""
    for arg in args:
        if isinstance(arg, Tensor):
            others.append(_TENSOR)
            others.append(places.setdefault(arg, len(places)))
        elif isinstance(arg, (tuple, list)):
            others.append(len(arg))
            _take_apart(arg, places, others)
        else:
            others.append(type(arg))  # 1, 1.0 and True are equal
            others.append(arg)


def _on_meta(arg: Any, metas: dict[Tensor, Tensor]) -> Any:
    """``arg`` with a meta tensor, one of its own, in place of every tensor; they are added to ``metas``."""
    if isinstance(arg, Tensor):
        if arg not in metas:
            metas[arg] = torch.empty_strided(arg.shape, arg.stride(), dtype=arg.dtype, device="meta")
        return metas[arg]
    if isinstance(arg, (tuple, list)):
        made = [_on_meta(item, metas) for item in arg]
        return type(arg)(*made) if hasattr(arg, "_fields") else type(arg)(made)
    return arg


class _Call:
    """A call that was made with tensors of this geometry."""

    __slots__ = ("guard", "programme", "refused")

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self.guard = guard_on(*tensors)
        self.programme: _Programme | None = None
        self.refused = False

    def run(self, planner: Planner, args: tuple, tensors: Sequence[Tensor]) -> None:
        addresses = [tensor.data_ptr() for tensor in tensors]
        together = 0
        for address in addresses:
            together |= address
        if together & 15 == 0 and not _watched():  # kernels are compiled for how addresses are aligned
            if self.programme is None and not self.refused:
                self.programme = _programme(planner, args, tensors[0].device)
                self.refused = self.programme is None
            if self.programme is not None:
                self.programme.run(addresses)
                return
        for launch in _launches(planner, args):
            launch.run()


def _launches(planner: Planner, args: Sequence[Any]) -> Sequence[Launch]:
    made = planner(*args)
    return (made,) if isinstance(made, Launch) else made


def _watched() -> bool:
    """Whether somebody, a profiler say, wants to be told of launches."""
    from triton import knobs

    hooks = knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook
    return any(hook is not None and getattr(hook, "calls", True) for hook in hooks)


def _programme(planner: Planner, args: tuple, device: torch.device) -> _Programme | None:
    """The launches that ``planner`` makes of ``args``; None where they cannot be made again."""
    from triton.runtime.jit import JITFunction

    if torch.version.hip is not None:  # there a kernel is compiled for the size of its tensors' memory too
        return None
    metas: dict[Tensor, Tensor] = {}
    arguments = [_on_meta(arg, metas) for arg in args]
    try:
        with _ViewsAlone():
            launches = _launches(planner, arguments)
    except _Computes:
        return None
    if not all(isinstance(launch.kernel, JITFunction) for launch in launches):  # those of the interpreter
        return None
    return _Programme(launches, [*metas.values()], device)


class _Computes(Exception):
    """A planner made a tensor with something in it, which would not be there when the launches are made again."""


class _ViewsAlone(TorchDispatchMode):
    """Raises :class:`_Computes`."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        schema = function._schema
        aliases = [argument.alias_info for argument in (*schema.arguments, *schema.returns) if argument.alias_info]
        view = bool(aliases) and not any(alias.is_write for alias in aliases)
        if not (view or function.overloadpacket.__name__.startswith(("empty", "new_empty"))):
            raise _Computes
        return function(*args, **(kwargs or {}))


class _Programme:
    """Compiled kernels, and which of their arguments change from call to call."""

    def __init__(self, launches: Sequence[Launch], metas: Sequence[Tensor], device: torch.device) -> None:
        from triton.runtime.driver import driver

        self._driver, self._device = driver, device
        #: Bytes of scratch tensors, which come behind those of the call.
        self._scratch: list[int] = []
        self._places = {_storage(meta): place for place, meta in enumerate(metas)}
        self._count, self._known = len(metas), list(metas)  # a storage that dies could give another its identity
        self._steps = [self._step(launch) for launch in launches]

    def _step(self, launch: Launch) -> tuple:
        arguments, kernel = launch.arguments, launch.kernel
        compiled = kernel.run(grid=(launch.programs,), warmup=True, **arguments, **launch.options)
        template = [arguments[name] for name in kernel.arg_names]
        slots, nested = [], []
        for place, argument in enumerate(template):
            if isinstance(argument, Tensor):
                slots.append((place, *self._source(argument)))
                template[place] = 0
            elif isinstance(argument, tuple) and any(isinstance(item, Tensor) for item in argument):
                nested.append((place, [self._source(item) for item in argument]))  # tensors, all of them
        return (compiled.run, launch.programs, compiled.function, compiled.packed_metadata, template, slots, nested)

    def _source(self, tensor: Tensor) -> tuple[int, int]:
        """The tensor that an argument is a view of, and how many bytes behind its beginning it begins."""
        storage = _storage(tensor)
        place = self._places.get(storage)
        if place is None:
            place = self._places[storage] = self._count + len(self._scratch)
            self._scratch.append(tensor.untyped_storage().nbytes())
            self._known.append(tensor)
        return place, tensor.storage_offset() * tensor.element_size()

    def run(self, addresses: list[int]) -> None:
        scratch = [torch.empty(size, dtype=torch.uint8, device=self._device) for size in self._scratch]
        addresses += [tensor.data_ptr() for tensor in scratch]
        active = self._driver.active
        stream = active.get_current_stream(self._device.index)
        for launch, programs, function, metadata, template, slots, nested in self._steps:
            arguments = template.copy()
            for place, source, offset in slots:
                arguments[place] = addresses[source] + offset
            for place, sources in nested:
                arguments[place] = tuple([addresses[source] + offset for source, offset in sources])
            launch(programs, 1, 1, stream, function, metadata, None, None, None, *arguments)


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata
