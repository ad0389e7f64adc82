"""GoogLeNet for small images: the auxiliary model that "Introduce the Result Into Self-Attention" tries."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .model import Model
from .registry import register_model

#: Table 1 of the source: 1x1, 3x3 reduce, 3x3, 5x5 reduce, 5x5, projection after the pooling
INCEPTIONS = {
    "3a": (64, 96, 128, 16, 32, 32),
    "3b": (128, 128, 192, 32, 96, 64),
    "4a": (192, 96, 208, 16, 48, 64),
    "4b": (160, 112, 224, 24, 64, 64),
    "4c": (128, 128, 256, 24, 64, 64),
    "4d": (112, 144, 288, 32, 64, 64),
    "4e": (256, 160, 320, 32, 128, 128),
    "5a": (256, 160, 320, 32, 128, 128),
    "5b": (384, 192, 384, 48, 128, 128),
}


def _conv(in_channels: int, channels: int, kernel: int) -> list[nn.Module]:
    return [
        nn.Conv2d(in_channels, channels, kernel, padding=kernel // 2, bias=False),
        nn.BatchNorm2d(channels),
        nn.ReLU(),
    ]


class Inception(nn.Module):
    """Four branches side by side: 1x1; 1x1 and 3x3; 1x1 and 5x5; pooling and 1x1."""

    def __init__(self, in_channels: int, one: int, three_in: int, three: int, five_in: int, five: int, pool: int):
        super().__init__()
        self.branches = nn.ModuleList(
            nn.Sequential(*layers)
            for layers in (
                _conv(in_channels, one, 1),
                _conv(in_channels, three_in, 1) + _conv(three_in, three, 3),
                _conv(in_channels, five_in, 1) + _conv(five_in, five, 5),
                [nn.MaxPool2d(3, 1, 1), *_conv(in_channels, pool, 1)],
            )
        )

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([branch(x) for branch in self.branches], 1)


class GoogLeNet(Model):
    """GoogLeNet with batch normalisation and a 3x3 stem without striding or pooling, for small images.

    Args:
        num_classes: outputs of the classifier.
        in_chans: channels of the input images.
        dropout: probability before the classifier.

    Shapes: input (B, in_chans, H, W), output (B, num_classes) logits.

    Source: Szegedy et al. 2014, "Going Deeper with Convolutions", table 1, without its auxiliary classifiers; the stem
    as Ye, "Introduce the Result Into Self-Attention", section 3.1, changes that of its ResNets.
    """

    def __init__(self, *, num_classes: int = 100, in_chans: int = 3, dropout: float = 0.4) -> None:
        super().__init__()
        if not 0.0 <= dropout <= 1.0:
            raise ValueError(f"dropout must be in [0, 1], got {dropout}")
        self.stem = nn.Sequential(*_conv(in_chans, 64, 3), *_conv(64, 64, 1), *_conv(64, 192, 3))
        channels = 192
        self.stages = nn.Sequential()
        for name, widths in INCEPTIONS.items():
            if name in ("4a", "5a"):
                self.stages.add_module(f"pool{name[0]}", nn.MaxPool2d(3, 2, 1))
            self.stages.add_module(name, Inception(channels, *widths))
            channels = widths[0] + widths[2] + widths[4] + widths[5]
        self.dropout = nn.Dropout(dropout)
        self.fc = nn.Linear(channels, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.dropout(self.stages(self.stem(x)).mean(dim=(2, 3))))


register_model("googlenet", GoogLeNet)
