"""Squeeze-excite as timm's networks compute it, their weights taken as they are; skipped where timm is not."""

import pytest
import torch
from equality import assert_same, outputs_and_gradients, randomise, with_parameters

from fused_attn import squeeze_excite
from fused_attn.modules import SqueezeExcite


def build(timm, name):
    """(module of timm, its layers, its options as ours)."""
    from timm.layers import EffectiveSEModule, SEModule
    from timm.models._efficientnet_blocks import SqueezeExcite as EfficientNetExcite

    if name == "SEModule":
        host = SEModule(24, rd_channels=7)
        return host, (host.fc1, host.fc2), {}
    if name == "SEModule, gelu":
        host = SEModule(24, rd_ratio=0.25, act_layer=torch.nn.GELU, bias=False)
        return host, (host.fc1, host.fc2), {"hidden_activation": "gelu"}
    if name == "EffectiveSEModule":
        host = EffectiveSEModule(24)
        return host, (host.fc,), {"gate": "hardsigmoid"}
    if name == "EfficientNet":
        host = EfficientNetExcite(24, rd_ratio=0.25, act_layer="silu")
        return host, (host.conv_reduce, host.conv_expand), {"hidden_activation": "silu"}
    if name == "hardswish and hardsigmoid":
        host = EfficientNetExcite(24, act_layer="hard_swish", gate_layer="hard_sigmoid")
        return host, (host.conv_reduce, host.conv_expand), {"hidden_activation": "hardswish", "gate": "hardsigmoid"}
    raise ValueError(name)


NAMES = ("SEModule", "SEModule, gelu", "EffectiveSEModule", "EfficientNet", "hardswish and hardsigmoid")


@pytest.mark.parametrize("impl", ["reference", "auto"])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=["first", "last"])
@pytest.mark.parametrize("name", NAMES)
def test_outputs_and_gradients_of_timm(timm, name, memory_format, impl):
    host, layers, options = build(timm, name)
    randomise(host)
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(3, 24, 5, 6, generator=generator).add(0.5).contiguous(memory_format=memory_format).requires_grad_()
    weights = [tensor for layer in layers for tensor in (layer.weight, layer.bias)]
    expected = outputs_and_gradients(lambda: host(x), with_parameters(host, x=x))
    found = outputs_and_gradients(lambda: squeeze_excite(x, *weights, **options, impl=impl), with_parameters(host, x=x))
    assert_same(found, expected)


@pytest.mark.parametrize("name", NAMES)
def test_state_dicts_of_timm(timm, name):
    """The module has the same parameters but for the names, and computes the same with them."""
    host, layers, options = build(timm, name)
    randomise(host)
    sizes = {"layers": 1} if len(layers) == 1 else {"hidden": layers[0].out_channels}
    module = SqueezeExcite(24, **sizes, **options, bias=layers[0].bias is not None)
    state = {
        f"fc{place}.{kind}": tensor
        for place, layer in enumerate(layers, 1)
        for kind, tensor in layer.state_dict().items()
    }
    module.load_state_dict(state)
    x = torch.randn(2, 24, 5, 6)
    torch.testing.assert_close(module(x), host(x))
    torch.testing.assert_close(module.scales(x)[:, :, None, None] * x, host(x))
