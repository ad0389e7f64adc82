"""What the tests of several model families share."""

import torch
import torch.nn.functional as F

from fused_attn import create_model

DEIT = {"dim": 32, "heads": 2, "depth": 3, "patch_size": 4}
SWIN = {"dim": 16, "depths": (2, 2), "heads": (2, 4), "window": 3, "patch_size": 2}
COATNET = {"stem": (8, 16), "dims": (16, 16, 32, 32), "depths": (1, 2, 1, 2), "head_dim": 8}
#: label -> (model, options): every class of the registry, and every way through it that differs in what is called.
MODELS = {
    "wrn": ("wrn_10_1", {}),
    "aa_wrn": ("aa_wrn_10_1", {}),
    "resnet34": ("resnet34", {}),
    "aa_resnet34": ("aa_resnet34", {"stem": "cifar"}),
    "resnet20": ("resnet20", {}),
    "sa_resnet20": ("sa_resnet20", {}),
    "sa_resnet20 of convolutions": ("sa_resnet20", {"layers": "convolutions", "values": "project"}),
    "sa_resnet20 of maps": ("sa_resnet20", {"key_grid": 2}),
    "sa_resnet20 features": ("sa_resnet20", {"features_only": True}),
    "resnet50": ("resnet50", {"zero_init": False}),
    "mrla_base": ("mrla_base_resnet50", {"stem": "cifar", "zero_init": False}),
    "mrla_light": ("mrla_light_resnet50", {"stem": "cifar", "zero_init": False}),
    "deit": ("deit_tiny", DEIT),
    "mrla_base_deit": ("mrla_base_deit_tiny", DEIT),
    "mrla_light_deit": ("mrla_light_deit_tiny", DEIT),
    "se": ("se_resnet34", {"width": 8}),
    "se of bottlenecks": ("se_resnet50", {"width": 8}),
    "se_a": ("se_a_resnet34", {"width": 8}),
    "se_r": ("se_r_resnet34", {"width": 8}),
    "se_m": ("se_m_resnet34", {"width": 8, "aux_model": "resnet20"}),
    "attention_wise": ("attention_wise_a", {}),
    "vgg_control": ("vgg_control", {}),
    "googlenet": ("googlenet", {}),
    "swin": ("swin_tiny", SWIN),
    "coatnet": ("coatnet_0_rw", COATNET),
}


def build(label):
    torch.manual_seed(0)
    name, options = MODELS[label]
    return create_model(name, num_classes=5, image_size=16, **options)


def images():
    return torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def on_meta(name, **options):
    """A model without memory, to count and to name its parameters."""
    with torch.device("meta"):
        return create_model(name, **options)


def count(model):
    return sum(parameter.numel() for parameter in model.parameters())


def normed(bn, x):
    """What batch normalisation gives in evaluation."""
    return F.batch_norm(x, bn.running_mean, bn.running_var, bn.weight, bn.bias)


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


def maps_and_outputs(model, backbone, parts, images, unused):
    """The maps of ``backbone`` with the weights of ``model``, each beside the output of one of the model's ``parts``.

    The names of what a backbone does not take begin with one of ``unused``.
    """
    report = backbone.load_state_dict(model.state_dict(), strict=False)
    assert report.missing_keys == []
    assert all(key.startswith(unused) for key in report.unexpected_keys)
    outputs = []
    for part in parts:
        part.register_forward_hook(lambda part, args, out: outputs.append(out))
    with torch.no_grad():
        model(images)
        return list(zip(backbone(images), outputs, strict=True))


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
