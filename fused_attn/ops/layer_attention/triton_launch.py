"""Launches of the Triton kernels: tile shapes, arguments, and the entry points of op.py.

A launch is planned as data (:class:`Launch`) from shapes and strides alone.  The entry points run the plans;
``compile_cases`` gives the same plans over meta tensors to the compile report.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from .._floor.launch import Launch, bucket, bucket_size, checked, compiler_options
from .._floor.layout import dense_order, in_order, is_channels_last
from .._floor.replay import run
from . import triton_kernels

#: Most layers of one launch.  Pointers of 32 layers are 256 of the 4,096 bytes that a launch may have in arguments.
MAX_LAYERS = 32


class SumLaunch(Launch):
    """A launch over the tiles of all images."""

    __slots__ = ()

    @property
    def tile(self) -> str:
        a = self.arguments
        return f"{a['ROWS']}x{a['COLUMNS']}, {a['layers']} layers of {a['LAYERS']}"

    @property
    def bytes_per_tile(self) -> int:
        """What has to cross global memory for one program."""
        a = self.arguments
        if "grad_out_ptr" in a:
            moved = 1 + (3 if a["ADD"] else 2) * a["layers"]
        else:
            moved = a["layers"] + (2 if a["ADD"] else 1)
        return a["ROWS"] * a["COLUMNS"] * a["value_ptrs"][0].element_size() * moved


class HeadLaunch(Launch):
    """A launch over heads."""

    __slots__ = ()

    @property
    def tile(self) -> str:
        a = self.arguments
        return "1 head" if a.get("GIVEN") else f"1 head, {a['layers']} layers of {a['LAYERS']}"

    @property
    def bytes_per_tile(self) -> int:
        """What has to cross global memory for one iteration of the loop over the depth, or over the partial sums."""
        a = self.arguments
        if a.get("GIVEN"):
            return min(a["BLOCK_P"], a["parts"] * a["span"]) * a["all_layers"] * 4
        tensors = (2 if "grad_weights_ptr" in a else 1) * (a["layers"] + 1)
        return a["BLOCK_D"] * a["query_ptr"].element_size() * tensors


class Matrix(NamedTuple):
    """How the kernels see an image: a dense matrix with a weight per row (channels first) or per column (last)."""

    rows: int
    columns: int
    groups: int
    row_weights: bool

    @property
    def span(self) -> int:
        """Columns that share a weight where columns have weights; 1 otherwise."""
        return 1 if self.row_weights else self.columns // self.groups


def as_matrix(shape: Sequence[int], groups: int, channels_last: bool) -> Matrix:
    """The matrix of an image of values (B, C, *spatial)."""
    channels, positions = shape[1], 1
    for size in shape[2:]:
        positions *= size
    if channels_last:
        return Matrix(positions, channels, groups, False)
    return Matrix(groups, channels // groups * positions, groups, True)


@functools.cache
def tile_of(matrix: Matrix, all_layers: int) -> tuple[int, int]:
    """(rows, columns) of a tile, powers of two; the same in every launch of a call, as its partial sums are per tile.

    With many layers fewer elements, as the compilers start the loads of all of them together.
    """
    elements = 1024 if all_layers <= 8 else 512
    if not matrix.row_weights:
        # A partial sum for every column of a tile: 32 channels fill the memory transactions, and the tile is tall, so
        # that in bfloat16 writing and reading the partial sums adds a sixteenth to the traffic (16 rows: an eighth).
        columns = min(triton.next_power_of_2(matrix.columns), 32)
        return min(1024 // columns, triton.next_power_of_2(matrix.rows)), columns
    widest = min(triton.next_power_of_2(matrix.columns), elements)

    def cost(columns: int) -> int:
        # Every further tile of a row costs about as much as 16 elements of padding: a partial sum, addresses.
        return -(-matrix.columns // columns) * (columns + 16)

    # Rows of fewer than 32 elements would waste memory transactions.
    columns = min((2**i for i in range(widest.bit_length()) if 2**i >= min(32, widest)), key=cost)
    return min(elements // columns, triton.next_power_of_2(matrix.rows)), columns


def chunks(layers: int) -> list[tuple[int, int]]:
    """(first layer, number of layers) of every launch."""
    return [(first, min(MAX_LAYERS, layers - first)) for first in range(0, layers, MAX_LAYERS)]


# --- the sum over layers ----------------------------------------------------------------------------------------------


def _plan_sum(kernel, like: Tensor, matrix: Matrix, values, first, all_layers, add, arguments) -> Launch:
    """A launch over the tiles of all images."""
    rows, columns = tile_of(matrix, all_layers)
    if rows * matrix.columns >= 2**31:
        raise ValueError(f"values must have fewer than 2**31 elements in {rows} rows, got {matrix.columns} in each")
    tiles = -(-matrix.rows // rows) * -(-matrix.columns // columns)
    arguments |= {
        "value_ptrs": bucket(values),
        "value_strides": bucket([value.stride(0) for value in values]),
        "rows": matrix.rows,
        "columns": matrix.columns,
        "groups": matrix.groups,
        "per_group": matrix.span,
        "layers": len(values),
        "first": first,
        "all_layers": all_layers,
        "ROW_WEIGHTS": matrix.row_weights,
        "ADD": add,
        "LAYERS": bucket_size(len(values)),
        "ROWS": rows,
        "COLUMNS": columns,
    }
    # 16 bytes of every layer to a thread; 8 where it holds those of all layers and as many weights.
    together = kernel is triton_kernels.layer_sum_fwd_kernel and not matrix.row_weights
    warps = max(1, min(8, rows * columns * like.element_size() // (256 if together else 512)))
    programs = checked(like.shape[0] * tiles, "values make")
    return SumLaunch(kernel, programs, arguments, compiler_options(warps, 1))


def plan_sum_forward(weights: Tensor, values: Sequence[Tensor], out: Tensor, channels_last: bool) -> list[Launch]:
    """Weights (B, G, L) float32; values dense per image, in one order; ``out`` dense in it."""
    matrix = as_matrix(out.shape, weights.shape[1], channels_last)
    return [
        _plan_sum(
            triton_kernels.layer_sum_fwd_kernel,
            out,
            matrix,
            values[first : first + count],
            first,
            len(values),
            first > 0,
            {"weights_ptr": weights, "out_ptr": out},
        )
        for first, count in chunks(len(values))
    ]


def partials_shape(shape: Sequence[int], groups: int, channels_last: bool, layers: int) -> tuple[int, int, int, int]:
    """Shape of the partial sums that the backward launches leave: (B, parts, L, groups or channels)."""
    matrix = as_matrix(shape, groups, channels_last)
    rows, columns = tile_of(matrix, layers)
    if matrix.row_weights:
        return shape[0], -(-matrix.columns // columns), layers, matrix.rows
    return shape[0], -(-matrix.rows // rows), layers, matrix.columns


def plan_sum_backward(
    grad_out: Tensor,
    weights: Tensor,
    values: Sequence[Tensor],
    grad_values: Sequence[Tensor],
    partials: Tensor,
    channels_last: bool,
    add: bool,
) -> list[Launch]:
    """Writes ``partials``, of :func:`partials_shape`, and ``grad_values``, dense in the values' order."""
    matrix = as_matrix(grad_out.shape, weights.shape[1], channels_last)
    return [
        _plan_sum(
            triton_kernels.layer_sum_bwd_kernel,
            grad_out,
            matrix,
            values[first : first + count],
            first,
            len(values),
            add,
            {
                "grad_out_ptr": grad_out,
                "weights_ptr": weights,
                "grad_value_ptrs": bucket(grad_values[first : first + count]),
                "partials_ptr": partials,
                "grad_out_stride": grad_out.stride(0),
            },
        )
        for first, count in chunks(len(values))
    ]


# --- the heads --------------------------------------------------------------------------------------------------------


def _head_blocks(layers: int, depth: int) -> dict[str, int]:
    # The keys of all layers of a launch are in registers together.
    most = 128 if layers <= 8 else 32
    return {"BLOCK_L": bucket_size(layers), "BLOCK_D": min(bucket_size(depth), most)}


def _launch_heads(kernel, heads: int, arguments: dict[str, Any]) -> Launch:
    return HeadLaunch(kernel, checked(heads, "values make"), arguments, compiler_options(1, 1))


def plan_weights(query, keys, bias, scale, sigmoid, weights) -> list[Launch]:
    """Writes ``weights`` (B, G, L) of a query (B, G, d) of any strides and contiguous keys."""
    launches = []
    for first, count in chunks(len(keys)):
        arguments = {
            "query_ptr": query,
            "key_ptrs": bucket(keys[first : first + count]),
            "bias_ptr": bias,
            "weights_ptr": weights,
            "query_strides": query.stride(),
            "bias_strides": None if bias is None else bias.stride(),
            "scale": float(scale),
            "groups": query.shape[1],
            "depth": query.shape[2],
            "layers": count,
            "first": first,
            "all_layers": len(keys),
            "SIGMOID": sigmoid,
            "FIRST": first == 0,
            "LAST": first + count == len(keys),
            "LAYERS": bucket_size(count),
            **_head_blocks(len(keys), query.shape[2]),
        }
        heads = query.shape[0] * query.shape[1]
        launches.append(_launch_heads(triton_kernels.layer_weights_fwd_kernel, heads, arguments))
    return launches


def plan_heads_backward(
    partials, weights, grad_weights, span: int, attention: tuple[Any, ...] | None = None
) -> list[Launch]:
    """Writes ``grad_weights`` (B, G, L) from the partial sums.

    With ``attention``, which is (query, keys, scale, sigmoid, grad_query, grad_keys), that is the gradient of the
    scores, and those of query and keys are written too.
    """
    layers, groups = weights.shape[2], weights.shape[1]
    query, keys, scale, sigmoid, grad_query, grad_keys = attention or (None, None, 1.0, False, None, None)
    depth = 1 if query is None else query.shape[2]
    launches = []
    for first, count in chunks(layers) if attention else [(0, 1)]:
        blocks = _head_blocks(layers, depth)
        arguments = {
            "partials_ptr": partials,
            "weights_ptr": weights,
            "grad_weights_ptr": grad_weights,
            "query_ptr": query,
            "key_ptrs": bucket(keys[first : first + count]) if attention else None,
            "grad_query_ptr": grad_query,
            "grad_key_ptrs": bucket(grad_keys[first : first + count]) if attention else None,
            "query_strides": query.stride() if attention else None,
            "scale": float(scale),
            "groups": groups,
            "depth": depth,
            "parts": partials.shape[1],
            "span": span,
            "layers": count,
            "first": first,
            "all_layers": layers,
            "GIVEN": attention is None,
            "SIGMOID": sigmoid,
            "FIRST": first == 0,
            "LAYERS": bucket_size(count),
            "BLOCK_P": max(4, min(32, 512 // blocks["BLOCK_L"])),
            **blocks,
        }
        heads = weights.shape[0] * groups
        launches.append(_launch_heads(triton_kernels.layer_heads_bwd_kernel, heads, arguments))
    return launches


# --- entry points of op.py ---------------------------------------------------------------------------------------


def sum_forward(weights: Tensor, values: Sequence[Tensor], out: Tensor) -> None:
    """Forward of the sum's operators."""
    order = dense_order(values[0])
    if out.numel():
        dense = [in_order(value, order) for value in values]
        with torch.cuda.device_of(out):
            run(plan_sum_forward, weights.float().contiguous(), dense, out, is_channels_last(order))


def attention_forward(query, keys, values, bias, scale, sigmoid, out, weights) -> None:
    """Forward of the attention's operators."""
    if weights.numel():
        with torch.cuda.device_of(query):
            run(plan_weights, query, [key.contiguous() for key in keys], bias, scale, sigmoid, weights)
    sum_forward(weights, values, out)


def _sum_backward(grad_out, weights, values, grad_values, accumulate) -> tuple[Tensor, int]:
    """Partial sums for the gradients of the weights, and how many lie side by side."""
    order, groups = dense_order(values[0]), weights.shape[1]
    channels_last = is_channels_last(order)
    if grad_out.numel() == 0:
        return weights.new_empty((grad_out.shape[0], 0, len(values), groups)), 1
    partials = weights.new_empty(partials_shape(grad_out.shape, groups, channels_last, len(values)))
    dense = [in_order(value, order) for value in values]
    run(plan_sum_backward, in_order(grad_out, order), weights, dense, grad_values, partials, channels_last, accumulate)
    return partials, as_matrix(grad_out.shape, groups, channels_last).span


def sum_backward(grad_out, weights, values, grad_weights, grad_values) -> None:
    """Backward of the sum's operators."""
    weights = weights.float().contiguous()
    with torch.cuda.device_of(weights):
        partials, span = _sum_backward(grad_out, weights, values, grad_values, False)
        gradient = torch.empty_like(weights)
        if weights.numel():
            run(plan_heads_backward, partials, weights, gradient, span)
        grad_weights.copy_(gradient)


def attention_backward(
    grad_out, query, keys, values, bias, weights, scale, sigmoid, grad_query, grad_keys, grad_values, grad_bias,
    accumulate=False,
) -> None:  # fmt: skip
    """Backward of the attention's operators; with ``accumulate`` it adds to ``grad_values``."""
    grad_scores = torch.empty_like(weights)
    with torch.cuda.device_of(query):
        partials, span = _sum_backward(grad_out, weights, values, grad_values, accumulate)
        if weights.numel():
            attention = (query, [key.contiguous() for key in keys], scale, sigmoid, grad_query, grad_keys)
            run(plan_heads_backward, partials, weights, grad_scores, span, attention)
        if bias is not None:
            grad_bias.copy_(grad_scores.sum(0).t())


# --- compile report ---------------------------------------------------------------------------------------------------

#: Cases of the compile report: name -> (layers, channels, groups, grid, dtype, options).
_COMPILE_SHAPES: dict[str, tuple] = {
    "r50 stage 3": (6, 1024, 64, (14, 14), torch.bfloat16, {}),
    "r50 stage 3, added": (6, 1024, 64, (14, 14), torch.bfloat16, {"add": True}),
    "r50 stage 3, channels_last": (6, 1024, 64, (14, 14), torch.bfloat16, {"channels_last": True}),
    "r50 stage 1": (3, 256, 16, (56, 56), torch.bfloat16, {}),
    "r50 stage 4": (3, 2048, 128, (7, 7), torch.bfloat16, {}),
    "r101 stage 3": (23, 1024, 64, (14, 14), torch.bfloat16, {}),
    "r101 stage 3, added": (23, 1024, 64, (14, 14), torch.bfloat16, {"add": True}),
    "r101 stage 3, channels_last": (23, 1024, 64, (14, 14), torch.bfloat16, {"channels_last": True}),
    "40 layers": (40, 1024, 64, (14, 14), torch.float16, {}),
    "given weights, gated shortcut": (2, 256, 256, (56, 56), torch.bfloat16, {"given": True}),
    "sa-resnet, pooled": (28, 64, 1, (), torch.float32, {}),
    "r50 stage 3, float32": (6, 1024, 64, (14, 14), torch.float32, {}),
    "r101 stage 3, float32": (23, 1024, 64, (14, 14), torch.float32, {}),
    "r101 stage 3, channels_last, float32": (23, 1024, 64, (14, 14), torch.float32, {"channels_last": True}),
}

COMPILE_NOTES = """
Values of layers past the run-time number are masked off: instructions of a bucket of 8 for 6 layers count in full,
bytes for 6.  One layer of a bfloat16 tile needs a 16-byte load, a widening and a multiply-add per element, and in the
backward pass a second product, a rounding and a 16-byte store.
"""


def compile_cases(arch: str) -> Iterator[tuple[str, Launch]]:
    """(case, launch) of every shipped configuration, over meta tensors: see compile_report.py."""
    for name, (layers, channels, groups, grid, dtype, options) in _COMPILE_SHAPES.items():
        launches = _plan_all(layers, channels, groups, grid, dtype, **options)
        for launch in launches:
            first = launch.arguments["first"]
            yield f"{name}, from layer {first}" if layers > MAX_LAYERS else name, launch


def _plan_all(layers, channels, groups, grid, dtype, *, channels_last=False, add=False, given=False) -> list[Launch]:
    batch, depth = 32, max(channels // groups, 1)

    def empty(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    def feature() -> Tensor:
        return empty(batch, *grid, channels).movedim(-1, 1) if channels_last else empty(batch, channels, *grid)

    values, grads = [[feature() for _ in range(layers)] for _ in range(2)]
    weights = empty(batch, groups, layers, dtype=torch.float32)
    partials = empty(*partials_shape(values[0].shape, groups, channels_last, layers), dtype=torch.float32)
    span = as_matrix(values[0].shape, groups, channels_last).span
    backward = plan_sum_backward(values[0], weights, values, grads, partials, channels_last, add)
    if add:
        return backward
    query, keys = empty(batch, groups, depth), [empty(batch, groups, depth) for _ in range(layers)]
    attention = None if given else (query, keys, depth**-0.5, False, query, keys)
    return [
        *([] if given else plan_weights(query, keys, None, depth**-0.5, False, weights)),
        *plan_sum_forward(weights, values, values[0], channels_last),
        *backward,
        *plan_heads_backward(partials, weights, weights, span, attention),
    ]
