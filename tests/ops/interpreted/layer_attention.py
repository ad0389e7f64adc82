"""Numerics of the Triton kernels in Triton's interpreter.  Run by tests/ops/test_layer_attention_triton.py, in a
process of its own, because TRITON_INTERPRET is read when triton is imported.
"""

import random

import numpy as np
import pytest
import torch

from fused_attn.ops.contract import convert, draw_grad_out, evaluate, numeric_mismatches
from fused_attn.ops.layer_attention import LayerCache, layer_attention, triton_launch, weighted_layer_sum
from fused_attn.ops.layer_attention.spec import SPECS, make_attention

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
SMALL = {"layers": 3, "batch": 2, "groups": 2, "depth": 3, "channels": 4, "spatial": (2, 3)}


@pytest.fixture(autouse=True)
def _unwritten_memory_is_nan():
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)


def bound(spec, impl="triton"):
    def function(**inputs):
        return spec.function(**inputs, impl=impl)

    return function


@pytest.mark.parametrize("dtype", [F32, F16, BF16])
@pytest.mark.parametrize(
    ("spec", "sample"),
    [pytest.param(spec, sample, id=f"{spec.name}-{sample.name}") for spec in SPECS for sample in spec.samples],
)
def test_samples(spec, sample, dtype):
    found = numeric_mismatches(spec, bound(spec), sample.inputs(dtype))
    assert not found, "; ".join(found)


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.name)
def test_random_shapes(spec, seed):
    sample = spec.fuzz(random.Random(seed))
    found = numeric_mismatches(spec, bound(spec), sample.inputs(F32), factor=4.0)
    assert not found, f"{sample.name}: {'; '.join(found)}"


@pytest.mark.parametrize("activation", ["softmax", "sigmoid"])
@pytest.mark.parametrize("layers", [31, 32, 33, 65])
def test_more_layers_than_a_launch_takes(layers, activation):
    call = {**SMALL, "layers": layers, "bias": True, "options": {"activation": activation}}
    inputs = make_attention(F32, torch.device("cpu"), **call)
    found = numeric_mismatches(SPECS[0], bound(SPECS[0]), inputs)
    assert not found, "; ".join(found)


def test_more_depth_than_a_block():
    inputs = make_attention(F32, torch.device("cpu"), **{**SMALL, "depth": 300})
    found = numeric_mismatches(SPECS[0], bound(SPECS[0]), inputs)
    assert not found, "; ".join(found)


@pytest.mark.parametrize("change", ["keys", "query", "bias"])
def test_strided_small_tensors(change):
    inputs = make_attention(F32, torch.device("cpu"), **{**SMALL, "bias": True})

    def spread(tensor):
        return tensor.repeat_interleave(2, -1)[..., ::2].transpose(0, 1).contiguous().transpose(0, 1)

    inputs[change] = [spread(key) for key in inputs[change]] if change == "keys" else spread(inputs[change])
    found = numeric_mismatches(SPECS[0], bound(SPECS[0]), inputs)
    assert not found, "; ".join(found)


@pytest.mark.parametrize("layout", ["expanded", "reversed axes", "strided"])
def test_layouts_of_the_gradient_of_the_output(layout):
    inputs = make_attention(F32, torch.device("cpu"), **SMALL)
    grad_out = draw_grad_out(SPECS[0], inputs)
    if layout == "expanded":
        grad_out = grad_out.flatten()[:1].expand(grad_out.shape)
    elif layout == "reversed axes":
        grad_out = grad_out.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0)
    else:
        grad_out = grad_out.repeat_interleave(2, -1)[..., ::2]
    actual = evaluate(bound(SPECS[0]), inputs, grad_out)
    expected = evaluate(bound(SPECS[0], "reference"), convert(inputs, torch.float64), grad_out.double())
    for name, tensor in actual.items():
        torch.testing.assert_close(tensor.double(), expected[name], rtol=1e-5, atol=1e-5)


def test_repeated_runs_are_bitwise_equal():
    inputs = make_attention(BF16, torch.device("cpu"), **{**SMALL, "channels": 14, "spatial": (9, 11)})
    grad_out = draw_grad_out(SPECS[0], inputs)
    first, second = (evaluate(bound(SPECS[0]), inputs, grad_out) for _ in range(2))
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), name


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("dtype", [F32, BF16])
def test_cache_adds_the_gradients_of_a_stage(dtype, channels_last):
    """Every launch of the backward pass but the first adds to the buffers of the values."""
    torch.manual_seed(0)
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
    try:
        memory = torch.from_numpy(np.zeros(far + 4096, dtype=np.int16)).view(BF16)
    except MemoryError as error:
        pytest.skip(f"4 GiB of address space are not to be had: {error}")
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
