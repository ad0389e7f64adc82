"""Samples, benchmark shapes and peers of ``row_col_softmax`` and ``elementwise_attention``."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .._floor.declarations import OpSpec, Sample, Shape, unchanged
from . import op
from .api import elementwise_attention, row_col_softmax
from .peers import ATTENTION_PEERS, SOFTMAX_PEERS

_OWN = object()


def attention_with_own_statistics(
    x: Tensor,
    weight_row: Tensor,
    weight_col: Tensor,
    running_mean: Any = _OWN,
    running_var: Any = _OWN,
    *,
    training: bool = True,
    **options: Any,
) -> Tensor:
    """``elementwise_attention`` with running statistics made for the call: they are state, not part of the result.

    They lie near those of a uniform product, so that evaluation mode normalises to the order of 1.
    """
    own = running_mean is _OWN or running_var is _OWN
    if own and not (isinstance(x, Tensor) and x.dim() == 4 and isinstance(weight_row, Tensor)):
        running_mean = running_var = None  # a bad input: the function says so
    elif own:
        channels, values = weight_row.shape[0] * x.shape[1], max(x.shape[2] * x.shape[3], 1)
        dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
        mean = torch.linspace(0.8, 1.2, channels, dtype=dtype, device=x.device) / values
        running_mean = mean if running_mean is _OWN else running_mean
        running_var = (mean * 0.7).square() if running_var is _OWN else running_var
    return elementwise_attention(x, weight_row, weight_col, running_mean, running_var, training=training, **options)


# --- calls ------------------------------------------------------------------------------------------------------------


def _contiguous(shape, dtype, device):
    return torch.randn(shape, dtype=torch.float64).to(device, dtype)


def _channels_last(shape, dtype, device):
    batch, channels, height, width = shape
    return _contiguous((batch, height, width, channels), dtype, device).permute(0, 3, 1, 2)


def _transposed(shape, dtype, device):
    """Height and width exchanged in memory, as the similarity of (b, a) is that of (a, b)."""
    return _contiguous((*shape[:2], shape[3], shape[2]), dtype, device).transpose(2, 3)


def _spread(shape, dtype, device):
    """Every second element of every axis."""
    return _contiguous([2 * size for size in shape], dtype, device)[tuple(slice(1, None, 2) for _ in shape)]


def _one_batch(shape, dtype, device):
    """One image expanded over the batch: stride 0."""
    return _contiguous((1, *shape[1:]), dtype, device).expand(shape)


def make_inputs(
    dtype: torch.dtype,
    device: torch.device,
    *,
    batch: int,
    channels: int,
    grid: tuple[int, int],
    heads: int | None = None,
    layout: Callable[..., Tensor] = _contiguous,
    weight_layout: Callable[..., Tensor] = _contiguous,
    scale: float = 1.0,
    edit: Callable[[dict[str, Any]], None] | None = None,
    options: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Arguments of either function; ``heads`` None: no weights."""
    inputs: dict[str, Any] = {"x": layout((batch, channels, *grid), dtype, device)}
    if heads is not None:
        for name in ("weight_row", "weight_col"):
            inputs[name] = weight_layout((heads, channels, *grid), dtype, device) * scale
    if edit is not None:
        edit(inputs)
    return {**inputs, **(options or {})}


SMALL = {"batch": 2, "channels": 2, "grid": (3, 4)}


def _g(grid, batch=2, channels=1, **more):
    return {"batch": batch, "channels": channels, "grid": grid, **more}


_PLANES = {
    "small": SMALL,
    "one value to a plane": _g((1, 1), batch=3),
    "row 1x9": _g((1, 9)),
    "column 9x1": _g((9, 1)),
    "primes 13x7": _g((13, 7), channels=3),
    "width 16": _g((5, 16)),
    "width 17": _g((17, 17)),
    "width 28": _g((28, 28), batch=3),
    "width 32": _g((32, 32), channels=3),
    "row 1x300": _g((1, 300)),
    "column 300x1": _g((300, 1)),
    "two blocks": _g((130, 70), batch=2),
    "narrow, several blocks": _g((600, 16), batch=1),
    "channels_last": _g((6, 8), channels=3, layout=_channels_last),
    "transposed": _g((6, 9), layout=_transposed),
    "spread": _g((3, 5), channels=2, layout=_spread),
    "expanded batch": _g((4, 5), batch=3, layout=_one_batch),
    "no images": _g((3, 4), batch=0),
    "no channels": _g((3, 4), channels=0),
    "no rows": _g((0, 4)),
    "no columns": _g((3, 0)),
}
#: Of these, what goes each its own way without weights.
_DUAL = {name: _PLANES[name] for name in ("small", "width 17", "two blocks", "transposed", "spread", "no rows")}
_LOG = {"log": True, "temperature": 0.7}
_WEIGHTED = {
    "many images": _g((6, 5), batch=67, heads=2),
    "heads 5": _g((7, 7), heads=5, channels=2),
    "strided weights": _g((6, 9), heads=2, weight_layout=_spread),
    "transposed weights": _g((6, 9), heads=2, weight_layout=_transposed),
    "small weights": _g((9, 8), heads=3, scale=0.02),
    "large logits": _g((7, 9), heads=2, scale=8.0),
    "no heads": _g((3, 4), heads=0),
}


def _mask(inputs: dict[str, Any]) -> None:
    """A row, a column and single elements at -inf: softmax is NaN over a whole row or column, else 0, as PyTorch's."""
    x = inputs["x"]
    x[0, 0, 1] = x[0, 0, :, 2] = float("-inf")
    x[1, 0, 0, 0] = float("-inf")


def _mask_least(inputs: dict[str, Any]) -> None:
    """A row and a column of one image: the softmaxes over them are uniform."""
    x = inputs["x"]
    x[0, 0, 1] = x[0, 0, :, 2] = torch.finfo(x.dtype).min


def _far_above(inputs: dict[str, Any]) -> None:
    """A row whose logits are far above the others': no single shift keeps the exponentials of both in range."""
    inputs["x"][..., -5, :] += 60


def _far_below(inputs: dict[str, Any]) -> None:
    """A row and a column whose logits are far below the others', so that softmaxes across them ignore them."""
    inputs["x"][..., -5, :] -= 60
    inputs["x"][..., 7] -= 60


def _mask_far_in(inputs: dict[str, Any]) -> None:
    """Masked elements, and a masked row and column, beyond the first rows of a large plane."""
    x = inputs["x"]
    x[0, 0, 100] = x[0, 0, :, 30] = x[-1, 0, 120, 5] = float("-inf")


def with_masks(inputs: dict[str, Any], rows: bool = True, columns: bool = True) -> None:
    """Masks that exclude about a third of the rows and columns, and NaN and infinity in x there."""
    x = inputs["x"]
    batch, _, height, width = x.shape
    excluded = torch.zeros(batch, 1, height, width, dtype=torch.bool)
    if rows:
        row = torch.rand(batch, height) > 0.3
        excluded |= ~row[:, None, :, None]
        inputs["row_mask"] = row.to(x.device)
    if columns:
        col = torch.rand(2 * batch, width).gt(0.3)[::2]  # strided
        excluded |= ~col[:, None, None]
        inputs["col_mask"] = col.to(x.device)
    wild = torch.where(torch.rand(x.shape) < 0.5, float("nan"), float("inf")).to(x)
    x.copy_(torch.where(excluded.to(x.device), wild, x))


def padded(inputs: dict[str, Any]) -> None:
    """Images padded to one size: the second half of the first one's rows and a third of its columns are not there."""
    batch, _, height, width = inputs["x"].shape
    row, col = torch.ones(batch, height, dtype=torch.bool), torch.ones(batch, width, dtype=torch.bool)
    row[0, height // 2 :] = False
    col[0, 2 * width // 3 :] = False
    inputs["row_mask"], inputs["col_mask"] = (mask.to(inputs["x"].device) for mask in (row, col))


def like_loftr(inputs: dict[str, Any]) -> None:
    """LoFTR: products of features over their number, and images of 4:3 that were padded to squares, so that a quarter
    of the rows and of the columns is not there."""
    inputs["x"] *= 0.1
    batch, _, height, width = inputs["x"].shape
    for name, length in (("row_mask", height), ("col_mask", width)):
        mask = torch.arange(length, device=inputs["x"].device) < 3 * length // 4
        inputs[name] = mask.expand(batch, length)


def all_masked(inputs: dict[str, Any]) -> None:
    """Of one image every column, of the other the first rows."""
    padded(inputs)
    inputs["col_mask"][0] = False
    inputs["row_mask"][1:, :2] = False


def _large_image(inputs: dict[str, Any]) -> None:
    inputs["x"][1] *= 40


def _plant(name: str, value: float) -> Callable[[dict[str, Any]], None]:
    def edit(inputs: dict[str, Any]) -> None:
        inputs[name][0, 0, 0, 0] = value

    return edit


def _sample(name: str, *, small: bool = False, **settings: Any) -> Sample:
    return Sample(name, partial(make_inputs, **settings), small=small)


SOFTMAX_SAMPLES = (
    *(_sample(name, small=name == "small", **({"heads": 2} | plane)) for name, plane in _PLANES.items()),
    *(_sample(name, **settings) for name, settings in _WEIGHTED.items()),
    *(_sample(f"dual, {name}", small=name == "small", **plane) for name, plane in _PLANES.items()),
    _sample("dual, 200x1000", **_g((200, 1000), batch=1)),
    _sample("dual, masked", **_g((4, 5)), edit=_mask),
    _sample("dual, masked by the least finite number", **_g((4, 5)), edit=_mask_least),
    _sample("dual, masked far in", **_g((130, 70)), edit=_mask_far_in),
    _sample("dual, far above", **_g((300, 200), batch=1), edit=_far_above),
    _sample("dual, far below", **_g((300, 200), batch=1), edit=_far_below),
    _sample("dual, far apart in one plane of many", **_g((130, 70), batch=40), edit=_large_image),
    _sample("dual, small planes, far below", **_g((9, 11)), edit=_far_below),
    _sample("dual, large numbers", **_g((130, 70)), edit=_large_image),
    _sample("large logits of one image", **_g((7, 9), heads=2), edit=_large_image),
    *(_sample(f"dual, temperature, {name}", **plane, options={"temperature": 0.3}) for name, plane in _DUAL.items()),
    *(_sample(f"dual, log, {name}", small=name == "small", **plane, options=_LOG) for name, plane in _DUAL.items()),
    *(
        _sample(f"dual, masks, {name}", small=name == "small", **plane, edit=with_masks)
        for name, plane in _DUAL.items()
    ),
    *(_sample(f"dual, log, masks, {name}", **plane, edit=with_masks, options=_LOG) for name, plane in _DUAL.items()),
    _sample("dual, row mask", **_g((6, 7)), edit=partial(with_masks, columns=False)),
    _sample("dual, column mask", **_g((6, 7)), edit=partial(with_masks, rows=False), options={"temperature": 3}),
    _sample("dual, padded", **_g((300, 200)), edit=padded, options={"temperature": 2.0}),
    _sample("dual, log, padded", **_g((300, 200)), edit=padded, options={"log": True}),
    _sample("dual, all masked", **_g((6, 7)), edit=all_masked),
    _sample("dual, log, all masked", **_g((130, 70)), edit=all_masked, options={"log": True}),
    _sample("dual, log, masked", **_g((4, 5)), edit=_mask, options={"log": True}),
    _sample("dual, log, far below", **_g((300, 200), batch=1), edit=_far_below, options={"log": True}),
    _sample("dual, log, nan", **_g((4, 5)), edit=_plant("x", float("nan")), options={"log": True}),
    _sample("dual, nan", **_g((4, 5)), edit=_plant("x", float("nan"))),
    _sample("inf in weight_row", **_g((4, 5), heads=2), edit=_plant("weight_row", float("inf"))),
)
ATTENTION_SAMPLES = (
    *(_sample(name, small=name == "small", **({"heads": 2} | plane)) for name, plane in _PLANES.items()),
    *(_sample(name, **settings) for name, settings in _WEIGHTED.items()),
    *(
        _sample(f"evaluation, {name}", small=name == "small", **({"heads": 2} | plane), options={"training": False})
        for name, plane in {**_PLANES, **_WEIGHTED}.items()
    ),
    _sample("eps 1e-12", small=True, **SMALL, heads=2, options={"eps": 1e-12}),
    _sample("large logits of one image", **_g((7, 9), heads=2), edit=_large_image),
    _sample("nan in x", **_g((4, 5), heads=2), edit=_plant("x", float("nan"))),
)


# --- random calls for the shape fuzz ----------------------------------------------------------------------------------


def _fuzz(choices: tuple[Any, ...], modes: tuple[Mapping[str, Any], ...], draw: random.Random) -> Sample:
    layouts = (_contiguous, _channels_last, _transposed, _spread)
    settings = {
        "batch": draw.choice((1, 2, 3, 20)),
        "channels": draw.randint(1, 3),
        # Two or three values to a channel normalise to about the same whatever they are: gradients of rounding errors.
        "grid": (draw.randint(6, 40), draw.randint(1, 40)),
        "heads": draw.choice(choices),
        "layout": draw.choice(layouts),
        "weight_layout": draw.choice(layouts),
        "options": draw.choice(modes),
    }
    if settings["heads"] is None:
        settings["options"] = draw.choice(({}, {"temperature": 0.6}, {"log": True}))
        settings["edit"] = draw.choice((None, with_masks, padded))
    name = str({key: getattr(value, "__name__", value) for key, value in settings.items()})
    return Sample(name, partial(make_inputs, **settings))


# --- benchmark shapes -------------------------------------------------------------------------------------------------


def _shape(
    name: str,
    batch: int,
    channels: int,
    grid: tuple[int, int],
    heads: int | None,
    attention: bool = False,
    edit: Callable[[dict[str, Any]], None] | None = None,
    **options: Any,
) -> Shape:
    settings = {"batch": batch, "channels": channels, "grid": grid, "heads": heads, "edit": edit, "options": options}
    plane = grid[0] * grid[1]
    x, weights = batch * channels * plane, 2 * (heads or 0) * channels * plane
    planes = batch * (heads or 1) * channels
    out, statistics = planes * plane, 2 * planes * sum(grid)
    flops = op.ATTENTION_FLOPS if attention else op.SOFTMAX_FLOPS
    return Shape(
        name,
        partial(make_inputs, **settings),
        flops_forward=flops[0] * out,
        flops_backward=flops[1] * out,
        bytes_forward=4 * (x + weights + out),
        bytes_backward=4 * (2 * x + 2 * weights + out),
        # The output and the gradient of x; statistics, their partial results and those of the weights' gradients, and
        # scratch memory for the rest.
        memory_limit=4 * (out + x + 2 * weights + 3 * statistics + (out // 6 if heads else 0)) + 2**21,
    )


SOFTMAX_SHAPES = (
    _shape("4,800x4,800", 1, 1, (4800, 4800), None),
    _shape("4,800x4,800, masks, temperature 0.1", 1, 1, (4800, 4800), None, edit=like_loftr, temperature=0.1),
    _shape("2,000x2,000", 1, 1, (2000, 2000), None),
    _shape("2,048x2,048, log", 1, 1, (2048, 2048), None, log=True),
    _shape("B 512, 16 heads, 28x28", 512, 1, (28, 28), 16),
)
SOFTMAX_GROWTH = tuple(_shape(f"{n}x{n}", 1, 1, (n, n), None) for n in (60, 120, 1000, 2000))
ATTENTION_SHAPES = (
    _shape("B 512, 16 heads, 28x28", 512, 1, (28, 28), 16, attention=True),
    _shape("B 256, 8 heads, 3 channels, 32x32", 256, 3, (32, 32), 8, attention=True),
)
# No batch equals the heads: with dynamic shapes, equal sizes of one call are taken to be equal in every call.
ATTENTION_GROWTH = tuple(_shape(f"B {n}, 4 heads, 28x28", n, 1, (28, 28), 4, attention=True) for n in (6, 12, 256, 512))


# --- specs ------------------------------------------------------------------------------------------------------------


_EVERY = ("x", "weight_row", "weight_col")
_MASKS = ("row_mask", "col_mask")


def _softmax_operators(impl: str, inputs: Mapping[str, Any]) -> tuple[tuple[Any, tuple], ...]:
    options = inputs.get("temperature", 1.0), inputs.get("log", False)
    return op.row_col_softmax.calls(impl, *map(inputs.get, _EVERY + _MASKS), *options)


def _attention_operators(impl: str, inputs: Mapping[str, Any]) -> tuple[tuple[Any, tuple], ...]:
    x, weight_row, _ = tensors = [inputs[name] for name in _EVERY]
    running = [None, None]
    if not inputs.get("training", True):
        channels = weight_row.shape[0] * x.shape[1]
        running = [torch.full((channels,), value, device=x.device) for value in (0.1, 1.0)]
    return op.elementwise_attention.calls(impl, *tensors, *running, inputs.get("eps", 1e-5))


SPECS = (
    OpSpec(
        name="row_col_softmax",
        function=row_col_softmax,
        implementations=op.row_col_softmax.implementations("x"),
        autocast=unchanged,
        samples=SOFTMAX_SAMPLES,
        fuzz=partial(_fuzz, (None, 1, 2, 5), ({},)),
        operators=_softmax_operators,
        shapes=SOFTMAX_SHAPES,
        growth=SOFTMAX_GROWTH,
        peers=SOFTMAX_PEERS,
    ),
    OpSpec(
        name="elementwise_attention",
        function=attention_with_own_statistics,
        implementations=op.elementwise_attention.implementations("x"),
        autocast=unchanged,
        samples=ATTENTION_SAMPLES,
        fuzz=partial(_fuzz, (1, 2, 5), ({}, {"training": False})),
        operators=_attention_operators,
        shapes=ATTENTION_SHAPES,
        growth=ATTENTION_GROWTH,
        peers=ATTENTION_PEERS,
    ),
)
