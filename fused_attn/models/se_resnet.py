"""Squeeze-excite ResNets for small images, with auxiliary classifiers whose results may join the squeezed channels."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from ..modules import SqueezeExcite, can_share_result, result_shares
from ..ops._floor import checks
from .model import Model
from .registry import create_model, register_model

#: depth -> blocks of each stage, expansion
DEPTHS = {34: ((3, 4, 6, 3), 1), 50: ((3, 4, 6, 3), 4), 101: ((3, 4, 23, 3), 4)}
RESULT_FORMS = ("logits", "probabilities")
REACHES = ("next", "later")


def _conv_bn(in_channels: int, channels: int, kernel: int, stride: int = 1) -> list[nn.Module]:
    # With the convolution's bias, which the batch normalisation makes void: the published counts include it.
    return [nn.Conv2d(in_channels, channels, kernel, stride, kernel // 2), nn.BatchNorm2d(channels)]


class SEBlock(nn.Module):
    """Residual block with squeeze-excite: ReLU(SE(residual) + shortcut), the residual branch ending in a ReLU.

    ``expansion`` 1: two 3x3 convolutions, the first one strided; else 1x1, strided 3x3, 1x1 to ``expansion * width``.
    """

    def __init__(
        self,
        in_channels: int,
        width: int,
        stride: int,
        expansion: int,
        *,
        reduction: int,
        result_features: int,
        impl: str,
    ) -> None:
        super().__init__()
        channels = expansion * width
        if expansion == 1:
            layers = [*_conv_bn(in_channels, width, 3, stride), nn.ReLU(), *_conv_bn(width, channels, 3), nn.ReLU()]
        else:
            layers = [
                *_conv_bn(in_channels, width, 1),
                nn.ReLU(),
                *_conv_bn(width, width, 3, stride),
                nn.ReLU(),
                *_conv_bn(width, channels, 1),
                nn.ReLU(),
            ]
        self.residual = nn.Sequential(*layers)
        self.se = SqueezeExcite(channels, reduction, result_features, impl=impl)
        self.shortcut = None
        if stride != 1 or in_channels != channels:
            self.shortcut = nn.Sequential(*_conv_bn(in_channels, channels, 1, stride))

    def forward(self, x: Tensor, result_share: Tensor | None = None, result: Tensor | None = None) -> Tensor:
        """``result_share``: (B, hidden), the result's part of the first squeeze-excite layer, where there is one; or
        ``result`` itself, (B, result_features)."""
        shortcut = x if self.shortcut is None else self.shortcut(x)
        return self.se(self.residual(x), result=result, result_share=result_share, residual=shortcut, activation="relu")


class AuxiliaryClassifier(nn.Module):
    """GoogLeNet's auxiliary classifier: 4x4 average pooling, 1x1 convolution to 128, two linear layers with dropout.

    Shapes: input (B, in_channels, H, W), output (B, num_classes) logits.

    Source: Szegedy et al. 2014, section 5; batch normalisation after the convolution as in torchvision, which the
    published counts of SE-R-ResNet confirm.
    """

    def __init__(self, in_channels: int, num_classes: int, dropout: float) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, 128, 1, bias=False)
        self.bn = nn.BatchNorm2d(128)
        self.fc1 = nn.Linear(128 * 4 * 4, 1024)
        self.dropout = nn.Dropout(dropout)
        self.fc2 = nn.Linear(1024, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn(self.conv(F.adaptive_avg_pool2d(x, 4))))
        return self.fc2(self.dropout(F.relu(self.fc1(x.flatten(1)))))


class SEResNet(Model):
    """SE-ResNet; with auxiliary classifiers SE-A-ResNet; with their results fed back SE-R-ResNet.

    ``se_m_resnet*`` is SE-R with an auxiliary model in place of the classifiers.

    Args:
        depth: 34, 50 or 101.
        num_classes: outputs of the classifier and of every auxiliary one.
        in_chans: channels of the input images.
        width: channels of the stem and, before expansion, of the first stage; the others have 2, 4 and 8 times as
            many.
        reduction: channels per hidden unit of the squeeze-excite layers.
        aux_stages: stages after which an auxiliary classifier stands, from (1, 2, 3); () is the plain SE-ResNet.
        aux_model: name of a registered model that sees the image, and whose result feeds the layers of all stages
            (paper: section 5.6, ``"googlenet"``); only with ``aux_stages=()``.
        feed_result: whether squeeze-excite layers see the result: SE-R (True) or SE-A (False).
        result_reach: which layers see a result: those of the ``"next"`` stage, or of all ``"later"`` stages up to that
            of the next auxiliary classifier.  The same for the paper's two classifiers, after stages 2 and 3; the
            paper leaves it open for a single one.
        result_form: what they see, ``"logits"`` or ``"probabilities"``; the paper leaves it open.
        detach_result: whether the gradient of the main loss stops at the result; the paper leaves it open.
        aux_dropout: probability of dropout between the linear layers of an auxiliary classifier.
        impl: implementation of the squeeze-excite layers.

    Shapes: input (B, in_chans, H, W), H and W at least 8, as 3x3 maps of stride 8 end the network; output
        (B, num_classes) logits.  In training mode with auxiliary classifiers: a tuple of these and the list of
        (B, num_classes) auxiliary logits, in the order of the stages, for a loss that adds them with weights.

    Raises:
        ValueError: an argument is out of range.

    Source: Ye, "Introduce the Result Into Self-Attention", sections 2 and 3; the trunk, biased convolutions and the
    ReLU that ends the residual branch included, is the CIFAR-100 SE-ResNet whose parameters the paper's table 1 counts.
    """

    def __init__(
        self,
        depth: int,
        *,
        num_classes: int = 100,
        in_chans: int = 3,
        width: int = 64,
        reduction: int = 8,
        aux_stages: Iterable[int] = (),
        aux_model: str | None = None,
        feed_result: bool = False,
        result_reach: str = "next",
        result_form: str = "logits",
        detach_result: bool = False,
        aux_dropout: float = 0.7,
        impl: str = "auto",
    ) -> None:
        super().__init__()
        checks.one_of("depth", depth, DEPTHS)
        checks.positive(width=width)
        aux_stages = tuple(aux_stages)
        if sorted(set(aux_stages)) != sorted(aux_stages) or not set(aux_stages) <= {1, 2, 3}:
            raise ValueError(f"aux_stages must be different stages from 1 to 3, got {aux_stages}")
        checks.one_of("result_reach", result_reach, REACHES)
        checks.one_of("result_form", result_form, RESULT_FORMS)
        if not 0.0 <= aux_dropout <= 1.0:
            raise ValueError(f"aux_dropout must be in [0, 1], got {aux_dropout}")
        if aux_model is not None and aux_stages:
            raise ValueError(f"aux_stages must be () with an aux_model, got {aux_stages}")
        if feed_result and not aux_stages and aux_model is None:
            raise ValueError("aux_stages must name a stage where feed_result is True, got ()")
        self.feed_result, self.result_reach = feed_result, result_reach
        self.result_form, self.detach_result = result_form, detach_result

        blocks, expansion = DEPTHS[depth]
        self.stem = nn.Sequential(*_conv_bn(in_chans, width, 3), nn.ReLU())
        self.stages = nn.ModuleList()
        self.auxiliary = nn.ModuleDict()
        if aux_model is not None:
            self.auxiliary["model"] = create_model(aux_model, num_classes=num_classes, in_chans=in_chans, impl=impl)
            if getattr(self.auxiliary["model"], "auxiliary", None):
                raise ValueError(f"aux_model must have no auxiliary classifiers of its own, got {aux_model!r}")
            aux_stages = (0,)
        channels = width
        for stage, count in enumerate(blocks, start=1):
            fed = feed_result and self._source(stage, aux_stages) is not None
            stage_width = width * 2 ** (stage - 1)
            layers = nn.ModuleList()
            for block in range(count):
                stride = 2 if stage > 1 and block == 0 else 1
                layers.append(
                    SEBlock(
                        channels,
                        stage_width,
                        stride,
                        expansion,
                        reduction=reduction,
                        result_features=num_classes if fed else 0,
                        impl=impl,
                    )
                )
                channels = expansion * stage_width
            self.stages.append(layers)
            if stage in aux_stages:
                self.auxiliary[str(stage)] = AuxiliaryClassifier(channels, num_classes, aux_dropout)
        self.fc = nn.Linear(channels, num_classes)

    def _source(self, stage: int, aux_stages: Iterable[int]) -> int | None:
        """The stage whose auxiliary classifier feeds ``stage``."""
        # 0: the auxiliary model.
        earlier = [aux for aux in aux_stages if aux < stage and (self.result_reach == "later" or aux in (0, stage - 1))]
        return max(earlier, default=None)

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, list[Tensor]]:
        logits: dict[int, Tensor] = {}
        if "model" in self.auxiliary and (self.training or self.feed_result):
            logits[0] = self.auxiliary["model"](x)
        x = self.stem(x)
        for stage, blocks in enumerate(self.stages, start=1):
            source = self._source(stage, logits) if self.feed_result else None
            shares: Sequence[Tensor | None] = [None] * len(blocks)
            result = None if source is None else self._result(logits[source])
            layers = [block.se for block in blocks]
            if result is not None and can_share_result(layers):
                shares, result = result_shares(layers, result), None
            for block, share in zip(blocks, shares, strict=True):
                x = block(x, share, result)
            if str(stage) in self.auxiliary and (self.training or self.feed_result):
                logits[stage] = self.auxiliary[str(stage)](x)
        out = self.fc(x.mean(dim=(2, 3)))
        return (out, list(logits.values())) if self.training and logits else out

    def _result(self, logits: Tensor) -> Tensor:
        if self.detach_result:
            logits = logits.detach()
        return logits.softmax(1) if self.result_form == "probabilities" else logits


for _prefix, _defaults in (
    ("se", {}),
    ("se_a", {"aux_stages": (2, 3)}),
    ("se_r", {"aux_stages": (2, 3), "feed_result": True}),
    ("se_m", {"aux_model": "googlenet", "feed_result": True}),
):
    register_model(
        rf"{_prefix}_resnet({'|'.join(map(str, DEPTHS))})",
        SEResNet,
        names=[f"{_prefix}_resnet{depth}" for depth in DEPTHS],
        **_defaults,
    )
