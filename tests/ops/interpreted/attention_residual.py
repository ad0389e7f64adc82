"""Numerics of the Triton kernels in Triton's interpreter, run by tests/ops/test_interpreted.py."""

import numpy as np
import pytest
import torch

from fused_attn.ops._floor.declarations import convert
from fused_attn.ops.attention_residual import op, spec, triton_launch
from fused_attn.testing import checks
from fused_attn.testing.numerics import evaluate

(SPEC,) = spec.SPECS
SAMPLES = {sample.name: sample for sample in SPEC.samples}
F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16


def inputs(dtype=F32, **settings):
    torch.manual_seed(0)
    return spec.make_inputs(dtype, torch.device("cpu"), **{"values": 3, "shape": (2, 3, 5), **settings})


def values_of(count, shape, dtype=F32):
    return [torch.zeros(shape, dtype=dtype) for _ in range(count)]


#: Samples that the interpreter takes seconds for; the tests below have the same cases smaller.
SLOW = ("many tokens", "many values", "depth 1030", "depth 2600")
HALF = ("small", "one value", "no norm_weight", "depth 77", "mixed layouts", "large logits")


@pytest.mark.parametrize(
    ("name", "dtype"),
    [(name, F32) for name in SAMPLES if name not in SLOW] + [(name, dtype) for name in HALF for dtype in (F16, BF16)],
)
def test_samples(name, dtype):
    checks.check_numerics(SPEC, "triton", *(SAMPLES[name].inputs(dtype, "cpu", draw) for draw in range(3)))


@pytest.mark.parametrize(
    ("dtype", "values", "depth"), [(F32, 9, 1030), (F16, 9, 7168), (BF16, 9, 7168), (F32, 2, 8192), (BF16, 19, 5)]
)
def test_deep_rows_and_many_values(dtype, values, depth):
    checks.check_numerics(SPEC, "triton", inputs(dtype, values=values, shape=(2, depth)))


def test_a_program_owns_several_tiles(monkeypatch):
    monkeypatch.setattr(triton_launch, "BACKWARD_PROGRAMS", 1)
    call = inputs(values=4, shape=(7, 21, 20))
    assert triton_launch._backward_programs([value.flatten(0, -2)[None] for value in call["values"]]) == 2
    checks.check_numerics(SPEC, "triton", call)


def test_offsets_past_two_to_the_31():
    far = 2**31 + 16
    storage = torch.from_numpy(np.zeros(far + 4096, dtype=np.int16)).view(BF16)
    call = inputs(BF16)
    call["values"] = [
        storage.as_strided(value.shape, (far, 64, 1), 1024 * i).copy_(value) for i, value in enumerate(call["values"])
    ]
    checks.check_numerics(SPEC, "triton", call)


def test_non_finite():
    checks.check_non_finite(SPEC, "triton", inputs())


def test_behaviour_of_the_contract():
    call = inputs(BF16, values=5, shape=(3, 40, 20))
    checks.check_grad_out_layouts(SPEC, "triton", call)
    checks.check_partial_gradients(SPEC, "triton", call)
    checks.check_deterministic(SPEC, "triton", call, runs=1)
    checks.check_inputs_unchanged(SPEC, "triton", call)
    checks.check_runs_its_operators(SPEC, "triton", call)


def test_what_the_kernels_do_not_take_is_refused():
    for values in (values_of(33, (2, 4)), values_of(1, (2, 8193)), values_of(1, (2, 4), torch.float64)):
        checks.check_refuses(SPEC, "triton", {"values": values, "query": values[0][0]})
    for values in (values_of(32, (2, 4)), values_of(1, (2, 8192))):
        assert op.can_run_triton(values, values[0][0]) is None


def test_gradients_of_the_weights_cancel_as_exactly_as_in_the_reference():
    """Where every grad_out . value is a hundred times as large as their differences."""
    errors = {"reference": 0.0, "triton": 0.0}
    for seed in range(4):
        torch.manual_seed(seed)
        call = {"values": [torch.randn(64, 8) + 10.0 for _ in range(3)], "query": torch.randn(8)}
        grad_out = 10.0 + torch.randn(64, 8)

        def grad_query(impl, dtype, call=call, grad_out=grad_out):
            function = checks.bound(SPEC, impl)
            return evaluate(function, convert(call, dtype), grad_out.to(dtype))["grad_query"].double()

        exact = grad_query("reference", torch.float64)
        for impl in errors:
            errors[impl] += float((grad_query(impl, F32) - exact).square().sum())
    assert errors["triton"] < errors["reference"], errors
