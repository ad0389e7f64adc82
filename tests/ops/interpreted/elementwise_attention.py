"""Numerics of the Triton kernels in Triton's interpreter, run by tests/ops/test_interpreted.py."""

from functools import partial

import numpy as np
import pytest
import torch

from fused_attn.ops._floor.declarations import Sample
from fused_attn.ops.elementwise_attention import op, reference, triton_launch
from fused_attn.ops.elementwise_attention.spec import SPECS, all_masked, make_inputs, padded
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
ROW = {"batch": 1, "channels": 1, "grid": (1, triton_launch.WHOLE_PLANE + 3)}
LOG = {"options": {"log": True}}
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
        ("elementwise_attention", "images and heads, tiles", TILES | {"batch": 2, "heads": 2}),
        ("row_col_softmax", "dual, all masked, tiles", TILES | {"batch": 2, "edit": all_masked}),
        ("row_col_softmax", "dual, all masked, log, tiles", TILES | {"batch": 2, "edit": all_masked, **LOG}),
        ("row_col_softmax", "dual, one row, tiles", ROW),
        ("elementwise_attention", "one row, tiles", ROW | {"heads": 1}),
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
    tile = triton_launch.tiling(*ROW["grid"])
    assert not tile.whole
    assert tile.chunks == 1


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


@pytest.mark.parametrize("dtype", [F32, F16, torch.float64])
def test_given_statistics_are_used_as_they_are(dtype):
    x, row, col = (torch.randn(shape) for shape in ((1, 2, 6, 7), (3, 2, 6, 7), (3, 2, 6, 7)))
    given = torch.rand(2, 18).to(dtype)[:, ::3]  # strided
    *_, mean, var = op.elementwise_attention.run("triton", x, row, col, *given, 1e-5)
    assert torch.equal(mean, given[0].float())
    assert torch.equal(var, given[1].float())


SMALL = (4, 4)


@pytest.mark.parametrize(
    ("images", "grid"),
    [(1, SMALL), (3, SMALL), (triton_launch.MOMENTS + 1, SMALL), (1, TILES["grid"]), (130, TILES["grid"])],
)
def test_moments_are_added_up_in_float64(images, grid):
    x = torch.empty(images, 2, *grid)
    moments = triton_launch._moments(x, 3)
    moments[..., 0], moments[..., 1] = torch.randn(moments.shape[:-1]), 1e3
    moments[:, 1, 1, :, 0] = 1e6  # a variance below 0
    moments[0, 2, 0, 0, 1] = float("nan")
    mean, var, scale, grad_mean, grad_var = torch.empty(5, 6)
    triton_launch.plan_batch(x, moments, None, None, 1e-3, mean, var, scale).run()
    norm = triton_launch.Normalisation(mean, scale.clone(), grad_mean, grad_var)
    triton_launch.plan_grad_batch(x, moments, var, 1e-3, norm).run()

    count, shift = x[:, 0].numel(), torch.tensor(1.0 / x[0, 0].numel())
    first, second = (moments.double().sum((0, 3)) / count).flatten(0, 1).unbind(1)
    eps = torch.tensor(1e-3)
    assert torch.equal(mean, (first + shift).float())
    torch.testing.assert_close(var, (second - first.square()).clamp_min(0).float(), rtol=2e-7, atol=0, equal_nan=True)
    assert var[3] == 0
    assert var[4].isnan()
    deviation = (var.double() + eps).rsqrt()
    for got, exact in ((scale, deviation), (grad_mean, first), (grad_var, second * deviation.square())):
        torch.testing.assert_close(got, exact.float(), rtol=2e-7, atol=0, equal_nan=True)
    assert torch.equal(norm.scale.nan_to_num(), scale.nan_to_num())

    triton_launch.plan_grad_batch(x, None, var, 1e-3, norm).run()  # evaluation
    assert not grad_mean.any()
    assert not grad_var.any()


COUNTS = pytest.mark.parametrize("count", [1, 2, 5, triton_launch.PARTS, 2 * triton_launch.PARTS + 3])


@COUNTS
@pytest.mark.parametrize("size", [1, 33, 130])
def test_partial_sums_are_added_up(count, size):
    partials, other = torch.randn(2, count, size)
    out, other_out = torch.empty(size), torch.empty(size, dtype=BF16)
    triton_launch.plan_fold(partials, out, other, other_out).run()
    torch.testing.assert_close(out.double(), partials.double().sum(0), rtol=1e-6, atol=1e-5)
    torch.testing.assert_close(other_out, other.sum(0).to(BF16), rtol=2**-7, atol=1e-5)
    again = torch.empty(size)
    triton_launch.plan_fold(partials, again).run()
    assert torch.equal(out, again)


@COUNTS
def test_column_statistics_of_chunks_are_those_of_the_plane(count):
    batch, channels, width = 2, 3, 150
    logits = 30 * torch.randn(count, batch, channels, 4, width)  # 4 rows to a chunk
    logits[:, 0, 0, :, 7] = float("-inf")
    logits[0, 0, 0, :, 8] = float("-inf")
    logits[-1, 1, 1, 2, 9] = float("nan")
    maximum = logits.nan_to_num(-float("inf"), float("inf"), -float("inf")).amax(3)  # as tl.max: NaN is no maximum
    total = (logits - maximum.masked_fill(maximum.isinf(), 0).unsqueeze(3)).exp().sum(3)
    mask = torch.rand(batch, width) > 0.2
    mask[0, 7:9] = mask[1, 9] = True
    mask[1, 10] = False
    for col_mask in (None, mask):
        stats = torch.empty(batch, 1, channels, 2, width)
        partials = torch.stack((maximum, total), 3).flatten(1, 2)
        triton_launch.plan_combine(partials, col_mask, stats).run()
        of_plane = maximum.amax(0)
        shift = of_plane.masked_fill(of_plane.isinf(), 0).double()
        exact = (logits.double() - shift.unsqueeze(2)).exp().sum((0, 3))
        kept = torch.ones_like(of_plane, dtype=torch.bool) if col_mask is None else col_mask[:, None].expand_as(exact)
        torch.testing.assert_close(stats[:, 0, :, 0], of_plane.where(kept, 0), rtol=0, atol=0)
        expected = exact.float().where(kept, 1)
        torch.testing.assert_close(stats[:, 0, :, 1], expected, rtol=2e-6, atol=0, equal_nan=True)
        assert stats[1, 0, 1, 1, 9].isnan()
        assert stats[0, 0, 0, 1, 7] == 0


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
