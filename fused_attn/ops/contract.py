"""What an op's ``spec.py`` declares, and the numerical bar every implementation has to meet.

``tests/test_op_contract.py`` and the benchmarks know no op by name.  They read ``SPECS`` (in
``fused_attn/ops/__init__.py``), so a new op is one new folder and one new line there.
"""

from __future__ import annotations

import hashlib
import inspect
import math
import random
import zlib
from collections.abc import Callable, Collection, Mapping
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

    def inputs(self, dtype: torch.dtype, device: torch.device | str = "cpu", draw: int = 0) -> dict[str, Any]:
        """Fresh keyword arguments; the same values for the same ``draw``, because the name is the seed."""
        with torch.random.fork_rng(devices=[]):
            seed_generators(zlib.crc32(self.name.encode()) + draw)
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
    backward in float32, in bytes.  ``sizes`` are the arguments of ``OpSpec.make_shape`` that make this case.
    ``memory_only`` cases are too large for the reference, so that nothing can be checked and timed on them.
    """

    flops_forward: int = 0
    flops_backward: int = 0
    bytes_forward: int = 0
    bytes_backward: int = 0
    memory_limit: int = 0
    sizes: Mapping[str, int] = field(default_factory=dict)
    memory_only: bool = False


@dataclass(frozen=True)
class Peer:
    """What a user would otherwise write.

    ``build(inputs)`` does what can be done once (index tables, one-hot features, compilation) and returns a callable
    over the same keyword arguments.  It raises ``NotImplementedError`` with the reason when the peer cannot run
    the case.  ``requires`` maps modules that it imports to the command that installs them; ``forward_only`` names the
    device types on which it has no backward pass.
    """

    name: str
    build: Callable[[Mapping[str, Any]], Callable[..., Tensor]]
    requires: Mapping[str, str] = field(default_factory=dict)
    forward_only: tuple[str, ...] = ()


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
    #: benchmark cases of a size that fills a GPU; ``shapes`` where there are none
    gpu_shapes: tuple[Shape, ...] = ()
    #: makes a benchmark case from sizes, its positional arguments: what ``fused-attn bench --shape`` calls
    make_shape: Callable[..., Shape] | None = None
    peers: tuple[Peer, ...] = ()
    #: dtypes every implementation must pass the contract in
    dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.bfloat16, torch.float16)
    #: the float32 inputs of a call as the op computes on them under autocast to a dtype, on the CPU
    autocast: Callable[[Mapping[str, Any], torch.dtype], Mapping[str, Any]] = lambda inputs, dtype: convert(
        inputs, dtype
    )
    #: further notes printed by ``fused-attn info``
    notes: Mapping[str, str] = field(default_factory=dict)

    def reason(self, impl: str, inputs: Mapping[str, Any]) -> str | None:
        """Why ``impl`` cannot run on ``inputs``; None when it can."""
        if impl not in self.implementations:
            return f"{self.name} has no implementation {impl!r}"
        return self.implementations[impl](inputs)

    def shape(self, name: str) -> Shape:
        """The benchmark case of that name, or one made from sizes: ``"B=8,heads=8,H=32,..."``.

        Raises:
            KeyError: there is no case of that name.
            ValueError: a size is missing, unknown or not a positive number; the text names those that there are.
        """
        if "=" in name:
            return self._shape_of_sizes(name)
        for shape in (*self.shapes, *self.gpu_shapes, *self.growth):
            if shape.name == name:
                return shape
        raise KeyError(f"{self.name} has no shape {name!r}")

    def _shape_of_sizes(self, text: str) -> Shape:
        if self.make_shape is None:
            raise ValueError(f"{self.name} has no shapes but those in its spec")
        known = {
            parameter.name: parameter.default is parameter.empty
            for parameter in inspect.signature(self.make_shape).parameters.values()
            if parameter.kind is parameter.POSITIONAL_OR_KEYWORD
        }
        expected = f"a shape of {self.name} must be KEY=NUMBER,... with the keys {', '.join(known)}"
        sizes = {}
        for part in text.split(","):
            key, _, value = (piece.strip() for piece in part.partition("="))
            if key not in known or key in sizes or not value.isdecimal() or int(value) < 1:
                raise ValueError(f"{expected}, each once, and positive numbers; got {part.strip()!r}")
            sizes[key] = int(value)
        missing = [key for key, required in known.items() if required and key not in sizes]
        if missing:
            raise ValueError(f"{expected}; {', '.join(missing)} missing in {text!r}")
        return self.make_shape(**sizes)


# --- evaluation -------------------------------------------------------------------------------------------------


def seed_generators(seed: int) -> None:
    """``torch.manual_seed`` of the devices that are there.

    Of those that are not, PyTorch keeps every call with a stack trace, which takes longer than most ops.
    """
    torch.default_generator.manual_seed(seed)
    if torch.cuda.is_available():
        torch.cuda.manual_seed_all(seed)


def tensors(inputs: Mapping[str, Any]) -> dict[str, Tensor]:
    """Every tensor of a call by name; those of a list are called ``values[0]``, ``values[1]``, ..."""
    found = {}
    for name, value in inputs.items():
        if isinstance(value, Tensor):
            found[name] = value
        elif isinstance(value, (list, tuple)):
            found |= {f"{name}[{i}]": item for i, item in enumerate(value) if isinstance(item, Tensor)}
    return found


def differentiable(inputs: Mapping[str, Any]) -> dict[str, Tensor]:
    """The tensors of a call that receive a gradient, by name: the floating-point ones."""
    return {name: tensor for name, tensor in tensors(inputs).items() if tensor.is_floating_point()}


def with_tensors(inputs: Mapping[str, Any], changed: Mapping[str, Any]) -> dict[str, Any]:
    """The same call with some of its :func:`tensors` replaced."""
    return {
        name: [changed.get(f"{name}[{i}]", item) for i, item in enumerate(value)]
        if isinstance(value, (list, tuple))
        else changed.get(name, value)
        for name, value in inputs.items()
    }


def convert(inputs: Mapping[str, Any], dtype: torch.dtype, keep: Collection[str] = ()) -> dict[str, Any]:
    """The same call with its floating-point tensors in ``dtype``; but for those of names to ``keep``."""
    return with_tensors(
        inputs, {name: tensor.to(dtype) for name, tensor in differentiable(inputs).items() if name not in keep}
    )


def unchanged(inputs: Mapping[str, Any], dtype: torch.dtype) -> Mapping[str, Any]:
    """``OpSpec.autocast`` of an op that computes in the dtype of its inputs."""
    return inputs


def leaves(inputs: Mapping[str, Any]) -> dict[str, Tensor]:
    """The differentiable tensors of a call as leaves that require a gradient."""
    return {name: tensor.detach().requires_grad_() for name, tensor in differentiable(inputs).items()}


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
    devices = {tensor.device for tensor in tensors(inputs).values() if tensor.is_cuda}
    with torch.random.fork_rng(devices=sorted(device.index for device in devices)):
        seed_generators(seed)
        if grad_out is None:
            with torch.no_grad():
                return {"out": function(**inputs)}
        variables = leaves(inputs)
        out = function(**with_tensors(inputs, variables))
        grads = torch.autograd.grad(out, list(variables.values()), grad_out, allow_unused=True)
    results = {"out": out.detach()}
    for (name, variable), grad in zip(variables.items(), grads, strict=True):
        results[f"grad_{name}"] = torch.zeros_like(variable) if grad is None else grad
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


def _root_mean_square(tensor: Tensor) -> float:
    return float(tensor.square().mean().sqrt()) if tensor.numel() else 0.0


def mismatches(
    actual: Mapping[str, Tensor],
    same_dtype: Mapping[str, Tensor],
    oracle: Mapping[str, Tensor],
    factor: float = 2.0,
) -> list[str]:
    """Outputs and gradients that miss the bar, in words; empty when all meet it.

    The bar: the root mean square error against ``oracle`` (the reference in float64) is at most ``factor`` times that
    of ``same_dtype`` (the reference in the dtype of ``actual``) plus 2 ulp of the largest value, and the largest error
    at most twice that multiple.  The worst of a few elements is luck: over 4,000 gradients of random shapes a kernel
    whose mean square errors never reached twice the reference's exceeded its largest error twofold in one of 200,
    threefold in one of 4,000.

    The largest value is that of the tensor.  One that cancels to less than a thousandth of the call's largest (the
    gradient of the query when there is one key) has no scale of its own: there it is the call's.

    Where ``same_dtype`` is NaN or infinite, so must be the output, exactly, and a gradient, in either way: whether
    infinities cancel there depends on the order of a sum.
    """
    found = []
    scale = max((_largest(tensor.nan_to_num(0.0, 0.0, 0.0)) for tensor in oracle.values()), default=0.0)
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
        if not bool((same | ~wild).all()):
            found.append(f"{name}: {int(wild.sum())} elements must be NaN or infinite as in the reference")
        # The oracle can be finite where the reference overflowed in its dtype, never the other way round.
        tame = ~wild & expected.isfinite()
        if not bool(tame.all()):
            value, reference, expected = value[tame], reference[tame], expected[tame]
        if not bool(value.isfinite().all()):
            found.append(f"{name}: {int((~value.isfinite()).sum())} of {value.numel()} elements are not finite")
            continue
        dtype, largest = same_dtype[name].dtype, _largest(expected)
        slack = 2 * ulp(largest if largest >= 1e-3 * scale else scale, dtype)
        for measure, times, kind in (
            (_largest, 2 * factor, "error"),
            (_root_mean_square, factor, "RMS error"),
        ):
            error, allowed = measure(value - expected), measure(reference - expected)
            if error > times * allowed + slack:
                found.append(
                    f"{name}: {kind} {error:.3g} exceeds {times * allowed + slack:.3g} (the reference in {dtype} errs "
                    f"by {allowed:.3g}, largest value {largest:.3g})"
                )
                break
    return found


def numeric_mismatches(
    spec: OpSpec,
    function: Callable[..., Tensor],
    *calls: Mapping[str, Any],
    backward: bool = True,
    remember: Callable[[Any, Callable[[], Any]], Any] = lambda key, compute: compute(),
) -> list[str]:
    """:func:`mismatches` of ``function`` (an implementation or a peer of ``spec``), over all ``calls`` together.

    The calls are draws of the same sample: the largest error of a single call on a small tensor is half luck.  One call
    alone is differentiated with three gradients of its output.  What the reference gives depends on ``spec`` and the
    bits of ``calls`` only: ``remember(key, compute)`` may return what it returned for an equal key.
    """

    def reference(**kwargs):
        return spec.function(**kwargs, impl="reference")

    if len(calls) == 1 and backward:
        calls *= 3

    def pooled(call, grad_outs, dtype=None):
        results = []
        for inputs, grad_out in zip(calls, grad_outs, strict=True):
            if dtype is not None:
                inputs, grad_out = convert(inputs, dtype), None if grad_out is None else grad_out.to(dtype)
            results.append(evaluate(call, inputs, grad_out))
        return {name: torch.stack([result[name] for result in results]) for name in results[0]}

    def expectations():
        grad_outs = [draw_grad_out(spec, inputs, 1 + i) if backward else None for i, inputs in enumerate(calls)]
        return grad_outs, pooled(reference, grad_outs), pooled(reference, grad_outs, torch.float64)

    key = (spec.function, backward, tuple(_fingerprint(inputs) for inputs in calls))
    grad_outs, same_dtype, oracle = remember(key, expectations)
    return mismatches(pooled(function, grad_outs), same_dtype, oracle)


def _fingerprint(inputs: Mapping[str, Any]) -> bytes:
    """The same for calls with the same options and tensors of the same bits in the same layout, and no others."""
    found = tensors(inputs)
    placeholders = with_tensors(inputs, dict.fromkeys(found, ...))
    digest = hashlib.blake2b(repr(placeholders).encode())
    for name, tensor in found.items():
        digest.update(repr((name, tensor.dtype, tensor.device, tensor.shape, tensor.stride())).encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.digest()
