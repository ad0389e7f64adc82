"""Numerics of the Triton kernels in Triton's interpreter, run by tests/ops/test_interpreted.py."""

import random

import pytest
import torch

from fused_attn.ops._floor.declarations import Sample
from fused_attn.ops.squeeze_excite import spec
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
