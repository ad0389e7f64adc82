"""Time and memory of implementations and peers, for the benchmarks and the memory test.

``python -m fused_attn.bench.measure OP SHAPE PROVIDER DEVICE DTYPE THREADS`` prints one memory measurement; it is what
:func:`peak_memory` starts in a process of its own.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..ops._floor.declarations import OpSpec, leaves, tensors, with_tensors

#: What is timed of one step: forward without autograd, as in inference; backward; forward and backward, as in training.
PASSES = ("fwd", "bwd", "both")
#: keyword arguments of one call, and a gradient of its output
Call = tuple[Mapping[str, Any], Tensor]
#: seconds of every function, pass and repetition
Times = dict[str, dict[str, list[float]]]
#: of every round, the turns in their order: whose, and the median seconds of each pass
Rounds = list[list[tuple[str, dict[str, float]]]]
#: A fast function repeats its call for so long before it is the next one's turn: long enough for most calls to find
#: their code and data as a loop would, short enough for a round to be over before the machine changes its speed.
TURN_SECONDS = 0.03
#: Rounds even of slow functions: fewer leave the median ratio to chance where a neighbour disturbs.
LEAST_ROUNDS = 9


def find_spec(op: str) -> OpSpec:
    """The spec of that name.

    Raises:
        ValueError: there is none.
    """
    from ..ops import SPECS

    for spec in SPECS:
        if spec.name == op:
            return spec
    raise ValueError(f"op must be one of {', '.join(spec.name for spec in SPECS)}, got {op!r}")


def provider(spec: OpSpec, name: str, inputs: Mapping[str, Any]) -> Callable[..., Tensor]:
    """The callable of an implementation or a peer of ``spec``.

    Raises:
        ValueError: ``name`` is neither.
        NotImplementedError: it is not installed or cannot run on ``inputs``; the text says why.
    """
    if name in spec.implementations:
        reason = spec.reason(name, inputs)
        if reason is not None:
            raise NotImplementedError(reason)
        return lambda **kwargs: spec.function(**kwargs, impl=name)
    for peer in spec.peers:
        if peer.name == name:
            for module, install in peer.requires.items():
                if importlib.util.find_spec(module) is None:
                    raise NotImplementedError(f"not installed: {install}")
            return peer.build(inputs)
    known = [*spec.implementations, *(peer.name for peer in spec.peers)]
    raise ValueError(f"provider must be one of {', '.join(map(repr, known))}, got {name!r}")


def passes_of(spec: OpSpec, name: str, device: str) -> tuple[str, ...]:
    """Those of :data:`PASSES` that an implementation or a peer has on a device type."""
    forward_only = any(peer.name == name and device in peer.forward_only for peer in spec.peers)
    return ("fwd",) if forward_only else PASSES


# --- time -------------------------------------------------------------------------------------------------------


class Clock:
    """Marks points in time: events on a GPU's stream, a monotonic clock on the CPU."""

    def __init__(self, device: torch.device) -> None:
        self._flushed = None
        if device.type == "cuda":
            l2_bytes = torch.cuda.get_device_properties(device).L2_cache_size
            self._flushed = torch.empty(max(2 * l2_bytes, 2**25), dtype=torch.int8, device=device)

    def start(self) -> Any:
        """A mark with a cold L2 cache; writing over it also gives the host time to run ahead of the GPU."""
        if self._flushed is not None:
            self._flushed.zero_()
        return self.mark()

    def mark(self) -> Any:
        if self._flushed is None:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def seconds(self, start: Any, end: Any) -> float:
        if self._flushed is None:
            return end - start
        end.synchronize()
        return start.elapsed_time(end) * 1e-3


def time_once(
    function: Callable[..., Tensor], call: Call, passes: Sequence[str] = PASSES, clock: Clock | None = None
) -> dict[str, float]:
    """Seconds of each of ``passes``, for one call."""
    inputs, grad_out = call
    clock = clock or Clock(grad_out.device)
    seconds = {}
    if "fwd" in passes:
        with torch.no_grad():
            start = clock.start()
            function(**inputs)
            end = clock.mark()
        seconds["fwd"] = clock.seconds(start, end)
    if "bwd" in passes or "both" in passes:
        variables = leaves(inputs)
        inputs = with_tensors(inputs, variables)
        start = clock.start()
        out = function(**inputs)
        end = clock.mark()
        backward_start = clock.start()
        torch.autograd.grad(out, list(variables.values()), grad_out)
        backward_end = clock.mark()
        backward = clock.seconds(backward_start, backward_end)
        seconds |= {"bwd": backward, "both": clock.seconds(start, end) + backward}
    return {name: value for name, value in seconds.items() if name in passes}


def time_interleaved(
    functions: Mapping[str, Callable[..., Tensor]],
    calls: Sequence[Call],
    *,
    passes: Mapping[str, Sequence[str]] | None = None,
    seconds: float,
    least: int = LEAST_ROUNDS,
    between: Collection[str] = (),
    turn_seconds: float = TURN_SECONDS,
    warmup: int = 1,
    keep_freed: bool = True,
    into: Times | None = None,
    rounds_into: Rounds | None = None,
    on_round: Callable[[float], None] = lambda done: None,
) -> Times:
    """Seconds of every function, pass and repetition: ``[function][pass][repetition]``.

    The functions take turns (A B C A B C ...), so that a machine that slows down slows all of them.  A turn is one
    call, or as many as fit in ``turn_seconds``; every call takes the next of ``calls``.

    Args:
        functions: by name.
        calls: input sets and gradients of the output, of one shape.
        passes: those to time, by function; all when None.
        seconds: to go on for, after the warm-up.
        least: rounds to run even if they take longer.
        between: functions that take a turn before each of the others and after the last (A B A C A), so that each of
            these has them right beside it.
        turn_seconds: for fast functions to repeat their call in, so that they are timed more often than slow ones and
            not only when another's data is in the caches.
        warmup: untimed rounds before, of every call.
        keep_freed: see :func:`keep_freed_memory`.
        into: where the times go, so that an interrupted measurement keeps what it has.
        rounds_into: where the median of each turn goes, for :func:`median_ratio`.
        on_round: told after each round what part is done, between 0 and 1.
    """
    passes = passes or dict.fromkeys(functions, PASSES)
    clock = Clock(calls[0][1].device)

    def turn(name: str) -> Callable[[int], dict[str, float]]:
        return lambda number: time_once(functions[name], calls[number % len(calls)], passes[name], clock)

    turns = {name: turn(name) for name in functions}
    return interleave(
        turns,
        seconds=seconds,
        least=least,
        between=between,
        turn_seconds=turn_seconds,
        warmup=len(calls) * warmup,
        keep_freed=keep_freed,
        into=into,
        rounds_into=rounds_into,
        on_round=on_round,
    )


def interleave(
    turns: Mapping[str, Callable[[int], Mapping[str, float]]],
    *,
    seconds: float,
    least: int,
    between: Collection[str] = (),
    turn_seconds: float = TURN_SECONDS,
    warmup: int,
    keep_freed: bool = True,
    into: Times | None = None,
    rounds_into: Rounds | None = None,
    on_round: Callable[[float], None] = lambda done: None,
) -> Times:
    """What :func:`time_interleaved` does, for anything that times itself.

    Args:
        turns: by name, what takes the number of a call, and returns seconds by what was timed.
        warmup: rounds of one call to throw away first.
        seconds, least, between, turn_seconds, keep_freed, into, rounds_into, on_round: as there.
    """
    if keep_freed:
        keep_freed_memory()
    times = {} if into is None else into
    rounds: Rounds = [] if rounds_into is None else rounds_into
    order, calls = _order(turns, between), dict.fromkeys(turns, 0)
    for number in range(warmup):
        for turn in turns.values():
            turn(number)
    with _no_garbage_collection() as collect:
        started, first_round = time.monotonic(), len(rounds)
        while (done := len(rounds) - first_round) < least or time.monotonic() - started < seconds:
            rounds.append([])
            for name in order:
                turn_started, first = time.monotonic(), calls[name]
                while True:
                    for each, value in turns[name](calls[name]).items():
                        times.setdefault(name, {}).setdefault(each, []).append(value)
                    calls[name] += 1
                    if time.monotonic() - turn_started >= turn_seconds:
                        break
                new = first - calls[name]
                medians = {each: statistics.median(values[new:]) for each, values in times[name].items()}
                rounds[-1].append((name, medians))
                collect()
            on_round(min(1.0, (time.monotonic() - started) / max(seconds, 1e-9), (done + 1) / least))
    return times


def _order(names: Iterable[str], between: Collection[str]) -> list[str]:
    """Who takes a turn when, in one round."""
    names = list(names)
    beside = [name for name in names if name in between]
    others = [name for name in names if name not in between]
    return [turn for name in others for turn in (*beside, name)] + beside


def median_ratio(rounds: Rounds, first: str, second: str, each: str) -> float | None:
    """Time of ``first`` over that of ``second``: the median of what its turns say; None when neither has one.

    A neighbour on the same machine can slow everything by half for seconds at a time.  When that is about half of the
    rounds, the medians of two functions may come from different halves.  So a turn of ``first`` is compared with the
    turns of ``second`` in the same round that come right before and after it, with their mean where there are both.

    Args:
        rounds: as :func:`time_interleaved` fills them.
        first, second: names of functions.
        each: the pass.
    """
    if first == second:
        return 1.0
    ratios = []
    for turns in rounds:
        for place, (name, medians) in enumerate(turns):
            if name == first and each in medians:
                before = [other[each] for whose, other in turns[:place] if whose == second and each in other]
                after = [other[each] for whose, other in turns[place + 1 :] if whose == second and each in other]
                if nearest := before[-1:] + after[:1]:
                    ratios.append(medians[each] / statistics.mean(nearest))
    return statistics.median(ratios) if ratios else None


@contextlib.contextmanager
def _no_garbage_collection() -> Iterator[Callable[[], object]]:
    """Keep Python's collector out of timed calls; yields what collects between them.

    After TorchInductor has run, a full collection takes longer than most calls, and it comes where a call happens to
    allocate Python objects.  Those that exist already are left out, which makes the collections in between short.
    """
    enabled = gc.isenabled()
    gc.collect()
    gc.freeze()
    gc.disable()
    try:
        yield gc.collect
    finally:
        gc.unfreeze()
        if enabled:
            gc.enable()


def keep_freed_memory() -> None:
    """Let this process reuse what it frees, where the C library is glibc.

    By default large blocks go back to the system and come anew, page fault by page fault, or not, depending on what was
    allocated before: on the CPU, times of ops that are bound by memory come out one or two and a half times as long.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        m_trim_threshold, m_mmap_max = -1, -4  # of malloc.h
        mallopt(m_mmap_max, 0)
        mallopt(m_trim_threshold, -1)  # never: 2 GiB, the most that fits, are passed by peers with large intermediates


def preloaded_allocator() -> str | None:
    """Name of the allocator in the place of the C library's in this process, as ``LD_PRELOAD`` has it; None without."""
    try:
        mapped = Path("/proc/self/maps").read_text()
    except OSError:  # not Linux
        return None
    return next((name for name in ("jemalloc", "tcmalloc", "mimalloc") if f"/lib{name}" in mapped), None)


# --- memory -----------------------------------------------------------------------------------------------------


def saved_bytes(function: Callable[..., Tensor], inputs: Mapping[str, Any]) -> int:
    """Bytes that autograd keeps from forward to backward, beyond the inputs: storages, each counted once."""
    variables = leaves(inputs)
    call = with_tensors(inputs, variables)
    own = {tensor.untyped_storage().data_ptr() for tensor in tensors(call).values()}
    saved: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor.detach()  # an output that holds its own graph would never be freed

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = function(**call)
    # Addresses tell storages apart as long as all of them live: the graph of the output holds them.
    del out
    return sum(saved.values())


def peak_extra_bytes(op: str, shape: str, name: str, *, threads: int | None = None, device: str = "cpu") -> int:
    """Most bytes held beyond the inputs while ``name`` runs forward and backward once, in float32."""
    return peak_memory(op, shape, name, threads=threads, device=device)["both"]


def peak_memory(
    op: str,
    shape: str,
    name: str,
    *,
    dtype: torch.dtype = torch.float32,
    threads: int | None = None,
    device: str = "cpu",
) -> dict[str, int]:
    """Most bytes held beyond the inputs during one call: ``"fwd"`` without autograd, ``"both"`` forward and backward.

    Measured in a fresh process: growth of the resident set on the CPU, of the allocator's peak on a GPU.  A function
    without a backward pass has ``"fwd"`` only.

    Args:
        op, shape: names of a spec and of one of its shapes, or that shape's sizes, as :meth:`OpSpec.shape` takes them.
        name: an implementation or a peer.
        dtype: of the inputs.
        threads: of PyTorch; those of this process when None.
        device: ``"cpu"`` or ``"cuda"``.

    Raises:
        NotImplementedError: it cannot run on that shape.
        RuntimeError: the process failed; the text is what it printed.
    """
    arguments = [op, shape, name, device, str(dtype).removeprefix("torch."), str(threads or torch.get_num_threads())]
    return run_child("fused_attn.bench.measure", arguments, what=f"the memory of {name} on {op}, {shape}")


def with_package() -> dict[str, str]:
    """The environment of a child that finds this package, also where it is not installed."""
    root = str(Path(__file__).parents[2])
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))}


def child_environment() -> dict[str, str]:
    """That of a process whose memory is measured: it finds this package, and gives freed blocks back at once."""
    return {
        **with_package(),
        "MALLOC_MMAP_THRESHOLD_": "65536",
        "MALLOC_TRIM_THRESHOLD_": "0",
    }


def run_child(module: str, arguments: Sequence[str], what: str) -> dict[str, Any]:
    """The JSON object that ``python -m module arguments`` prints last, for memory of a process of its own.

    Raises:
        NotImplementedError: the object has a ``"reason"``.
        RuntimeError: the process failed; the text is what it printed.
    """
    command = [sys.executable, "-m", module, *arguments]
    process = subprocess.run(command, env=child_environment(), capture_output=True, text=True)
    if process.returncode != 0:
        raise RuntimeError(f"{what} could not be measured (exit status {process.returncode}):\n{process.stderr}")
    result = json.loads(process.stdout.splitlines()[-1])
    if "reason" in result:
        raise NotImplementedError(result["reason"])
    return result


def _status(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}")


def trim() -> int:
    """Give freed memory back to the system; returns the resident bytes that are left."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    return _status("VmRSS")


def peak_resident(function: Callable[[], None]) -> int:
    """Most resident bytes of this process during one call."""
    try:
        Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts again from here
    except OSError:
        return _sampled_peak(function)
    function()
    return _status("VmHWM")


def peak_allocated(function: Callable[[], None]) -> int:
    """Most bytes that PyTorch's CUDA allocator holds during one call, beyond those that it held before."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    function()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


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


def _steps(
    function: Callable[..., Tensor], inputs: Mapping[str, Any], passes: Sequence[str]
) -> dict[str, Callable[[], None]]:
    def forward() -> None:
        with torch.no_grad():
            function(**inputs)

    def forward_backward() -> None:
        variables = leaves(inputs)
        out = function(**with_tensors(inputs, variables))
        grad_out = out.detach().new_ones(()).expand(out.shape)
        grads = torch.autograd.grad(out, list(variables.values()), grad_out)
        del grads

    steps = {"fwd": forward, "both": forward_backward}
    return {name: step for name, step in steps.items() if name in passes}


def memory_here(op: str, shape: str, name: str, device: str, dtype: torch.dtype) -> dict[str, int]:
    """:func:`peak_memory` in this process: exact on a GPU; on the CPU, for a process that does nothing else."""
    spec = find_spec(op)
    inputs = spec.shape(shape).inputs(dtype, device)
    passes = passes_of(spec, name, device)
    function = provider(spec, name, inputs)
    # Libraries, threads and compilation are not the call's memory.  An implementation warms up on the smallest
    # size, so that scratch it keeps afterwards is counted; a peer on the size it was built for.
    small = name in spec.implementations and spec.growth
    for step in _steps(function, spec.growth[0].inputs(dtype, device) if small else inputs, passes).values():
        step()
    steps = _steps(function, inputs, passes)
    if device == "cuda":
        return {each: peak_allocated(step) for each, step in steps.items()}
    peaks, before = {}, trim()
    for each, step in steps.items():
        trim()
        peaks[each] = max(0, peak_resident(step) - before)  # pages that were resident before may have gone
    return peaks


def main(arguments: Sequence[str]) -> None:
    """Print one memory measurement."""
    *names, device, dtype, threads = arguments
    torch.set_num_threads(int(threads))
    try:
        print(json.dumps(memory_here(*names, device, getattr(torch, dtype)), allow_nan=False))
    except NotImplementedError as reason:  # handed to the parent, which raises it there
        print(json.dumps({"reason": str(reason)}, allow_nan=False))


if __name__ == "__main__":
    main(sys.argv[1:])
