"""Pictures of where the attention layers of a network look from one point of an image."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor, nn

from ..maps import AttentionMap, attention_maps
from ..train.decode import Encoded, decode
from ..train.errors import TrainError

#: Channels of a network -> mode of the images that it takes.
_MODES = {1: "L", 3: "RGB"}


def read_image(file: Path, channels: int, size: Sequence[int]) -> Tensor:
    """An image file as a network takes it.

    Args:
        file: of any format that Pillow reads.
        channels: 1 or 3.
        size: (H, W); the image is resized, and what its sides are too long is cut off on both ends.

    Returns:
        (1, channels, H, W), uint8.

    Raises:
        TrainError: it cannot be read, or the network takes neither grey nor coloured images.
    """
    if channels not in _MODES:
        raise TrainError(f"file must be an image of {channels} channels, as the data set's are, got {file}")
    image = decode(Encoded(str(file), str(file))).convert(_MODES[channels])
    fitted = ImageOps.fit(image, (size[1], size[0]), Image.Resampling.BILINEAR)
    return torch.from_numpy(np.array(fitted)).view(1, *size, channels).permute(0, 3, 1, 2)


def trace(network: nn.Module, image: Tensor, point: tuple[float, float]) -> tuple[list[AttentionMap], Tensor]:
    """Run one image through a network, and keep where its layers look from one point.

    Args:
        network: in evaluation mode.
        image: (1, C, H, W).
        point: (y, x) from 0 to 1 in the image.

    Returns:
        for every layer with attention over positions the weights of the point's query, (1, heads, 1, H, W); and the
        logits.

    Raises:
        ValueError: there is no such layer.
    """
    with torch.no_grad(), attention_maps(network, points=[point]) as maps:
        logits = network(image)
    layers = [each for each in maps if each.queries is not None and each.weights.dim() == 5]
    if not layers:
        raise ValueError(
            "there must be attention over positions in it, as in aa_wrn_10_1, or element-wise attention layers, as in "
            "attention_wise_b, found none"
        )
    return layers, logits


def draw(layers: Sequence[AttentionMap], image: Tensor, path: Path, title: str, head: int | None = None) -> None:
    """Write the layers of :func:`trace` as a PNG: in each row the image with the query's position, then every head's
    weights over it, with their largest and how many times an even share it is.

    Every panel has its own scale, from 0 to its largest weight.

    Args:
        layers: one or more.
        image: (1, C, H, W), floats from 0 to 1; one channel or three.
        path: the file.
        title: above the picture.
        head: the only one to draw; None: all.

    Raises:
        ValueError: a layer has no such head.
    """
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle

    least = min(layer.weights.shape[1] for layer in layers)
    if head is not None and not 0 <= head < least:
        raise ValueError(f"head must be from 0 to {least - 1}, got {head}")
    heads = [range(layer.weights.shape[1]) if head is None else (head,) for layer in layers]
    columns = 1 + max(map(len, heads))
    pixels = image[0].permute(1, 2, 0).clamp(0.0, 1.0).float().cpu()
    grey = pixels.mean(-1).numpy()
    size = grey.shape
    extent = (0, size[1], size[0], 0)
    figure = Figure(figsize=(max(1.3 * columns, 5.0), 1.75 * len(layers) + 0.6), layout="constrained")
    figure.suptitle(title, fontsize="medium")
    parts = figure.subfigures(len(layers), 1, squeeze=False)[:, 0]
    for part, layer, shown in zip(parts, layers, heads, strict=True):
        weights = layer.weights[0, :, 0].float().cpu()
        (y, x), (height, width) = layer.queries[0].tolist(), weights.shape[1:]
        part.suptitle(f"{layer.name or 'model'}, {height}x{width}", fontsize="small", fontweight="bold")
        row = part.subplots(1, columns, squeeze=False)[0]
        for axes in row:
            axes.set(xticks=[], yticks=[])
        for axes in row[1 + len(shown) :]:
            axes.set_axis_off()
        row[0].imshow(pixels.squeeze(-1).numpy(), cmap="gray", vmin=0, vmax=1, extent=extent)
        for axes, number in zip(row[1:], shown, strict=False):
            values = weights[number]
            largest = float(values.max())
            axes.imshow(grey, cmap="gray", vmin=0, vmax=1, extent=extent)
            axes.imshow(
                values.numpy(), cmap="inferno", vmin=0, vmax=largest or 1, extent=extent, alpha=0.75,
                interpolation="nearest",
            )  # fmt: skip
            axes.set_title(f"head {number}", fontsize="x-small")
            axes.set_xlabel(f"{largest:.2g} ({largest * height * width:.3g}x)", fontsize="x-small")
        for axes in row[: 1 + len(shown)]:
            step = size[0] / height, size[1] / width
            corner = x * step[1], y * step[0]
            axes.add_patch(Rectangle(corner, step[1], step[0], fill=False, edgecolor="cyan", linewidth=1.2))
    figure.savefig(path, dpi=110, format="png")
