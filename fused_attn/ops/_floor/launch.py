"""Launches of Triton kernels as data: what the planners of all ops share.

A planner makes a :class:`Launch` of shapes, strides and the architecture alone.  An op's entry points run it; the
compile report compiles it over meta tensors.  Planning is paid at every call, beside kernels of a few microseconds:
what depends on sizes alone is cached.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Launch(NamedTuple):
    """One kernel launch: ``kernel[(programs,)](**arguments, **options)``.

    The compile report also asks an op's launches for ``tile``, their shape in words, and for ``scores_per_tile`` or
    ``bytes_per_tile``, the work of one iteration of the innermost loop: see benchmarks/gpu/gpu_code.py.
    """

    kernel: Any
    programs: int
    arguments: dict[str, Any]
    options: dict[str, Any]

    def run(self) -> None:
        self.kernel[(self.programs,)](**self.arguments, **self.options)


@functools.cache
def triton_before(major: int, minor: int) -> bool:
    """Whether the installed Triton is older: where versions compile a kernel differently, launches ask."""
    import triton

    return tuple(int(part) for part in triton.__version__.split(".")[:2]) < (major, minor)


@functools.cache
def compiler_options(warps: int, stages: int) -> dict[str, Any]:
    """Compiler options; shared, not to be changed."""
    # FMA contraction is the default up to Triton 3.9 and no longer after it.
    return {"num_warps": warps, "num_stages": stages, "enable_fp_fusion": True}


def checked(programs: int, inputs: str) -> int:
    """``programs``, where a grid can have so many.

    Raises:
        ValueError: it cannot; ``inputs`` names what is too large, with its verb.
    """
    if programs >= 2**31:
        raise ValueError(f"{inputs} {programs} tiles of work, expected fewer than 2**31; split the batch")
    return programs


def bucket_size(count: int) -> int:
    """The least power of two that is at least ``count``: one compilation serves many lengths."""
    return 1 << (count - 1).bit_length()


def bucket(items: Sequence[Any]) -> tuple[Any, ...]:
    """The items, the first one repeated up to a power of two."""
    count = len(items)
    return (*items, *[items[0]] * (bucket_size(count) - count))


def strides(tensor: Tensor | None) -> tuple[int, ...] | None:
    """Strides, with 0 along dimensions of size 1, whose stride is arbitrary and could compile a kernel anew."""
    if tensor is None:
        return None
    shape = tensor.shape
    if 1 not in shape:
        return tensor.stride()
    return tuple(0 if size == 1 else stride for size, stride in zip(shape, tensor.stride(), strict=True))


def alignment(tensor: Tensor | None, steps: Sequence[int] | None) -> int:
    """Alignment of the rows of a tensor, in elements: a power of two of at most 16 bytes.

    It divides the tensor's address and all ``steps`` but the last, which is the stride of the depth.  1 where that is
    not contiguous, and where there is no tensor.
    """
    if tensor is None or steps[-1] != 1:
        return 1
    itemsize = tensor.element_size()
    address = tensor.storage_offset() * itemsize if tensor.is_meta else tensor.data_ptr()
    return math.gcd(16 // itemsize, address // itemsize if address % itemsize == 0 else 1, *steps[:-1])


def architecture(tensor: Tensor) -> str:
    """``"sm_90"``, ``"gfx942"``, ...: what ``tensor`` lives on.  ``"sm_90"`` for the interpreter."""
    device = tensor.device
    return _architecture(device.index) if device.type == "cuda" else "sm_90"


@functools.cache
def _architecture(index: int) -> str:
    properties = torch.cuda.get_device_properties(index)
    if torch.version.hip:
        return properties.gcnArchName.split(":")[0]
    return f"sm_{properties.major}{properties.minor}"
