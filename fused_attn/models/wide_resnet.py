"""Wide ResNets and their attention-augmented form."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial

import torch.nn.functional as F
from torch import Tensor, nn

from ..modules import AttentionAugmentedConv2d
from .coverage import AttentionCoverage, grid, strided
from .model import ResidualModel, conv3x3
from .registry import register_model


class WideBlock(nn.Module):
    """Pre-activation residual block: BN-ReLU-conv, BN-ReLU-dropout-conv.

    A 1x1 convolution of the activated input is the shortcut where the number of channels changes.
    """

    def __init__(
        self,
        in_channels: int,
        channels: int,
        stride: int,
        dropout: float,
        first_conv: Callable[..., nn.Module],
    ) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.conv1 = first_conv(in_channels, channels, stride=stride)
        self.bn2 = nn.BatchNorm2d(channels)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = conv3x3(channels, channels)
        changes = stride != 1 or in_channels != channels
        self.shortcut = nn.Conv2d(in_channels, channels, 1, stride, bias=False) if changes else None

    def forward(self, x: Tensor) -> Tensor:
        activated = F.relu(self.bn1(x))
        residual = self.conv1(activated)
        residual = self.conv2(self.dropout(F.relu(self.bn2(residual))))
        return residual + (x if self.shortcut is None else self.shortcut(activated))


class WideResNet(ResidualModel):
    """Wide ResNet, optionally with attention-augmented convolutions.

    Three stages of (depth - 4) / 6 blocks with 16, 32 and 64 times ``width`` channels, at full, half and quarter
    resolution.  In the blocks that the coverage chooses, the first 3x3 convolution is an
    :class:`~fused_attn.modules.AttentionAugmentedConv2d`.

    Args:
        depth: number of convolutions, 6n+4.
        width: widening factor.
        num_classes: outputs of the classifier.
        in_chans: channels of the input images.
        dropout: probability of dropping an activation before the second convolution of a block.
        image_size: H = W, or (H, W), of the largest input; sizes the relative position tables.
        resize_tables: whether an input of another size, larger or smaller, takes all of the tables, interpolated
            linearly, instead of their central rows.
        attention_stages: stages with attention, from (1, 2, 3); () is the plain network.
        attention_blocks: ``"all"`` blocks of those stages, or their ``"first"`` or ``"last"`` only.
        relative, heads, key_ratio, value_ratio, min_key_depth: as in ``AttentionAugmentedConv2d``.
        attention_dropout: probability of dropping an attention weight.
        impl: implementation of the attention.

    Shapes: input (B, in_chans, H, W), output (B, num_classes).

    Raises:
        ValueError: an argument is out of range.

    Convolutions start at He's normal initialisation (fan-out); there are no biases but the classifier's.
    Sources: Zagoruyko and Komodakis 2016, "Wide Residual Networks"; Bello et al. 2019, "Attention Augmented
    Convolutional Networks", section 4.1 (all stages, all blocks).
    """

    def __init__(
        self,
        depth: int,
        width: int,
        *,
        num_classes: int = 10,
        in_chans: int = 3,
        dropout: float = 0.0,
        image_size: int | tuple[int, int] = 32,
        resize_tables: bool = False,
        attention_stages: Iterable[int] = (),
        attention_blocks: str = "all",
        relative: bool = True,
        heads: int = 8,
        key_ratio: float = 0.2,
        value_ratio: float = 0.1,
        min_key_depth: int = 20,
        attention_dropout: float = 0.0,
        impl: str = "auto",
    ) -> None:
        super().__init__()
        if depth < 10 or (depth - 4) % 6:
            raise ValueError(f"depth of a Wide ResNet must be 6n+4 (10, 16, 22, 28, ...), got {depth}")
        if width < 1:
            raise ValueError(f"width of a Wide ResNet must be at least 1, got {width}")
        if not 0.0 <= dropout < 1.0:
            raise ValueError(f"dropout must be in [0, 1), got {dropout}")
        covers = AttentionCoverage(attention_stages, attention_blocks, num_stages=3)
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

        num_blocks, channels, size = (depth - 4) // 6, 16, grid(image_size)
        self.stem = conv3x3(in_chans, channels)
        self.stages = nn.ModuleList()
        for stage in (1, 2, 3):
            stage_channels, stage_stride = 16 * width * 2 ** (stage - 1), 1 if stage == 1 else 2
            size = strided(size, stage_stride)
            blocks = []
            for block in range(num_blocks):
                first_conv = partial(augmented, size=size) if covers(stage, block, num_blocks) else conv3x3
                stride = stage_stride if block == 0 else 1
                blocks.append(WideBlock(channels, stage_channels, stride, dropout, first_conv))
                channels = stage_channels
            self.stages.append(nn.Sequential(*blocks))
        self.bn = nn.BatchNorm2d(channels)
        self.fc = nn.Linear(channels, num_classes)
        self.initialise()

    def initialise(self) -> None:
        super().initialise()
        nn.init.zeros_(self.fc.bias)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for stage in self.stages:
            x = stage(x)
        x = F.relu(self.bn(x))
        return self.fc(x.mean(dim=(2, 3)))


_SIZES = ("10_1", "10_2", "16_1", "16_2", "16_4", "16_8", "22_2", "28_2", "28_10", "40_2", "40_4")
register_model(r"wrn_(\d+)_(\d+)", WideResNet, names=[f"wrn_{size}" for size in _SIZES])
register_model(
    r"aa_wrn_(\d+)_(\d+)", WideResNet, names=[f"aa_wrn_{size}" for size in _SIZES], attention_stages=(1, 2, 3)
)
# Demartis, Vázquez and Sanz, "Simplified Replication of Attention Augmented Convolutional Networks", section 5.2: all
# that fitted in their memory.  Their AA-NRE network is this one with relative=False.
register_model(
    r"aa_wrn_(\d+)_(\d+)_replication",
    WideResNet,
    names=["aa_wrn_28_10_replication"],
    attention_stages=(3,),
    attention_blocks="first",
)
