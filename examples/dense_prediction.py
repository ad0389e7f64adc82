"""A backbone for dense prediction: a CIFAR ResNet's maps, a small pyramid on top, and a mask for every pixel.

The task: find the petals in scikit-learn's sample image of a flower.  Their colour makes the labels; the network sees
grey images, so that it must learn shape and texture.

Run: ``python examples/dense_prediction.py --out mask.png``
"""

import argparse
from pathlib import Path

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from sklearn.datasets import load_sample_image
from torch import Tensor, nn

import fused_attn

SIZE = 64


class Pyramid(nn.Module):
    """Maps of a backbone, brought to one width and added from the coarsest to the finest; one logit per pixel."""

    def __init__(self, backbone: nn.Module, width: int = 24) -> None:
        super().__init__()
        self.backbone = backbone
        self.lateral = nn.ModuleList(nn.Conv2d(channels, width, 1) for channels in backbone.feature_info.channels())
        self.head = nn.Conv2d(width, 1, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        maps = [lateral(each) for lateral, each in zip(self.lateral, self.backbone(x), strict=True)]
        total = maps.pop()
        while maps:
            finer = maps.pop()
            total = finer + F.interpolate(total, size=finer.shape[2:], mode="nearest")
        return F.interpolate(self.head(total.relu()), size=x.shape[2:], mode="bilinear")


def crops(image: Tensor, mask: Tensor, columns: range, count: int) -> tuple[Tensor, Tensor]:
    tops = torch.randint(0, image.shape[1] - SIZE + 1, (count,)).tolist()
    lefts = torch.randint(columns.start, columns.stop - SIZE + 1, (count,)).tolist()
    windows = [(slice(top, top + SIZE), slice(left, left + SIZE)) for top, left in zip(tops, lefts, strict=True)]
    return (torch.stack([each[(slice(None), *window)] for window in windows]) for each in (image, mask))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--out", type=Path, default=Path("mask.png"))
    options = parser.parse_args()
    options.out.parent.mkdir(parents=True, exist_ok=True)

    torch.manual_seed(0)
    colours = torch.tensor(load_sample_image("flower.jpg") / 255.0, dtype=torch.float32).permute(2, 0, 1)
    colours = F.interpolate(colours[None], scale_factor=0.5, mode="area")[0]
    mask = (colours[0] > colours[1]).float()[None]  # petals are redder than green
    image = colours.mean(0, keepdim=True).expand(3, -1, -1)
    image = (image - image.mean()) / image.std()
    middle = image.shape[2] // 2

    model = Pyramid(fused_attn.create_model("resnet20", features_only=True))
    print("maps:", model.backbone.feature_info.channels(), "at strides", model.backbone.feature_info.reduction())
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(options.steps):
        x, target = crops(image, mask, range(0, middle), 8)
        loss = F.binary_cross_entropy_with_logits(model(x), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    model.eval()
    with torch.no_grad():
        found = model(image[None, :, :, middle:])[0] > 0
    target = mask[:, :, middle:] > 0
    overlap = float((found & target).sum() / (found | target).sum())
    print(f"trained on the left half; on the right half, intersection over union {overlap:.1%}")

    figure = Figure(figsize=(12, 4.5), layout="constrained")
    panels = {"right half": colours[:, :, middle:].permute(1, 2, 0), "petals": target[0], "found": found[0]}
    for axes, (title, panel) in zip(figure.subplots(1, 3), panels.items(), strict=True):
        axes.imshow(panel, cmap="gray")
        axes.set_title(title)
        axes.set_axis_off()
    figure.savefig(options.out, dpi=110)
    print(f"drawn in {options.out}")


if __name__ == "__main__":
    main()
