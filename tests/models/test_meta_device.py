"""Models and modules that were built on the meta device start as those built with memory."""

import pytest
import torch
from model_checks import MODELS, build

from fused_attn import modules

PUBLIC = {
    "AttentionAugmentedConv1d": lambda: modules.AttentionAugmentedConv1d(4, 16, 3, 2, 40, heads=2),
    "AttentionAugmentedConv2d": lambda: modules.AttentionAugmentedConv2d(4, 16, 3, 2, (8, 8), heads=2),
    "AttentionResidual": lambda: modules.AttentionResidual(64),
    "DualSoftmax": lambda: modules.DualSoftmax(),
    "ElementwiseAttention": lambda: modules.ElementwiseAttention(3, (8, 8), 2),
    "ElementwiseAttentionBlock": lambda: modules.ElementwiseAttentionBlock(3, (8, 8), 2, batch_norm=True),
    "GridAttention2d": lambda: modules.GridAttention2d(16, 2, 7),
    "LayerAttention": lambda: modules.LayerAttention([8, 16, 16], values="project"),
    "MRLABase": lambda: modules.MRLABase(64),
    "MRLALight": lambda: modules.MRLALight(64),
    "RelPosAttention1d": lambda: modules.RelPosAttention1d(8, 16, 16, 2, 40, per_head_tables=True, bias=True),
    "RelPosAttention2d": lambda: modules.RelPosAttention2d(8, 16, 16, 2, (8, 8), per_head_tables=True, bias=True),
    "SqueezeExcite": lambda: modules.SqueezeExcite(64, 4, result_features=3),
    "WindowAttention2d": lambda: modules.WindowAttention2d(16, 2, 7, 3),
}


def empty(make):
    """The module on the meta device, then with memory that holds what no initialisation leaves."""
    with torch.device("meta"):
        module = make()
    assert all(tensor.is_meta for tensor in (*module.parameters(), *module.buffers()))
    module.to_empty(device="cpu")
    with torch.no_grad():
        for tensor in (*module.parameters(), *module.buffers()):
            tensor.fill_(torch.nan if tensor.is_floating_point() else 999)
    return module


def check_fresh(module, usual):
    """Same constants, and same distributions as far as the number of values shows them."""
    expected = dict(usual.named_parameters()) | dict(usual.named_buffers())
    found = dict(module.named_parameters()) | dict(module.named_buffers())
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        want = expected[name].detach().double()
        values, number = tensor.detach().double(), want.numel()
        assert values.isfinite().all(), name
        if not want.std(correction=0) and float(want.flatten()[0]) in (0.0, 1.0):
            assert torch.equal(values, want), name
        elif number < 32:
            assert values.abs().max() <= 8.0 * max(want.abs().max(), 0.1), name
        else:
            spread = float(want.std())
            assert abs(float(values.mean() - want.mean())) < 8.0 * spread / number**0.5, name
            assert float(values.std()) == pytest.approx(spread, rel=7.0 / number**0.5), name


def test_every_public_module_is_here():
    public = {name for name in modules.__all__ if isinstance(getattr(modules, name), type)}
    assert {name for name in public if issubclass(getattr(modules, name), torch.nn.Module)} == PUBLIC.keys()


@pytest.mark.parametrize("name", PUBLIC)
@pytest.mark.parametrize("order", [list, lambda parts: reversed(list(parts))], ids=["parents first", "children first"])
def test_modules(name, order):
    module = empty(PUBLIC[name])
    for part in order(module.modules()):
        if hasattr(part, "reset_parameters"):
            part.reset_parameters()
    check_fresh(module, PUBLIC[name]())


@pytest.mark.parametrize("label", MODELS)
def test_models(label):
    """One call draws all there is, at the model's own initialisation."""
    usual = build(label)
    model = empty(lambda: build(label))
    torch.manual_seed(1)
    model.reset_parameters()
    check_fresh(model, usual)


@pytest.mark.parametrize("label", MODELS)
def test_a_loop_over_the_modules_of_a_model(label):
    """Children first it draws the same; parents first it leaves nothing out, but layers end at their own defaults."""
    usual = build(label)
    model = empty(lambda: build(label))
    torch.manual_seed(1)
    for part in model.modules():
        if hasattr(part, "reset_parameters"):
            part.reset_parameters()
    assert all(tensor.isfinite().all() and (tensor < 999).all() for tensor in (*model.parameters(), *model.buffers()))
    for part in reversed(list(model.modules())):
        if hasattr(part, "reset_parameters"):
            part.reset_parameters()
    check_fresh(model, usual)
