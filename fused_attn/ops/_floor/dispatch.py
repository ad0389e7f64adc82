"""Choice of implementation, shared by every op.

Each op names its implementations in the order ``auto`` prefers them and gives, for each, one function that
says whether it can run on the inputs at hand.  That one answer serves the choice, the error text of an
explicit ``impl`` and ``fused-attn info``.
"""

from __future__ import annotations

import functools
import importlib.util
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from ... import _extension
from .tracing import exports_plainly

#: Every value that ``impl=`` may take, for any op.
IMPLEMENTATIONS = ("auto", "reference", "cpu", "triton", "cuda")

#: Says why an implementation cannot run on the given inputs; None when it can.
CanRun = Callable[..., "str | None"]

#: Dtypes that the C++ and the Triton kernels compute.
KERNEL_DTYPES = (torch.float32, torch.float16, torch.bfloat16)

_NO_EXTENSION = "the C++ extension is not available"
_HAS_TRITON = importlib.util.find_spec("triton") is not None
_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

#: Device types that operators of the Triton kernels are registered for.
TRITON_DEVICES = ("cuda", "cpu") if _INTERPRETED else ("cuda",)


def _dtype_reason(tensor: torch.Tensor) -> str:
    return f"it computes float32, float16 and bfloat16, got {tensor.dtype} (impl='reference' computes any)"


def cpu_reason(tensor: torch.Tensor) -> str | None:
    """Why the C++ kernels cannot run on tensors of the device and dtype of this one; None when they can."""
    if not tensor.is_cpu:
        return f"it needs CPU tensors, got {tensor.device.type}"
    if tensor.dtype not in KERNEL_DTYPES:
        return _dtype_reason(tensor)
    return None if _extension.available() else f"{_NO_EXTENSION} ({_extension.reason()})"


def triton_reason(tensor: torch.Tensor) -> str | None:
    """Why the Triton kernels cannot run on tensors of the device and dtype of this one; None when they can."""
    if not _HAS_TRITON:
        return "the package triton is not installed"
    if tensor.device.type not in TRITON_DEVICES:
        return f"it needs CUDA tensors, got {tensor.device.type} (or TRITON_INTERPRET=1, which runs it slowly anywhere)"
    return None if tensor.dtype in KERNEL_DTYPES else _dtype_reason(tensor)


def choose(op: str, impl: str, candidates: Mapping[str, CanRun], *inputs) -> str:
    """Name the implementation of ``op`` to run: the reference where an export asks for plain PyTorch.

    Args:
        op: the op's public name, for the error text.
        impl: ``"auto"`` or one of ``candidates``.
        candidates: implementation name -> ``can_run(*inputs)``, in the order ``auto`` tries them.
        inputs: what each ``can_run`` is asked about.

    Raises:
        ValueError: ``impl`` is not a known name, or the op has no such implementation.
        RuntimeError: ``impl`` names an implementation that cannot run here; the text says why.
    """
    if exports_plainly() and (impl == "auto" or impl in candidates):
        return "reference"
    if impl == "auto":
        reasons = {}
        for name, can_run in candidates.items():
            reason = can_run(*inputs)
            if reason is None:
                if name == "reference" and reasons.get("cpu", "").startswith(_NO_EXTENSION):
                    _extension.warn_of_reference()
                return name
            reasons[name] = reason
        text = "; ".join(f"{name}: {reason}" for name, reason in reasons.items())
        raise RuntimeError(f"{op}: no implementation can run on these inputs ({text})")
    if impl not in candidates:
        expected = ", ".join(repr(name) for name in ("auto", *candidates))
        raise ValueError(f"{op}: impl must be one of {expected}, got {impl!r}")
    reason = candidates[impl](*inputs)
    if reason is not None:
        raise RuntimeError(f"{op}: impl={impl!r} cannot run: {reason}")
    return impl


def autocast_dtype(tensor: torch.Tensor) -> torch.dtype | None:
    """The dtype that autocast computes in on the device of ``tensor``; None where it is off."""
    device_type = tensor.device.type
    if device_type == "meta" or not torch.is_autocast_enabled(device_type):
        return None
    return torch.get_autocast_dtype(device_type)


def _is_cast(tensor: torch.Tensor | None) -> bool:
    """Whether autocast changes the dtype of such a tensor: float64 and integers are left alone."""
    return tensor is not None and tensor.is_floating_point() and tensor.dtype != torch.float64


def _cast(tensors: Sequence[torch.Tensor | None], dtype: torch.dtype) -> tuple[torch.Tensor | None, ...]:
    return tuple(tensor.to(dtype) if _is_cast(tensor) else tensor for tensor in tensors)


def _widest(tensors: Sequence[torch.Tensor | None]) -> torch.dtype:
    return functools.reduce(torch.promote_types, {tensor.dtype for tensor in tensors if _is_cast(tensor)})


# What autocast does to an op is what it does to the op's formula in plain PyTorch: each op takes one of three rules.


def autocast(*tensors: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
    """Autocast of matrix products: cast floating tensors to the autocast dtype where it is on for their device.

    For attention, and sums that ``einsum`` forms.  This is the rule that
    ``torch.nn.functional.scaled_dot_product_attention`` follows: inputs in the lower precision, statistics and
    accumulation in float32 inside the kernel.  float64 tensors are left alone.
    """
    dtype = autocast_dtype(tensors[0])
    return tensors if dtype is None else _cast(tensors, dtype)


def autocast_softmax(*tensors: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
    """Autocast of a softmax whose logits are the inputs, or their products.

    Logits have the range and the precision of their dtype: 50.0 and 50.1 are one number in bfloat16, and a mask of -1e9
    is -inf in float16.  On GPUs softmax is on autocast's float32 list.  On the CPU it is not: it computes in the dtype
    that it gets, which is the widest of the inputs.
    """
    if autocast_dtype(tensors[0]) is None or not any(map(_is_cast, tensors)):
        return tensors
    return _cast(tensors, _widest(tensors) if tensors[0].device.type == "cpu" else torch.float32)


def autocast_maps(maps: Sequence[torch.Tensor | None], *parameters: torch.Tensor | None) -> tuple[Any, ...]:
    """Autocast of sums and products element by element: the maps keep their dtype, the widest of them for all.

    Args:
        maps: the first one is a tensor.
        parameters: whatever is small; cast to the dtype of the maps.

    Returns:
        the maps, then the parameters.
    """
    tensors = (*maps, *parameters)
    if autocast_dtype(tensors[0]) is None or not any(map(_is_cast, maps)):
        return tensors
    return _cast(tensors, _widest(maps))


def without_autocast(tensor: torch.Tensor) -> AbstractContextManager:
    """For the implementations: their inputs have been cast, and their own products and sums keep to that."""
    if autocast_dtype(tensor) is None:
        return nullcontext()
    return torch.autocast(tensor.device.type, enabled=False)
