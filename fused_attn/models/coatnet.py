"""CoAtNet: two stages of convolutions, then two of attention over the whole map with free relative biases."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from ..modules import SqueezeExcite, WindowAttention2d
from .coverage import check_largest_size, grid, strided
from .drop_path import DropPath
from .features import choose_levels
from .model import Model
from .registry import register_model
from .swin import MLP

EPS = 1e-6  # of layer normalisation


def pool(x: Tensor) -> Tensor:
    """Mean of every 2x2 positions, (B, C, H, W) -> (B, C, ceil(H / 2), ceil(W / 2)); fewer at an odd edge."""
    return F.avg_pool2d(x, 2, ceil_mode=True)


class Shortcut(nn.Module):
    """Halve the map and change the channels, (B, in_chans, H, W) -> (B, out_chans, ceil(H / 2), ceil(W / 2))."""

    def __init__(self, in_chans: int, out_chans: int) -> None:
        super().__init__()
        self.expand = nn.Conv2d(in_chans, out_chans, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.expand(pool(x))


class ConvBlock(nn.Module):
    """Inverted bottleneck with squeeze-excite, each convolution behind normalisation and SiLU, beside a shortcut."""

    def __init__(self, in_chans: int, out_chans: int, stride: int, drop_path: float, impl: str) -> None:
        super().__init__()
        hidden = 4 * in_chans
        self.stride = stride
        self.shortcut = nn.Identity() if stride == 1 else Shortcut(in_chans, out_chans)
        self.pre_norm = nn.BatchNorm2d(in_chans)
        self.conv1_1x1 = nn.Conv2d(in_chans, hidden, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(hidden)
        self.conv2_kxk = nn.Conv2d(hidden, hidden, 3, padding=1, groups=hidden, bias=False)
        self.se_early = SqueezeExcite(hidden, 4, impl=impl)
        self.norm2 = nn.BatchNorm2d(hidden)
        self.conv3_1x1 = nn.Conv2d(hidden, out_chans, 1, bias=False)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        out = F.silu(self.pre_norm(x))
        if self.stride > 1:
            out = pool(out)
        out = F.silu(self.norm1(self.conv1_1x1(out)))
        out = F.silu(self.norm2(self.se_early(self.conv2_kxk(out))))
        return self.shortcut(x) + self.drop_path(self.conv3_1x1(out))


class TransformerBlock(nn.Module):
    """Attention over the whole map and a perceptron, each after LayerNorm and beside a shortcut.

    With a stride, the attention works on the halved map and its last layer changes the channels.  With
    ``resize_tables``, a map of any size is one window.
    """

    def __init__(
        self,
        in_chans: int,
        out_chans: int,
        stride: int,
        size: tuple[int, int],
        head_dim: int,
        drop_path: float,
        resize_tables: bool,
        impl: str,
    ) -> None:
        super().__init__()
        self.stride = stride
        self.shortcut = nn.Identity() if stride == 1 else Shortcut(in_chans, out_chans)
        self.norm1 = nn.LayerNorm(in_chans, eps=EPS)
        self.attn = WindowAttention2d(
            in_chans, in_chans // head_dim, size, out_dim=out_chans, resize_tables=resize_tables, impl=impl
        )
        self.norm2 = nn.LayerNorm(out_chans, eps=EPS)
        self.mlp = MLP(out_chans)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        out = self.norm1(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        if self.stride > 1:
            out = pool(out)
        out = self.attn(out, window=(out.shape[2], out.shape[3])) if self.attn.resize_tables else self.attn(out)
        x = self.shortcut(x) + self.drop_path(out)
        return x + self.drop_path(self.mlp(self.norm2(x.permute(0, 2, 3, 1))).permute(0, 3, 1, 2))


class Stem(nn.Module):
    """Two 3x3 convolutions, the first with a stride of 2."""

    def __init__(self, in_chans: int, widths: tuple[int, int]) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_chans, widths[0], 3, 2, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(widths[0])
        self.conv2 = nn.Conv2d(widths[0], widths[1], 3, 1, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv2(F.silu(self.norm1(self.conv1(x))))


class CoAtNet(Model):
    """CoAtNet, in the form of timm's ``coatnet_0_rw_224``.

    Args:
        num_classes: outputs of the classifier.
        in_chans: channels of the input images.
        stem: channels of the stem's two convolutions.
        dims: channels of the four stages.
        depths: blocks of the four stages.
        head_dim: channels to a head; divides those of the last three stages.
        image_size: H = W, or (H, W), of the largest images: the tables of the last two stages are those of
            its size over 16 and over 32.  Smaller images take the central parts of the tables.
        resize_tables: whether images of another size, larger or smaller, take all of the tables, interpolated
            bicubically to their maps.
        drop_path: probability of dropping a residual branch for a sample in training, in [0, 1), in the last block;
            it grows linearly from 0 in the first.
        features_only: return maps instead of logits, and have no classifier.
        out_indices: the maps that ``features_only`` takes: 0 is that of the stem, 1 to 4 those of the stages; None:
            all.  Stages past the last of them are left out.
        impl: implementation of the attention and of squeeze-excite.

    Shapes: input (B, in_chans, H, W), without ``resize_tables`` of at most ``image_size``; output (B, num_classes), or
        with ``features_only`` a list of maps that ``feature_info`` describes.

    Raises:
        ValueError: an argument is out of range, or the images are larger than ``image_size`` without ``resize_tables``.

    Weights start at PyTorch's defaults, tables at a truncated normal of standard deviation 0.02.  Parameters have the
    names of timm's, but for the tables, the norms of strided blocks and the classifier.
    Source: Dai et al. 2021, "CoAtNet: Marrying Convolution and Attention for All Data Sizes".
    """

    resize_tables = False

    def __init__(
        self,
        *,
        num_classes: int = 1000,
        in_chans: int = 3,
        stem: tuple[int, int] = (32, 64),
        dims: Sequence[int] = (96, 192, 384, 768),
        depths: Sequence[int] = (2, 3, 7, 2),
        head_dim: int = 32,
        image_size: int | tuple[int, int] = 224,
        resize_tables: bool = False,
        drop_path: float = 0.0,
        features_only: bool = False,
        out_indices: Iterable[int] | None = None,
        impl: str = "auto",
    ) -> None:
        super().__init__()
        dims, depths = tuple(dims), tuple(depths)
        for name, numbers in (("dims", dims), ("depths", depths)):
            if len(numbers) != 4 or min(numbers) < 1:
                raise ValueError(f"{name} must be four positive numbers, got {numbers}")
        if head_dim < 1 or any(channels % head_dim for channels in dims[1:]):
            raise ValueError(f"head_dim must be positive and divide the channels {dims[1:]}, got {head_dim}")
        self.image_size, self.resize_tables = grid(image_size), resize_tables
        levels = [(channels, 2 ** (1 + index)) for index, channels in enumerate((stem[1], *dims))]
        self.out_indices, self.feature_info = choose_levels(levels, out_indices)

        self.stem = Stem(in_chans, stem)
        size = strided(self.image_size, 2)
        total, done = max(sum(depths) - 1, 1), 0
        self.stages = nn.ModuleList()
        for stage in range(self.out_indices[-1] if features_only else 4):
            in_chans, out_chans = levels[stage][0], levels[stage + 1][0]
            size = strided(size, 2)
            blocks = []
            for block in range(depths[stage]):
                arguments = (out_chans if block else in_chans, out_chans, 1 if block else 2)
                rate = drop_path * done / total
                if stage < 2:
                    blocks.append(ConvBlock(*arguments, rate, impl))
                else:
                    blocks.append(TransformerBlock(*arguments, size, head_dim, rate, resize_tables, impl))
                done += 1
            self.stages.append(nn.Sequential(*blocks))
        self.norm = None if features_only else nn.LayerNorm(dims[-1], eps=EPS)
        self.head = None if features_only else nn.Linear(dims[-1], num_classes)

    def forward(self, x: Tensor) -> Tensor | list[Tensor]:
        if not self.resize_tables:
            check_largest_size(x, self.image_size, "with resize_tables=True the tables are interpolated")
        x = self.stem(x)
        maps = [x]
        for stage in self.stages:
            x = stage(x)
            maps.append(x)
        if self.head is None:
            return [maps[index] for index in self.out_indices]
        return self.head(self.norm(x.permute(0, 2, 3, 1)).mean((1, 2)))


register_model("coatnet_0_rw", CoAtNet)
