"""Broken kernels fail the contract: each mutation here is one that a plausible slip would make."""

from functools import partial

import pytest
import torch

from fused_attn.ops import SPECS, rel_attention_2d
from fused_attn.ops.contract import evaluate, numeric_mismatches
from fused_attn.ops.rel_attention_2d import library

SPEC = next(spec for spec in SPECS if spec.name == "rel_attention_2d")
SAMPLE = next(sample for sample in SPEC.samples if sample.name == "width 8")


def found(function, dtype=torch.float32, name="width 8"):
    sample = next(sample for sample in SPEC.samples if sample.name == name)
    return numeric_mismatches(SPEC, function, sample.inputs(dtype))


class Tamper(torch.autograd.Function):
    """Identity forward; the gradient passes through ``change``."""

    @staticmethod
    def forward(ctx, x, change):
        ctx.change = change
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        return ctx.change(grad.clone()), None


def with_gradient(argument, change):
    """The CPU kernel with the gradient of one argument changed."""

    def call(**inputs):
        inputs[argument] = Tamper.apply(inputs[argument], change)
        return rel_attention_2d(**inputs, impl="cpu")

    return call


def with_output(change):
    def call(**inputs):
        out = rel_attention_2d(**inputs, impl="cpu")
        return Tamper.apply(out + (change(out.detach().clone()) - out.detach()), lambda grad: grad)

    return call


def zero_first_row(x):
    x[:, :, 0] = 0.0
    return x


def nan_last_row(x):
    x[..., -1, :] = float("nan")
    return x


def test_the_sound_kernel_passes():
    for dtype in SPEC.dtypes:
        assert found(partial(rel_attention_2d, impl="cpu"), dtype) == []


@pytest.mark.parametrize("argument", ["query", "key", "value", "rel_h", "rel_w"])
@pytest.mark.parametrize(
    "change",
    [
        torch.neg,
        lambda g: g * 1.001,
        torch.zeros_like,
        nan_last_row,
        lambda g: g.roll(1, -2),
        lambda g: g.bfloat16().to(g),
    ],
    ids=["wrong sign", "wrong scale", "missing", "unwritten row", "off by one", "low precision"],
)
def test_a_broken_gradient_is_caught(argument, change):
    problems = found(with_gradient(argument, change))
    assert [problem.split(":")[0] for problem in problems] == [f"grad_{argument}"]


@pytest.mark.parametrize(
    "change",
    [zero_first_row, nan_last_row, lambda x: x * (1 + 1e-5), lambda x: x.half().to(x), lambda x: x.flip(2)],
    ids=["unwritten rows", "uninitialised row", "wrong scale", "low precision", "rows swapped"],
)
def test_a_broken_output_is_caught(change):
    assert any(problem.startswith("out:") for problem in found(with_output(change)))


def test_the_wrong_index_convention_is_caught():
    def call(**inputs):
        return rel_attention_2d(**inputs, index="query_minus_key", impl="cpu")

    assert found(call)


def test_a_table_off_by_one_is_caught():
    def call(*, rel_h, **inputs):
        return rel_attention_2d(rel_h=rel_h.roll(1, -2), **inputs, impl="cpu")

    assert found(call)


def test_a_wrong_mask_is_caught():
    def call(*, key, **inputs):  # the last key column left out
        hidden = torch.full_like(key[..., -1:, :], 0.0)
        return rel_attention_2d(key=torch.cat((key[..., :-1, :], hidden), -2), **inputs, impl="cpu")

    assert found(call)


def test_another_dropout_mask_is_caught():
    def call(**inputs):
        torch.rand(1)  # moves the generator: another seed
        return rel_attention_2d(**inputs, impl="cpu")

    assert found(call, name="dropout, width 8")
    assert found(partial(rel_attention_2d, impl="cpu"), name="dropout, width 8") == []


def test_silent_half_precision_is_caught():
    def call(**inputs):
        halves = {name: value.half() for name, value in inputs.items()}
        return rel_attention_2d(**halves, impl="cpu").float()

    assert found(call)


def test_a_leaked_nan_is_caught():
    spec = next(spec for spec in SPECS if spec.name == "decomposed_bias_attention")
    sample = next(sample for sample in spec.samples if sample.name == "nan in query")
    inputs = sample.inputs(torch.float32)
    assert numeric_mismatches(spec, partial(spec.function, impl="cpu"), inputs) == []

    def swallows(**kwargs):
        return spec.function(**{**kwargs, "query": kwargs["query"].nan_to_num(0.0)}, impl="cpu")

    def spreads(**kwargs):
        return spec.function(**kwargs, impl="cpu") + kwargs["query"].sum() * 0.0

    assert numeric_mismatches(spec, swallows, inputs)
    assert numeric_mismatches(spec, spreads, inputs)


def test_an_unordered_sum_is_caught():
    """The determinism check compares bits: a sum in a changing order differs in them."""
    inputs = SAMPLE.inputs(torch.float32)
    order = torch.Generator()

    def call(*, rel_h, **others):
        def shuffled(grad):
            parts = torch.randn(64, *grad.shape, generator=torch.Generator().manual_seed(0)) * 1e-3
            permutation = torch.randperm(64, generator=order)
            total = grad
            for part in parts[permutation]:
                total = total + part
            return total

        return rel_attention_2d(rel_h=Tamper.apply(rel_h, shuffled), **others, impl="cpu")

    grad_out = torch.ones(*inputs["query"].shape[:-1], inputs["value"].shape[-1])
    runs = [evaluate(call, inputs, grad_out)["grad_rel_h"] for _ in range(5)]
    assert any(not torch.equal(run, runs[0]) for run in runs[1:])


def test_a_kernel_that_is_the_reference_is_caught(monkeypatch):
    """``impl="cpu"`` must reach the C++ kernel: without it the call fails, it does not take another way."""
    inputs = SAMPLE.inputs(torch.float32)
    calls = []
    monkeypatch.setattr(library, "attention", lambda impl, *args: calls.append(impl) or torch.zeros(1))
    rel_attention_2d(**inputs, impl="cpu")
    assert calls == ["cpu"]
