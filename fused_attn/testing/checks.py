"""The checks of the op contract, each a function that raises AssertionError with what is wrong.

They know an op only through its ``OpSpec``.  ``test_op_contract.py`` runs them on every implementation,
``test_contract_catches.py`` on implementations broken on purpose.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch._dynamo.testing
import torch.utils.checkpoint
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from ..bench import measure
from ..ops._floor.declarations import (
    OpSpec,
    Shape,
    convert,
    differentiable,
    leaves,
    seed_generators,
    tensors,
    with_tensors,
)
from .numerics import draw_grad_out, evaluate, mismatches, numeric_mismatches

#: What an RSS measurement is off by: code paged in, stacks of threads.
RSS_NOISE = 4 * 2**20
#: cuBLAS takes 32 MiB at its first product on a GPU.
GPU_NOISE = 33 * 2**20
#: Bytes of what the reference gave that a test process keeps: more than all samples of one op take.
REMEMBERED = 2**28


class Memory:
    """Results by key; the oldest go when they are more than ``limit`` bytes."""

    def __init__(self, limit: int) -> None:
        self.limit, self.bytes, self.results = limit, 0, {}

    def __call__(self, key: Any, compute: Callable[[], Any]) -> Any:
        if key in self.results:
            return self.results[key][0]
        result = compute()
        size = sum(tensor.nbytes for tensors in result[1:] for tensor in tensors.values())
        self.results[key] = result, size
        self.bytes += size
        while self.bytes > self.limit:
            self.bytes -= self.results.pop(next(iter(self.results)))[1]
        return result


#: The reference of a sample is the same for every instruction set.
remember = Memory(REMEMBERED)


def bound(spec: OpSpec, impl: str) -> Callable[..., Tensor]:
    """The public function with ``impl`` chosen."""

    def function(**inputs):
        return spec.function(**inputs, impl=impl)

    return function


@contextlib.contextmanager
def nan_in_unwritten_memory():
    """Within: every allocation through PyTorch starts as NaN, so that an element that no kernel writes is noticed."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    filled = torch.utils.deterministic.fill_uninitialized_memory
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.utils.deterministic.fill_uninitialized_memory = filled
        torch.use_deterministic_algorithms(False)


def _bits(tensor: Tensor) -> Tensor:
    # What has one element or none is contiguous whatever its strides, with which it cannot be viewed as bytes.
    return tensor.contiguous().as_strided((tensor.numel(),), (1,)).view(torch.uint8)


def _require(found: list[str]) -> None:
    assert not found, "; ".join(found)


def _error(call: Callable[[], Any]) -> Exception | None:
    try:
        call()
    except Exception as error:
        return error
    return None


# --- numbers ----------------------------------------------------------------------------------------------------


def check_numerics(spec: OpSpec, impl: str, *calls: Mapping[str, Any]) -> None:
    """Output and every gradient meet the bar of ``numerics.mismatches``, whatever unwritten memory holds."""
    with nan_in_unwritten_memory():
        _require(numeric_mismatches(spec, bound(spec, impl), *calls, remember=remember))


def check_grad_out_layouts(spec: OpSpec, impl: str, inputs: Mapping[str, Any]) -> None:
    """The gradient of the output may come expanded (as from ``sum()``), permuted or strided in memory.

    Three draws of it are judged together, as :func:`numeric_mismatches` does.
    """
    grad_outs = [draw_grad_out(spec, inputs, 1 + i) for i in range(3)]
    reverse = list(range(grad_outs[0].dim()))[::-1]
    layouts = {
        "expanded": lambda grad: grad.flatten()[:1].expand(grad.shape) if grad.numel() else grad,
        "reversed axes": lambda grad: grad.permute(reverse).contiguous().permute(reverse),
        "strided": lambda grad: grad.repeat_interleave(2, -1)[..., ::2],
    }

    def pooled(chosen: str, layout: Callable[[Tensor], Tensor], dtype: torch.dtype | None = None) -> dict[str, Tensor]:
        call = inputs if dtype is None else convert(inputs, dtype)
        results = [evaluate(bound(spec, chosen), call, layout(grad).to(dtype or grad.dtype)) for grad in grad_outs]
        return {name: torch.stack([result[name] for result in results]) for name in results[0]}

    for name, layout in layouts.items():
        oracle = pooled("reference", layout, torch.float64)
        found = mismatches(pooled(impl, layout), pooled("reference", layout), oracle)
        _require([f"grad_out {name}: {text}" for text in found])


def check_partial_gradients(spec: OpSpec, impl: str, inputs: Mapping[str, Any]) -> None:
    """Asking for one gradient alone gives the bits that asking for all gives; without any, nothing is recorded."""
    grad_out = draw_grad_out(spec, inputs)
    everything = evaluate(bound(spec, impl), inputs, grad_out)
    for name, leaf in leaves(inputs).items():
        seed_generators(0)
        out = spec.function(**with_tensors(inputs, {name: leaf}), impl=impl)
        (grad,) = torch.autograd.grad(out, [leaf], grad_out)
        assert torch.equal(_bits(grad), _bits(everything[f"grad_{name}"])), f"grad_{name} alone differs"
    assert not spec.function(**inputs, impl=impl).requires_grad, "out requires a gradient that no input asked for"


def check_non_finite(spec: OpSpec, impl: str, inputs: Mapping[str, Any]) -> None:
    """NaN and infinities in any argument reach the outputs they reach in the reference; NaN, the gradients too.

    16-bit kernels of GPUs take the mean of the weights' gradients from the output, which is NaN also where the weight
    of a value that is NaN was dropped, or its key hidden by segments: their gradients may be NaN in more places.
    """
    drops = inputs.get("dropout_p") or inputs.get("key_segments") is not None
    exact = impl == "cpu" or not drops or next(iter(tensors(inputs).values())).dtype == torch.float32
    for name, tensor in differentiable(inputs).items():
        if tensor.numel() == 0:
            continue
        for value in (float("nan"), float("inf"), float("-inf")):
            planted = tensor.clone()
            planted[(0,) * planted.dim()] = value
            call = with_tensors(inputs, {name: planted})
            # An infinity times a zero weight is NaN or left out depending on the order of a sum: outputs only.
            found = numeric_mismatches(spec, bound(spec, impl), call, backward=value != value)
            if not exact:
                found = [text for text in found if not re.fullmatch(r"grad_\w+: .* elements are not finite", text)]
            _require([f"{value} in {name}: {text}" for text in found])


def check_gradcheck(spec: OpSpec, inputs: Mapping[str, Any]) -> None:
    """The reference's gradients are those of finite differences, in float64."""
    inputs = convert(inputs, torch.float64)
    # An infinity has no finite difference: it is kept, and only the other elements are variables.
    variables, rebuild = [], {}
    for name, tensor in differentiable(inputs).items():
        finite = tensor.isfinite()
        variables.append(tensor[finite].clone().requires_grad_())
        rebuild[name] = tensor.contiguous(), finite

    def function(*values):
        seed_generators(0)
        full = {
            name: base.masked_scatter(finite, value)
            for (name, (base, finite)), value in zip(rebuild.items(), values, strict=True)
        }
        return spec.function(**with_tensors(inputs, full), impl="reference")

    assert torch.autograd.gradcheck(function, variables, raise_exception=False), "finite differences disagree"


# --- behaviour --------------------------------------------------------------------------------------------------


def check_deterministic(
    spec: OpSpec, impl: str, inputs: Mapping[str, Any], runs: int = 5, threads: Sequence[int] = (1, 2)
) -> None:
    """The same bits from every run at every number of threads."""
    grad_out = draw_grad_out(spec, inputs)
    expected = None
    for number in threads:
        torch.set_num_threads(number)
        for run in range(runs):
            results = evaluate(bound(spec, impl), inputs, grad_out)
            expected = expected or results
            for name, tensor in results.items():
                assert torch.equal(_bits(tensor), _bits(expected[name])), (
                    f"{name} of run {run + 1} at {number} threads differs from the first run at {threads[0]}"
                )


def check_inputs_unchanged(spec: OpSpec, impl: str, inputs: Mapping[str, Any]) -> None:
    """No tensor argument, nor the gradient of the output, is written to."""
    grad_out = draw_grad_out(spec, inputs)
    tensors = {**differentiable(inputs), "grad_out": grad_out}
    before = {name: tensor.clone() for name, tensor in tensors.items()}
    evaluate(bound(spec, impl), inputs, grad_out)
    for name, tensor in tensors.items():
        assert torch.equal(_bits(tensor), _bits(before[name])), f"{name} was changed"


class _Recorder(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen.add(func)
        return func(*args, **(kwargs or {}))


def check_runs_its_operators(spec: OpSpec, impl: str, inputs: Mapping[str, Any]) -> None:
    """An explicit ``impl`` runs its own registered operators, forward and backward, and no other's."""
    own = {operator for operator, _ in spec.operators(impl, inputs)}
    others = set()
    for name in spec.implementations:
        if name != impl and spec.reason(name, inputs) is None:
            others |= {operator for operator, _ in spec.operators(name, inputs)}
    grad_out = draw_grad_out(spec, inputs)
    with _Recorder() as recorder:
        evaluate(bound(spec, impl), inputs, grad_out)
    assert own <= recorder.seen, f"impl={impl!r} did not run {sorted(map(str, own - recorder.seen))}"
    assert not others & recorder.seen, f"impl={impl!r} ran {sorted(map(str, others & recorder.seen))}"


def check_refuses(spec: OpSpec, impl: str, inputs: Mapping[str, Any]) -> None:
    """An explicit ``impl`` that cannot run raises RuntimeError with the reason, and does not fall back."""
    reason = spec.reason(impl, inputs)
    assert reason, f"{impl} can run"
    error = _error(lambda: spec.function(**inputs, impl=impl))
    assert error is not None, f"impl={impl!r} ran, though {reason}"
    assert type(error) is RuntimeError, f"expected RuntimeError, got {error!r}"
    assert f"impl={impl!r} cannot run: {reason}" in str(error), f"the reason is missing from: {error}"


@dataclass(frozen=True)
class BadInput:
    """One invalid call, the exception it must raise and a regular expression its message must match."""

    name: str
    make: Callable[[], dict[str, Any]]
    error: type[Exception]
    match: str


def check_bad_input(spec: OpSpec, bad: BadInput) -> None:
    """The call raises exactly the declared error, whose message matches."""
    error = _error(lambda: spec.function(**bad.make()))
    assert error is not None, f"nothing raised; expected {bad.error.__name__} matching {bad.match!r}"
    assert type(error) is bad.error, f"expected {bad.error.__name__}, got {error!r}"
    assert re.search(bad.match, str(error)), f"{str(error)!r} does not match {bad.match!r}"


def check_double_backward(spec: OpSpec, impl: str, inputs: Mapping[str, Any]) -> None:
    """The gradient of a penalty on gradients, to 1e-5 of its largest value: the first ones bring in their errors."""

    def of_penalty(inputs: Mapping[str, Any], impl: str) -> dict[str, Tensor]:
        variables = leaves(inputs)
        out = spec.function(**with_tensors(inputs, variables), impl=impl)
        grads = torch.autograd.grad(out.square().sum(), list(variables.values()), create_graph=True)
        total = sum(grad.square().sum() for grad in grads)
        return dict(zip(variables, torch.autograd.grad(total, list(variables.values())), strict=True))

    expected = of_penalty(convert(inputs, torch.float64), "reference")
    for name, grad in of_penalty(inputs, impl).items():
        error, largest = (grad.double() - expected[name]).abs().max().item(), expected[name].abs().max().item()
        assert error <= 1e-5 * largest, f"{name}: error {error:.3g} where the largest value is {largest:.3g}"


def check_autocast(spec: OpSpec, impl: str, inputs: Mapping[str, Any], dtype: torch.dtype = torch.bfloat16) -> None:
    """Under autocast a float32 call gives the bits of the call on inputs cast as the spec says; its gradients, too."""
    cast = spec.autocast(inputs, dtype)
    grad_out = draw_grad_out(spec, cast)
    expected = evaluate(bound(spec, impl), cast, grad_out)
    device_type = grad_out.device.type

    def function(**kwargs):
        with torch.autocast(device_type, dtype=dtype):
            return spec.function(**kwargs, impl=impl)

    actual = evaluate(function, inputs, grad_out)
    assert actual["out"].dtype == grad_out.dtype, f"out has dtype {actual['out'].dtype} under autocast to {dtype}"
    for name, tensor in actual.items():
        assert name == "out" or tensor.dtype == torch.float32, f"{name} has dtype {tensor.dtype}"
        same = torch.equal(_bits(tensor.to(expected[name].dtype)), _bits(expected[name]))
        assert same, f"{name} differs from the call on cast inputs"


def check_checkpoint(
    spec: OpSpec,
    impl: str,
    inputs: Mapping[str, Any],
    again: Callable[[], contextlib.AbstractContextManager] = contextlib.nullcontext,
) -> None:
    """``torch.utils.checkpoint`` around the op, in both of its forms, gives the bits of the call without it.

    The call is repeated, and differentiated, within ``again()``.
    """
    grad_out = draw_grad_out(spec, inputs)
    expected = evaluate(bound(spec, impl), inputs, grad_out)
    for reentrant in (False, True):
        variables = leaves(inputs)

        def function(*tensors, names=tuple(variables)):
            return spec.function(**with_tensors(inputs, dict(zip(names, tensors, strict=True))), impl=impl)

        torch.manual_seed(0)
        out = torch.utils.checkpoint.checkpoint(function, *variables.values(), use_reentrant=reentrant)
        with again():
            out.backward(grad_out)
        assert torch.equal(_bits(out.detach()), _bits(expected["out"])), f"out differs, use_reentrant={reentrant}"
        for name, leaf in variables.items():
            grad = torch.zeros_like(leaf) if leaf.grad is None else leaf.grad
            same = torch.equal(_bits(grad), _bits(expected[f"grad_{name}"]))
            assert same, f"grad_{name} differs, use_reentrant={reentrant}"


# --- PyTorch's machinery ----------------------------------------------------------------------------------------


def check_operators(spec: OpSpec, impl: str, inputs: Mapping[str, Any]) -> None:
    """``torch.library.opcheck``: schema, autograd registration, fake kernels, AOT dispatch with dynamic shapes."""
    for operator, args in spec.operators(impl, with_tensors(inputs, leaves(inputs))):
        results = torch.library.opcheck(operator, args, raise_exception=False)
        failed = {test: result for test, result in results.items() if result != "SUCCESS"}
        assert not failed, f"{operator}: {failed}"


def check_compiled(spec: OpSpec, impl: str, *calls: Mapping[str, Any], backend: str, dynamic: bool = False) -> None:
    """``torch.compile`` takes the whole function into one graph; forward and backward meet the numerical bar.

    With ``dynamic`` all ``calls``, of different sizes, run in one compilation.
    """
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend(backend)
    try:
        function = torch.compile(bound(spec, impl), fullgraph=True, dynamic=dynamic, backend=counter)
        _require(numeric_mismatches(spec, function, calls[0]))
        compilations = counter.frame_count
        for inputs in calls[1:]:
            _require(numeric_mismatches(spec, function, inputs))
        assert counter.frame_count == compilations or not dynamic, "another size was compiled again"
    except torch._dynamo.exc.TorchDynamoException as error:
        raise AssertionError(f"not one graph: {error}") from error
    finally:
        torch._dynamo.reset()


# --- memory -----------------------------------------------------------------------------------------------------


def check_memory(
    spec: OpSpec, impl: str, shape: Shape, device: str = "cpu", peak: Callable[..., int] = measure.peak_extra_bytes
) -> None:
    """Forward and backward hold no more beyond the inputs than ``shape.memory_limit``: nothing N x N.

    ``peak`` measures; see :func:`measure.peak_extra_bytes`.
    """
    extra = peak(spec.name, shape.name, impl, device=device)
    noise = RSS_NOISE if device == "cpu" else GPU_NOISE
    assert extra <= shape.memory_limit + noise, (
        f"{extra / 2**20:.1f} MiB beyond the inputs, the limit is {shape.memory_limit / 2**20:.1f} MiB"
    )
