"""Plain calls: what there is to know of one, and whether another is like it."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import Parameter

from ... import _extension

any_autocast = torch._C._is_any_autocast_enabled
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


def guard_on(*tensors: Tensor) -> Callable[..., bool]:
    """Whether tensors have the type, dispatch keys, dtype, device, sizes, strides and requires_grad of these.

    The dispatch keys are those within modes and transforms, though not within all of them.
    """
    from torch._C._dynamo.guards import TensorGuards

    return TensorGuards(*tensors, dynamic_dims_sizes=None, dynamic_dims_strides=None).check


def _has_guards(tensor: Tensor) -> bool:
    try:
        return guard_on(tensor)(tensor)
    except Exception:  # they are not public: where they are others, calls are told apart in Python
        return False


def _plain() -> tuple[set[tuple[int, int]], set[int], bool]:
    states = {_state()}
    with torch.inference_mode():
        states.add(_state())
    return states, _keys("cpu"), _has_guards(torch.empty(0, device="cpu"))


# In a thread of its own, which has no modes: the package may be imported within some.
with ThreadPoolExecutor(1) as _thread:
    _PLAIN_STATES, _PLAIN_KEYS, HAS_GUARDS = _thread.submit(_plain).result()
_PLAIN_DEVICES = {"cpu"}
_PLAIN_KINDS = frozenset({type(None), float, bool, int, str})
_metadata = operator.attrgetter("shape", "dtype", "device", "requires_grad")


def in_no_mode() -> bool:
    """Whether no mode, transform or forward mode of PyTorch's is active, autocast aside."""
    return _state() in _PLAIN_STATES and forward_ad._current_level < 0


def signature(args: Sequence[Any]) -> tuple | None:
    """What there is to know of a plain call but for the values of its tensors; None if it is not plain.

    Plain is a call with tensors as users make them, and with no mode, transform or autocast of PyTorch's active.
    """
    if _state() not in _PLAIN_STATES or forward_ad._current_level >= 0 or any_autocast():
        return None
    seen = [torch.is_grad_enabled(), _extension.available()]
    return tuple(seen) if _look(args, seen) else None


def _look(args: Sequence[Any], seen: list) -> bool:
    """Add what there is to know of ``args``; False if one is not plain."""
    for arg in args:
        kind = type(arg)
        if kind is Tensor or kind is Parameter:
            if _dispatch_keys(arg).raw_repr() not in _PLAIN_KEYS and not _is_plain_tensor(arg):
                return False
            seen += _metadata(arg)
            seen.append(arg.stride())
        elif kind in _PLAIN_KINDS:
            seen += kind, arg  # 1, 1.0 and True are equal
        elif kind is list or kind is tuple:
            seen.append(len(arg))
            if not _look(arg, seen):
                return False
        else:  # a subclass, a symbolic number
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


class Guard:
    """Whether a call has the :func:`signature` of ``args``: asked of PyTorch in one call, for those without lists.

    Args:
        args: of a plain call, with a tensor, and with no list.
    """

    __slots__ = ("_check", "_mode", "_others", "_same", "_tensors")

    def __init__(self, args: Sequence) -> None:
        tensors = [place for place, arg in enumerate(args) if isinstance(arg, Tensor)]
        self._tensors, self._others = getter(tensors), getter([i for i in range(len(args)) if i not in tensors])
        self._check, self._same = guard_on(*self._tensors(args)), self._others(args)
        self._mode = torch.is_grad_enabled(), _extension.available()

    @staticmethod
    def serves(args: Sequence) -> bool:
        """Whether there can be one for a plain call with these arguments."""
        kinds = {*map(type, args)}
        return HAS_GUARDS and not kinds & {list, tuple} and bool(kinds & {Tensor, Parameter})

    def __call__(self, args: Sequence) -> bool:
        return (
            all(map(operator.is_, self._others(args), self._same))
            and self._check(*self._tensors(args))
            and _state() in _PLAIN_STATES
            and self._mode == (torch.is_grad_enabled(), _extension.available())
            and not any_autocast()
            and forward_ad._current_level < 0
        )


def getter(places: Sequence[int]) -> Callable[[Sequence], tuple]:
    """The items at these places, as a tuple whatever their number."""
    if len(places) > 1:
        return operator.itemgetter(*places)
    return lambda values: tuple(values[place] for place in places)
