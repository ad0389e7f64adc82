"""``fused-attn bench``: which cases, how they are measured, and where the results go."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import tyro
from tqdm import tqdm

from ..ops._floor.declarations import OpSpec, Shape
from ..options import check, make_folder
from ..train.environment import describe
from . import BenchError, measure, report
from .ceilings import measure_ceilings
from .runner import DTYPES, Measurement, Options, provider_names

#: More fit no memory; the number of bytes of a tensor with as many elements fits an int64.
MOST_ELEMENTS = 2**48


@dataclass(frozen=True)
class BenchConfig:
    """Measure ops beside what you would write instead; ``fused-attn bench networks`` measures whole networks."""

    ops: tyro.conf.Positional[tuple[str, ...]] = ()
    """ops to measure; all when none is named"""
    shape: tuple[str, ...] = ()
    """sizes, as B=8,heads=8,H=32,W=32,d_k=20,d_v=2, or names of the op's own cases; several are separated by spaces"""
    dtype: Literal["fp32", "bf16", "fp16"] = "fp32"
    """dtype of all tensors"""
    device: Literal["cpu", "cuda"] = "cpu"
    """where to run"""
    passes: Annotated[str, tyro.conf.arg(name="pass")] = "fwd,bwd,both"
    """what to time, one or more of fwd (forward without autograd), bwd (backward), both (forward and backward)"""
    threads: int | None = None
    """CPU threads of PyTorch; its own choice when not given"""
    seconds: float = 10.0
    """seconds to time each case for; every implementation and peer has at least nine turns, however long they take"""
    out: Path | None = None
    """folder for JSON, CSV, Markdown and pictures; results of the same op in it are replaced"""
    providers: tuple[str, ...] = ()
    """implementations and peers to measure; all but the reference when none is named"""
    allocator: Literal["caching", "default"] = "caching"
    """CPU memory.  caching: freed memory is kept, as jemalloc and tcmalloc do.  default: what the C library does; large
    blocks may go back to the system and come back page fault by page fault, so times depend on earlier allocations"""
    growth: bool = True
    """with --out and without --shape, measure at growing sizes too: time and memory against N"""
    memory: bool = True
    """measure peak memory too, on the CPU in a process of its own for each"""

    def __post_init__(self) -> None:
        check("bench", type(self), vars(self), BenchError)


def run(config: BenchConfig) -> int:
    """Measure, show and write; returns the exit status: 0, 1 (a fused implementation is wrong) or 130 (interrupted).

    Raises:
        BenchError: a setting cannot be measured.
    """
    specs, options = _specs(config.ops), _options(config)
    cases = [(spec, _cases(spec, config)) for spec in specs]
    for spec in specs:
        _check_providers(spec, config.providers)
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    if config.out is not None:
        make_folder(config.out, BenchError)

    failures: list[str] = []
    total = sum(Measurement.STEPS * len(provider_names(spec, options.providers)) for spec, own in cases for _ in own)
    reports: list[report.Report] = []
    interrupted = False
    with tqdm(total=total, bar_format="{l_bar}{bar}| {elapsed} {postfix}", mininterval=0.5, leave=False) as bar:
        try:
            bar.set_postfix_str("this machine's ceilings")
            ceilings = measure_ceilings(options.dtype, options.device)
            for spec, own in cases:
                reports.append(_measure_op(spec, own, config, options, ceilings, bar, failures))
        except KeyboardInterrupt as stop:
            interrupted = True
            reports += stop.args  # that of the op in progress
    if config.out is not None:  # before the tables, whose reader may close early
        for each in reports:
            report.render(each, config.out)
    for each in reports:
        report.print_table(each)
    for failure in failures:
        print(f"fused-attn: {failure}", file=sys.stderr)
    if interrupted:
        print("fused-attn: interrupted; what was measured is kept", file=sys.stderr)
        return 130
    return 1 if failures else 0


def _measure_op(
    spec: OpSpec,
    cases: Sequence[tuple[str, Shape]],
    config: BenchConfig,
    options: Options,
    ceilings: dict[str, Any],
    bar: tqdm,
    failures: list[str],
) -> report.Report:
    """All cases of one op; the result files hold each as soon as it is measured."""
    result = {
        "op": spec.name,
        "device": config.device,
        "dtype": config.dtype,
        "allocator": measure.preloaded_allocator() or config.allocator,
        "interrupted": True,
        "environment": describe(),
        "ceilings": ceilings,
        "rows": [],
    }
    finished: list[report.Row] = []

    def keep(measurement: Measurement | None = None) -> None:
        result["rows"] = finished + (measurement.rows(ceilings) if measurement else [])
        if config.out is not None:
            report.write(result, config.out)

    for kind, shape in cases:
        measurement = Measurement(spec, shape, kind, options)

        def advance(what: str, steps: float, shape: Shape = shape) -> None:
            if what:
                bar.set_postfix_str(f"{spec.name}, {shape.name}: {what}")
            bar.update(round(steps, 6))

        try:
            measurement.run(advance, partial(keep, measurement))
        except KeyboardInterrupt:
            keep(measurement)
            raise KeyboardInterrupt(result) from None
        failures += measurement.failures
        finished += measurement.rows(ceilings)
    result["interrupted"] = False
    keep()
    return result


# --- settings ---------------------------------------------------------------------------------------------------


def _specs(names: Sequence[str]) -> list[OpSpec]:
    from ..ops import SPECS

    try:
        return [measure.find_spec(name) for name in names] if names else list(SPECS)
    except ValueError as error:
        raise BenchError(str(error)) from None


def _options(config: BenchConfig) -> Options:
    passes = tuple(part.strip() for part in config.passes.split(","))
    if not passes or not set(passes) <= set(measure.PASSES):
        raise BenchError(f"pass must be some of {','.join(measure.PASSES)}, got {config.passes!r}")
    if config.device == "cuda" and not torch.cuda.is_available():
        raise BenchError("device cuda: PyTorch finds no GPU on this machine")
    passes = tuple(each for each in measure.PASSES if each in passes)
    dtype = DTYPES[config.dtype]
    return Options(
        dtype, config.device, passes, config.seconds, config.providers, config.memory, config.allocator == "caching"
    )


def _cases(spec: OpSpec, config: BenchConfig) -> list[tuple[str, Shape]]:
    if config.shape:
        try:
            shapes = [spec.shape(text) for text in config.shape]
        except ValueError as error:
            raise BenchError(str(error)) from None
        except KeyError:
            own = ", ".join(repr(shape.name) for shape in (*spec.shapes, *spec.gpu_shapes, *spec.growth))
            raise BenchError(f"shape must be KEY=NUMBER,... or, of {spec.name}, one of {own}") from None
        for shape in shapes:
            if math.prod(shape.sizes.values()) > MOST_ELEMENTS:
                raise BenchError(
                    f"shape must have sizes with a product of at most {MOST_ELEMENTS:,}, got {shape.name!r}"
                )
        return [("shape", shape) for shape in shapes]
    shapes = spec.gpu_shapes if config.device == "cuda" and spec.gpu_shapes else spec.shapes
    growth = spec.growth if config.growth and config.out is not None else ()
    return [*(("shape", shape) for shape in shapes), *(("growth", shape) for shape in growth)]


def _check_providers(spec: OpSpec, chosen: Sequence[str]) -> None:
    known = [*spec.implementations, *(peer.name for peer in spec.peers)]
    for name in chosen:
        if name not in known:
            raise BenchError(f"a provider of {spec.name} must be one of {', '.join(map(repr, known))}, got {name!r}")
