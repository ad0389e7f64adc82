"""The op contract: every op x implementation x dtype of ``SPECS``, on every sample its spec declares.

An implementation is left out only where its own ``can_run`` gives a reason.  The C++ kernels may not be left out
where a compiler is: ``test_extension_is_loaded`` fails then.
"""

import os
import random
import shutil
from functools import partial

import memory_server
import pytest
import torch
from bad_inputs import BAD_INPUTS
from hypothesis import given, settings
from hypothesis import strategies as st
from instruction_sets import instruction_set
from torch.utils.flop_counter import FlopCounterMode

from fused_attn import _extension
from fused_attn.ops import SPECS
from fused_attn.ops._floor.declarations import tensors
from fused_attn.testing import checks

FAST = torch.float32
#: Draws of a sample that a numerical check sees together.
DRAWS = 3


def device_of(impl: str) -> str:
    """Where an implementation is tested: the GPU's on one, if there is one."""
    return "cuda" if impl in ("triton", "cuda") and torch.cuda.is_available() else "cpu"


def _skipped(spec, impl: str, dtype: torch.dtype) -> str | None:
    return spec.reason(impl, spec.samples[0].inputs(dtype, device_of(impl)))


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _draw(spec, impl: str, sample, dtype: torch.dtype, draw: int = 0):
    """Inputs of a sample; the test is skipped where the implementation cannot run them."""
    inputs = sample.inputs(dtype, device_of(impl), draw)
    reason = spec.reason(impl, inputs)
    if reason is not None:
        pytest.skip(f"{spec.name}-{impl}-{_name(dtype)}-{sample.name}: {reason}")
    return inputs


def cases(*, dtypes=None, select=lambda sample: True, reference=False):
    """(spec, impl, maker of one draw of inputs) for every op, implementation, dtype and selected sample."""
    parameters = []
    for spec in SPECS:
        for impl in spec.implementations:
            if impl == "reference" and not reference:
                continue
            for dtype in dtypes or spec.dtypes:
                prefix = f"{spec.name}-{impl}-{_name(dtype)}"
                reason = _skipped(spec, impl, dtype)
                if reason is not None:
                    skip = pytest.mark.skip(reason=f"{prefix}: {reason}")
                    parameters.append(pytest.param(spec, impl, None, marks=skip, id=prefix))
                    continue
                for sample in filter(select, spec.samples):
                    parameters.append(
                        pytest.param(
                            spec,
                            impl,
                            partial(_draw, spec, impl, sample, dtype),
                            id=f"{prefix}-{sample.name}",
                        )
                    )
    return pytest.mark.parametrize(("spec", "impl", "make"), parameters)


def implementations(*, reference=False):
    """(spec, impl) for every op and implementation."""
    parameters = []
    for spec in SPECS:
        for impl in spec.implementations:
            if impl == "reference" and not reference:
                continue
            reason = _skipped(spec, impl, FAST)
            marks = () if reason is None else pytest.mark.skip(reason=f"{spec.name}-{impl}: {reason}")
            parameters.append(pytest.param(spec, impl, marks=marks, id=f"{spec.name}-{impl}"))
    return pytest.mark.parametrize(("spec", "impl"), parameters)


specs = pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.name)


def is_small(sample) -> bool:
    return sample.small


def is_finite(sample) -> bool:
    """Whether NaN and infinities are not part of the sample already."""
    return all(bool(tensor.isfinite().all()) for tensor in tensors(sample.inputs(torch.float32)).values())


# --- what has to be there ---------------------------------------------------------------------------------------


def test_extension_is_loaded():
    compiler = next(filter(None, map(shutil.which, (os.environ.get("CXX") or "c++", "g++", "clang++"))), None)
    if compiler is None and not _extension.available():
        pytest.skip(f"no C++ compiler, and {_extension.reason()}")
    assert _extension.available(), f"{compiler} is there, but the C++ kernels are not loaded: {_extension.reason()}"


@specs
def test_every_implementation_but_the_reference_has_operators(spec):
    inputs = spec.samples[0].inputs(FAST)
    assert "reference" in spec.implementations
    assert spec.reason("reference", inputs) is None
    for impl in spec.implementations:
        if impl != "reference" and spec.reason(impl, spec.samples[0].inputs(FAST, device_of(impl))) is None:
            assert spec.operators(impl, spec.samples[0].inputs(FAST, device_of(impl)))


@specs
def test_samples_are_named_apart_and_repeat(spec):
    assert len({sample.name for sample in spec.samples}) == len(spec.samples)
    bad_inputs = BAD_INPUTS[spec.name]
    assert len({bad.name for bad in bad_inputs}) == len(bad_inputs)
    sample = spec.samples[0]
    first, second = tensors(sample.inputs(FAST)), tensors(sample.inputs(FAST))
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name])


# --- numbers ----------------------------------------------------------------------------------------------------


def has_tiles(spec, impl, inputs) -> bool:
    """Whether there are kernels with matrix tiles here; only attention has them."""
    return (
        impl == "cpu"
        and _extension.cpu_capability() == "amx"
        and any("rel_attention_2d" in str(operator) for operator, _ in spec.operators(impl, inputs))
    )


def on_tiles_too(spec, impl, inputs, check) -> None:
    """``check()`` with the kernels that the call takes, and with those that have matrix tiles."""
    check()
    if has_tiles(spec, impl, inputs):
        with instruction_set("amx"):
            check()


@cases()
def test_numerics(spec, impl, make):
    """The C++ kernels, of every instruction set: what the reference gives is computed once for all."""
    calls = [make(draw=draw) for draw in range(DRAWS)]
    capabilities = _extension.CPU_CAPABILITIES
    if impl == "cpu":
        # Each processor has all below its own.
        for capability in capabilities[: capabilities.index(_extension.cpu_capability()) + 1]:
            if capability == "amx" and not has_tiles(spec, impl, calls[0]):
                continue
            try:
                with instruction_set(capability):
                    checks.check_numerics(spec, impl, *calls)
            except AssertionError as error:
                raise AssertionError(f"{capability}: {error}") from None
    else:
        checks.check_numerics(spec, impl, *calls)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=_name)
@implementations()
def test_numerics_of_random_shapes(spec, impl, dtype):
    @settings(max_examples=60)
    @given(rng=st.randoms(use_true_random=False))
    def fuzz(rng: random.Random):
        sample = spec.fuzz(rng)

        def calls(number: int):
            return [sample.inputs(dtype, device_of(impl), draw) for draw in range(number)]

        def check():
            try:
                checks.check_numerics(spec, impl, *few)
            except AssertionError:
                # Among so many shapes and gradients the worst of a few elements is bad luck now and then.
                checks.check_numerics(spec, impl, *calls(8 * DRAWS))

        try:
            few = calls(DRAWS)
            if spec.reason(impl, few[0]) is None:
                on_tiles_too(spec, impl, few[0], check)
        except Exception as error:
            error.add_note(f"sample: {sample.name}") if hasattr(error, "add_note") else print(sample.name)
            raise

    fuzz()


@cases(dtypes=(FAST,), select=is_small)
def test_layouts_of_the_gradient_of_the_output(spec, impl, make):
    checks.check_grad_out_layouts(spec, impl, make())


@cases(dtypes=(FAST,), select=is_small)
def test_partial_gradients(spec, impl, make):
    checks.check_partial_gradients(spec, impl, make())


@cases(dtypes=(FAST, torch.bfloat16), select=lambda sample: sample.small and is_finite(sample))
def test_nan_and_infinity(spec, impl, make):
    inputs = make()
    on_tiles_too(spec, impl, inputs, lambda: checks.check_non_finite(spec, impl, inputs))


@pytest.mark.parametrize(
    ("spec", "sample"),
    [
        pytest.param(spec, sample, id=f"{spec.name}-{sample.name}")
        for spec in SPECS
        for sample in filter(is_small, spec.samples)
    ],
)
def test_gradcheck_of_the_reference(spec, sample):
    checks.check_gradcheck(spec, sample.inputs(torch.float64))


# --- behaviour --------------------------------------------------------------------------------------------------


@cases(dtypes=(FAST, torch.bfloat16))
def test_same_bits_at_every_run_and_number_of_threads(spec, impl, make):
    checks.check_deterministic(spec, impl, make())


@cases(dtypes=(FAST,))
def test_inputs_are_not_written(spec, impl, make):
    checks.check_inputs_unchanged(spec, impl, make())


@cases(dtypes=(FAST,), select=is_small, reference=True)
def test_explicit_implementation_runs_its_own_operators(spec, impl, make):
    checks.check_runs_its_operators(spec, impl, make())


@specs
def test_implementation_that_cannot_run_says_why(spec):
    for dtype in (FAST, torch.float64):
        inputs = spec.samples[0].inputs(dtype)
        for impl in spec.implementations:
            if spec.reason(impl, inputs) is not None:
                checks.check_refuses(spec, impl, inputs)


@specs
def test_missing_extension_is_an_error_not_a_fallback(spec, monkeypatch):
    monkeypatch.setattr(_extension, "_REASON", "it was taken away")
    inputs = spec.samples[0].inputs(FAST)
    assert "it was taken away" in spec.reason("cpu", inputs)
    checks.check_refuses(spec, "cpu", inputs)
    assert torch.equal(spec.function(**inputs), spec.function(**inputs, impl="reference"))


@pytest.mark.parametrize(
    ("spec", "bad"),
    [pytest.param(spec, bad, id=f"{spec.name}-{bad.name}") for spec in SPECS for bad in BAD_INPUTS[spec.name]],
)
def test_bad_input(spec, bad):
    checks.check_bad_input(spec, bad)


@implementations()
def test_second_derivative(spec, impl):
    checks.check_double_backward(spec, impl, spec.samples[0].inputs(FAST, device_of(impl)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=_name)
@implementations(reference=True)
def test_autocast(spec, impl, dtype):
    for sample in filter(is_small, spec.samples):
        checks.check_autocast(spec, impl, sample.inputs(FAST, device_of(impl)), dtype)


@implementations(reference=True)
def test_checkpoint(spec, impl):
    for sample in filter(is_small, spec.samples):
        checks.check_checkpoint(spec, impl, sample.inputs(FAST, device_of(impl)))


@implementations()
def test_checkpoint_of_a_plain_call_that_is_repeated_within_a_mode(spec, impl):
    """What the two keep has one shape, dtype and device."""
    for sample in filter(is_small, spec.samples):
        inputs = sample.inputs(torch.bfloat16, device_of(impl))
        checks.check_checkpoint(spec, impl, inputs, lambda: FlopCounterMode(display=False))


# --- PyTorch's machinery ----------------------------------------------------------------------------------------


@cases(dtypes=(FAST,), select=is_small)
def test_operators(spec, impl, make):
    checks.check_operators(spec, impl, make())


@cases(dtypes=(FAST,), select=is_small, reference=True)
def test_compile(spec, impl, make):
    checks.check_compiled(spec, impl, make(), backend="aot_eager")


@implementations()
def test_compile_with_dynamic_shapes(spec, impl):
    calls = [shape.inputs(FAST, device_of(impl)) for shape in spec.growth[:2]]
    checks.check_compiled(spec, impl, *calls, backend="aot_eager", dynamic=True)


@implementations()
def test_compile_with_inductor(spec, impl):
    checks.check_compiled(spec, impl, spec.samples[0].inputs(FAST, device_of(impl)), backend="inductor")


# --- memory -----------------------------------------------------------------------------------------------------


@implementations()
def test_nothing_quadratic_is_allocated(spec, impl):
    torch.set_num_threads(2)
    for shape in spec.growth[-2:]:
        checks.check_memory(spec, impl, shape, device_of(impl), memory_server.peak_extra_bytes)
