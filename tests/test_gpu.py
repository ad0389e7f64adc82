"""What only a GPU shows: run by ``pytest -m gpu``, skipped where there is none."""

import pytest
import torch

from fused_attn import decomposed_bias_attention
from fused_attn.ops import SPECS
from fused_attn.ops._floor import replay
from fused_attn.ops._floor.declarations import tensors
from fused_attn.testing.numerics import draw_grad_out, evaluate, mismatches, numeric_mismatches

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU that PyTorch can use"),
]


def each(name, cases):
    """Parametrises a test by the ops with Triton kernels and their cases: shapes of benchmarks, or samples."""
    return pytest.mark.parametrize(
        ("spec", name),
        [
            pytest.param(spec, case, id=f"{spec.name}-{case.name}")
            for spec in SPECS
            if "triton" in spec.implementations
            for case in cases(spec)
        ],
    )


shapes = each("shape", lambda spec: spec.shapes)
samples = each("sample", lambda spec: spec.samples)
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])


def bound(spec):
    def function(**inputs):
        return spec.function(**inputs, impl="triton")

    return function


def bits(tensor):
    return tensor.contiguous().view(torch.uint8)


def call(spec, shape, dtype):
    inputs = shape.inputs(dtype, "cuda")
    reason = spec.reason("triton", inputs)
    if reason is not None:
        pytest.skip(reason)
    return inputs


@dtypes
@shapes
def test_numerics_at_benchmark_shapes(spec, shape, dtype):
    found = numeric_mismatches(spec, bound(spec), call(spec, shape, dtype))
    assert not found, "; ".join(found)


@dtypes
@shapes
def test_five_runs_give_the_same_bits_at_benchmark_shapes(spec, shape, dtype):
    inputs = call(spec, shape, dtype)
    grad_out = draw_grad_out(spec, inputs)
    expected = evaluate(bound(spec), inputs, grad_out)
    for run in range(4):
        for name, tensor in evaluate(bound(spec), inputs, grad_out).items():
            assert torch.equal(bits(tensor), bits(expected[name])), f"{name} of run {run + 2}"


@dtypes
@samples
def test_launches_made_again_are_those_that_are_planned(spec, sample, dtype, monkeypatch):
    assert replay.HAS_GUARDS
    draws = []
    for draw in range(4):
        inputs = sample.inputs(dtype, "cuda", draw)
        if spec.reason("triton", inputs) is not None:
            pytest.skip(spec.reason("triton", inputs))
        draws.append((inputs, draw_grad_out(spec, inputs)))
    monkeypatch.setattr(replay, "_seen", {})
    again = [evaluate(bound(spec), *arguments) for arguments in draws]
    made_again = [call.programme is not None for calls in replay._seen.values() for call in calls]
    aligned = all(tensor.data_ptr() % 16 == 0 for inputs, _ in draws for tensor in tensors(inputs).values())
    assert any(made_again) or not aligned or not made_again  # no launches: nothing to compute
    monkeypatch.setattr(replay, "_seen", {})
    monkeypatch.setattr(replay, "HAS_GUARDS", False)
    for got, arguments in zip(again, draws, strict=True):
        for name, tensor in evaluate(bound(spec), *arguments).items():
            assert torch.equal(bits(tensor), bits(got[name])), name


def test_tensors_of_more_than_two_to_the_31_elements():
    """Query, key, value, output and their gradients: each 4 GiB in bfloat16, so that offsets overflow 32 bits."""
    heads, grid, depth = 8, (4, 4), 64
    batch = 2**31 // (heads * grid[0] * grid[1] * depth) + 1
    needed = 40 * 2**30
    if torch.cuda.get_device_properties(0).total_memory < needed:
        pytest.skip(f"needs a GPU with {needed // 2**30} GiB")
    generator = torch.Generator("cuda").manual_seed(0)

    def draw(*shape):
        return torch.randn(batch, heads, *grid, *shape, device="cuda", dtype=torch.bfloat16, generator=generator)

    inputs = {
        "query": draw(depth),
        "key": draw(depth),
        "value": draw(depth),
        "bias_h": draw(grid[0]),
        "bias_w": draw(grid[1]),
    }
    grad_out = draw(depth)
    assert inputs["query"].numel() > 2**31
    actual = evaluate(lambda **kw: decomposed_bias_attention(**kw, impl="triton"), inputs, grad_out)

    def reference(**kwargs):
        return decomposed_bias_attention(**kwargs, impl="reference")

    # Images are independent: the first, one in the middle and the last, whose offsets are the largest.
    for image in (0, batch // 2, batch - 1):
        part = slice(image, image + 1)
        few = {name: tensor[part].clone() for name, tensor in inputs.items()}
        exact = {name: tensor.double() for name, tensor in few.items()}
        found = mismatches(
            {name: tensor[part] for name, tensor in actual.items()},
            evaluate(reference, few, grad_out[part].clone()),
            evaluate(reference, exact, grad_out[part].double()),
        )
        assert not found, f"image {image} of {batch}: " + "; ".join(found)
