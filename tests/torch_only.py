"""Runs every op, module and model, and ``fused-attn info``: all that must work with torch alone.

A script, for environments without pytest too: ``python tests/torch_only.py``.
"""

from functools import partial

import torch

from fused_attn import cli, create_model, list_models, modules
from fused_attn.ops import SPECS
from fused_attn.testing.numerics import draw_grad_out, evaluate

#: call of every public module
MODULES = {
    "AttentionAugmentedConv1d": lambda m, x: m(8, 16, 3, 1, 64, heads=2)(x.flatten(2)),
    "AttentionAugmentedConv2d": lambda m, x: m(8, 16, 3, 1, (8, 8), heads=2)(x),
    "AttentionResidual": lambda m, x: m(8)([x, x]),
    "DualSoftmax": lambda m, x: m()(x),
    "ElementwiseAttention": lambda m, x: m(8, (8, 8), 2)(x),
    "ElementwiseAttentionBlock": lambda m, x: m(8, (8, 8), 2)(x),
    "GridAttention2d": lambda m, x: m(8, 2, 4)(x),
    "LayerAttention": lambda m, x: m([8, 8])([x, x]),
    "MRLABase": lambda m, x: m(8, dim_per_head=4)(x, modules.LayerCache()),
    "MRLALight": lambda m, x: m(8, dim_per_head=4)(x, x),
    "RelPosAttention1d": lambda m, x: m(8, 16, 16, 2, 64)(x.flatten(2)),
    "RelPosAttention2d": lambda m, x: m(8, 16, 16, 2, (8, 8))(x),
    "SqueezeExcite": lambda m, x: m(8, 2)(x),
    "WindowAttention2d": lambda m, x: m(8, 2, 4, 2)(x),
}


def run_ops() -> None:
    for spec in SPECS:
        inputs = spec.samples[0].inputs(torch.float32)
        grad_out = draw_grad_out(spec, inputs)
        expected, found = (
            evaluate(partial(spec.function, impl=each), inputs, grad_out) for each in ("reference", "auto")
        )
        for name, tensor in expected.items():
            torch.testing.assert_close(found[name], tensor, rtol=1e-3, atol=1e-4)


def run_modules() -> None:
    public = {name: getattr(modules, name) for name in modules.__all__ if isinstance(getattr(modules, name), type)}
    assert {name for name, kind in public.items() if issubclass(kind, torch.nn.Module)} == MODULES.keys()
    for name, call in MODULES.items():
        x = torch.randn(2, 8, 8, 8, requires_grad=True)
        call(public[name], x).sum().backward()
        assert x.grad is not None, name


def run_models() -> None:
    for name in list_models():
        with torch.device("meta"):
            model, images = create_model(name, num_classes=5, image_size=32), torch.empty(2, 3, 32, 32)
        assert model.eval()(images).shape == (2, 5), name


if __name__ == "__main__":
    run_ops()
    run_modules()
    run_models()
    assert cli.main(["info"]) == 0
