"""ResNet-34 and its attention-augmented form."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial

import torch.nn.functional as F
from torch import Tensor, nn

from ..modules import AttentionAugmentedConv2d
from ..ops._floor import checks
from .coverage import AttentionCoverage, grid, strided
from .model import ResidualModel, conv3x3
from .registry import register_model

MakeConv = Callable[..., nn.Module]

#: Stem -> kernel and stride of the first convolution, stride of the max-pooling (1: none).
STEMS = {"imagenet": (7, 2, 2), "replication": (7, 1, 2), "cifar": (3, 1, 1)}


class BasicBlock(nn.Module):
    """Residual block of two 3x3 convolutions; a 1x1 convolution and BN are the shortcut where the shape changes."""

    def __init__(self, in_channels: int, channels: int, stride: int, conv1: MakeConv, conv2: MakeConv) -> None:
        super().__init__()
        self.conv1 = conv1(in_channels, channels, stride=stride)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = conv2(channels, channels, stride=1)
        self.bn2 = nn.BatchNorm2d(channels)
        self.shortcut = None
        if stride != 1 or in_channels != channels:
            self.shortcut = nn.Sequential(
                nn.Conv2d(in_channels, channels, 1, stride, bias=False), nn.BatchNorm2d(channels)
            )

    def forward(self, x: Tensor) -> Tensor:
        residual = F.relu(self.bn1(self.conv1(x)))
        residual = self.bn2(self.conv2(residual))
        return F.relu(residual + (x if self.shortcut is None else self.shortcut(x)), inplace=True)


class ResNet34(ResidualModel):
    """ResNet-34, optionally with attention-augmented convolutions.

    Args:
        num_classes: outputs of the classifier.
        in_chans: channels of the input images.
        stem: ``"imagenet"``: 7x7 convolution of stride 2 and 3x3 max-pooling of stride 2 (He et al.);
            ``"replication"``: the same with a first stride of 1, with which 32x32 images end as the 2x2 maps of the
            replication report; ``"cifar"``: 3x3 convolution, no pooling, 32x32 images end as 4x4 maps.
        image_size: H = W, or (H, W), of the largest input; sizes the relative position tables.
        resize_tables: whether an input of another size, larger or smaller, takes all of the tables, interpolated
            linearly, instead of their central rows.
        attention_stages: stages with attention, from (1, 2, 3, 4); () is the plain network.
        attention_blocks: ``"all"`` blocks of those stages, or their ``"first"`` or ``"last"`` only.
        attention_convs: which convolutions of those blocks, from (1, 2).
        relative, heads, key_ratio, value_ratio, min_key_depth: as in ``AttentionAugmentedConv2d``.
        attention_dropout: probability of dropping an attention weight.
        impl: implementation of the attention.

    Shapes: input (B, in_chans, H, W), output (B, num_classes).

    Raises:
        ValueError: an argument is out of range.

    Convolutions start at He's normal initialisation (fan-out).
    Sources: He et al. 2016, "Deep Residual Learning for Image Recognition"; Demartis, Vázquez and Sanz, "Simplified
    Replication of Attention Augmented Convolutional Networks", section 5.2, which augments the last layer: the last
    convolution of the last block.
    """

    def __init__(
        self,
        *,
        num_classes: int = 10,
        in_chans: int = 3,
        stem: str = "replication",
        image_size: int | tuple[int, int] = 32,
        resize_tables: bool = False,
        attention_stages: Iterable[int] = (),
        attention_blocks: str = "last",
        attention_convs: Iterable[int] = (2,),
        relative: bool = True,
        heads: int = 8,
        key_ratio: float = 0.2,
        value_ratio: float = 0.1,
        min_key_depth: int = 20,
        attention_dropout: float = 0.0,
        impl: str = "auto",
    ) -> None:
        super().__init__()
        checks.one_of("stem", stem, STEMS)
        attention_convs = tuple(attention_convs)
        if not all(conv in (1, 2) for conv in attention_convs):
            raise ValueError(f"attention_convs must be numbers from 1 to 2, got {attention_convs}")
        covers = AttentionCoverage(attention_stages, attention_blocks, num_stages=4)
        augmented = partial(
            AttentionAugmentedConv2d,
            kernel_size=3,
            relative=relative,
            heads=heads,
            key_ratio=key_ratio,
            value_ratio=value_ratio,
            min_key_depth=min_key_depth,
            dropout_p=attention_dropout,
            resize_tables=resize_tables,
            impl=impl,
        )

        kernel, stride, pool_stride = STEMS[stem]
        channels = 64
        self.stem = nn.Conv2d(in_chans, channels, kernel, stride, kernel // 2, bias=False)
        self.bn = nn.BatchNorm2d(channels)
        self.pool = nn.MaxPool2d(3, pool_stride, padding=1) if pool_stride > 1 else nn.Identity()
        size = strided(strided(grid(image_size), stride), pool_stride)
        self.stages = nn.ModuleList()
        for stage, num_blocks in enumerate((3, 4, 6, 3), start=1):
            stage_channels, stage_stride = 64 * 2 ** (stage - 1), 1 if stage == 1 else 2
            size = strided(size, stage_stride)
            blocks = []
            for block in range(num_blocks):
                chosen = attention_convs if covers(stage, block, num_blocks) else ()
                conv1, conv2 = (partial(augmented, size=size) if conv in chosen else conv3x3 for conv in (1, 2))
                blocks.append(BasicBlock(channels, stage_channels, stage_stride if block == 0 else 1, conv1, conv2))
                channels = stage_channels
            self.stages.append(nn.Sequential(*blocks))
        self.fc = nn.Linear(channels, num_classes)
        self.initialise()

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(F.relu(self.bn(self.stem(x))))
        for stage in self.stages:
            x = stage(x)
        return self.fc(x.mean(dim=(2, 3)))


register_model("resnet34", ResNet34)
register_model("aa_resnet34", ResNet34, attention_stages=(4,))
