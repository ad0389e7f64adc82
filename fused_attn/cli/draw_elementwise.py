"""Pictures of what the element-wise attention layers of a network do to one image."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor, nn

from ..modules import ElementwiseAttentionBlock

#: How a panel is coloured: values of either sign around white, shares, or as the image itself.
COLORS = {"weights": "RdBu_r", "products": "RdBu_r", "softmax": "viridis", "values": "gray"}

Panels = dict[str, tuple[str, Tensor]]


def trace(network: nn.Module, image: Tensor, head: int = 0) -> tuple[list[Panels], Tensor]:
    """Run one image through a network, and keep what its element-wise attention layers see and compute.

    Args:
        network: with :class:`~fused_attn.modules.ElementwiseAttentionBlock` in it; in evaluation mode.
        image: (1, C, H, W).
        head: of the attention, counted from 0.

    Returns:
        for every layer name -> (kind of values, their (C, H, W)), in the order of computation, and the logits.  The
        fused op forms neither products nor softmaxes: they are computed here from its input and weights.

    Raises:
        ValueError: there is no such layer, or no such head.
    """
    blocks = [module for module in network.modules() if isinstance(module, ElementwiseAttentionBlock)]
    if not blocks:
        raise ValueError("there must be element-wise attention layers in it, as in attention_wise_b, found none")
    heads = min(block.attention.heads for block in blocks)
    if not 0 <= head < heads:
        raise ValueError(f"head must be from 0 to {heads - 1}, got {head}")
    seen: dict[nn.Module, tuple[Tensor, Tensor]] = {}

    def keep(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        seen[module] = (inputs[0][0].clone(), output[0].clone())

    parts = [part for block in blocks for part in (block, block.attention, block.conv, block.norm)]
    handles = [part.register_forward_hook(keep) for part in parts]
    try:
        logits = network(image)
    finally:
        for handle in handles:
            handle.remove()
    return [_panels(block, head, seen) for block in blocks], logits


def _panels(block: ElementwiseAttentionBlock, head: int, seen: Mapping[nn.Module, tuple[Tensor, Tensor]]) -> Panels:
    x, heads = seen[block.attention]
    weight_row, weight_col = (w.detach()[head] for w in (block.attention.weight_row, block.attention.weight_col))
    rows, columns = (x * weight_row).softmax(2), (x * weight_col).softmax(1)
    before_norm, after_norm = seen[block.norm]
    panels: Panels = {
        "input": ("values", x),
        "x weights": ("weights", weight_row),
        "input · x weights": ("products", x * weight_row),
        "softmax of its rows": ("softmax", rows),
        "y weights": ("weights", weight_col),
        "input · y weights": ("products", x * weight_col),
        "softmax of its columns": ("softmax", columns),
        "product of the softmaxes": ("softmax", rows * columns),
        "before convolution": ("values", heads.unflatten(0, (block.attention.heads, -1))[head]),
        "after convolution": ("values", seen[block.conv][1]),
        "after skip": ("values", before_norm),
    }
    if not isinstance(block.norm, nn.Identity):
        panels["after batch norm"] = ("values", after_norm)
    return panels | {"after ReLU": ("values", seen[block][1])}


def draw(layers: list[Panels], path: Path, title: str) -> None:
    """Write the panels of :func:`trace` as a PNG: two rows for every layer, the range of the values below each panel.

    Every panel has its own scale.  Three channels are drawn as red, green and blue; other numbers as their mean.
    """
    from matplotlib.figure import Figure

    split = 7  # the attention's weights and logits; what comes of them
    figure = Figure(figsize=(1.75 * split, 4.3 * len(layers) + 0.5), layout="constrained")
    figure.suptitle(title)
    parts = figure.subfigures(len(layers), 1, squeeze=False)[:, 0]
    for number, (part, panels) in enumerate(zip(parts, layers, strict=True), start=1):
        part.suptitle(f"layer {number}", fontsize="medium", fontweight="bold")
        grid = part.subplots(2, split)
        items = list(panels.items())
        for axes, item in zip(grid.flat, items + [None] * (grid.size - len(items)), strict=True):
            if item is None:
                axes.set_axis_off()
                continue
            name, (kind, values) = item
            low, high = float(values.min()), float(values.max())
            axes.set_title(name, fontsize="small")
            axes.set_xlabel(f"{low:.3g} … {high:.3g}", fontsize="small")
            axes.set(xticks=[], yticks=[])
            if len(values) == 3:
                scaled = (values - low) / max(high - low, 1e-12)
                axes.imshow(scaled.permute(1, 2, 0).numpy(), interpolation="nearest")
                continue
            if kind in ("weights", "products"):
                high = max(abs(low), abs(high))
                low = -high
            axes.imshow(values.mean(0).numpy(), cmap=COLORS[kind], vmin=low, vmax=high, interpolation="nearest")
    figure.savefig(path, dpi=110, format="png")
