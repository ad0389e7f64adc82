"""Launches of the Triton kernels: tile shapes, arguments, and the two entry points of op.py.

A launch is planned as data (:class:`Launch`) from shapes and strides alone.  ``forward`` and ``backward`` run the
plans; ``compile_cases`` gives the same plans over meta tensors to the compile report.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import triton
from torch import Tensor

from .._floor.launch import Launch, architecture, bucket, bucket_size, checked, compiler_options, strides, triton_before
from .._floor.layout import rows
from .._floor.replay import run
from . import triton_kernels

#: Programs of the backward pass, and so partial sums of the score vector's gradient.  A fixed number: results do not
#: depend on the device.  1,024 are several waves on any GPU, and their partial sums 1 % of what the pass reads and
#: writes at 9 values of 8,192 tokens.  Rows of fewer than 1,024 numbers take twice as many, as they have few warps.
BACKWARD_PROGRAMS = 1024


class TokenLaunch(Launch):
    """A launch over tiles of tokens."""

    __slots__ = ()

    @property
    def tile(self) -> str:
        a = self.arguments
        return f"{a['BLOCK_T']} tokens x {a['BLOCK_D']}, {a['COUNT']} values"

    @property
    def bytes_per_tile(self) -> int:
        """What one tile of tokens moves between registers and global memory where all COUNT values are there."""
        a = self.arguments
        tensors = (2 if "grad_out_ptr" in a else 1) * a["COUNT"] + 1
        return a["BLOCK_T"] * a["D"] * a["query_ptr"].element_size() * tensors


class FoldLaunch(Launch):
    """The launch that sums partial gradients."""

    __slots__ = ()

    @property
    def tile(self) -> str:
        return f"{self.arguments['BLOCK_P']} sums x {self.arguments['BLOCK_D']}"

    @property
    def bytes_per_tile(self) -> int:
        return 4 * self.arguments["BLOCK_P"] * self.arguments["BLOCK_D"]


@functools.cache
def _tile(depth: int, elements_per_thread: int) -> tuple[int, int, int]:
    """(tokens, padded depth, warps) of a tile: one token of 256 numbers or more, else 1,024 numbers, but not square.

    Triton 3.6 does not compile the forward kernel for a tile of 32 x 32 by one warp and three values or more: a layout
    conversion that it moves up leaves the branch that defines its operand.
    """
    block_d = max(16, triton.next_power_of_2(depth))
    block_t = 1 if block_d >= 256 else 64 if block_d == 32 else 1024 // block_d
    warps = max(1, min(16, block_t * block_d // (32 * elements_per_thread)))
    return block_t, block_d, warps


def _common(values: Sequence[Tensor], query: Tensor, norm_weight: Tensor | None, tile) -> dict[str, Any]:
    """Arguments that both kernels take, by name; ``values`` are (outer, inner, D)."""
    outer, inner, depth = values[0].shape
    block_t, block_d, _ = tile
    return {
        "value_ptrs": bucket(values),
        "value_strides": bucket([strides(value)[:2] for value in values]),
        "query_ptr": query,
        "norm_weight_ptr": norm_weight,
        "query_stride": query.stride(0),
        "norm_weight_stride": 0 if norm_weight is None else norm_weight.stride(0),
        "count": len(values),
        "tokens": outer * inner,
        "inner_size": inner,
        "D": depth,
        "COUNT": bucket_size(len(values)),
        "BLOCK_T": block_t,
        "BLOCK_D": block_d,
    }


def _launch(kernel, programs: int, arguments: dict[str, Any], tile, **options: int) -> Launch:
    options = compiler_options(tile[2], 1) | options
    return TokenLaunch(kernel, checked(programs, "values make"), arguments, options)


def plan_forward(values, query, norm_weight, eps, out, statistics, arch: str) -> Launch:
    """The forward launch; ``values`` are (outer, inner, D); writes ``out`` and ``statistics``, both contiguous."""
    # Of rows this long, tiles of eight warps and 145 registers leave room for one on a multiprocessor: too few bytes on
    # their way.  Where there are registers for it, two of four warps.
    long = values[0].shape[-1] > 4096 and query.element_size() == 2
    spills = triton_before(3, 7) and arch == "sm_100"
    tile = _tile(values[0].shape[-1], 64 if long and not spills else 32)
    arguments = _common(values, query, norm_weight, tile)
    arguments |= {"out_ptr": out, "statistics_ptr": statistics, "eps": eps}
    programs = -(-arguments["tokens"] // tile[0])
    return _launch(triton_kernels.attention_residual_fwd_kernel, programs, arguments, tile)


def plan_backward(grad_out, values, query, norm_weight, statistics, grad_values, partials) -> Launch:
    """The backward launch; writes ``grad_values`` (contiguous) and ``partials``, a row per program."""
    tile = _tile(values[0].shape[-1], 16)
    options = {}
    if triton_before(3, 7):
        if tile[2] == 16:  # 128 registers, which spill
            tile = _tile(values[0].shape[-1], 32)
        elif tile[2] <= 2 and torch.version.hip is None:
            options["maxnreg"] = 184  # or a few of them are spilled for the sake of 128
    arguments = _common(values, query, norm_weight, tile)
    arguments |= {
        "grad_out_ptr": grad_out,
        "grad_out_strides": strides(grad_out)[:2],
        "statistics_ptr": statistics,
        "grad_value_ptrs": bucket(grad_values),
        "partials_ptr": partials,
    }
    return _launch(triton_kernels.attention_residual_bwd_kernel, partials.shape[0], arguments, tile, **options)


def _backward_programs(values: Sequence[Tensor]) -> int:
    outer, inner, depth = values[0].shape
    programs = BACKWARD_PROGRAMS if depth >= 1024 else 2 * BACKWARD_PROGRAMS
    return min(programs, -(-outer * inner // _tile(depth, 16)[0]))


def plan_fold(partials, query, norm_weight, grad_query, grad_norm_weight) -> Launch:
    """The launch that makes the gradients of query and norm_weight of the backward launch's ``partials``."""
    depth = query.shape[0]
    arguments = {
        "partials_ptr": partials,
        "query_ptr": query,
        "norm_weight_ptr": norm_weight,
        "grad_query_ptr": grad_query,
        "grad_norm_weight_ptr": None if norm_weight is None else grad_norm_weight,
        "query_stride": query.stride(0),
        "norm_weight_stride": 0 if norm_weight is None else norm_weight.stride(0),
        "count": partials.shape[0],
        "D": depth,
        "BLOCK_P": 32,
        "BLOCK_D": 32,
    }
    kernel = triton_kernels.attention_residual_fold_kernel
    return FoldLaunch(kernel, -(-depth // 32), arguments, compiler_options(4, 1))


def forward(values, query, norm_weight, eps, out, statistics) -> None:
    """Forward of the operators in op.py."""
    if out.numel():
        arch = architecture(query)
        with torch.cuda.device_of(query):
            run(plan_forward, [rows(value) for value in values], query, norm_weight, eps, out, statistics, arch)


def _plan_backward(
    grad_out, values, query, norm_weight, statistics, grad_values, grad_query, grad_norm_weight
) -> list[Launch]:
    partials = statistics.new_empty((_backward_programs(values), query.shape[0]))
    return [
        plan_backward(grad_out, values, query, norm_weight, statistics, grad_values, partials),
        plan_fold(partials, query, norm_weight, grad_query, grad_norm_weight),
    ]


def backward(grad_out, values, query, norm_weight, statistics, eps, grad_values, grad_query, grad_norm_weight) -> None:
    """Backward of the operators in op.py."""
    if grad_out.numel() == 0:
        grad_query.zero_(), grad_norm_weight.zero_()
        return
    arguments = rows(grad_out), [rows(value) for value in values], query, norm_weight, statistics
    with torch.cuda.device_of(query):
        run(_plan_backward, *arguments, grad_values, grad_query, grad_norm_weight)


#: Cases of the compile report: name -> (values, tokens, D, dtype).
_COMPILE_SHAPES = {
    "L 9, D 7168": (9, 8192, 7168, torch.bfloat16),
    "L 9, D 7168, float32": (9, 8192, 7168, torch.float32),
    "L 9, D 1024": (9, 8192, 1024, torch.bfloat16),
    "L 24, D 384": (24, 12544, 384, torch.float16),
    "L 1, D 20": (1, 8192, 20, torch.bfloat16),
    "L 4, D 20, float32": (4, 8192, 20, torch.float32),
}

COMPILE_NOTES = """
Bytes: those of the values, the output and their gradients in one tile of tokens, once each.  Backward asks for the
values a second time, which the caches answer.  The values are unrolled up to a power of two, and instructions and bytes
are those of all of them; one past the run-time count costs a comparison.
"""


def compile_cases(arch: str) -> Iterator[tuple[str, Launch]]:
    """(case, launch) of every shipped configuration, over meta tensors: see compile_report.py."""
    for name, (count, tokens, depth, dtype) in _COMPILE_SHAPES.items():

        def empty(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
            return torch.empty(shape, dtype=dtype, device="meta")

        values = [empty(1, tokens, depth) for _ in range(count)]
        query, out = empty(depth), values[0]
        statistics = empty(tokens, count, 2, dtype=torch.float32)
        partials = empty(_backward_programs(values), depth, dtype=torch.float32)
        yield name, plan_forward(values, query, query, 1e-6, out, statistics, arch)
        yield name, plan_backward(out, values, query, query, statistics, values, partials)
        yield name, plan_fold(partials, query, query, query, query)
