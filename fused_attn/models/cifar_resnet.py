"""ResNet-20 to -110 for small images, and SA-ResNet: self-attentive aggregation of their layers."""

from __future__ import annotations

from collections.abc import Iterable

import torch.nn.functional as F
from torch import Tensor, nn

from ..modules import LayerAttention
from ..ops._floor import checks
from .features import choose_levels
from .model import ResidualModel, conv3x3
from .registry import register_model

CHANNELS = (16, 32, 64)
LAYERS = ("blocks", "convolutions")


class CifarBlock(nn.Module):
    """Residual block of two 3x3 convolutions with a shortcut free of parameters (option A of He et al.): where the
    shape changes, every second position, and zeros for the channels that are new."""

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = conv3x3(in_channels, channels, stride=stride)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = conv3x3(channels, channels)
        self.bn2 = nn.BatchNorm2d(channels)
        self.stride, self.new_channels = stride, channels - in_channels

    def layers(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Activations after both of the block's convolutions; the second is the block's output."""
        inner = F.relu(self.bn1(self.conv1(x)))
        shortcut = x[:, :, :: self.stride, :: self.stride]
        if self.new_channels:
            shortcut = F.pad(shortcut, (0, 0, 0, 0, 0, self.new_channels))
        return inner, F.relu(self.bn2(self.conv2(inner)) + shortcut, inplace=True)

    def forward(self, x: Tensor, every_convolution: bool = False) -> Tensor | tuple[Tensor, Tensor]:
        """The block's output; with ``every_convolution`` what :meth:`layers` gives."""
        layers = self.layers(x)
        return layers if every_convolution else layers[1]


class LayersStage(nn.Sequential):
    """The blocks of a stage; returns the outputs of its layers beside its own."""

    def forward(self, x: Tensor, every_convolution: bool, pooled: bool) -> tuple[Tensor, ...]:
        """The last output, then all layers, as maps or ``pooled``: their global averages."""
        layers = []
        for block in self:
            out = block(x, every_convolution)
            outputs = out if every_convolution else (out,)
            layers += [output.mean(dim=(2, 3)) for output in outputs] if pooled else outputs
            x = outputs[-1]
        return x, *layers  # no list in it, which backward hooks do not look into


class CifarResNet(ResidualModel):
    """ResNet of 6n + 2 layers for small images: three stages of n blocks with 16, 32 and 64 channels.

    Args:
        depth: number of weighted layers, 6n + 2.
        num_classes: outputs of the classifier.
        in_chans: channels of the input images.
        features_only: return maps instead of logits, and have no classifier.
        out_indices: which maps, from (0, 1, 2): the outputs of the stages, of strides 1, 2 and 4; None: all.

    Shapes: input (B, in_chans, H, W); output (B, num_classes), or with ``features_only`` a list of maps that
        ``feature_info`` describes.

    Raises:
        ValueError: an argument is out of range.

    Convolutions start at He's normal initialisation (fan-out).
    Source: He et al. 2016, "Deep Residual Learning for Image Recognition", section 4.2.
    """

    stage_type: type[nn.Sequential] = nn.Sequential

    def __init__(
        self,
        depth: int,
        *,
        num_classes: int = 10,
        in_chans: int = 3,
        features_only: bool = False,
        out_indices: Iterable[int] | None = None,
    ) -> None:
        super().__init__()
        if depth < 8 or (depth - 2) % 6:
            raise ValueError(f"depth of a CIFAR ResNet must be 6n+2 (20, 32, 44, 56, 110, ...), got {depth}")
        self.out_indices, self.feature_info = choose_levels([(16, 1), (32, 2), (64, 4)], out_indices)
        channels = CHANNELS[0]
        self.stem = conv3x3(in_chans, channels)
        self.bn = nn.BatchNorm2d(channels)
        self.stages = nn.ModuleList()
        for stage, stage_channels in enumerate(CHANNELS):
            blocks = []
            for block in range((depth - 2) // 6):
                blocks.append(CifarBlock(channels, stage_channels, 2 if stage > 0 and block == 0 else 1))
                channels = stage_channels
            self.stages.append(self.stage_type(*blocks))
        self.fc = None if features_only else nn.Linear(channels, num_classes)
        self.initialise()

    def forward(self, x: Tensor) -> Tensor | list[Tensor]:
        maps, x = [], F.relu(self.bn(self.stem(x)))
        for stage in self.stages:
            x = stage(x)
            maps.append(x)
        if self.fc is None:
            return [maps[index] for index in self.out_indices]
        return self.fc(x.mean(dim=(2, 3)))


class SAResNet(CifarResNet):
    """CIFAR ResNet whose classifier sees all layers, weighted per image by attention over them.

    :class:`~fused_attn.modules.LayerAttention` says what the paper leaves open.  The classifier is pooling and a linear
    layer, and pooling commutes with a weighted sum of layers, so only vectors are kept and summed, never maps (but for
    ``key_grid`` > 1, whose keys need them).  With ``features_only`` the last map is the attention's, of stride 4.

    Args:
        depth, num_classes, in_chans, features_only, out_indices: as in :class:`CifarResNet`.
        layers: what counts as a layer: ``"blocks"``, the outputs of the 3n residual blocks, or ``"convolutions"``, the
            activations after each of the 6n + 1 convolutions.
        key_dim: d_k of the paper.
        values, key_grid: as in :class:`~fused_attn.modules.LayerAttention`.
        impl: implementation of the attention.

    Source: Luo, "Self-Attentive Layer Aggregation", section 3.
    """

    stage_type = LayersStage

    def __init__(
        self,
        depth: int,
        *,
        num_classes: int = 10,
        in_chans: int = 3,
        features_only: bool = False,
        out_indices: Iterable[int] | None = None,
        layers: str = "blocks",
        key_dim: int = 32,
        values: str = "pad",
        key_grid: int | tuple[int, int] = 1,
        impl: str = "auto",
    ) -> None:
        super().__init__(
            depth, num_classes=num_classes, in_chans=in_chans, features_only=features_only, out_indices=out_indices
        )
        checks.one_of("layers", layers, LAYERS)
        self.every_convolution = layers == "convolutions"
        per_stage = (depth - 2) // 6 * (2 if self.every_convolution else 1)
        channels = [channels for channels in CHANNELS for _ in range(per_stage)]
        if self.every_convolution:
            channels.insert(0, CHANNELS[0])
        self.attention = LayerAttention(channels, key_dim=key_dim, values=values, key_grid=key_grid, impl=impl)

    def forward(self, x: Tensor) -> Tensor | list[Tensor]:
        needs_maps = self.fc is None or self.attention.key_grid != (1, 1)
        maps, layers = [], []
        x = F.relu(self.bn(self.stem(x)))
        if self.every_convolution:
            layers.append(x if needs_maps else x.mean(dim=(2, 3)))
        for stage in self.stages:
            x, *outputs = stage(x, self.every_convolution, not needs_maps)
            layers += outputs
            maps.append(x)
        if self.fc is None:
            if 2 in self.out_indices:
                maps[2] = self.attention(layers)
            return [maps[index] for index in self.out_indices]
        aggregated = self.attention(layers)
        return self.fc(aggregated.mean(dim=(2, 3)) if needs_maps else aggregated)


_DEPTHS = (20, 32, 44, 56, 110)
_PATTERN = rf"resnet({'|'.join(map(str, _DEPTHS))})"
register_model(_PATTERN, CifarResNet, names=[f"resnet{depth}" for depth in _DEPTHS])
register_model(rf"sa_{_PATTERN}", SAResNet, names=[f"sa_resnet{depth}" for depth in _DEPTHS])
