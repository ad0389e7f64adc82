"""That a converted module of a host computes what it computed before."""

import importlib
import inspect

import torch
from equality import assert_same, outputs_and_gradients, with_parameters

from fused_attn import integrations
from fused_attn.integrations.convert import OPS
from fused_attn.integrations.host import method_of, own_methods

#: What adds the same to all logits of a query: its gradient is rounding.
VANISHING = ("k_proj.bias", "key.bias", "k_norm.bias", "norm_k.bias", "rel_pos.mlp.fc2.bias")


def check(model, call, tolerance=2e-5, **inputs):
    """All candidates are replaced, outputs and gradients stay, and ``restore`` gives the same bits as before."""
    tensors = with_parameters(model, **inputs)
    keys = {name: tensor.shape for name, tensor in model.state_dict().items()}
    expected = outputs_and_gradients(call, tensors)
    report = integrations.convert(model, ops=OPS)
    assert len(report) > 0
    assert report.replaced == len(report), report
    assert {name: tensor.shape for name, tensor in model.state_dict().items()} == keys
    found = outputs_and_gradients(call, tensors)
    # Something else computes it: of so few numbers, those of the output alone may round alike.
    assert not all(torch.equal(*pair) for pair in _pairs(found, expected))
    scale = max(gradient.abs().max() for gradient in expected[1].values())
    for name in [name for name in expected[1] if name.endswith(VANISHING)]:
        assert max(gradients.pop(name).abs().max() for _, gradients in (found, expected)) < 1e-5 * scale, name
    assert_same(found, expected, tolerance=tolerance)
    assert integrations.restore(model) == len(report)
    assert not any("forward" in module.__dict__ or own_methods(module) for module in model.modules())
    assert torch.equal(outputs_and_gradients(call, tensors)[0], expected[0])


def _pairs(found, expected):
    return [(found[0], expected[0]), *((found[1][name], gradient) for name, gradient in expected[1].items())]


def check_registered(hosts):
    """Classes of a registry are there, and take the arguments that their layers take."""
    for path, host in hosts.items():
        module, name = path.split(":")
        kind = getattr(importlib.import_module(module), name.partition(".")[0])
        methods = getattr(kind, method_of(path)), host.layer.forward
        theirs, ours = ([*inspect.signature(each).parameters] for each in methods)
        assert theirs == ours, path
