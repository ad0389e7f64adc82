"""Attention-Wise networks, made of element-wise attention layers, and the VGG-like network they are compared with."""

from __future__ import annotations

import math

from torch import Tensor, nn

from ..modules import ElementwiseAttentionBlock
from ..ops._floor import checks
from .coverage import check_size, grid
from .model import Model
from .registry import register_model

STD = 0.02


class _PapersStart(Model):
    """A model whose weights start at a normal distribution of standard deviation 0.02, biases at 0 (section 2.3)."""

    def initialise(self, std: float = STD) -> None:
        for module in self.modules():
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                nn.init.normal_(module.weight, std=std)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)


class AttentionWise(_PapersStart):
    """Layers of element-wise attention at the images' size and with their channels, then one linear layer.

    Args:
        num_classes: outputs of the classifier.
        in_chans: channels of the input images, and of every layer.
        heads: attention heads in a layer.
        layers: number of :class:`~fused_attn.modules.ElementwiseAttentionBlock`.
        batch_norm: whether every layer has a batch normalisation between skip and ReLU.
        skip: whether every layer has a skip connection; the appendix tries it without.
        std: standard deviation of the normal distribution that convolutions and the classifier start from; the
            appendix also tries 1.
        attention_std: that of the attention's weights.
        image_size: H = W, or (H, W), of the images: every pixel has weights of its own.
        impl: implementation of the attention.

    Shapes: input (B, in_chans, H, W), output (B, num_classes): logits, where the paper has their logarithmic softmax.

    Raises:
        ValueError: an argument is out of range, or the images do not have the size ``image_size``.

    Biases start at 0, batch normalisation at 1 and 0.
    Source: Araujo Bacochina and de Souza 2023, "Element-Wise Attention Layers: an option for optimization", sec. 2.2.
    """

    def __init__(
        self,
        *,
        num_classes: int = 10,
        in_chans: int = 1,
        heads: int = 8,
        layers: int = 2,
        batch_norm: bool = False,
        skip: bool = True,
        std: float = STD,
        attention_std: float = STD,
        image_size: int | tuple[int, int] = 28,
        impl: str = "auto",
    ) -> None:
        super().__init__()
        checks.positive(heads=heads, layers=layers)
        for name, deviation in (("std", std), ("attention_std", attention_std)):
            if not 0.0 <= deviation < math.inf:
                raise ValueError(f"{name} must be at least 0 and finite, got {deviation}")
        self.size = grid(image_size)
        self.layers = nn.Sequential(
            *(
                ElementwiseAttentionBlock(
                    in_chans, self.size, heads, batch_norm=batch_norm, skip=skip, std=attention_std, impl=impl
                )
                for _ in range(layers)
            )
        )
        self.fc = nn.Linear(in_chans * self.size[0] * self.size[1], num_classes)
        self.initialise(std)

    def forward(self, x: Tensor) -> Tensor:
        x = check_size(x, self.size)
        return self.fc(self.layers(x).flatten(1))


class VGGControl(_PapersStart):
    """The paper's control: two stages of two 3x3 convolutions and a strided 2x2 one, then a linear layer.

    Args:
        num_classes: outputs of the classifier.
        in_chans: channels of the input images.
        image_size: H = W, or (H, W), of the images; at least 4.

    Shapes: input (B, in_chans, H, W), output (B, num_classes): logits, where the paper has their logarithmic softmax.

    Raises:
        ValueError: an argument is out of range, or the images do not have the size ``image_size``.

    The stages have 100 and 200 channels; a ReLU follows every convolution, and the strided ones have no bias.  Weights
    start as in :class:`AttentionWise`.
    Source: Araujo Bacochina and de Souza 2023, "Element-Wise Attention Layers: an option for optimization", sec. 2.1.
    """

    def __init__(self, *, num_classes: int = 10, in_chans: int = 1, image_size: int | tuple[int, int] = 28) -> None:
        super().__init__()
        self.size = grid(image_size)
        if min(self.size) < 4:
            raise ValueError(f"image_size must be at least 4, got {image_size}")
        stages, channels = [], in_chans
        for width in (100, 200):
            stages += [nn.Conv2d(channels, width, 3, padding=1), nn.ReLU()]
            stages += [nn.Conv2d(width, width, 3, padding=1), nn.ReLU()]
            stages += [nn.Conv2d(width, width, 2, stride=2, bias=False), nn.ReLU()]
            channels = width
        self.features = nn.Sequential(*stages)
        self.fc = nn.Linear(channels * (self.size[0] // 4) * (self.size[1] // 4), num_classes)
        self.initialise()

    def forward(self, x: Tensor) -> Tensor:
        x = check_size(x, self.size)
        return self.fc(self.features(x).flatten(1))


register_model("attention_wise", AttentionWise)
# The list of section 2.2: 8 or 16 heads, 2 or 4 layers, with and without batch normalisation.
for _name, _heads, _layers, _batch_norm in (
    ("a", 8, 2, True),
    ("b", 8, 2, False),
    ("c", 16, 2, True),
    ("d", 16, 2, False),
    ("e", 8, 4, True),
    ("f", 8, 4, False),
    ("g", 16, 4, True),
    ("h", 16, 4, False),
):
    register_model(f"attention_wise_{_name}", AttentionWise, heads=_heads, layers=_layers, batch_norm=_batch_norm)
register_model("attention_wise_one_head", AttentionWise, heads=1, layers=2, batch_norm=True)  # the appendix
register_model("attention_wise_cifar", AttentionWise, heads=8, layers=4, batch_norm=False, image_size=32)
register_model("vgg_control", VGGControl)
