"""Squeeze-excite as a module, with or without a result that joins the channel means."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .._floor import checks, dispatch
from .._floor.plain import is_plain, why_not_plain
from .._floor.tracing import leaf
from ..layer_attention import weighted_layer_sum
from . import op, reference
from .api import ACTIVATIONS, GATES, HIDDEN_ACTIVATIONS, squeeze_excite


class SqueezeExcite(nn.Module):
    """Scale every channel of a feature map by a gate computed from the channel means and, if there is one, a result.

    ``fc1`` and ``fc2`` are ``nn.Linear``; state dicts in which they are 1x1 convolutions (torchvision, timm) load as
    well.  With ``result_features`` the first columns of ``fc1`` belong to the result, as in the paper's eq. 4.

    The fused op reads the weights of the two layers.  Where that would not be the same as calling them (hooks, pruning,
    parametrizations, adapters, quantised or sharded layers: :mod:`~fused_attn.ops._floor.plain`) they are called,
    between a mean in PyTorch and :func:`~fused_attn.weighted_layer_sum`, whose implementation ``impl`` then names.

    Args:
        channels: C of the feature map.
        reduction: the hidden width is ``channels // reduction``, unless ``hidden`` names it.
        result_features: features n of the result; 0: plain squeeze-excite.
        hidden: the hidden width; None: by ``reduction``.
        layers: 2, or 1 as in Effective SE: ``fc1`` from C to C channels, ``fc2`` None, no hidden width.
        hidden_activation: ``"relu"``, ``"silu"``, ``"gelu"`` or ``"hardswish"``; ``"relu"`` with one layer.
        gate: ``"sigmoid"`` or ``"hardsigmoid"``.
        bias: whether the layers have a bias.
        impl: implementation of the op; not part of the state dict, so weights load across implementations.

    Shapes: input (B, C, H, W), output (B, C, H, W).

    Raises:
        ValueError: an argument is out of range, ``reduction`` leaves no hidden channel, one layer is given what only
            two have, a result is missing, not expected, or of the wrong width or batch.

    Source: Hu et al. 2017, "Squeeze-and-Excitation Networks"; Ye, "Introduce the Result Into Self-Attention"; one
    layer: Lee and Park 2019, "CenterMask: Real-Time Anchor-Free Instance Segmentation".
    """

    def __init__(
        self,
        channels: int,
        reduction: int = 16,
        result_features: int = 0,
        *,
        hidden: int | None = None,
        layers: int = 2,
        hidden_activation: str = "relu",
        gate: str = "sigmoid",
        bias: bool = True,
        impl: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        checks.positive(channels=channels, reduction=reduction)
        if layers not in (1, 2):
            raise ValueError(f"layers must be 1 or 2, got {layers!r}")
        checks.one_of("hidden_activation", hidden_activation, HIDDEN_ACTIVATIONS)
        checks.one_of("gate", gate, GATES)
        if layers == 1:
            if hidden is not None:
                raise ValueError(f"hidden must be None where layers=1: there is no hidden layer, got {hidden}")
            if hidden_activation != "relu":
                raise ValueError(
                    "hidden_activation must be left at 'relu' where layers=1: there is no hidden layer, "
                    f"got {hidden_activation!r}"
                )
        elif hidden is None:
            if reduction > channels:
                raise ValueError(f"reduction must leave a hidden channel of channels={channels}, got {reduction}")
        else:
            checks.positive(hidden=hidden)
        if result_features < 0:
            raise ValueError(f"result_features must be at least 0, got {result_features}")
        checks.one_of("impl", impl, ("auto", *op.squeeze_excite.can_run))
        self.channels, self.result_features = channels, result_features
        #: None where it says nothing: the hidden width was named, or there is one layer.
        self.reduction = reduction if layers == 2 and hidden is None else None
        self.hidden_activation, self.gate = hidden_activation, gate
        self.impl = impl
        options: dict[str, Any] = {"bias": bias, "device": device, "dtype": dtype}
        width = channels if layers == 1 else hidden or channels // reduction
        self.fc1 = nn.Linear(result_features + channels, width, **options)
        self.fc2 = nn.Linear(width, channels, **options) if layers == 2 else None

    def forward(
        self,
        x: Tensor,
        result: Tensor | None = None,
        *,
        result_share: Tensor | None = None,
        residual: Tensor | None = None,
        activation: str | None = None,
    ) -> Tensor:
        """Excite x; see :func:`~fused_attn.squeeze_excite`.

        Args:
            x: (B, C, H, W).
            result: (B, result_features); required where the module has some, unless ``result_share`` is given.
            result_share: (B, hidden), from :func:`result_shares`, instead of ``result``.
            residual: (B, C, H, W), added to the scaled map.
            activation: None or ``"relu"``, after the addition.
        """
        self._check(x, result, result_share)
        if self._plain():
            return squeeze_excite(
                x,
                *self._layers(result_share),
                result=result,
                result_share=result_share,
                residual=residual,
                activation=activation,
                hidden_activation=self.hidden_activation,
                gate=self.gate,
                impl=self.impl,
            )
        checks.one_of("activation", activation, ACTIVATIONS)
        if residual is not None:
            _check_residual(x, residual)
        scales = self.scales(x, result, result_share=result_share)
        return _scaled(x, scales, residual, activation, self.impl)

    def scales(self, x: Tensor, result: Tensor | None = None, *, result_share: Tensor | None = None) -> Tensor:
        """The gates alone, (B, C), in plain PyTorch: for plots of how much they differ between channels."""
        self._check(x, result, result_share)
        if self._plain():
            return reference.scales(
                x, *self._layers(result_share), result, result_share, self.hidden_activation, self.gate
            )
        z = x.mean((2, 3))
        if result_share is None:
            first = self.fc1(z if result is None else torch.cat((result, z), 1))
        else:
            first = F.linear(z, self.fc1.weight[:, self.result_features :], self.fc1.bias) + result_share
        if self.fc2 is not None:
            first = self.fc2(reference.HIDDEN_ACTIVATIONS[self.hidden_activation](first))
        return reference.GATES[self.gate](first)

    def _plain(self) -> bool:
        return is_plain(self.fc1, nn.Linear) and (self.fc2 is None or is_plain(self.fc2, nn.Linear))

    def _layers(self, result_share: Tensor | None) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
        weight = self.fc1.weight if result_share is None else self.fc1.weight[:, self.result_features :]
        if self.fc2 is None:
            return weight, self.fc1.bias, None, None
        return weight, self.fc1.bias, self.fc2.weight, self.fc2.bias

    def _check(self, x: Tensor, result: Tensor | None, result_share: Tensor | None) -> None:
        checks.feature_map(x, self.channels)
        expected = self.result_features
        if expected == 0 and (result is not None or result_share is not None):
            raise ValueError("result must be None: the module was built with result_features=0")
        if expected > 0 and result is None and result_share is None:
            raise ValueError(f"result must be given, (B, {expected}): the module has result_features={expected}")
        if result is not None:
            _check_result(result, expected)
        if result_share is not None and (reason := why_not_plain(self.fc1, nn.Linear)):
            raise ValueError(f"result_share must be None: fc1 {reason} and must be called: give the result itself")

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        for name in ("fc1.weight", "fc2.weight"):
            weight = state_dict.get(prefix + name)
            if weight is not None and weight.dim() == 4 and weight.shape[2:] == (1, 1):
                state_dict[prefix + name] = weight.flatten(1)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def extra_repr(self) -> str:
        sizes = f"{self.channels}, reduction={self.reduction}, result_features={self.result_features}"
        return f"{sizes}, hidden_activation={self.hidden_activation!r}, gate={self.gate!r}, impl={self.impl!r}"


@leaf
def _check_result(result: Tensor, features: int) -> None:
    if result.dim() != 2 or result.shape[1] != features:
        raise ValueError(f"result must have shape (B, {features}), got {tuple(result.shape)}")


@leaf
def _check_residual(x: Tensor, residual: Tensor) -> None:
    if residual.shape != x.shape:
        raise ValueError(f"residual must have shape (B, C, H, W)={tuple(x.shape)}, got {tuple(residual.shape)}")


@leaf
def _scaled(x: Tensor, scales: Tensor, residual: Tensor | None, activation: str | None, impl: str) -> Tensor:
    x, residual, scales = dispatch.autocast_maps((x, residual), scales)
    scales = scales.to(x.dtype)
    weights, maps = [scales], [x]
    if residual is not None:
        weights.append(torch.ones_like(scales))
        maps.append(residual)
    with dispatch.without_autocast(x):
        out = weighted_layer_sum(torch.stack(weights, dim=-1), maps, impl=impl)
    return out if activation is None else out.relu()


def result_shares(modules: Sequence[SqueezeExcite], result: Tensor) -> tuple[Tensor, ...]:
    """The result's part of the first layer of several modules, in one product.

    Args:
        modules: all with the same ``result_features``, those of one stage for example; as the product reads the weights
            of their ``fc1``, all plain: :func:`can_share_result`.
        result: (B, result_features).

    Returns:
        one ``result_share`` (B, hidden) per module.

    Raises:
        ValueError: a module expects another width, or its ``fc1`` must be called.
    """
    for index, module in enumerate(modules):
        _check_width(result, module.result_features)
        if reason := why_not_plain(module.fc1, nn.Linear):
            raise ValueError(
                f"modules[{index}].fc1 must be a plain nn.Linear, but it {reason} and must be called: "
                "give it the result itself"
            )
    columns = torch.cat([module.fc1.weight[:, : module.result_features] for module in modules])
    shares = F.linear(result, columns).split([module.fc1.out_features for module in modules], dim=1)
    return tuple(shares[index] for index in range(len(modules)))  # torch.fx knows no number of parts


@leaf
def _check_width(result: Tensor, features: int) -> None:
    if result.dim() != 2 or features != result.shape[1]:
        raise ValueError(f"result must have shape (B, {features}), as every module expects, got {tuple(result.shape)}")


def can_share_result(modules: Sequence[SqueezeExcite]) -> bool:
    """Whether :func:`result_shares` can read the first layers of all the modules."""
    return all(is_plain(module.fc1, nn.Linear) for module in modules)
