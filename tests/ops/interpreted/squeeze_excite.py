"""Numerics of the Triton kernels in Triton's interpreter, run by tests/ops/test_interpreted.py."""

import functools
import random

import pytest
import torch

from fused_attn.ops._floor.declarations import Sample
from fused_attn.ops.squeeze_excite import spec, triton_launch
from fused_attn.testing import checks

(SPEC,) = spec.SPECS
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=lambda d: str(d)[6:])


@DTYPES
@pytest.mark.parametrize("sample", SPEC.samples, ids=lambda sample: sample.name)
def test_numerics(sample, dtype):
    checks.check_numerics(SPEC, "triton", *(sample.inputs(dtype, draw=draw) for draw in range(2)))


@pytest.mark.parametrize("seed", range(8))
def test_numerics_of_random_shapes(seed):
    sample = SPEC.fuzz(random.Random(seed))
    dtype = (torch.float32, torch.float16)[seed % 2]
    checks.check_numerics(SPEC, "triton", *(sample.inputs(dtype, draw=draw) for draw in range(2)))


@pytest.mark.parametrize("layout", spec.LAYOUTS[:2], ids=lambda layout: layout.__name__)
def test_maps_of_several_tiles(layout):
    """More channels, and more positions, than one tile holds."""

    def make(dtype, device):
        return spec.make_inputs(dtype, device, size=(1, 130, 33, 32), hidden=4, residual=True, relu=True, layout=layout)

    sample = Sample(f"several tiles, {layout.__name__}", make)
    checks.check_numerics(SPEC, "triton", *(sample.inputs(torch.float32, draw=draw) for draw in range(2)))


def _strided(inputs):
    """Every second element of every axis of the parameters."""
    for name, value in inputs.items():
        if name.startswith("fc"):
            for dim in range(min(value.dim(), 2)):
                value = value.repeat_interleave(2, dim)
            inputs[name] = value[::2, ::2] if value.dim() > 1 else value[::2]


def _expanded(inputs):
    """One number for all biases, and weights of convolutions that are channels_last."""
    for name, value in inputs.items():
        if name.endswith("bias"):
            inputs[name] = value[:1].expand(value.shape)
        elif name.startswith("fc"):
            inputs[name] = value.contiguous(memory_format=torch.channels_last)


LAYERS = {
    "one sample, one hidden unit": {"size": (1, 17, 2, 2), "hidden": 1, "features": 1},
    "one sample, one channel": {"size": (1, 1, 2, 2), "hidden": 1, "share": True, "hidden_activation": "gelu"},
    "long sums": {"size": (5, 300, 1, 1), "hidden": 9, "features": 29, "hidden_activation": "silu"},
    "long sums, one layer": {"size": (2, 300, 1, 1), "one_layer": True, "share": True, "gate": "hardsigmoid"},
    "strided parameters": {"size": (3, 37, 2, 1), "hidden": 5, "features": 4, "edit": _strided},
    "strided convolutions": {"size": (3, 37, 2, 1), "hidden": 5, "convolutions": True, "edit": _strided},
    "expanded biases": {"size": (3, 37, 2, 1), "hidden": 5, "convolutions": True, "edit": _expanded},
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("name", LAYERS)
def test_layers(name, dtype):
    """Sizes on both sides of a tile's, of one and of several tiles, and strides of the parameters."""
    sample = Sample(name, functools.partial(spec.make_inputs, **LAYERS[name]))
    checks.check_numerics(SPEC, "triton", *(sample.inputs(dtype, draw=draw) for draw in range(2)))


@pytest.mark.parametrize("hidden_activation", spec.reference.HIDDEN_ACTIVATIONS)
def test_large_tiles_of_layers(hidden_activation, monkeypatch):
    """Those of many outputs and of large weights, which would take minutes here."""
    monkeypatch.setattr(triton_launch, "_FEW_OUTPUTS", 0)
    monkeypatch.setattr(triton_launch, "_FEW_WEIGHTS", 0)
    monkeypatch.setattr(triton_launch, "_layer_blocks", triton_launch._layer_blocks.__wrapped__)

    def make(dtype, device):
        settings = {"hidden": 40, "features": 9, "hidden_activation": hidden_activation}
        return spec.make_inputs(dtype, device, size=(35, 70, 1, 2), **settings)

    sample = Sample(f"large tiles, {hidden_activation}", make)
    checks.check_numerics(SPEC, "triton", *(sample.inputs(torch.float32, draw=draw) for draw in range(2)))


@pytest.mark.parametrize(
    "sample", [sample for sample in SPEC.samples if sample.small][3::2], ids=lambda sample: sample.name
)
def test_contract(sample):
    inputs = sample.inputs(torch.float32)
    checks.check_grad_out_layouts(SPEC, "triton", inputs)
    checks.check_partial_gradients(SPEC, "triton", inputs)
    checks.check_inputs_unchanged(SPEC, "triton", inputs)
    checks.check_runs_its_operators(SPEC, "triton", inputs)
    checks.check_operators(SPEC, "triton", inputs)
    checks.check_non_finite(SPEC, "triton", inputs)
    checks.check_deterministic(SPEC, "triton", inputs, runs=2)
