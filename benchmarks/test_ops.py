"""The cases of ``fused-attn bench`` under pytest-benchmark, so that two versions can be compared.

Run from the repository root: ``pytest benchmarks`` (``-k "rel_attention_2d and 32x32 and both"`` chooses), with
``--benchmark-save=NAME`` in one version, and ``--benchmark-compare --benchmark-compare-fail=median:10%`` in the next.
"""

from __future__ import annotations

import pytest
import torch

from fused_attn.bench import measure
from fused_attn.bench.runner import DTYPES, Measurement, Options, provider_names
from fused_attn.ops import SPECS
from fused_attn.ops._floor import declarations


def pytest_generate_tests(metafunc):
    device = metafunc.config.getoption("--device")
    cases = [
        pytest.param(spec, shape, name, each, id=f"{spec.name}-{shape.name}-{name}-{each}")
        for spec in SPECS
        for shape in ((spec.gpu_shapes if device == "cuda" else ()) or spec.shapes)
        for name in provider_names(spec)
        for each in measure.passes_of(spec, name, device)
    ]
    # Of one case and provider after the other, so that it is checked once.
    metafunc.parametrize(("spec", "shape", "name", "each"), cases)


@pytest.fixture(scope="session")
def checked():
    """Checks each provider of a case once; returns its function and the calls, or skips or fails with the reason."""
    last: dict = {}

    def check(spec, shape, name, options):
        key = spec.name, shape.name, name
        if key not in last:
            last.clear()
            measurement = Measurement(spec, shape, "shape", options)
            last[key] = measurement, *measurement.check()
        measurement, functions, calls = last[key]
        if name in measurement.refused:
            status, reason = measurement.refused[name]
            (pytest.skip if status == "not run" else pytest.fail)(f"{status}: {reason}")
        return functions[name], calls

    return check


def test_op(benchmark, checked, request, spec, shape, name, each):
    option = request.config.getoption
    if option("--threads"):
        torch.set_num_threads(option("--threads"))
    measure.keep_freed_memory()
    options = Options(dtype=DTYPES[option("--dtype")], device=option("--device"), providers=(name,))
    function, calls = checked(spec, shape, name, options)
    benchmark.group = f"{spec.name}, {shape.name}, {each}"
    number = 0

    def call():
        """What the next round runs, on the next inputs; not timed."""
        nonlocal number
        inputs, grad_out = calls[number % len(calls)]
        number += 1
        if each == "fwd":
            return (function, inputs), {}
        variables = declarations.leaves(inputs)
        inputs = declarations.with_tensors(inputs, variables)
        if each == "bwd":
            return (backward, {"out": function(**inputs), "variables": variables, "grad_out": grad_out}), {}
        return (both, {"inputs": inputs, "variables": variables, "grad_out": grad_out}), {}

    def backward(out, variables, grad_out):
        torch.autograd.grad(out, list(variables.values()), grad_out)

    def both(inputs, variables, grad_out):
        backward(function(**inputs), variables, grad_out)

    def run(target, arguments):
        with torch.set_grad_enabled(each != "fwd"):
            target(**arguments)
        if options.device == "cuda":
            torch.cuda.synchronize()

    least, longest = option("--benchmark-min-rounds"), float(option("--benchmark-max-time"))
    seconds = measure.time_once(function, calls[0], (each,))[each]
    rounds = max(least, min(1000, int(longest / max(seconds, 1e-6))))
    benchmark.pedantic(run, setup=call, rounds=rounds, warmup_rounds=len(calls))
