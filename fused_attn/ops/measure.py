"""Time and peak memory of implementations and peers, for the benchmarks and the memory test.

``python -m fused_attn.ops.measure OP SHAPE PROVIDER`` prints one memory measurement; it is what
:func:`peak_extra_bytes` starts in a process of its own.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import contract

#: Parts of one training step that are timed.  "forward" is without autograd, as in inference.
PHASES = ("forward", "backward", "forward+backward")


def find_spec(op: str) -> contract.OpSpec:
    """The spec of that name.

    Raises:
        ValueError: there is none.
    """
    from . import SPECS

    for spec in SPECS:
        if spec.name == op:
            return spec
    raise ValueError(f"op must be one of {', '.join(spec.name for spec in SPECS)}, got {op!r}")


def provider(spec: contract.OpSpec, name: str, inputs: Mapping[str, Any]) -> Callable[..., Tensor]:
    """The callable of an implementation or a peer of ``spec``.

    Raises:
        ValueError: ``name`` is neither.
        NotImplementedError: it cannot run on ``inputs``; the text says why.
    """
    if name in spec.implementations:
        reason = spec.reason(name, inputs)
        if reason is not None:
            raise NotImplementedError(reason)
        return lambda **kwargs: spec.function(**kwargs, impl=name)
    for peer in spec.peers:
        if peer.name == name:
            return peer.build(inputs)
    known = [*spec.implementations, *(peer.name for peer in spec.peers)]
    raise ValueError(f"provider must be one of {', '.join(map(repr, known))}, got {name!r}")


# --- time -------------------------------------------------------------------------------------------------------


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def time_once(function: Callable[..., Tensor], inputs: Mapping[str, Any], grad_out: Tensor) -> dict[str, float]:
    """Seconds of each of :data:`PHASES`, for one call."""
    device = grad_out.device
    with torch.no_grad():
        start = _now(device)
        function(**inputs)
        forward = _now(device) - start
    variables = contract.leaves(inputs)
    call = contract.with_tensors(inputs, variables)
    start = _now(device)
    out = function(**call)
    middle = _now(device)
    torch.autograd.grad(out, list(variables.values()), grad_out)
    end = _now(device)
    return {"forward": forward, "backward": end - middle, "forward+backward": end - start}


def time_interleaved(
    functions: Mapping[str, Callable[..., Tensor]],
    inputs: Mapping[str, Any],
    grad_out: Tensor,
    *,
    repetitions: int,
    warmup: int,
) -> dict[str, dict[str, list[float]]]:
    """Seconds of every function and phase: ``[function][phase][repetition]``.

    The functions take turns (A B C A B C ...), so that a machine that slows down slows all of them.
    """
    seconds = {name: {phase: [] for phase in PHASES} for name in functions}
    for repetition in range(warmup + repetitions):
        for name, function in functions.items():
            measured = time_once(function, inputs, grad_out)
            if repetition >= warmup:
                for phase, value in measured.items():
                    seconds[name][phase].append(value)
    return seconds


# --- memory -----------------------------------------------------------------------------------------------------


def peak_extra_bytes(op: str, shape: str, name: str, *, threads: int | None = None, device: str = "cpu") -> int:
    """Most bytes held beyond the inputs while ``name`` runs forward and backward once, in float32.

    Measured in a fresh process: growth of the resident set on the CPU, of the allocator's peak on a GPU.

    Args:
        op, shape: names of a spec and of one of its shapes.
        name: an implementation or a peer.
        threads: of PyTorch; those of this process when None.

    Raises:
        NotImplementedError: it cannot run on that shape.
        RuntimeError: the process failed; the text is what it printed.
    """
    root = str(Path(__file__).parents[2])
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH")))),
        # Freed blocks go back to the system at once, and do not count twice.
        "MALLOC_MMAP_THRESHOLD_": "65536",
        "MALLOC_TRIM_THRESHOLD_": "0",
    }
    command = [sys.executable, "-m", "fused_attn.ops.measure", op, shape, name, device]
    command.append(str(threads or torch.get_num_threads()))
    process = subprocess.run(command, env=environment, capture_output=True, text=True)
    if process.returncode != 0:
        raise RuntimeError(f"the memory of {name} on {op}, {shape} could not be measured:\n{process.stderr}")
    result = json.loads(process.stdout.splitlines()[-1])
    if "reason" in result:
        raise NotImplementedError(result["reason"])
    return result["bytes"]


def _status(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}")


def _peak_growth(function: Callable[[], None]) -> int:
    """Growth of this process's resident set over one call."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    before = _status("VmRSS")
    try:
        Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts again from here
    except OSError:
        return _sampled_peak(function) - before
    function()
    return _status("VmHWM") - before


def _sampled_peak(function: Callable[[], None]) -> int:
    """Where the kernel keeps no resettable mark (some sandboxes): look every half millisecond."""
    peak, running = _status("VmRSS"), True

    def watch():
        nonlocal peak
        while running:
            peak = max(peak, _status("VmRSS"))
            time.sleep(0.0005)

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    function()
    running = False
    watcher.join()
    return peak


def _measure_memory(op: str, shape_name: str, name: str, device: str) -> dict[str, Any]:
    spec = find_spec(op)
    shape = spec.shape(shape_name)

    def step(call: Mapping[str, Any], function: Callable[..., Tensor]) -> None:
        variables = contract.leaves(call)
        out = function(**contract.with_tensors(call, variables))
        grad_out = out.detach().new_ones(()).expand(out.shape)
        grads = torch.autograd.grad(out, list(variables.values()), grad_out)
        del grads

    inputs = shape.inputs(torch.float32, device)
    try:
        function = provider(spec, name, inputs)
    except NotImplementedError as error:
        return {"reason": str(error)}
    # Libraries, threads and compilation are not the call's memory.  An implementation warms up on the smallest
    # size, so that scratch it keeps afterwards is counted; a peer on the size it was built for.
    if name in spec.implementations:
        step(spec.growth[0].inputs(torch.float32, device), function)
    else:
        step(inputs, function)
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step(inputs, function)
        torch.cuda.synchronize()
        return {"bytes": torch.cuda.max_memory_allocated() - before}
    return {"bytes": _peak_growth(lambda: step(inputs, function))}


if __name__ == "__main__":
    torch.set_num_threads(int(sys.argv[5]))
    print(json.dumps(_measure_memory(*sys.argv[1:5])))
