"""What an op's ``spec.py`` declares, and the numerical bar every implementation has to meet.

``tests/test_op_contract.py`` and the benchmarks know no op by name.  They read ``SPECS`` (in
``fused_attn/ops/__init__.py``), so a new op is one new folder and one new line there.
"""

from __future__ import annotations

import math
import random
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

#: Makes the keyword arguments of one call, drawing from PyTorch's CPU generator.
MakeInputs = Callable[[torch.dtype, torch.device], dict[str, Any]]

# --- declarations -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sample:
    """One valid call of an op.

    ``small`` samples also go through what is slow per element: gradcheck in float64, opcheck, ``torch.compile``
    and the Triton interpreter.
    """

    name: str
    make: MakeInputs
    small: bool = False

    def inputs(self, dtype: torch.dtype, device: torch.device | str = "cpu") -> dict[str, Any]:
        """Fresh keyword arguments; the same values at every call, because the name is the seed."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(zlib.crc32(self.name.encode()))
            return self.make(dtype, torch.device(device))


@dataclass(frozen=True)
class BadInput:
    """One invalid call, the exception it must raise and a regular expression its message must match."""

    name: str
    make: Callable[[], dict[str, Any]]
    error: type[Exception]
    match: str


@dataclass(frozen=True)
class Shape(Sample):
    """One benchmark case, with the least work that any implementation must do for it.

    FLOPs are those of the products; bytes are every input read and every output written once, in float32.
    ``memory_limit`` bounds what a fused implementation may hold beyond the inputs while it runs forward and
    backward in float32, in bytes.
    """

    flops_forward: int = 0
    flops_backward: int = 0
    bytes_forward: int = 0
    bytes_backward: int = 0
    memory_limit: int = 0


@dataclass(frozen=True)
class Peer:
    """What a user would otherwise write.

    ``build(inputs)`` does what can be done once (index tables, one-hot features, compilation) and returns a callable
    over the same keyword arguments.  It raises ``NotImplementedError`` with the reason when the peer cannot run
    the case.
    """

    name: str
    build: Callable[[Mapping[str, Any]], Callable[..., Tensor]]


@dataclass(frozen=True)
class OpSpec:
    """Everything the contract test and the benchmark runner need to know about one op."""

    name: str
    #: the public function; it takes the inputs and ``impl`` as keywords
    function: Callable[..., Tensor]
    #: implementation name -> why it cannot run on the inputs, or None; in the order ``auto`` prefers them
    implementations: Mapping[str, Callable[[Mapping[str, Any]], str | None]]
    samples: tuple[Sample, ...]
    bad_inputs: tuple[BadInput, ...]
    #: draws one random valid call for the shape fuzz
    fuzz: Callable[[random.Random], Sample]
    #: the registered operators an implementation consists of, with arguments: (impl, inputs) -> ((operator, args), ...)
    operators: Callable[[str, Mapping[str, Any]], tuple[tuple[Any, tuple], ...]]
    shapes: tuple[Shape, ...] = ()
    #: the same call at growing sizes, smallest first: shows how memory grows
    growth: tuple[Shape, ...] = ()
    peers: tuple[Peer, ...] = ()
    #: dtypes every implementation must pass the contract in
    dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.bfloat16, torch.float16)
    #: further notes printed by ``fused-attn info``
    notes: Mapping[str, str] = field(default_factory=dict)

    def reason(self, impl: str, inputs: Mapping[str, Any]) -> str | None:
        """Why ``impl`` cannot run on ``inputs``; None when it can."""
        return self.implementations[impl](inputs)

    def shape(self, name: str) -> Shape:
        """The benchmark case of that name."""
        for shape in (*self.shapes, *self.growth):
            if shape.name == name:
                return shape
        raise KeyError(f"{self.name} has no shape {name!r}")


# --- evaluation -------------------------------------------------------------------------------------------------


def differentiable(inputs: Mapping[str, Any]) -> list[str]:
    """Names of the arguments that receive a gradient: the floating-point tensors."""
    return [name for name, value in inputs.items() if isinstance(value, Tensor) and value.is_floating_point()]


def convert(inputs: Mapping[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """The same call with its floating-point tensors in ``dtype``."""
    names = set(differentiable(inputs))
    return {name: value.to(dtype) if name in names else value for name, value in inputs.items()}


def evaluate(
    function: Callable[..., Tensor],
    inputs: Mapping[str, Any],
    grad_out: Tensor | None = None,
    *,
    seed: int = 0,
) -> dict[str, Tensor]:
    """Call ``function(**inputs)`` and differentiate it.

    Args:
        function: an op or a peer.
        inputs: keyword arguments; they are neither changed nor given a ``.grad``.
        grad_out: gradient of the output; None: forward only, without autograd.
        seed: of PyTorch's generators, so that two implementations draw the same dropout mask.

    Returns:
        ``"out"`` and, for every differentiable argument, ``"grad_<name>"``.
    """
    devices = {value.device for value in inputs.values() if isinstance(value, Tensor) and value.is_cuda}
    with torch.random.fork_rng(devices=sorted(device.index for device in devices)):
        torch.manual_seed(seed)
        if grad_out is None:
            with torch.no_grad():
                return {"out": function(**inputs)}
        names = differentiable(inputs)
        leaves = {name: inputs[name].detach().requires_grad_() for name in names}
        out = function(**{**inputs, **leaves})
        grads = torch.autograd.grad(out, list(leaves.values()), grad_out, allow_unused=True)
    results = {"out": out.detach()}
    for name, grad in zip(names, grads, strict=True):
        results[f"grad_{name}"] = torch.zeros_like(leaves[name]) if grad is None else grad
    return results


def draw_grad_out(spec: OpSpec, inputs: Mapping[str, Any], seed: int = 1) -> Tensor:
    """A random gradient of the output, in the dtype and on the device of the output."""
    out = evaluate(lambda **kwargs: spec.function(**kwargs, impl="reference"), inputs)["out"]
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(out.shape, generator=generator).to(out)


def ulp(value: float, dtype: torch.dtype) -> float:
    """Distance from ``value`` to the next larger number of ``dtype``."""
    if value == 0.0 or not math.isfinite(value):
        return 0.0
    exponent = math.frexp(value)[1] - 1
    return max(torch.finfo(dtype).eps * 2.0**exponent, torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps)


def _largest(tensor: Tensor) -> float:
    return float(tensor.abs().max()) if tensor.numel() else 0.0


def mismatches(
    actual: Mapping[str, Tensor], same_dtype: Mapping[str, Tensor], oracle: Mapping[str, Tensor], factor: float = 2.0
) -> list[str]:
    """Outputs and gradients that miss the bar, in words; empty when all meet it.

    The bar: the largest error against ``oracle`` (the reference in float64) is at most ``factor`` times that of
    ``same_dtype`` (the reference in the dtype of ``actual``) plus 2 ulp of the largest value.  A tensor that cancels
    to less than a thousandth of the largest (the gradient of the query when there is one key) has no scale of its
    own: 16 float32 ulp of the largest of all outputs and gradients are its bar, as sums are accumulated in float32.
    Where ``same_dtype`` is NaN or infinite, so must be the output, exactly, and a gradient, in either way: whether
    infinities cancel there depends on the order of a sum.
    """
    found = []
    scale = max((_largest(tensor[tensor.isfinite()]) for tensor in oracle.values()), default=0.0)
    for name, expected in oracle.items():
        value, reference = actual[name], same_dtype[name]
        if value.shape != expected.shape:
            found.append(f"{name}: shape {tuple(value.shape)}, expected {tuple(expected.shape)}")
            continue
        if value.dtype != reference.dtype:
            found.append(f"{name}: dtype {value.dtype}, expected {reference.dtype}")
            continue
        wild = ~reference.isfinite()
        value, reference, expected = value.double(), reference.double(), expected.double()
        same = (value == reference) | (value.isnan() & reference.isnan())
        if name != "out":
            same = ~value.isfinite()
        if not bool(same[wild].all()):
            found.append(f"{name}: {int(wild.sum())} elements must be NaN or infinite as in the reference")
        # The oracle can be finite where the reference overflowed in its dtype, never the other way round.
        tame = ~wild & expected.isfinite()
        value, reference, expected = value[tame], reference[tame], expected[tame]
        if not bool(value.isfinite().all()):
            found.append(f"{name}: {int((~value.isfinite()).sum())} of {value.numel()} elements are not finite")
            continue
        dtype = same_dtype[name].dtype
        error, allowed = _largest(value - expected), _largest(reference - expected)
        bar = factor * allowed + 2 * ulp(_largest(expected), dtype)
        if _largest(expected) < 1e-3 * scale:
            bar = max(bar, 16 * ulp(scale, torch.float32))
        if error > bar:
            found.append(
                f"{name}: error {error:.3g} exceeds {bar:.3g} (the reference in {dtype} errs by {allowed:.3g}, "
                f"largest value {_largest(expected):.3g})"
            )
    return found


def numeric_mismatches(
    spec: OpSpec,
    function: Callable[..., Tensor],
    inputs: Mapping[str, Any],
    *,
    backward: bool = True,
    factor: float = 2.0,
) -> list[str]:
    """:func:`mismatches` of ``function`` (an implementation or a peer of ``spec``) on ``inputs``."""

    def reference(**kwargs):
        return spec.function(**kwargs, impl="reference")

    # Three gradients of the output: the largest error of a single one, on a small tensor, is half luck.
    grad_outs = [draw_grad_out(spec, inputs, seed) for seed in (1, 2, 3)] if backward else [None]

    def pooled(call, call_inputs, dtype=None):
        draws = [evaluate(call, call_inputs, g if g is None or dtype is None else g.to(dtype)) for g in grad_outs]
        return {name: torch.stack([draw[name] for draw in draws]) for name in draws[0]}

    oracle = pooled(reference, convert(inputs, torch.float64), torch.float64)
    return mismatches(pooled(function, inputs), pooled(reference, inputs), oracle, factor)
