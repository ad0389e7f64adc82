"""Launches of the Triton kernels: tiles, arguments, and the four entry points of op.py.

A launch is planned as data (:class:`Launch`) from shapes and strides alone.  The entry points run the plans;
``compile_cases`` gives the same plans over meta tensors to the compile report.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from .._floor.launch import Launch, checked, compiler_options, strides, triton_before
from .._floor.replay import run
from . import triton_kernels as kernels

#: Elements of the largest plane that one program holds, and of a tile of a larger one.
WHOLE_PLANE = 4096
TILE = 1024
#: Images whose weight gradients one program adds up.
IMAGES = 32


class PlaneLaunch(Launch):
    """A launch over the tiles of planes."""

    __slots__ = ()

    @property
    def tile(self) -> str:
        return f"{self.arguments['ROWS']}x{self.arguments['COLUMNS']}"

    @property
    def bytes_per_tile(self) -> int:
        """Bytes read and written in one iteration, without statistics, sums and gradients of x and weights."""
        a = self.arguments
        moved = (a.get(name) for name in ("grad_out_ptr", "x_ptr", "row_ptr", "col_ptr", "out_ptr"))
        return a["ROWS"] * a["COLUMNS"] * sum(tensor.element_size() for tensor in moved if tensor is not None)


class Dual(NamedTuple):
    """What the softmax without weights has beside its input."""

    row_mask: Tensor | None = None
    col_mask: Tensor | None = None
    temperature: float = 1.0
    log: bool = False

    def arguments(self) -> dict[str, Any]:
        masks = {"row_mask_ptr": self.row_mask, "col_mask_ptr": self.col_mask}
        dense = {name: mask if mask is None else mask.contiguous().view(torch.uint8) for name, mask in masks.items()}
        return dense | {"factor": None if self.temperature == 1.0 else 1.0 / self.temperature, "LOG": self.log}


PLAIN = Dual()


class Tiling(NamedTuple):
    """How a plane is cut: rows and columns of a tile, row tiles, and whether one tile is the whole plane."""

    rows: int
    columns: int
    chunks: int
    whole: bool

    @property
    def warps(self) -> int:
        return min(max(self.rows * self.columns // 128, 1), 8)


@functools.cache
def tiling(height: int, width: int) -> Tiling:
    """How a plane of (height, width) is cut into tiles, whose sides are powers of two."""
    rows, columns = triton.next_power_of_2(height), triton.next_power_of_2(width)
    if rows * columns <= WHOLE_PLANE:
        return Tiling(rows, columns, 1, True)
    columns = min(columns, 64)
    rows = min(rows, TILE // columns)
    return Tiling(rows, columns, -(-height // rows), False)


def _launch(kernel, programs: int, tile: Tiling, arguments: dict[str, Any]) -> Launch:
    arguments = {name: arguments[name] for name in kernel.arg_names}
    once = tile.whole and "images" not in arguments and kernel is not kernels.row_col_bwd_x_kernel
    warps = tile.warps
    if kernel is kernels.row_col_bwd_weight_kernel and not tile.whole and triton_before(3, 7):
        warps = min(warps, 4)  # 8 spill for two blocks of 128 registers to a multiprocessor; 4 run in three
    options = compiler_options(warps, 1 if once else 2)
    return PlaneLaunch(kernel, checked(programs, "x makes"), arguments, options)


def _common(
    x: Tensor, row: Tensor | None, col: Tensor | None, row_stats: Tensor, col_stats: Tensor, dual: Dual = PLAIN
) -> dict[str, Any]:
    batch, channels, height, width = x.shape
    heads = 1 if row is None else row.shape[0]
    tile = tiling(height, width)
    return {
        "x_ptr": x, "row_ptr": row, "col_ptr": col, "row_stats_ptr": row_stats, "col_stats_ptr": col_stats,
        "x_strides": strides(x), "row_strides": strides(row), "col_strides": strides(col),
        "planes": batch * heads * channels, "batch": batch, "heads": heads, "channels": channels, "height": height,
        "width": width, "chunks": tile.chunks, "shift": 1.0 / (height * width),
        "ROWS": tile.rows, "COLUMNS": tile.columns, "WHOLE": tile.whole,
        "out_ptr": None, "moments_ptr": None, "mean_ptr": None, "scale_ptr": None,
    } | dual.arguments()  # fmt: skip


# --- forward ----------------------------------------------------------------------------------------------------


def plan_statistics(x, row, col, row_stats, col_partials, dual=PLAIN, out=None, moments=None) -> Launch:
    """Row statistics and those of the columns of each chunk, ``col_partials`` (chunks, ...); see the kernel."""
    common = _common(x, row, col, row_stats, col_partials, dual) | {"out_ptr": out, "moments_ptr": moments}
    tile = tiling(*x.shape[2:])
    return _launch(kernels.row_col_stats_kernel, common["planes"] * tile.chunks, tile, common)


def plan_moments(x, row, col, row_stats, col_stats, moments) -> Launch:
    common = _common(x, row, col, row_stats, col_stats) | {"moments_ptr": moments}
    tile = tiling(*x.shape[2:])
    return _launch(kernels.row_col_moments_kernel, common["planes"] * tile.chunks, tile, common)


def plan_output(x, row, col, out, row_stats, col_stats, mean=None, scale=None, dual=PLAIN) -> Launch:
    common = _common(x, row, col, row_stats, col_stats, dual) | {"out_ptr": out, "mean_ptr": mean, "scale_ptr": scale}
    tile = tiling(*x.shape[2:])
    return _launch(kernels.row_col_output_kernel, common["planes"] * tile.chunks, tile, common)


def _combine_columns(partials: Tensor, col_stats: Tensor, col_mask: Tensor | None) -> None:
    """Column statistics of whole planes from those of their chunks, (chunks, planes, 2, width), in one fixed order."""
    maximum, total = partials.unbind(2)
    largest = maximum.amax(0)
    shift = largest.masked_fill(largest == float("-inf"), 0.0)
    total = (total * (maximum - shift).exp()).sum(0)
    if col_mask is not None:  # as the kernels settle them
        excluded = ~col_mask.repeat_interleave(len(total) // len(col_mask), 0)
        largest, total = largest.masked_fill(excluded, 0.0), total.masked_fill(excluded, 1.0)
    torch.stack((largest, total), 1, out=col_stats.view(-1, 2, col_stats.shape[-1]))


def _statistics(x, row, col, row_stats, col_stats, dual=PLAIN, out=None, moments=None) -> None:
    tile = tiling(*x.shape[2:])
    if tile.whole:
        run(plan_statistics, x, row, col, row_stats, col_stats, dual, out, moments)
        return
    planes = row_stats.shape[:3].numel()
    partials = x.new_empty((tile.chunks, planes, 2, x.shape[3]), dtype=torch.float32)
    run(plan_statistics, x, row, col, row_stats, partials, dual)
    _combine_columns(partials, col_stats, dual.col_mask)
    if moments is not None:
        run(plan_moments, x, row, col, row_stats, col_stats, moments)


def softmax_forward(x, row, col, row_mask, col_mask, temperature, log, out, row_stats, col_stats) -> None:
    dual = Dual(row_mask, col_mask, temperature, log)
    if out.numel() == 0:
        return
    with torch.cuda.device_of(x):
        _statistics(x, row, col, row_stats, col_stats, dual, out=out)
        if not tiling(*x.shape[2:]).whole:
            run(plan_output, x, row, col, out, row_stats, col_stats, None, None, dual)


def _reduced(moments: Tensor, shape: torch.Size) -> tuple[Tensor, Tensor]:
    """Means per (head, channel) in float64 of moments (B, heads, C, chunks, 2), over images and positions of x."""
    count = shape[0] * shape[2] * shape[3]
    return (moments.double().sum((0, 3)) / count).flatten(0, 1).unbind(1)


def _moments(x: Tensor, heads: int) -> Tensor:
    return x.new_empty((x.shape[0], heads, x.shape[1], tiling(*x.shape[2:]).chunks, 2), dtype=torch.float32)


def attention_forward(x, row, col, mean, var, eps, out, row_stats, col_stats, mean_used, var_used) -> None:
    if mean is not None:
        mean_used.copy_(mean)
        var_used.copy_(var)
    if out.numel() == 0:
        return
    with torch.cuda.device_of(x):
        moments = _moments(x, row.shape[0]) if mean is None else None
        _statistics(x, row, col, row_stats, col_stats, moments=moments)
        if mean is None:
            first, second = _reduced(moments, x.shape)
            shift = torch.tensor(1.0 / (x.shape[2] * x.shape[3]), dtype=torch.float32).item()
            mean_used.copy_(shift + first)
            var_used.copy_((second - first.square()).clamp_min(0.0))
        scale = (var_used.double() + eps).rsqrt().float()
        run(plan_output, x, row, col, out, row_stats, col_stats, mean_used, scale)


# --- backward ---------------------------------------------------------------------------------------------------


class Normalisation(NamedTuple):
    """What backward through the batch normalisation needs, per (head, channel); all None without one."""

    mean: Tensor | None = None
    scale: Tensor | None = None
    grad_mean: Tensor | None = None
    grad_var: Tensor | None = None


def _backward(grad_out, x, row, col, row_stats, col_stats, norm, sums=(None, None), dual=PLAIN) -> dict[str, Any]:
    return _common(x, row, col, row_stats, col_stats, dual) | {
        "grad_out_ptr": grad_out,
        "grad_out_strides": strides(grad_out),
        "mean_ptr": norm.mean,
        "scale_ptr": norm.scale,
        "grad_mean_ptr": norm.grad_mean,
        "grad_var_ptr": norm.grad_var,
        "row_sums_ptr": sums[0],
        "col_sums_ptr": sums[1],
    }


def plan_grad_moments(grad_out, x, row, col, row_stats, col_stats, norm, moments) -> Launch:
    arguments = _backward(grad_out, x, row, col, row_stats, col_stats, norm) | {"moments_ptr": moments}
    tile = tiling(*x.shape[2:])
    return _launch(kernels.row_col_grad_moments_kernel, arguments["planes"] * tile.chunks, tile, arguments)


def plan_sums(grad_out, x, row, col, row_stats, col_stats, norm, sums, dual=PLAIN) -> Launch:
    arguments = _backward(grad_out, x, row, col, row_stats, col_stats, norm, sums, dual)
    tile = tiling(*x.shape[2:])
    return _launch(kernels.row_col_sums_kernel, arguments["planes"] * tile.chunks, tile, arguments)


def plan_grad_x(grad_out, x, row, col, row_stats, col_stats, norm, sums, grad_x, dual=PLAIN) -> Launch:
    arguments = _backward(grad_out, x, row, col, row_stats, col_stats, norm, sums, dual) | {"grad_x_ptr": grad_x}
    tile = tiling(*x.shape[2:])
    programs = x.shape[0] * x.shape[1] * tile.chunks
    return _launch(kernels.row_col_bwd_x_kernel, programs, tile, arguments)


def plan_grad_weight(grad_out, x, row, col, row_stats, col_stats, norm, sums, partials) -> Launch:
    """``partials``: (groups, 2, heads, C, H, W), float32."""
    tile = tiling(*x.shape[2:])
    column_tiles = -(-x.shape[3] // tile.columns)
    arguments = _backward(grad_out, x, row, col, row_stats, col_stats, norm, sums) | {
        "grad_weight_ptr": partials,
        "images": IMAGES,
        "column_tiles": column_tiles,
    }
    programs = partials.shape[0] * row.shape[0] * x.shape[1] * tile.chunks * column_tiles
    return _launch(kernels.row_col_bwd_weight_kernel, programs, tile, arguments)


def _run_backward(grad_out, x, row, col, row_stats, col_stats, norm, grad_x, grad_row, grad_col, dual=PLAIN) -> None:
    batch, _, height, width = x.shape
    terms = (grad_out, x, row, col, row_stats, col_stats, norm)
    tile, planes = tiling(height, width), row_stats.shape[:3].numel()
    sums = (None, None)
    if not tile.whole:
        row_sums = x.new_empty((planes, height), dtype=torch.float32)
        partials = x.new_empty((tile.chunks, planes, width), dtype=torch.float32)
        run(plan_sums, *terms, (row_sums, partials), dual)
        sums = row_sums, partials.sum(0)
    run(plan_grad_x, *terms, sums, grad_x, dual)
    if row is not None:
        partials = x.new_empty((-(-batch // IMAGES), 2, *row.shape), dtype=torch.float32)
        run(plan_grad_weight, *terms, sums, partials)
        both = partials.sum(0)
        grad_row.copy_(both[0])
        grad_col.copy_(both[1])


def _by_head(tensor: Tensor, channels: int) -> Tensor:
    """(B, heads*C, H, W) or (B, C, H, W) as (B, heads, C, H, W)."""
    if tensor.dim() == 5:
        return tensor
    return tensor.unflatten(1, (tensor.shape[1] // channels, channels))


def softmax_backward(grad_out, x, row, col, row_mask, col_mask, row_stats, col_stats, temperature, log, *grads) -> None:
    dual = Dual(row_mask, col_mask, temperature, log)
    with torch.cuda.device_of(x):
        grad_out = _by_head(grad_out, x.shape[1])
        _run_backward(grad_out, x, row, col, row_stats, col_stats, Normalisation(), *grads, dual)


def attention_backward(grad_out, x, row, col, row_stats, col_stats, mean, var, training, eps, *grads) -> None:
    with torch.cuda.device_of(x):
        grad_out = _by_head(grad_out, x.shape[1])
        deviation = (var.double() + eps).rsqrt()
        norm = Normalisation(mean, deviation.float(), torch.zeros_like(mean), torch.zeros_like(mean))
        if training:
            moments = _moments(x, row.shape[0])
            run(plan_grad_moments, grad_out, x, row, col, row_stats, col_stats, norm, moments)
            first, second = _reduced(moments, x.shape)
            norm.grad_mean.copy_(first)
            norm.grad_var.copy_(second * deviation.square())
        _run_backward(grad_out, x, row, col, row_stats, col_stats, norm, *grads)


# --- compilation without a GPU ----------------------------------------------------------------------------------

#: Cases of the compile report: name -> (batch, channels, grid, heads, dtype), and whether there is everything that the
#: softmax without weights can have beside its input, with the logarithm or not.
_COMPILE_SHAPES: dict[str, tuple] = {
    "28x28, 16 heads": (512, 1, (28, 28), 16, torch.bfloat16),
    "32x32, 3 channels": (256, 3, (32, 32), 8, torch.float16),
    "64x64": (32, 2, (64, 64), 4, torch.bfloat16),
    "100x150": (8, 2, (100, 150), 4, torch.bfloat16),
    "28x28, float32": (512, 1, (28, 28), 16, torch.float32),
    "dual 4800x4800": (1, 1, (4800, 4800), None, torch.bfloat16),
    "dual 4800x4800, float32": (1, 1, (4800, 4800), None, torch.float32),
    "dual 4800x4800, masked, float32": (1, 1, (4800, 4800), None, torch.float32, False),
    "dual 2048x2048, masked, log, float32": (1, 1, (2048, 2048), None, torch.float32, True),
    "dual 32x32, masked, log, float32": (64, 1, (32, 32), None, torch.float32, True),
}


def compile_cases(arch: str) -> Iterator[tuple[str, Launch]]:
    """(case, launch) of every shipped configuration, over meta tensors; the tiles are the same on every ``arch``."""
    for name, shape in _COMPILE_SHAPES.items():
        for launch in _plan_all(*shape):
            statistics = launch.kernel is kernels.row_col_stats_kernel
            moments = statistics and launch.arguments["moments_ptr"] is not None
            yield f"{name}, moments" if moments else name, launch


def _plan_all(
    batch: int, channels: int, grid: tuple[int, int], heads: int | None, dtype: torch.dtype, log: bool | None = None
) -> list[Launch]:
    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    x, tile = empty(batch, channels, *grid, dtype=dtype), tiling(*grid)
    lead = (batch, heads or 1, channels)
    row, col = (empty(heads, channels, *grid, dtype=dtype) if heads else None for _ in range(2))
    out = empty(*lead, *grid, dtype=dtype)
    stats = empty(*lead, 2, grid[0]), empty(*lead, 2, grid[1])
    moments = empty(*lead, tile.chunks, 2)
    per_channel = [empty((heads or 1) * channels) for _ in range(4)]
    norm = Normalisation(*per_channel) if heads else Normalisation()
    sums = (None, None) if tile.whole else (empty(*lead, grid[0]), empty(*lead, grid[1]))
    dual = PLAIN if log is None else Dual(*(empty(batch, size, dtype=torch.bool) for size in grid), 0.1, log)
    launches = [plan_statistics(x, row, col, *stats, dual, **({"out": out} if tile.whole else {}))]
    if heads:
        statistics = plan_statistics(x, row, col, *stats, moments=moments)
        launches += [statistics] if tile.whole else [plan_moments(x, row, col, *stats, moments)]
        launches.append(plan_grad_moments(out, x, row, col, *stats, norm, moments))
    launches.append(plan_output(x, row, col, out, *stats, *norm[:2], dual))
    if not tile.whole:
        launches.append(plan_sums(out, x, row, col, *stats, norm, sums, dual))
    launches.append(plan_grad_x(out, x, row, col, *stats, norm, sums, x, dual))
    if heads:
        launches.append(plan_grad_weight(out, x, row, col, *stats, norm, sums, empty(1, 2, heads, channels, *grid)))
    return launches
