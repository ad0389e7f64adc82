"""Numerics of the Triton kernels in Triton's interpreter, run by tests/ops/test_interpreted.py."""

import numpy as np
import pytest
import torch

from fused_attn.ops.layer_attention import LayerCache, layer_attention, triton_launch, weighted_layer_sum
from fused_attn.ops.layer_attention.spec import SPECS, make_attention_inputs
from fused_attn.testing import checks

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
SPEC = SPECS[0]
SMALL = {"layers": 3, "batch": 2, "groups": 2, "depth": 3, "channels": 4, "spatial": (2, 3)}


def inputs(dtype=F32, **settings):
    torch.manual_seed(0)
    return make_attention_inputs(dtype, torch.device("cpu"), **(SMALL | settings))


SAMPLES = [pytest.param(spec, sample, id=f"{spec.name}-{sample.name}") for spec in SPECS for sample in spec.samples]


@pytest.mark.parametrize(("spec", "sample"), SAMPLES)
def test_samples(spec, sample):
    checks.check_numerics(spec, "triton", *(sample.inputs(F32, draw=draw) for draw in range(3)))


@pytest.mark.parametrize("dtype", [F16, BF16])
@pytest.mark.parametrize(("spec", "sample"), [param for param in SAMPLES if param.values[1].small])
def test_half_precision(spec, sample, dtype):
    checks.check_numerics(spec, "triton", *(sample.inputs(dtype, draw=draw) for draw in range(3)))


@pytest.mark.parametrize(("layers", "activation"), [(31, "softmax"), (32, "softmax"), (33, "sigmoid"), (65, "softmax")])
def test_more_layers_than_a_launch_takes(layers, activation):
    checks.check_numerics(SPEC, "triton", inputs(layers=layers, bias=True, options={"activation": activation}))


def test_more_depth_than_a_block():
    checks.check_numerics(SPEC, "triton", inputs(depth=300))


def test_behaviour_of_the_contract():
    call = inputs(BF16, channels=14, spatial=(9, 11))
    checks.check_grad_out_layouts(SPEC, "triton", call)
    checks.check_partial_gradients(SPEC, "triton", call)
    checks.check_deterministic(SPEC, "triton", call, runs=1)
    checks.check_inputs_unchanged(SPEC, "triton", call)
    checks.check_runs_its_operators(SPEC, "triton", call)


def test_non_finite():
    checks.check_non_finite(SPEC, "triton", inputs())


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("dtype", [F32, BF16])
def test_cache_adds_the_gradients_of_a_stage(dtype, channels_last):
    """Every launch of the backward pass but the first adds to the buffers of the values."""
    layers, groups, channels = 4, 2, 6

    def leaves(kind):
        torch.manual_seed(1)
        layout = torch.channels_last if channels_last else torch.contiguous_format
        heads = [[torch.randn(2, groups, 3).to(kind) for _ in range(layers)] for _ in range(2)]
        maps = [torch.randn(2, channels, 3, 5).to(kind).to(memory_format=layout) for _ in range(layers)]
        return [[tensor.requires_grad_() for tensor in group] for group in (*heads, maps)]

    def run(kind, impl, cached):
        queries, keys, values = leaves(kind)
        cache, outs = LayerCache(), []
        for i, query in enumerate(queries):
            if cached:
                cache.append(keys[i], values[i])
                outs.append(cache.attend(query, impl=impl))
            else:
                outs.append(layer_attention(query, keys[: i + 1], values[: i + 1], impl=impl))
        loss = sum((1 + i) * out.double().square().sum() for i, out in enumerate(outs))
        return torch.autograd.grad(loss, [*queries, *keys, *values])

    exact = run(torch.float64, "reference", False)
    actual, rounded = run(dtype, "triton", True), run(dtype, "reference", False)
    for a, b, c in zip(actual, exact, rounded, strict=True):
        largest, allowed = b.abs().max(), 2 * (c.double() - b).abs().max()
        assert (a.double() - b).abs().max() <= allowed + 4 * torch.finfo(dtype).eps * largest


def test_layers_far_apart_in_memory():
    """Images more than 2^31 elements apart; only the pages touched are ever backed by memory."""
    far = 2**31 + 4096
    memory = torch.from_numpy(np.zeros(far + 4096, dtype=np.int16)).view(BF16)
    torch.manual_seed(0)
    weights = torch.randn(2, 2, 2, dtype=BF16)
    near = [torch.randn(2, 4, 3, 5, dtype=BF16) for _ in range(2)]
    values = [memory.as_strided((2, 4, 3, 5), (far, 15, 5, 1), 128 * i).copy_(v) for i, v in enumerate(near)]
    expected = weighted_layer_sum(weights, near, impl="triton")
    assert torch.equal(weighted_layer_sum(weights, values, impl="triton"), expected)


@pytest.mark.parametrize(
    ("shape", "groups", "channels_last"),
    [((2, 1024, 14, 14), 64, False), ((2, 1024, 14, 14), 64, True), ((2, 64), 1, False), ((2, 256, 7, 7), 256, False)],
)
def test_tiles_cover_the_image_and_are_powers_of_two(shape, groups, channels_last):
    matrix = triton_launch.as_matrix(shape, groups, channels_last)
    assert matrix.rows * matrix.columns == torch.Size(shape[1:]).numel()
    for layers in (6, 23):
        rows, columns = triton_launch.tile_of(matrix, layers)
        assert rows.bit_count() == columns.bit_count() == 1
        assert rows * columns <= 2048
        # Partial sums are small beside the values: one for at least 16 elements, or for a whole row or column.
        summed, available = (columns, matrix.columns) if matrix.row_weights else (rows, matrix.rows)
        assert summed >= min(16, available)


def test_buckets_repeat_pointers_up_to_a_power_of_two():
    values = [torch.zeros(1, 2, 3) for _ in range(6)]
    out = torch.zeros(1, 2, 3)
    (launch,) = triton_launch.plan_sum_forward(torch.zeros(1, 2, 6), values, out, False)
    pointers = launch.arguments["value_ptrs"]
    assert [any(pointer is value for value in values) for pointer in pointers] == [True] * 8
    assert launch.arguments["layers"] == 6
    assert launch.arguments["LAYERS"] == 8
    assert triton_launch.chunks(70) == [(0, 32), (32, 32), (64, 6)]
