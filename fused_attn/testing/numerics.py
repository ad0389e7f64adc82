"""The numerical bar that every implementation has to meet: see :func:`mismatches`."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from ..ops._floor.declarations import OpSpec, convert, leaves, seed_generators, tensors, with_tensors


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
    return _normal_like(evaluate(lambda **kwargs: spec.function(**kwargs, impl="reference"), inputs)["out"], seed)


def _normal_like(out: Tensor, seed: int) -> Tensor:
    return torch.randn(out.shape, generator=torch.Generator().manual_seed(seed)).to(out)


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
    at most twice that multiple.  The worst of a few elements depends on chance: over 4,000 gradients of random shapes a
    kernel whose mean square errors never reached twice the reference's exceeded its largest error twofold in one of
    200, threefold in one of 4,000.

    The largest value is that of the tensor.  One that cancels to less than a thousandth of the call's largest (the
    gradient of the query when there is one key) has no scale of its own: there it is the call's.

    Where ``same_dtype`` is NaN or infinite, the output must have the same value.  A gradient may be either of the two
    there: whether infinities cancel depends on the order of a sum.
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

    The calls are draws of the same sample: the largest error of a single call on a small tensor is largely chance.
    One call alone is differentiated with three gradients of its output.  What the reference gives depends on ``spec``
    and the bits of ``calls`` only: ``remember(key, compute)`` may return what it returned for an equal key.
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
        grad_outs = [None] * len(calls)
        if backward:
            out = evaluate(reference, calls[0])["out"]  # of the same shape in every call
            grad_outs = [_normal_like(out, 1 + i) for i in range(len(calls))]
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
        # A tensor of one element is contiguous whatever its stride, and cannot be viewed as bytes.
        copy = tensor.detach().cpu().clone(memory_format=torch.contiguous_format).flatten()
        digest.update(copy.view(torch.uint8).numpy())
    return digest.digest()
