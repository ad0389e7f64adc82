"""Dual-softmax matching of two views of a photograph, as in LoFTR; draws the matches.

The second view of scikit-learn's sample image is shifted, turned, darker and noisy.  Where its points belong is known,
so that the matches can be judged.

Run: ``python examples/match_images.py --out matches.png``
"""

import argparse
import math
from pathlib import Path

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from sklearn.datasets import load_sample_image
from torch import Tensor

from fused_attn.modules import DualSoftmax

PATCH, STEP, TEMPERATURE = 24, 4, 0.02


def view(image: Tensor, center: tuple[float, float], size: int, degrees: float) -> tuple[Tensor, Tensor]:
    """(1, size, size), and the position in the image of each of its pixels, (size, size, 2) as x, y."""
    angle = math.radians(degrees)
    offsets = torch.arange(size) - (size - 1) / 2
    y, x = torch.meshgrid(offsets, offsets, indexing="ij")
    turned = torch.stack((math.cos(angle) * x - math.sin(angle) * y, math.sin(angle) * x + math.cos(angle) * y), -1)
    places = turned + torch.tensor(center)
    scaled = 2 * places / (torch.tensor(image.shape[:0:-1]) - 1) - 1
    return F.grid_sample(image[None], scaled[None], align_corners=True)[0], places


def describe(image: Tensor) -> tuple[Tensor, Tensor]:
    """Normalised patches on a grid, (N, PATCH**2), and their centers (N, 2) as x, y."""
    smooth = F.avg_pool2d(image[None], 5, stride=1, padding=2, count_include_pad=False)  # a patch may be pixels off
    patches = F.unfold(smooth, PATCH, stride=STEP)[0].T
    patches = patches - patches.mean(1, keepdim=True)
    count = (image.shape[-1] - PATCH) // STEP + 1
    steps = torch.arange(count) * STEP + PATCH // 2
    y, x = torch.meshgrid(steps, steps, indexing="ij")
    return F.normalize(patches, dim=1), torch.stack((x, y), -1).flatten(0, 1)


def match(features_0: Tensor, features_1: Tensor, threshold: float) -> Tensor:
    """(M, 2): pairs that are each other's best, with a probability above the threshold."""
    probability = DualSoftmax()((features_0 / TEMPERATURE @ features_1.T)[None])[0]
    best = (probability == probability.amax(0, keepdim=True)) & (probability == probability.amax(1, keepdim=True))
    return (best & (probability > threshold)).nonzero()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("matches.png"))
    out = parser.parse_args().out

    torch.manual_seed(0)
    image = torch.tensor(load_sample_image("china.jpg") / 255.0, dtype=torch.float32).mean(-1)[None]
    view_0, places_0 = view(image, (250.0, 200.0), 256, 0.0)
    view_1, places_1 = view(image, (290.0, 215.0), 256, 4.0)
    view_1 = 0.7 * view_1 + 0.02 * torch.randn_like(view_1)

    (features_0, centers_0), (features_1, centers_1) = describe(view_0), describe(view_1)
    pairs = match(features_0, features_1, threshold=0.2)
    points_0, points_1 = centers_0[pairs[:, 0]], centers_1[pairs[:, 1]]
    apart = places_0[points_0[:, 1], points_0[:, 0]] - places_1[points_1[:, 1], points_1[:, 0]]
    right = apart.norm(dim=1) <= STEP
    print(
        f"{len(pairs)} matches among {len(features_0)} and {len(features_1)} patches, {right.float().mean():.1%} right"
    )

    figure = Figure(figsize=(10, 5), layout="constrained")
    axes = figure.subplots()
    axes.imshow(torch.cat((view_0, view_1), -1)[0], cmap="gray")
    for (x0, y0), (x1, y1), good in zip(
        points_0[::10].tolist(), points_1[::10].tolist(), right[::10].tolist(), strict=True
    ):
        axes.plot((x0, x1 + view_0.shape[-1]), (y0, y1), color="lime" if good else "red", linewidth=0.6)
    axes.set_axis_off()
    axes.set_title(
        f"{len(pairs)} matches, {int(right.sum())} of them at most {STEP} pixels off; one in ten drawn, those in green"
    )
    figure.savefig(out, dpi=110)
    print(f"drawn in {out}")


if __name__ == "__main__":
    main()
