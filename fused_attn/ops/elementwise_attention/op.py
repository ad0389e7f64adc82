"""The operators, one pair for each public function: schemas, allocation and FLOPs.

Both are functional: ``elementwise_attention`` returns the statistics of the batch, and api.py updates the running ones.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .._floor import dispatch
from .._floor.batching import Fold, Folded
from .._floor.layout import empty_contiguous
from .._floor.operators import Operators, cpp, triton
from .._floor.sharding import Axis
from . import reference

# Statistics: per plane (batch, head, channel) and per row or column, a shift (the maximum of the logits or near it) and
# the sum of e^(logit - shift).  The pair rather than a log-sum-exp, whose rounding a whole row would share.
_STATISTICS = "Tensor row_stats, Tensor col_stats"


def _allocate_statistics(x: Tensor, heads: int) -> tuple[Tensor, Tensor]:
    batch, channels, height, width = x.shape
    return tuple(x.new_empty(batch, heads, channels, 2, size, dtype=torch.float32) for size in (height, width))


def _allocate_softmax(x: Tensor, weight_row: Tensor | None, *_) -> tuple[Tensor, Tensor, Tensor]:
    batch, channels, height, width = x.shape
    if weight_row is None:
        return empty_contiguous(x), *_allocate_statistics(x, 1)
    heads = weight_row.shape[0]
    return x.new_empty(batch, heads, channels, height, width), *_allocate_statistics(x, heads)


def _allocate_attention(x: Tensor, weight_row: Tensor, *_) -> tuple[Tensor, ...]:
    batch, channels, height, width = x.shape
    heads = weight_row.shape[0]
    out = x.new_empty(batch, heads * channels, height, width)
    mean, var = (x.new_empty(heads * channels, dtype=torch.float32) for _ in range(2))
    return out, *_allocate_statistics(x, heads), mean, var


_cpp_attention = cpp("elementwise_attention_forward")


def _attention(x, weight_row, weight_col, mean, var, eps, *outputs) -> None:
    if mean is not None:
        outputs[3].copy_(mean), outputs[4].copy_(var)
    _cpp_attention(x, weight_row, weight_col, mean is None, eps, *outputs)


def _unless_empty(kernel):
    """A kernel of the backward pass whose gradients are zeros where the inputs have no element."""

    def run(grad_out, *args) -> None:
        if grad_out.numel() == 0:
            for grad in args[-3:]:
                grad.zero_()
        else:
            kernel(grad_out, *args)

    return run


#: Additions, multiplications and exponentials of one output element, forward and backward: logits, two softmaxes and
#: their product forward (10, and 3 more to normalise), and what README.md gives backward.
SOFTMAX_FLOPS, ATTENTION_FLOPS = (10, 18), (13, 28)


# What the softmax without weights has beside its input; see the public function.
_MASKS, _OPTIONS = "Tensor? row_mask, Tensor? col_mask", "Scalar temperature, bool log"


def _per_element(factor: int, index: int = 0):
    def formula(*shapes, **_) -> int:
        x, weight_row = shapes[index : index + 2]
        return factor * math.prod(x) * (1 if weight_row is None else weight_row[0])

    return formula


_WEIGHTS, _PLANES = ("weight_row", "weight_col"), ("row_stats", "col_stats")
_STATISTICS_USED = ("mean", "var", "mean_used", "var_used")


def _folds(call: Mapping[str, Any]) -> Sequence[Fold]:
    heads = call["weight_row"].shape[0]
    channels = dict.fromkeys(("x", *_WEIGHTS, *_PLANES), Folded(-3))
    return [channels | {"out": Folded(1, outer=heads)} | dict.fromkeys(_STATISTICS_USED, Folded(0, outer=heads))]


def _recompute(x, weight_row, weight_col, mean_used, var_used, training, eps, **_) -> Tensor:
    statistics = (None, None) if training else (mean_used, var_used)
    return reference.elementwise_attention(x, weight_row, weight_col, *statistics, eps)[0]


def _softmax_axes(call) -> list[Axis]:
    of_images = dict.fromkeys(("x", "row_mask", "col_mask", "out", *_PLANES), 0)
    of_channels = {"x": 1, **dict.fromkeys(_WEIGHTS, 1), **dict.fromkeys(_PLANES, 2)}
    if call["weight_row"] is None:
        return [Axis(of_images), Axis({**of_channels, "out": 1})]
    return [
        Axis(of_images),
        Axis({**of_channels, "out": 2}),
        Axis({**dict.fromkeys(_WEIGHTS, 0), "out": 1, **dict.fromkeys(_PLANES, 1)}),
    ]


def _attention_axes(call) -> list[Axis]:
    of_heads = {**dict.fromkeys((*_WEIGHTS, *_STATISTICS_USED), 0), **dict.fromkeys(("out", *_PLANES), 1)}
    axes = [Axis(of_heads)]
    if call["weight_row"].shape[0] == 1:  # of several heads, the channels of one lie side by side
        of_channels = {**dict.fromkeys(("x", "out", *_WEIGHTS), 1), **dict.fromkeys(_STATISTICS_USED, 0)}
        axes.append(Axis({**of_channels, **dict.fromkeys(_PLANES, 2)}))
    training = call["training"] if "training" in call else call["mean"] is None
    if not training:  # the statistics of the batch are those of all its images
        axes.append(Axis(dict.fromkeys(("x", "out", *_PLANES), 0)))
    return axes


row_col_softmax = Operators(
    "row_col_softmax",
    f"(Tensor x, Tensor? weight_row, Tensor? weight_col, {_MASKS}, {_OPTIONS}) -> (Tensor out, {_STATISTICS})",
    f"(Tensor grad_out, Tensor x, Tensor? weight_row, Tensor? weight_col, {_MASKS}, {_STATISTICS}, {_OPTIONS}) "
    "-> (Tensor grad_x, Tensor grad_weight_row, Tensor grad_weight_col)",
    allocate=_allocate_softmax,
    kernels={
        "cpu": (cpp("row_col_softmax_forward"), _unless_empty(cpp("row_col_softmax_backward"))),
        "triton": (triton(__package__, "softmax_forward"), _unless_empty(triton(__package__, "softmax_backward"))),
    },
    autocast=dispatch.autocast_softmax,
    reference=reference.row_col_softmax,
    flops=_per_element(SOFTMAX_FLOPS[0]),
    flops_backward=_per_element(SOFTMAX_FLOPS[1], 1),
    apart=("row_mask", "col_mask"),
    axes=_softmax_axes,
)

elementwise_attention = Operators(
    "elementwise_attention",
    # mean and var None: normalise with the statistics of the batch.  Both come back as they were used, float32.
    "(Tensor x, Tensor weight_row, Tensor weight_col, Tensor? mean, Tensor? var, Scalar eps) "
    f"-> (Tensor out, {_STATISTICS}, Tensor mean_used, Tensor var_used)",
    f"(Tensor grad_out, Tensor x, Tensor weight_row, Tensor weight_col, {_STATISTICS}, Tensor mean_used, "
    "Tensor var_used, bool training, Scalar eps) -> (Tensor grad_x, Tensor grad_weight_row, Tensor grad_weight_col)",
    allocate=_allocate_attention,
    kernels={
        "cpu": (_attention, _unless_empty(cpp("elementwise_attention_backward"))),
        "triton": (triton(__package__, "attention_forward"), _unless_empty(triton(__package__, "attention_backward"))),
    },
    autocast=dispatch.autocast_softmax,
    reference=reference.elementwise_attention,
    flops=_per_element(ATTENTION_FLOPS[0]),
    flops_backward=_per_element(ATTENTION_FLOPS[1], 1),
    apart=("mean", "var"),
    derived={"training": lambda values, needs: values[3] is None},
    recompute=_recompute,
    folds=_folds,
    axes=_attention_axes,
)
