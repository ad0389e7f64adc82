"""ResNet-50 and ResNet-101, and their forms with multi-head recurrent layer attention (MRLA)."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from itertools import pairwise

import torch.nn.functional as F
from torch import Tensor, nn

from ..modules import LayerCache, MRLABase, MRLALight
from ..ops._floor import checks
from .drop_path import DropPath
from .features import choose_levels
from .model import ResidualModel, conv3x3
from .registry import register_model

BLOCKS = {50: (3, 4, 6, 3), 101: (3, 4, 23, 3)}
EXPANSION = 4
conv1x1 = partial(nn.Conv2d, kernel_size=1, bias=False)


class Bottleneck(nn.Module):
    """Residual block of 1x1, 3x3 and 1x1 convolutions, the 3x3 one strided; a 1x1 convolution and BN are the shortcut
    where the shape changes."""

    def __init__(self, in_channels: int, width: int, stride: int) -> None:
        super().__init__()
        channels = EXPANSION * width
        self.conv1 = conv1x1(in_channels, width)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = conv3x3(width, width, stride=stride)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = conv1x1(width, channels)
        self.bn3 = nn.BatchNorm2d(channels)
        self.shortcut = None
        if stride != 1 or in_channels != channels:
            self.shortcut = nn.Sequential(conv1x1(in_channels, channels, stride=stride), nn.BatchNorm2d(channels))

    def residual(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The block's output, and the shortcut that is part of it."""
        shortcut = x if self.shortcut is None else self.shortcut(x)
        x = F.relu(self.bn1(self.conv1(x)))
        x = F.relu(self.bn2(self.conv2(x)))
        return F.relu(self.bn3(self.conv3(x)) + shortcut, inplace=True), shortcut

    def forward(self, x: Tensor) -> Tensor:
        return self.residual(x)[0]


class MRLABaseBottleneck(Bottleneck):
    """Bottleneck, plus what attention over the layers of its stage so far retrieves."""

    def __init__(
        self, in_channels: int, width: int, stride: int, *, dim_per_head: int, drop_path: float, impl: str
    ) -> None:
        super().__init__(in_channels, width, stride)
        self.mrla = MRLABase(EXPANSION * width, dim_per_head=dim_per_head, impl=impl)
        self.bn_mrla = nn.BatchNorm2d(EXPANSION * width)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor, cache: LayerCache) -> Tensor:
        x, _ = self.residual(x)
        return x + self.drop_path(F.relu(self.bn_mrla(self.mrla(x, cache))))


class MRLALightBottleneck(Bottleneck):
    """Bottleneck, plus the light form of layer attention, whose memory is the shortcut."""

    def __init__(
        self, in_channels: int, width: int, stride: int, *, dim_per_head: int, drop_path: float, impl: str
    ) -> None:
        super().__init__(in_channels, width, stride)
        self.mrla = MRLALight(EXPANSION * width, dim_per_head=dim_per_head, impl=impl)
        self.bn_mrla = nn.BatchNorm2d(EXPANSION * width)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        x, shortcut = self.residual(x)
        return x + self.drop_path(self.bn_mrla(self.mrla(x, shortcut)))


class MRLABaseStage(nn.Sequential):
    """Blocks that share one cache of keys and values."""

    def forward(self, x: Tensor) -> Tensor:
        cache = LayerCache()
        for block in self:
            x = block(x, cache)
        return x


#: Kind of layer attention -> block, stage, channels per head in the authors' code.
KINDS = {
    None: (Bottleneck, nn.Sequential, None),
    "base": (MRLABaseBottleneck, MRLABaseStage, 16),
    "light": (MRLALightBottleneck, nn.Sequential, 32),
}


def make_stem(kind: str, in_chans: int) -> tuple[nn.Module, int, nn.Module]:
    """(convolutions to 64 channels, without the last BN and ReLU; their stride; the pooling).

    Raises:
        ValueError: ``kind`` is unknown.
    """
    pool = nn.MaxPool2d(3, 2, padding=1)
    if kind == "imagenet":
        return nn.Conv2d(in_chans, 64, 7, 2, padding=3, bias=False), 2, pool
    if kind == "deep":
        widths = (in_chans, 32, 32, 64)
        layers: list[nn.Module] = []
        for index, (before, after) in enumerate(pairwise(widths)):
            if index:
                layers += [nn.BatchNorm2d(before), nn.ReLU()]
            layers.append(conv3x3(before, after, stride=1 if index else 2))
        return nn.Sequential(*layers), 2, pool
    if kind == "cifar":
        return conv3x3(in_chans, 64), 1, nn.Identity()
    raise ValueError(f"stem must be one of 'imagenet', 'deep', 'cifar', got {kind!r}")


class BottleneckResNet(ResidualModel):
    """ResNet of bottleneck blocks, optionally with multi-head recurrent layer attention after every block.

    Args:
        depth: 50 or 101.
        num_classes: outputs of the classifier.
        in_chans: channels of the input images.
        layer_attention: None, ``"base"`` (over all layers of the stage so far) or ``"light"`` (over the current layer,
            plus the weighted shortcut).
        dim_per_head: channels to a head of the layer attention; 16 (base) or 32 (light) when None.
        drop_path: probability of dropping a block's layer attention for a sample in training, in [0, 1).
        stem: ``"imagenet"``: 7x7 convolution of stride 2 and max-pooling (He et al.); ``"deep"``: three 3x3
            convolutions instead, 32, 32 and 64 wide (the authors' MRLA-base); ``"cifar"``: 3x3 convolution, no pooling.
        zero_init: start the last BN of every residual branch at 0, so that blocks start as their shortcuts.
        features_only: return maps instead of logits, and have no classifier.
        out_indices: which maps, from (0, 1, 2, 3, 4): the activated stem and the four stages, of strides 2, 4, 8, 16
            and 32 (stem "cifar": 1, 1, 2, 4, 8); None: all.  Stages past the last of them are left out.
        impl: implementation of the layer attention.

    Shapes: input (B, in_chans, H, W); output (B, num_classes), or with ``features_only`` a list of maps that
        ``feature_info`` describes.

    Raises:
        ValueError: an argument is out of range.

    Convolutions start at He's normal initialisation (fan-out), the BN after the layer attention at 1.
    Sources: He et al. 2016, "Deep Residual Learning for Image Recognition", with the stride in the 3x3 convolution as
    is usual; Fang et al. 2023, "Cross-Layer Retrospective Retrieving via Layer Attention", and its code.
    """

    def __init__(
        self,
        depth: int,
        *,
        num_classes: int = 1000,
        in_chans: int = 3,
        layer_attention: str | None = None,
        dim_per_head: int | None = None,
        drop_path: float = 0.0,
        stem: str = "imagenet",
        zero_init: bool = True,
        features_only: bool = False,
        out_indices: Iterable[int] | None = None,
        impl: str = "auto",
    ) -> None:
        super().__init__()
        checks.one_of("depth", depth, BLOCKS)
        checks.one_of("layer_attention", layer_attention, KINDS)
        block_type, stage_type, default_dim = KINDS[layer_attention]
        if layer_attention is not None:
            dim_per_head = default_dim if dim_per_head is None else dim_per_head
            block_type = partial(block_type, dim_per_head=dim_per_head, drop_path=drop_path, impl=impl)
        elif drop_path or dim_per_head is not None:
            name, given = ("drop_path", drop_path) if drop_path else ("dim_per_head", dim_per_head)
            raise ValueError(f"{name} belongs to the layer attention, of which this network has none, got {given}")

        self.stem, stride, self.pool = make_stem(stem, in_chans)
        channels = 64
        self.bn = nn.BatchNorm2d(channels)
        levels = [(channels, stride)]
        stride *= 1 if isinstance(self.pool, nn.Identity) else 2
        self.stages = nn.ModuleList()
        for stage, num_blocks in enumerate(BLOCKS[depth]):
            width, stage_stride = 64 * 2**stage, 1 if stage == 0 else 2
            blocks = []
            for block in range(num_blocks):
                blocks.append(block_type(channels, width, stage_stride if block == 0 else 1))
                channels = EXPANSION * width
            self.stages.append(stage_type(*blocks))
            stride *= stage_stride
            levels.append((channels, stride))
        self.out_indices, self.feature_info = choose_levels(levels, out_indices)
        if features_only:
            self.stages = self.stages[: self.out_indices[-1]]
        self.fc = None if features_only else nn.Linear(channels, num_classes)
        self.zero_init = zero_init
        self.initialise()

    def initialise(self) -> None:
        super().initialise()
        for module in self.modules():
            if self.zero_init and isinstance(module, Bottleneck):
                nn.init.zeros_(module.bn3.weight)

    def forward(self, x: Tensor) -> Tensor | list[Tensor]:
        x = F.relu(self.bn(self.stem(x)))
        maps = [x]
        x = self.pool(x)
        for stage in self.stages:
            x = stage(x)
            maps.append(x)
        if self.fc is None:
            return [maps[index] for index in self.out_indices]
        return self.fc(x.mean(dim=(2, 3)))


_DEPTHS = (50, 101)
_PATTERN = r"resnet(50|101)"
register_model(_PATTERN, BottleneckResNet, names=[f"resnet{depth}" for depth in _DEPTHS])
register_model(
    rf"mrla_base_{_PATTERN}",
    BottleneckResNet,
    names=[f"mrla_base_resnet{depth}" for depth in _DEPTHS],
    layer_attention="base",
    stem="deep",
)
register_model(
    rf"mrla_light_{_PATTERN}",
    BottleneckResNet,
    names=[f"mrla_light_resnet{depth}" for depth in _DEPTHS],
    layer_attention="light",
)
