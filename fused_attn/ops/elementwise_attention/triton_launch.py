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

from .._floor.launch import Launch, bucket_size, checked, compiler_options, strides, triton_before
from .._floor.replay import run
from . import triton_fold_kernels as folds
from . import triton_kernels as kernels

#: Elements of the largest plane that one program holds, and of a tile of a larger one.
WHOLE_PLANE = 4096
TILE = 1024
#: Images whose weight gradients one program adds up.
IMAGES = 32
#: Moments of one head and channel that one program adds up at a time, and the most chunks or groups.
MOMENTS, PARTS = 512, 128


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


class FoldLaunch(Launch):
    """A launch that adds up partial results."""

    __slots__ = ()

    @property
    def tile(self) -> str:
        a = self.arguments
        return f"{a['MOMENTS']} moments" if "MOMENTS" in a else f"{a['PARTS']}x{a['COLUMNS']}"

    @property
    def bytes_per_tile(self) -> int:
        """Bytes of partial results read in one iteration; without any, those that a program reads and writes."""
        a = self.arguments
        if "MOMENTS" in a:
            return 8 * a["MOMENTS"] if a["moments_ptr"] is not None else 20 if "mean_ptr" in a else 16
        return 4 * a["PARTS"] * a["COLUMNS"]


class Dual(NamedTuple):
    """What the softmax without weights has beside its input; masks are contiguous."""

    row_mask: Tensor | None = None
    col_mask: Tensor | None = None
    temperature: float = 1.0
    log: bool = False

    def arguments(self) -> dict[str, Any]:
        masks = {"row_mask_ptr": self.row_mask, "col_mask_ptr": self.col_mask}
        numbers = {name: mask if mask is None else mask.view(torch.uint8) for name, mask in masks.items()}
        return numbers | {"factor": None if self.temperature == 1.0 else 1.0 / self.temperature, "LOG": self.log}


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


@functools.cache
def _fold_tile(count: int, size: int) -> tuple[int, int, int]:
    """(partial results, columns, warps) of a tile of ``count`` partial results of ``size`` numbers."""
    parts = min(bucket_size(count), PARTS)
    columns = min(bucket_size(size), 128, 4096 // parts)
    return parts, columns, max(parts * columns // 512, 1)


def plan_combine(partials, col_mask, col_stats) -> Launch:
    """Column statistics of whole planes from those of their chunks, ``partials`` (chunks, planes, 2, width)."""
    count, planes, _, width = partials.shape
    parts, columns, warps = _fold_tile(count, width)
    blocks = -(-width // columns)
    arguments = {
        "partials_ptr": partials, "col_mask_ptr": None if col_mask is None else col_mask.view(torch.uint8),
        "col_stats_ptr": col_stats, "planes": planes, "channels": col_stats.shape[2], "width": width, "count": count,
        "blocks": blocks, "PARTS": parts, "COLUMNS": columns,
    }  # fmt: skip
    programs = checked(planes * blocks, "x makes")
    return FoldLaunch(folds.row_col_combine_kernel, programs, arguments, compiler_options(warps, 1))


def plan_statistics_of_planes(x, row, col, row_stats, col_stats, dual=PLAIN, out=None, moments=None) -> list[Launch]:
    """Everything that ``out`` needs of planes of any size; ``out`` itself where one tile is the whole plane."""
    tile = tiling(*x.shape[2:])
    if tile.whole:
        return [plan_statistics(x, row, col, row_stats, col_stats, dual, out, moments)]
    partials = x.new_empty((tile.chunks, row_stats.shape[:3].numel(), 2, x.shape[3]), dtype=torch.float32)
    launches = [
        plan_statistics(x, row, col, row_stats, partials, dual),
        plan_combine(partials, dual.col_mask, col_stats),
    ]
    if moments is not None:
        launches.append(plan_moments(x, row, col, row_stats, col_stats, moments))
    return launches


def plan_softmax_forward(x, row, col, dual, out, row_stats, col_stats) -> list[Launch]:
    launches = plan_statistics_of_planes(x, row, col, row_stats, col_stats, dual, out)
    if not tiling(*x.shape[2:]).whole:
        launches.append(plan_output(x, row, col, out, row_stats, col_stats, dual=dual))
    return launches


def softmax_forward(x, row, col, row_mask, col_mask, temperature, log, out, row_stats, col_stats) -> None:
    if out.numel() == 0:
        return
    with torch.cuda.device_of(x):
        run(plan_softmax_forward, x, row, col, _dual(row_mask, col_mask, temperature, log), out, row_stats, col_stats)


def _dual(row_mask: Tensor | None, col_mask: Tensor | None, temperature: float, log: bool) -> Dual:
    """With masks made contiguous, which a planner must not do."""
    row_mask, col_mask = (mask if mask is None else mask.contiguous() for mask in (row_mask, col_mask))
    return Dual(row_mask, col_mask, temperature, log)


def _moments(x: Tensor, heads: int) -> Tensor:
    return x.new_empty((x.shape[0], heads, x.shape[1], tiling(*x.shape[2:]).chunks, 2), dtype=torch.float32)


def _over_batch(x: Tensor, moments: Tensor | None, eps: float) -> dict[str, Any]:
    """Arguments of both kernels that add up moments over images and positions of x."""
    batch, _, height, width = x.shape
    return {
        "moments_ptr": moments, "images": batch, "chunks": tiling(height, width).chunks,
        "count": batch * height * width, "eps": eps, "MOMENTS": MOMENTS,
    }  # fmt: skip


def _batch_launch(kernel, arguments: dict[str, Any]) -> Launch:
    """A launch of one program for each head and channel."""
    channels = arguments["scale_ptr"].shape[0]
    return FoldLaunch(kernel, checked(channels, "x makes"), arguments, compiler_options(4, 1))


def plan_batch(x, moments, mean, var, eps, mean_used, var_used, scale) -> Launch:
    """Statistics to normalise with, and ``scale``: of ``moments``, or ``mean`` and ``var`` where these are given."""
    arguments = _over_batch(x, moments, eps) | {
        "mean_ptr": mean, "var_ptr": var, "mean_used_ptr": mean_used, "var_used_ptr": var_used, "scale_ptr": scale,
        "mean_strides": strides(mean), "var_strides": strides(var), "shift": 1.0 / (x.shape[2] * x.shape[3]),
    }  # fmt: skip
    return _batch_launch(folds.row_col_batch_kernel, arguments)


def plan_attention_forward(x, row, col, mean, var, eps, out, row_stats, col_stats, mean_used, var_used) -> list[Launch]:
    moments = _moments(x, row.shape[0]) if mean is None else None
    scale = mean_used.new_empty(mean_used.shape)
    return [
        *plan_statistics_of_planes(x, row, col, row_stats, col_stats, moments=moments),
        plan_batch(x, moments, mean, var, eps, mean_used, var_used, scale),
        plan_output(x, row, col, out, row_stats, col_stats, mean_used, scale),
    ]


def attention_forward(x, row, col, mean, var, eps, out, row_stats, col_stats, mean_used, var_used) -> None:
    if out.numel() == 0:
        if mean is not None:
            mean_used.copy_(mean)
            var_used.copy_(var)
        return
    stats = row_stats, col_stats, mean_used, var_used
    with torch.cuda.device_of(x):
        run(plan_attention_forward, x, row, col, mean, var, float(eps), out, *stats)


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


def plan_grad_weight(grad_out, x, row, col, row_stats, col_stats, norm, sums, grads) -> Launch:
    """``grads``: those of row and of col, each (groups, heads, C, H, W)."""
    tile = tiling(*x.shape[2:])
    column_tiles, groups = -(-x.shape[3] // tile.columns), -(-x.shape[0] // IMAGES)
    arguments = _backward(grad_out, x, row, col, row_stats, col_stats, norm, sums) | {
        "grad_row_ptr": grads[0],
        "grad_col_ptr": grads[1],
        "images": IMAGES,
        "column_tiles": column_tiles,
    }
    programs = groups * row.shape[0] * x.shape[1] * tile.chunks * column_tiles
    return _launch(kernels.row_col_bwd_weight_kernel, programs, tile, arguments)


def plan_fold(partials, out, other_partials=None, other_out=None) -> Launch:
    """The sum over the first axis of ``partials``; of others too, of the same shape, where there are any."""
    count, size = partials.shape[0], out.numel()
    parts, columns, warps = _fold_tile(count, size)
    arguments = {
        "partials_ptr": partials, "out_ptr": out, "other_partials_ptr": other_partials, "other_out_ptr": other_out,
        "count": count, "size": size, "PARTS": parts, "COLUMNS": columns,
    }  # fmt: skip
    programs = checked(-(-size // columns), "x makes")
    return FoldLaunch(folds.row_col_fold_kernel, programs, arguments, compiler_options(warps, 1))


def _plan_gradients(
    grad_out, x, row, col, row_stats, col_stats, norm, grad_x, grad_row, grad_col, dual=PLAIN
) -> list[Launch]:
    batch, _, height, width = x.shape
    terms = (grad_out, x, row, col, row_stats, col_stats, norm)
    tile, planes = tiling(height, width), row_stats.shape[:3].numel()
    launches, sums = [], (None, None)
    if not tile.whole:
        sums = tuple(x.new_empty((planes, size), dtype=torch.float32) for size in (height, width))
        partials = sums[1]
        if tile.chunks > 1:
            partials = x.new_empty((tile.chunks, planes, width), dtype=torch.float32)
        launches.append(plan_sums(*terms, (sums[0], partials), dual))
        if tile.chunks > 1:
            launches.append(plan_fold(partials, sums[1]))
    launches.append(plan_grad_x(*terms, sums, grad_x, dual))
    if row is None:
        return launches
    groups, grads = -(-batch // IMAGES), (grad_row, grad_col)
    if groups == 1:
        return [*launches, plan_grad_weight(*terms, sums, grads)]
    partials = [x.new_empty((groups, *row.shape), dtype=torch.float32) for _ in grads]
    launches.append(plan_grad_weight(*terms, sums, partials))
    return [*launches, plan_fold(partials[0], grad_row, partials[1], grad_col)]


def _by_head(tensor: Tensor, channels: int) -> Tensor:
    """(B, heads*C, H, W) or (B, C, H, W) as (B, heads, C, H, W)."""
    if tensor.dim() == 5:
        return tensor
    return tensor.unflatten(1, (tensor.shape[1] // channels, channels))


def plan_softmax_backward(grad_out, x, row, col, dual, row_stats, col_stats, *grads) -> list[Launch]:
    grad_out = _by_head(grad_out, x.shape[1])
    return _plan_gradients(grad_out, x, row, col, row_stats, col_stats, Normalisation(), *grads, dual)


def softmax_backward(grad_out, x, row, col, row_mask, col_mask, row_stats, col_stats, temperature, log, *grads) -> None:
    dual = _dual(row_mask, col_mask, temperature, log)
    if row is None:
        grads = grads[0], None, None  # not one empty tensor twice, which no guard accepts
    with torch.cuda.device_of(x):
        run(plan_softmax_backward, grad_out, x, row, col, dual, row_stats, col_stats, *grads)


def plan_grad_batch(x, moments, var, eps, norm) -> Launch:
    """The scale of ``norm`` and its gradients of mean and variance, those of ``moments``; 0 without, in evaluation."""
    arguments = _over_batch(x, moments, eps) | {
        "var_ptr": var, "scale_ptr": norm.scale, "grad_mean_ptr": norm.grad_mean, "grad_var_ptr": norm.grad_var,
    }  # fmt: skip
    return _batch_launch(folds.row_col_grad_batch_kernel, arguments)


def plan_attention_backward(
    grad_out, x, row, col, row_stats, col_stats, mean, var, training, eps, *grads
) -> list[Launch]:
    terms = (_by_head(grad_out, x.shape[1]), x, row, col, row_stats, col_stats)
    norm = Normalisation(mean, *(mean.new_empty(mean.shape) for _ in range(3)))
    moments, launches = None, []
    if training:
        moments = _moments(x, row.shape[0])
        launches.append(plan_grad_moments(*terms, norm, moments))
    return [*launches, plan_grad_batch(x, moments, var, eps, norm), *_plan_gradients(*terms, norm, *grads)]


def attention_backward(grad_out, x, row, col, row_stats, col_stats, mean, var, training, eps, *grads) -> None:
    stats = row_stats, col_stats, mean, var
    with torch.cuda.device_of(x):
        run(plan_attention_backward, grad_out, x, row, col, *stats, training, float(eps), *grads)


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
            moments = launch.kernel is kernels.row_col_stats_kernel and launch.arguments["moments_ptr"] is not None
            yield f"{name}, moments" if moments else name, launch
        for launch in _plan_attention(*shape, training=False) if shape[3] else ():
            if "eps" in launch.arguments:  # the others are as in training
                yield f"{name}, evaluation", launch


def _empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _plan_all(
    batch: int, channels: int, grid: tuple[int, int], heads: int | None, dtype: torch.dtype, log: bool | None = None
) -> list[Launch]:
    x, lead = _empty(batch, channels, *grid, dtype=dtype), (batch, heads or 1, channels)
    row, col = (_empty(heads, channels, *grid, dtype=dtype) if heads else None for _ in range(2))
    out, stats = _empty(*lead, *grid, dtype=dtype), [_empty(*lead, 2, size) for size in grid]
    dual = PLAIN if log is None else Dual(*(_empty(batch, size, dtype=torch.bool) for size in grid), 0.1, log)
    softmax = plan_softmax_forward(x, row, col, dual, out, *stats)
    if heads:
        # Whatever else the softmax with weights launches is in element-wise attention too, and does more there.
        return [*(softmax if tiling(*grid).whole else ()), *_plan_attention(batch, channels, grid, heads, dtype)]
    return softmax + plan_softmax_backward(out, x, row, col, dual, *stats, x, None, None)


def _plan_attention(
    batch: int, channels: int, grid: tuple[int, int], heads: int, dtype: torch.dtype, training: bool = True
) -> list[Launch]:
    x, row = _empty(batch, channels, *grid, dtype=dtype), _empty(heads, channels, *grid, dtype=dtype)
    out, lead = _empty(batch, heads * channels, *grid, dtype=dtype), (batch, heads, channels)
    stats, norm = [_empty(*lead, 2, size) for size in grid], [_empty(heads * channels) for _ in range(2)]
    given = (None, None) if training else norm
    launches = plan_attention_forward(x, row, row, *given, 1e-5, out, *stats, *norm)
    return launches + plan_attention_backward(out, x, row, row, *stats, *norm, training, 1e-5, x, row, row)
