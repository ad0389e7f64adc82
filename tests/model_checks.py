"""What the tests of several model families share."""

import torch
import torch.nn.functional as F

from fused_attn import create_model


def on_meta(name, **options):
    """A model without memory, to count and to name its parameters."""
    with torch.device("meta"):
        return create_model(name, **options)


def count(model):
    return sum(parameter.numel() for parameter in model.parameters())


def randomise_norms(model):
    """Give BN and LayerNorm weights, biases and statistics at which no term of the network vanishes."""
    for module in model.modules():
        if isinstance(module, (torch.nn.BatchNorm2d, torch.nn.LayerNorm)) and module.weight is not None:
            torch.nn.init.uniform_(module.weight, 0.5, 1.5)
            torch.nn.init.normal_(module.bias, std=0.2)
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.normal_(module.running_mean, std=0.2)
            torch.nn.init.uniform_(module.running_var, 0.5, 1.5)
    return model


def check_trains(model, images, labels, without_gradient=()):
    """A gradient reaches every parameter but the named ones, and a step along it lowers the loss."""
    loss = F.cross_entropy(model(images), labels)
    loss.backward()
    squared_norm, without = 0.0, []
    for name, parameter in model.named_parameters():
        assert parameter.grad.isfinite().all(), name
        if not parameter.grad.abs().sum() > 0:
            without.append(name)
        squared_norm += parameter.grad.square().sum()
    assert sorted(without) == sorted(without_gradient)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter -= 0.05 * loss / squared_norm * parameter.grad  # aims at a twentieth off the loss
        assert F.cross_entropy(model(images), labels) < loss
