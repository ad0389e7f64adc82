"""Choice of implementation, shared by every op.

Each op names its implementations in the order ``auto`` prefers them and gives, for each, one function that
says whether it can run on the inputs at hand.  That one answer serves the choice, the error text of an
explicit ``impl`` and ``fused-attn info``.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Mapping

import torch

from .. import _extension

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


def _dtype_reason(tensor: torch.Tensor) -> str | None:
    if tensor.dtype in KERNEL_DTYPES:
        return None
    return f"it computes float32, float16 and bfloat16, got {tensor.dtype} (impl='reference' computes any)"


def cpu_reason(tensor: torch.Tensor) -> str | None:
    """Why the C++ kernels cannot run on a tensor of this device and dtype; None when they can."""
    if tensor.device.type != "cpu":
        return f"it needs CPU tensors, got {tensor.device.type}"
    reason = _dtype_reason(tensor)
    if reason is None and not _extension.available():
        reason = f"{_NO_EXTENSION} ({_extension.reason()})"
    return reason


def triton_reason(tensor: torch.Tensor) -> str | None:
    """Why the Triton kernels cannot run on a tensor of this device and dtype; None when they can."""
    if not _HAS_TRITON:
        return "the package triton is not installed"
    if tensor.device.type not in TRITON_DEVICES:
        return f"it needs CUDA tensors, got {tensor.device.type} (or TRITON_INTERPRET=1, which runs it slowly anywhere)"
    return _dtype_reason(tensor)


def choose(op: str, impl: str, candidates: Mapping[str, CanRun], *inputs) -> str:
    """Name the implementation of ``op`` to run.

    Args:
        op: the op's public name, for the error text.
        impl: ``"auto"`` or one of ``candidates``.
        candidates: implementation name -> ``can_run(*inputs)``, in the order ``auto`` tries them.
        inputs: what each ``can_run`` is asked about.

    Raises:
        ValueError: ``impl`` is not a known name, or the op has no such implementation.
        RuntimeError: ``impl`` names an implementation that cannot run here; the text says why.
    """
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


def autocast(*tensors: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
    """Cast floating tensors to the autocast dtype where autocast is on for their device.

    This is the rule ``torch.nn.functional.scaled_dot_product_attention`` follows: inputs in the lower
    precision, statistics and accumulation in float32 inside the kernel.  float64 tensors are left alone.
    """
    device_type = tensors[0].device.type
    if device_type == "meta" or not torch.is_autocast_enabled(device_type):
        return tensors
    dtype = torch.get_autocast_dtype(device_type)
    return tuple(
        tensor.to(dtype)
        if tensor is not None and tensor.is_floating_point() and tensor.dtype != torch.float64
        else tensor
        for tensor in tensors
    )
