"""Numerics of the Triton kernels in Triton's interpreter, run by tests/ops/test_interpreted.py."""

from functools import partial

import numpy as np
import pytest
import torch

from fused_attn.ops._floor.declarations import Sample
from fused_attn.ops.elementwise_attention import op, reference, triton_launch
from fused_attn.ops.elementwise_attention.spec import SPECS, make_inputs, padded
from fused_attn.testing import checks
from fused_attn.testing.numerics import mismatches

pytestmark = pytest.mark.usefixtures("unwritten_memory_is_nan")
F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
SPEC_OF = {spec.name: spec for spec in SPECS}


#: Samples of the specs, and smaller ones of what is slow there: several tiles to a plane, several groups of images.
SOFTMAX_SAMPLES = (
    "row 1x9", "column 9x1", "channels_last", "transposed weights", "large logits", "no heads", "no images",
    "dual, small", "dual, one value to a plane", "dual, spread", "dual, transposed", "dual, expanded batch",
    "dual, no rows", "dual, masked", "dual, nan", "inf in weight_row", "dual, temperature, small", "dual, log, small",
    "dual, masks, small", "dual, log, masks, small", "dual, row mask", "dual, column mask", "dual, all masked",
    "dual, log, masked",
)  # fmt: skip
ATTENTION_SAMPLES = (
    "small", "row 1x9", "column 9x1", "small weights", "strided weights", "no images", "evaluation, row 1x9",
    "evaluation, small", "evaluation, no rows", "eps 1e-12", "nan in x",
)  # fmt: skip
TILES = {"batch": 1, "channels": 1, "grid": (66, 65)}
GROUPS = {"batch": triton_launch.IMAGES + 1, "channels": 1, "grid": (4, 3), "heads": 1}


def _cases():
    own = (
        ("row_col_softmax", "dual, tiles", TILES),
        ("row_col_softmax", "dual, masks, log, tiles", TILES | {"edit": padded, "options": {"log": True}}),
        ("row_col_softmax", "tiles", TILES | {"heads": 1}),
        ("row_col_softmax", "groups", GROUPS),
        ("elementwise_attention", "tiles", TILES | {"heads": 1}),
        ("elementwise_attention", "groups", GROUPS),
        ("elementwise_attention", "evaluation, tiles", TILES | {"heads": 1, "options": {"training": False}}),
    )
    found = [(SPEC_OF[name], Sample(sample, partial(make_inputs, **settings))) for name, sample, settings in own]
    for spec_name, names in (("row_col_softmax", SOFTMAX_SAMPLES), ("elementwise_attention", ATTENTION_SAMPLES)):
        samples = {sample.name: sample for sample in SPEC_OF[spec_name].samples}
        found += [(SPEC_OF[spec_name], samples[name]) for name in names]
    return [pytest.param(spec, sample, id=f"{spec.name}-{sample.name}") for spec, sample in found]


def test_own_samples_take_several_tiles_and_groups():
    tile = triton_launch.tiling(*TILES["grid"])
    assert not tile.whole
    assert tile.chunks > 1
    assert TILES["grid"][1] > tile.columns


@pytest.mark.parametrize(("spec", "sample"), _cases())
def test_numerics(spec, sample):
    draws = 1 if sample.name.endswith(("tiles", "groups")) else 3
    checks.check_numerics(spec, "triton", *(sample.inputs(F32, draw=draw) for draw in range(draws)))


@pytest.mark.parametrize("dtype", [F16, BF16])
@pytest.mark.parametrize("name", ["row_col_softmax", "elementwise_attention"])
def test_half_precision(name, dtype):
    spec = SPEC_OF[name]
    sample = next(sample for sample in spec.samples if sample.name == "small")
    checks.check_numerics(spec, "triton", *(sample.inputs(dtype, draw=draw) for draw in range(3)))


def test_batch_statistics_are_those_of_the_reference():
    x, row, col = (torch.randn(shape) for shape in ((5, 2, 6, 7), (3, 2, 6, 7), (3, 2, 6, 7)))
    *_, mean, var = op.elementwise_attention.run("triton", x, row, col, None, None, 1e-5)
    _, expected_mean, expected_var = reference.elementwise_attention(
        x.double(), row.double(), col.double(), None, None, 1e-5
    )
    torch.testing.assert_close(mean.double(), expected_mean, rtol=1e-6, atol=0.0)
    torch.testing.assert_close(var.double(), expected_var, rtol=1e-5, atol=0.0)


def test_offsets_past_two_to_the_31():
    far = 2**31 + 16
    storage = torch.from_numpy(np.zeros(far + 64, dtype=np.int16)).view(BF16)
    plane = torch.randn(2, 1, 3, 4, dtype=F32).to(BF16)
    x = storage.as_strided(plane.shape, (far, 12, 4, 1)).copy_(plane)
    got = op.row_col_softmax.run("triton", x, None, None, None, None, 1.0, False)[0]
    rounded, exact = reference.row_col_softmax(plane), reference.row_col_softmax(plane.double())
    found = mismatches(*({"out": out} for out in (got, rounded, exact)))
    assert not found, "; ".join(found)


@pytest.mark.parametrize("name", ["row_col_softmax", "elementwise_attention"])
def test_repeated_runs_are_bitwise_equal(name):
    checks.check_deterministic(SPEC_OF[name], "triton", SPEC_OF[name].samples[0].inputs(F32), runs=2)
