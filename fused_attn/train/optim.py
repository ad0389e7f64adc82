"""Optimizers and learning-rate schedules."""

from __future__ import annotations

import math

import torch
from torch import nn

from .. import modules
from .config import TrainConfig
from .errors import TrainError

#: Modules whose parameters are attention's: what they contain besides, as projections, belongs to it.
ATTENTION_MODULES = (
    modules.AttentionResidual,
    modules.ElementwiseAttention,
    modules.GridAttention2d,
    modules.LayerAttention,
    modules.MRLABase,
    modules.MRLALight,
    modules.RelPosAttention2d,
    modules.SqueezeExcite,
    modules.WindowAttention2d,
)


def build_optimizers(config: TrainConfig, network: nn.Module) -> dict[str, torch.optim.Optimizer]:
    """The optimizer of all parameters, or, with separate attention, those of the attention modules and of the rest.

    Returns:
        name -> optimizer: ``"optimizer"``, and ``"attention_optimizer"`` where there are two.

    Raises:
        TrainError: the attention is to be separate, and there is none, or nothing but attention.
    """
    parameters = list(network.parameters())
    if not config.separate_attention:
        return {"optimizer": _build(config, config.optimizer, config.lr, parameters)}
    attention = {
        id(parameter)
        for module in network.modules()
        if isinstance(module, ATTENTION_MODULES)
        for parameter in module.parameters()
    }
    if not 0 < len(attention) < len(parameters):
        option = "attention_lr" if config.attention_optimizer is None else "attention_optimizer"
        found = "no parameters in attention modules" if not attention else "no others"
        raise TrainError(
            f"{option}: model {config.model} must have parameters in attention modules and others, got {found}"
        )
    kind, rate = config.attention_optimizer or config.optimizer, config.attention_lr or config.lr
    return {
        "optimizer": _build(config, config.optimizer, config.lr, [p for p in parameters if id(p) not in attention]),
        "attention_optimizer": _build(config, kind, rate, [p for p in parameters if id(p) in attention]),
    }


def _build(config: TrainConfig, kind: str, rate: float, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    if kind != "sgd":
        adam = torch.optim.Adam if kind == "adam" else torch.optim.AdamW
        return adam(parameters, lr=rate, weight_decay=config.weight_decay)
    return torch.optim.SGD(
        parameters, lr=rate, momentum=config.momentum, nesterov=config.nesterov, weight_decay=config.weight_decay
    )


def attention_factor(config: TrainConfig) -> float:
    """Learning rate of the attention modules' optimizer over that of the other, at every step."""
    return 1.0 if config.attention_lr is None else config.attention_lr / config.lr


def learning_rate(config: TrainConfig, step: int, steps_per_epoch: int) -> float:
    """Learning rate of optimizer step ``step``, counted from 0: a function of the step alone, so it needs no state."""
    epoch = step / steps_per_epoch
    if epoch < config.warmup_epochs:
        return config.lr * (step + 1) / (config.warmup_epochs * steps_per_epoch)
    if config.schedule == "step":
        return config.lr * config.gamma ** sum(epoch >= milestone for milestone in config.milestones)
    if config.schedule == "cosine":
        progress = (epoch - config.warmup_epochs) / max(config.epochs - config.warmup_epochs, 1e-9)
        return config.lr * 0.5 * (1.0 + math.cos(math.pi * min(progress, 1.0)))
    return config.lr
