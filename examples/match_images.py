"""Dual-softmax matching of two photographs of one scene, as in LoFTR; draws the matches.

By default the photographs are the stereo pair of a motorcycle (Scharstein et al. 2014, Middlebury) that scikit-image
brings (``pip install scikit-image``), with the true place of every pixel, so that the matches can be judged.  The
features are smoothed grey patches, where LoFTR has a network: they match what is neither much turned nor scaled.

Run: ``python examples/match_images.py --out matches.png``
Your own: ``python examples/match_images.py --images A.jpg B.jpg --out matches.png``
"""

import argparse
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

from fused_attn.modules import DualSoftmax

LONGEST, PATCH, STEP, TEMPERATURE = 384, 24, 4, 0.05


def motorcycle() -> tuple[Image.Image, Image.Image, Tensor]:
    """Both photographs, and by how many pixels each pixel of the left one lies further left in the right one."""
    try:
        from skimage.data import stereo_motorcycle
    except ImportError as error:
        raise SystemExit(f"the default photographs: pip install scikit-image ({error})") from error
    left, right, disparity = stereo_motorcycle()
    return Image.fromarray(left), Image.fromarray(right), torch.tensor(disparity)


def opened(path: Path) -> Image.Image:
    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except OSError as error:
        raise SystemExit(f"--images: {path} cannot be read ({error})") from error


def grey(image: Image.Image) -> Tensor:
    """(1, H, W), from 0 to 1; the longer side has ``LONGEST`` pixels."""
    scale = LONGEST / max(image.size)
    size = [max(round(side * scale), PATCH) for side in image.size]
    return torch.tensor(np.asarray(image.convert("L").resize(size, Image.Resampling.LANCZOS)) / 255.0)[None].float()


def describe(image: Tensor) -> tuple[Tensor, Tensor]:
    """Normalised patches on a grid, (N, PATCH**2), and their centers (N, 2) as x, y."""
    smooth = F.avg_pool2d(image[None], 5, stride=1, padding=2, count_include_pad=False)  # a patch may be pixels off
    patches = F.unfold(smooth, PATCH, stride=STEP)[0].T
    patches = patches - patches.mean(1, keepdim=True)
    rows, columns = (torch.arange((side - PATCH) // STEP + 1) * STEP + PATCH // 2 for side in image.shape[1:])
    y, x = torch.meshgrid(rows, columns, indexing="ij")
    return F.normalize(patches, dim=1), torch.stack((x, y), -1).flatten(0, 1)


def match(features_0: Tensor, features_1: Tensor, threshold: float) -> Tensor:
    """(M, 2): pairs that are each other's best, with a probability above the threshold."""
    probability = DualSoftmax()((features_0 / TEMPERATURE @ features_1.T)[None])[0]
    best = (probability == probability.amax(0, keepdim=True)) & (probability == probability.amax(1, keepdim=True))
    return (best & (probability > threshold)).nonzero()


def judge(points_0: Tensor, points_1: Tensor, disparity: Tensor) -> tuple[Tensor, Tensor]:
    """(M,) whether each match is at most ``STEP`` pixels off, and whether its true place is known."""
    scale = LONGEST / max(disparity.shape)
    x, y = (points_0 / scale).long().clamp_max(torch.tensor(disparity.shape[::-1]) - 1).unbind(1)
    expected = points_0 - torch.stack((disparity[y, x] * scale, torch.zeros(len(x))), 1)
    return (points_1 - expected).norm(dim=1) <= STEP, disparity[y, x].isfinite()


def draw(images: tuple[Tensor, Tensor], points_0: Tensor, points_1: Tensor, colours: list[str], title: str) -> Figure:
    height = max(image.shape[1] for image in images)
    side_by_side = torch.cat([F.pad(image, (0, 0, 0, height - image.shape[1])) for image in images], -1)
    figure = Figure(figsize=(10, 10 * height / side_by_side.shape[2] + 0.4), layout="constrained")
    axes = figure.subplots()
    axes.imshow(side_by_side[0], cmap="gray")
    shift = images[0].shape[2]
    for (x0, y0), (x1, y1), colour in zip(points_0.tolist(), points_1.tolist(), colours, strict=True):
        axes.plot((x0, x1 + shift), (y0, y1), color=colour, linewidth=0.6)
    axes.set_axis_off()
    axes.set_title(title)
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=Path, nargs=2, metavar=("A", "B"), help="two photographs of one scene")
    parser.add_argument("--out", type=Path, default=Path("matches.png"))
    options = parser.parse_args()
    options.out.parent.mkdir(parents=True, exist_ok=True)

    if options.images is None:
        *photographs, disparity = motorcycle()
    else:
        photographs, disparity = map(opened, options.images), None
    images = tuple(map(grey, photographs))
    (features_0, centers_0), (features_1, centers_1) = map(describe, images)
    pairs = match(features_0, features_1, threshold=0.5)
    points_0, points_1 = centers_0[pairs[:, 0]], centers_1[pairs[:, 1]]

    text, colours = f"{len(pairs)} matches among {len(features_0)} and {len(features_1)} patches", ["lime"] * len(pairs)
    if disparity is not None:
        right, known = judge(points_0, points_1, disparity)
        text += f"; {right[known].float().mean():.1%} of those whose true place is known are at most {STEP} pixels off"
        colours = ["lime" if good else "red" if told else "gray" for good, told in zip(right, known, strict=True)]
    print(text)
    drawn = slice(None, None, max(len(pairs) // 100, 1))
    figure = draw(images, points_0[drawn], points_1[drawn], colours[drawn], text)
    figure.savefig(options.out, dpi=110)
    print(f"drawn in {options.out}")


if __name__ == "__main__":
    main()
