"""Checks of arguments that all ops share."""

from __future__ import annotations

import numbers
from collections.abc import Collection, Mapping, Sequence

import torch
from torch import Tensor
from torch.autograd import forward_ad

from .tracing import leaf


def number(name: str, value: object) -> float:
    """A number that a user gave, as a float.

    Under ``torch.compile``, ``torch.export`` and ``make_fx`` a number that was computed from a dynamic size stays
    symbolic.  The operators take it as a ``Scalar``: for a ``float``, PyTorch would put in the number of today's size.

    Args:
        name: of the argument, for the error text.
        value: an int, a float, a number of NumPy, a symbolic number, or a tensor without dimensions that needs no
            gradient.  Such a tensor is read, which waits for a GPU.  ``torch.compile`` takes numbers of NumPy
            for tensors, and breaks the graph at both: give it ``float(value)``.

    Raises:
        TypeError: it is something else, a bool, or a tensor that has a gradient or a tangent to lose.
    """
    if type(value) is float:
        return value
    if isinstance(value, Tensor):
        _check_number_tensor(name, value)
    elif isinstance(value, (bool, torch.SymBool)) or not isinstance(value, _NUMBERS):
        raise TypeError(f"{name} must be a number, got {type(value).__name__}")
    return torch.sym_float(value)


_NUMBERS = (numbers.Real, torch.SymInt, torch.SymFloat)


def _check_number_tensor(name: str, value: Tensor) -> None:
    if value.requires_grad:
        raise TypeError(
            f"{name} must be a number, got a tensor that requires grad, which its gradient would not reach: "
            "detach() it, or multiply an argument by it instead"
        )
    if value.dim() > 0:
        raise TypeError(
            f"{name} must be a number or a tensor without dimensions, got one of shape {tuple(value.shape)}"
        )
    if value.dtype == torch.bool or value.is_complex():
        raise TypeError(f"{name} must be a number, got a tensor of dtype {value.dtype}")
    if value.is_meta:
        raise TypeError(f"{name} must be a number, got a tensor on the meta device")
    if forward_ad._current_level >= 0:
        if forward_ad.unpack_dual(value).tangent is not None:
            raise _lost(name)
        if not torch.compiler.is_compiling():
            _without_tangent(value, name)


def _lost(name: str) -> TypeError:
    return TypeError(f"{name} must be a number, got a tensor with a forward-mode tangent, which would be lost")


# An operator, because nested function transforms run one at each of their levels; a tensor itself shows the tangent of
# the innermost level alone.
_LIBRARY = torch.library.Library("fused_attn", "FRAGMENT")
_LIBRARY.define("without_tangent(Tensor value, str name) -> Tensor")
_without_tangent = torch.ops.fused_attn.without_tangent.default


def _refuse_tangent(keyset, value: Tensor, name: str) -> Tensor:
    if torch._VF._unpack_dual(value, level=0)[1] is not None:
        raise _lost(name)
    with torch._C._AutoDispatchBelowAutograd():
        return _without_tangent.redispatch(keyset & torch._C._after_autograd_keyset, value, name)


_LIBRARY.impl("without_tangent", _refuse_tangent, "Autograd", with_keyset=True)
_LIBRARY.impl("without_tangent", lambda value, name: value.clone(), "CompositeExplicitAutograd")


def tensor(name: str, value: object) -> None:
    """Require a floating-point tensor.

    Raises:
        TypeError: it is something else.
    """
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(value).__name__}")
    if not value.is_floating_point():
        raise TypeError(f"{name} must have a floating-point dtype, got {value.dtype}")


def tensors(**values: object) -> None:
    """Require floating-point tensors, by name; raises as :func:`tensor` does."""
    for name, value in values.items():
        tensor(name, value)


@leaf
def feature_map(x: Tensor, channels: int) -> None:
    """Require the input of a module: a map (B, channels, H, W).

    Raises:
        ValueError: it has another shape.
    """
    if x.dim() != 4 or x.shape[1] != channels:
        raise ValueError(f"x must have shape (B, {channels}, H, W), got {tuple(x.shape)}")


def one_of(name: str, value: object, choices: Collection[object]) -> None:
    """Require one of several values, which the error text lists.

    Raises:
        ValueError: it is another one.
    """
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}")


def positive(**numbers: int) -> None:
    """Require numbers of at least 1, by name.

    Raises:
        ValueError: one is less.
    """
    for name, value in numbers.items():
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")


def same_dtype(tensors: Mapping[str, Tensor | Sequence[Tensor] | None], or_float32: Collection[str] = ()) -> None:
    """Require tensors of one dtype, on one device.

    Args:
        tensors: by name; the others have to be as the first.  None is left out.
        or_float32: names of those that may be float32, too.

    Raises:
        ValueError: one has another dtype or lies on another device.
    """
    first = None
    for name, value in tensors.items():
        if value is None:
            continue
        items = (value,) if isinstance(value, Tensor) else value
        if first is None:
            first, dtype, device = name if items[0] is value else f"{name}[0]", items[0].dtype, items[0].device
        for i, tensor in enumerate(items):
            if tensor.dtype != dtype and not (name in or_float32 and tensor.dtype == torch.float32):
                raise _unlike(name if tensor is value else f"{name}[{i}]", "have the dtype", first, dtype, tensor.dtype)
            if tensor.device != device:
                raise _unlike(
                    name if tensor is value else f"{name}[{i}]", "be on the device", first, device, tensor.device
                )


def _unlike(name: str, must: str, first: str, expected: object, got: object) -> ValueError:
    return ValueError(f"{name} must {must} of {first}, {expected}, got {got}")
