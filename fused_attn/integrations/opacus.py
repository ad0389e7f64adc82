"""Opacus, which hands the first input of a layer to the gradients per sample that it makes by itself."""

from __future__ import annotations

import copy
from collections import OrderedDict
from typing import Any

import torch
from torch import Tensor, nn

from ..modules import MRLALight, RelPosAttention1d


def register() -> None:
    """Gradients per sample of layers of more than one tensor, in ``opacus.GradSampleModule`` and ``PrivacyEngine``.

    They are :class:`~fused_attn.modules.MRLALight` and a padded :class:`~fused_attn.modules.RelPosAttention1d`.
    The other modules need nothing, but :class:`~fused_attn.modules.AttentionResidual`, whose input is a list, cannot
    be had: the hooks of Opacus take tensors alone.

    Raises:
        ImportError: Opacus is not installed.
    """
    from opacus.grad_sample import register_grad_sampler  # type: ignore[import-not-found]

    register_grad_sampler([MRLALight, RelPosAttention1d])(_gradients_per_sample)


def _gradients_per_sample(module: nn.Module, inputs: list[Tensor], cotangents: Tensor) -> dict[nn.Parameter, Tensor]:
    """Of the parameters that are the module's own; its layers have samplers of theirs."""
    bare = _without_hooks(module)
    own = {name: parameter for name, parameter in module.named_parameters(recurse=False) if parameter.requires_grad}

    def of_one(own: dict[str, Tensor], inputs: list[Tensor], cotangent: Tensor) -> Tensor:
        out = torch.func.functional_call(bare, own, tuple(x[None] for x in inputs))
        return (out * cotangent[None]).sum()

    found = torch.func.vmap(torch.func.grad(of_one), (None, 0, 0))(dict(own), inputs, cotangents)
    return {parameter: found[name] for name, parameter in own.items()}


def _without_hooks(module: nn.Module) -> Any:
    """The same parameters in modules that Opacus does not listen to."""
    bare = copy.copy(module)
    bare._forward_hooks, bare._backward_hooks = OrderedDict(), OrderedDict()
    bare._parameters = dict(module._parameters)
    bare._modules = {name: child and _without_hooks(child) for name, child in module._modules.items()}
    return bare
