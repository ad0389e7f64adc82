"""What every op keeps in every implementation and dtype.  Knows no op by name: everything comes from the specs.

The numerical bar and the comparison with the float64 reference are in fused_attn/ops/contract.py;
tests/test_contract_catches.py shows that broken kernels fail these checks.
"""

import random
import re
import shutil
import subprocess
import sys
from functools import partial

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fused_attn import _extension
from fused_attn.ops import SPECS
from fused_attn.ops.contract import convert, differentiable, draw_grad_out, evaluate, numeric_mismatches

CAPABILITIES = _extension.CPU_CAPABILITIES
# On the CPU; "triton" joins where there is a GPU, and runs in the interpreter in tests/ops/.
DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
KERNELS = {"cpu": ["cpu"], "cuda": ["triton"]}


def cases(kernels_only=True, samples=lambda spec: spec.samples):
    for device in DEVICES:
        for spec in SPECS:
            for impl in KERNELS[device] if kernels_only else spec.implementations:
                if impl in spec.implementations:
                    for sample in samples(spec):
                        yield pytest.param(spec, impl, sample, device, id=f"{spec.name}-{impl}-{device}-{sample.name}")


def small(spec):
    return [sample for sample in spec.samples if sample.small]


def first(spec):
    return spec.samples[:1]


def bind(spec, impl):
    return partial(spec.function, impl=impl)


def require(spec, impl, inputs):
    reason = spec.reason(impl, inputs)
    if reason is not None:
        pytest.skip(reason)


@pytest.fixture
def unwritten_memory_is_nan():
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def capability():
    best = _extension.cpu_capability()
    yield _extension.set_cpu_capability
    _extension.set_cpu_capability(best)


def test_the_extension_is_there_where_a_compiler_is():
    if shutil.which("c++") or shutil.which("g++"):
        assert _extension.available(), _extension.reason()


@pytest.mark.parametrize(("spec", "impl", "sample", "device"), cases())
@pytest.mark.usefixtures("unwritten_memory_is_nan")
def test_numerics(spec, impl, sample, device):
    for dtype in spec.dtypes:
        inputs = sample.inputs(dtype, device)
        require(spec, impl, inputs)
        assert numeric_mismatches(spec, bind(spec, impl), inputs) == [], dtype


@pytest.mark.parametrize("name", CAPABILITIES[:-1])
@pytest.mark.parametrize(("spec", "impl", "sample", "device"), [case for case in cases() if case.values[1] == "cpu"])
def test_numerics_of_lower_instruction_sets(spec, impl, sample, device, name, capability):
    if CAPABILITIES.index(name) >= CAPABILITIES.index(_extension.cpu_capability()):
        pytest.skip(f"this processor's best is {_extension.cpu_capability()}")
    capability(name)
    inputs = sample.inputs(torch.float32, device)
    grad_out = draw_grad_out(spec, inputs)
    with_best = evaluate(bind(spec, "reference"), convert(inputs, torch.float64), grad_out.double())
    results = evaluate(bind(spec, impl), inputs, grad_out)
    # The reference runs on this processor's best instruction set, so it is no measure here: float32's own precision,
    # over sums of N terms, is.
    for key, expected in with_best.items():
        error = (results[key].double() - expected).nan_to_num(0.0, 0.0, 0.0)
        finite = expected[expected.isfinite()]
        if finite.numel():
            assert error[expected.isfinite()].abs().max() <= 1e-5 * max(1.0, float(finite.abs().max())), key


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.name)
@pytest.mark.parametrize("impl", KERNELS["cpu"])
@settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(seed=st.integers(0, 2**32 - 1))
def test_numerics_of_random_calls(spec, impl, seed):
    sample = spec.fuzz(random.Random(seed))
    inputs = sample.inputs(torch.float32)
    assert numeric_mismatches(spec, bind(spec, impl), inputs) == [], sample.name


@pytest.mark.parametrize(("spec", "impl", "sample", "device"), cases(samples=small))
def test_gradients_of_the_reference_by_finite_differences(spec, impl, sample, device):
    if impl != KERNELS["cpu"][0]:
        pytest.skip("once is enough")
    inputs = sample.inputs(torch.float64)
    names = differentiable(inputs)

    def call(*tensors):
        torch.manual_seed(0)
        return spec.function(**{**inputs, **dict(zip(names, tensors, strict=True))}, impl="reference")

    leaves = [inputs[name].detach().clone().requires_grad_() for name in names]
    assert torch.autograd.gradcheck(call, leaves, fast_mode=True)


@pytest.mark.parametrize(("spec", "impl", "sample", "device"), cases(samples=small))
def test_operators_are_registered_correctly(spec, impl, sample, device):
    inputs = sample.inputs(torch.float32, device)
    require(spec, impl, inputs)
    for name in differentiable(inputs):
        inputs[name] = inputs[name].detach().requires_grad_()
    forward, *others = spec.operators(impl, inputs)
    torch.library.opcheck(*forward)
    for operator, arguments in others:
        torch.library.opcheck(operator, arguments, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize(("spec", "impl", "sample", "device"), cases(samples=first))
def test_compiles_whole(spec, impl, sample, device, backend):
    inputs = sample.inputs(torch.float32, device)
    require(spec, impl, inputs)
    torch._dynamo.reset()
    compiled = torch.compile(bind(spec, impl), fullgraph=True, backend=backend)
    grad_out = draw_grad_out(spec, inputs)
    expected = evaluate(bind(spec, impl), inputs, grad_out)
    for name, value in evaluate(compiled, inputs, grad_out).items():
        torch.testing.assert_close(value, expected[name])


@pytest.mark.parametrize(("spec", "impl", "sample", "device"), cases(samples=first))
def test_compiles_for_many_shapes_at_once(spec, impl, sample, device):
    torch._dynamo.reset()
    compiled = torch.compile(bind(spec, impl), fullgraph=True, backend="aot_eager", dynamic=True)
    for other in spec.samples[2:6]:
        inputs = other.inputs(torch.float32, device)
        require(spec, impl, inputs)
        grad_out = draw_grad_out(spec, inputs)
        expected = evaluate(bind(spec, impl), inputs, grad_out)
        for name, value in evaluate(compiled, inputs, grad_out).items():
            torch.testing.assert_close(value, expected[name])


@pytest.mark.parametrize(("spec", "impl", "sample", "device"), cases())
def test_same_bits_at_every_run_and_number_of_threads(spec, impl, sample, device):
    inputs = sample.inputs(torch.float32, device)
    require(spec, impl, inputs)
    grad_out = draw_grad_out(spec, inputs)
    expected = evaluate(bind(spec, impl), inputs, grad_out)
    for run in range(5):
        torch.set_num_threads(1 + run % 2)
        for name, value in evaluate(bind(spec, impl), inputs, grad_out).items():
            assert torch.equal(value.nan_to_num(7.0), expected[name].nan_to_num(7.0)), (name, run)


@pytest.mark.parametrize(("spec", "impl", "sample", "device"), cases())
def test_inputs_are_not_changed(spec, impl, sample, device):
    inputs = sample.inputs(torch.float32, device)
    require(spec, impl, inputs)
    before = {name: inputs[name].clone() for name in differentiable(inputs)}
    evaluate(bind(spec, impl), inputs, draw_grad_out(spec, inputs))
    for name, value in before.items():
        assert torch.equal(inputs[name].nan_to_num(7.0), value.nan_to_num(7.0)), name


@pytest.mark.parametrize(("spec", "impl", "sample", "device"), cases(samples=small))
def test_a_gradient_is_computed_for_each_input_alone(spec, impl, sample, device):
    inputs = sample.inputs(torch.float32, device)
    require(spec, impl, inputs)
    grad_out = draw_grad_out(spec, inputs)
    expected = evaluate(bind(spec, impl), inputs, grad_out)
    for name in differentiable(inputs):
        leaf = inputs[name].detach().requires_grad_()
        torch.manual_seed(0)
        out = spec.function(**{**inputs, name: leaf}, impl=impl)
        assert torch.equal(torch.autograd.grad(out, leaf, grad_out)[0], expected[f"grad_{name}"]), name


@pytest.mark.parametrize(("spec", "impl", "sample", "device"), cases(samples=small))
def test_second_derivative_is_refused(spec, impl, sample, device):
    inputs = sample.inputs(torch.float32, device)
    require(spec, impl, inputs)
    name = differentiable(inputs)[0]
    leaf = inputs[name].detach().requires_grad_()
    out = spec.function(**{**inputs, name: leaf}, impl=impl)
    (grad,) = torch.autograd.grad(out.square().sum(), leaf, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative; use impl='reference'"):
        grad.sum().backward()


@pytest.mark.parametrize(("spec", "impl", "sample", "device"), cases(samples=first))
def test_autocast_computes_in_its_dtype(spec, impl, sample, device):
    inputs = sample.inputs(torch.float32, device)
    require(spec, impl, inputs)
    with torch.autocast(device, torch.bfloat16):
        out = spec.function(**inputs, impl=impl)
    assert torch.equal(out, spec.function(**convert(inputs, torch.bfloat16), impl=impl))


@pytest.mark.parametrize(
    ("spec", "bad"),
    [pytest.param(spec, bad, id=f"{spec.name}-{bad.name}") for spec in SPECS for bad in spec.bad_inputs],
)
def test_bad_input_gets_a_clear_error(spec, bad):
    with pytest.raises(bad.error) as caught:
        spec.function(**bad.make())
    assert re.search(bad.match, str(caught.value)), str(caught.value)


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.name)
def test_a_named_implementation_runs_or_says_why_not(spec):
    inputs = spec.samples[0].inputs(torch.float32)
    assert spec.reason("reference", inputs) is None
    for impl in spec.implementations:
        reason = spec.reason(impl, inputs)
        if reason is None:
            spec.function(**inputs, impl=impl)
        else:
            with pytest.raises(RuntimeError, match=re.escape(reason)):
                spec.function(**inputs, impl=impl)


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.name)
def test_without_the_extension_the_cpu_kernel_is_refused(spec, monkeypatch):
    monkeypatch.setattr(_extension, "_REASON", "it was not built")
    inputs = spec.samples[0].inputs(torch.float32)
    with pytest.raises(RuntimeError, match=r"impl='cpu' cannot run: .*it was not built"):
        spec.function(**inputs, impl="cpu")
    # auto then says nothing and runs the reference: it promises the best that can run.
    assert torch.equal(spec.function(**inputs), spec.function(**inputs, impl="reference"))


MEMORY = """
import resource, sys, torch
from functools import partial
from fused_attn.ops import SPECS
from fused_attn.ops.contract import evaluate
torch.set_num_threads(2)
spec = next(spec for spec in SPECS if spec.name == sys.argv[1])
shape = spec.shape(sys.argv[2])
inputs = shape.inputs(torch.float32)
small = next(sample for sample in spec.samples if sample.small).inputs(torch.float32)
call = partial(spec.function, impl="cpu")
evaluate(call, small, torch.ones_like(evaluate(call, small)["out"]))
grad_out = torch.ones(*inputs["query"].shape[:-1], inputs["value"].shape[-1])
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
evaluate(call, inputs, grad_out)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024)
"""


@pytest.mark.parametrize(
    ("spec", "shape"),
    [
        pytest.param(spec, shape, id=f"{spec.name}-{shape.name}")
        for spec in SPECS
        for shape in (*spec.shapes[:1], *spec.growth[1:3])
    ],
)
def test_peak_memory_stays_within_the_limit(spec, shape):
    result = subprocess.run([sys.executable, "-c", MEMORY, spec.name, shape.name], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    # Threads have 4 MiB of scratch each at the most at these sizes; the N x N map of one head at 64x64 has 64 MiB.
    assert int(result.stdout) <= shape.memory_limit + 8 * 2**20
