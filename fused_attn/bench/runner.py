"""Measures one case of one op: implementations and peers, each checked before it is timed."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..ops._floor.declarations import OpSpec, Shape, convert
from ..testing.numerics import evaluate, mismatches
from . import measure
from .ceilings import memory_gbps
from .rows import Row

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
#: Peers sum in other orders than the reference: this many times its error is still the same function.
PEER_FACTOR = 16.0
#: Input sets that take turns.
DRAWS = 3


@dataclass(frozen=True)
class Options:
    """How cases are measured."""

    dtype: torch.dtype = torch.float32
    device: str = "cpu"
    passes: tuple[str, ...] = measure.PASSES
    #: to time each case for
    seconds: float = 10.0
    #: names of implementations and peers; empty for all but the reference
    providers: tuple[str, ...] = ()
    memory: bool = True
    #: on the CPU, keep freed memory; for good: a process cannot take it back
    keep_freed: bool = True


def provider_names(spec: OpSpec, chosen: Sequence[str] = ()) -> list[str]:
    """Implementations, then peers; the reference only when chosen."""
    names = [*spec.implementations, *(peer.name for peer in spec.peers)]
    return [name for name in names if (name in chosen if chosen else name != "reference")]


class Measurement:
    """One case, as far as it has been measured: :meth:`rows` may be asked for at any time.

    Args:
        spec: of the op.
        shape: the case.
        kind: ``"shape"``, or ``"growth"`` for one of a series of sizes.
        options: how to measure.
    """

    #: steps of one provider that :meth:`run` reports: checked, timed, memory
    STEPS = 3

    def __init__(self, spec: OpSpec, shape: Shape, kind: str, options: Options) -> None:
        self.spec, self.shape, self.kind, self.options = spec, shape, kind, options
        self.names = provider_names(spec, options.providers)
        self.refused: dict[str, tuple[str, str]] = {}
        self.times: measure.Times = {}
        self.rounds: measure.Rounds = []
        self.saved: dict[str, int] = {}
        self.memory: dict[str, dict[str, int]] = {}
        self.memory_missing: dict[str, str] = {}

    # --- measuring ----------------------------------------------------------------------------------------------

    def run(
        self,
        advance: Callable[[str, float], None] = lambda what, steps: None,
        keep: Callable[[], None] = lambda: None,
    ) -> None:
        """Check, time and measure the memory of every provider.

        Args:
            advance: told what comes next, and how many of ``STEPS`` times the providers were done since.
            keep: called when there is more to keep.
        """
        if self.shape.memory_only:
            self._refuse_all_but_memory("the size is for the memory of the fused op alone")
        else:
            try:
                self._check_and_time(advance)
            except (torch.OutOfMemoryError, MemoryError):
                self._refuse_all_but_memory("the float64 reference does not fit into memory, so nothing can be checked")
        keep()
        for name in self.names:
            advance(f"memory of {name}", 0)
            if self.options.memory and name not in self.refused:
                self._measure_memory(name)
            advance("", 1)

    def _check_and_time(self, advance) -> None:
        functions, calls = self.check(advance)
        if functions:
            self._time(functions, calls, advance)

    def _refuse_all_but_memory(self, why: str) -> None:
        inputs = self.shape.inputs(self.options.dtype, self.options.device)
        for name in self.names:
            if name == "reference" or name not in self.spec.implementations:
                self.refused[name] = ("not run", why)
            elif (reason := self.spec.reason(name, inputs)) is not None:
                self.refused[name] = ("not run", reason)

    def _is_fused(self, name: str) -> bool:
        return name in self.spec.implementations and name != "reference"

    def _passes(self, name: str) -> tuple[str, ...]:
        available = measure.passes_of(self.spec, name, self.options.device)
        return tuple(each for each in self.options.passes if each in available)

    def check(
        self, advance: Callable[[str, float], None] = lambda what, steps: None
    ) -> tuple[dict[str, Callable[..., Tensor]], list[measure.Call]]:
        """Those that can run and are right, and what to call them on."""
        if "torch._dynamo" in sys.modules:  # the limit on recompilations counts all cases of a process
            torch._dynamo.reset()
        options, draws = self.options, []
        for draw in range(DRAWS):
            draws.append(self.shape.inputs(options.dtype, options.device, draw))
        advance("reference", 0)
        reference = measure.provider(self.spec, "reference", draws[0])
        shape_of_out = evaluate(reference, draws[0])["out"]
        generator = torch.Generator().manual_seed(1)
        calls = [(inputs, torch.randn(shape_of_out.shape, generator=generator).to(shape_of_out)) for inputs in draws]
        grad_out = calls[0][1] if {"bwd", "both"} & set(options.passes) else None
        same_dtype = evaluate(reference, draws[0], grad_out)
        oracle = evaluate(
            reference, convert(draws[0], torch.float64), None if grad_out is None else grad_out.to(torch.float64)
        )

        functions = {}
        for name in self.names:
            advance(f"check of {name}", 0)
            trains = grad_out is not None and self._passes(name) != ("fwd",)
            if not self._passes(name):
                self.refused[name] = ("not run", f"no backward on {options.device.upper()}")
                advance("", 1)
                continue
            wanted = oracle if trains else {"out": oracle["out"]}
            try:
                function = measure.provider(self.spec, name, draws[0])
                results = evaluate(function, draws[0], grad_out if trains else None)
                fused = name in self.spec.implementations
                wrong = mismatches(results, same_dtype, wanted, 2.0 if fused else PEER_FACTOR)
                if wrong:
                    self.refused[name] = ("wrong", "; ".join(wrong))
                else:
                    functions[name] = function
                    if trains:
                        self.saved[name] = measure.saved_bytes(function, draws[0])
                del results
            except NotImplementedError as error:  # so a peer says why it cannot run here, see declarations.Peer
                self.refused[name] = ("not run", _one_line(error))
            except Exception as error:  # a peer that does not compile or fit must not end the others' measurement
                status = "failed" if name in self.spec.implementations else "not run"
                self.refused[name] = (status, f"{type(error).__name__}: {_one_line(error)}")
            advance("", 1)
        return functions, calls

    def _time(self, functions, calls, advance) -> None:
        done = 0.0

        def on_round(part: float) -> None:
            nonlocal done
            advance("timing", (part - done) * len(self.names))
            done = part

        advance("timing (warm-up)", 0)
        measure.time_interleaved(
            functions,
            calls,
            passes={name: self._passes(name) for name in functions},
            seconds=self.options.seconds,
            between=[name for name in functions if self._is_fused(name)],
            keep_freed=self.options.keep_freed,
            into=self.times,
            rounds_into=self.rounds,
            on_round=on_round,
        )

    def _measure_memory(self, name: str) -> None:
        arguments = (self.spec.name, self.shape.name, name)
        try:
            if self.options.device == "cuda":  # the allocator counts what one call holds in any process
                self.memory[name] = measure.memory_here(*arguments, "cuda", self.options.dtype)
            else:
                self.memory[name] = measure.peak_memory(*arguments, dtype=self.options.dtype)
        except NotImplementedError as error:  # the process that measures it could not run it
            self.refused[name] = ("not run", _one_line(error))
        except RuntimeError as error:  # it does not fit: what was timed stays
            self.memory_missing[name] = f"no memory measured: {_one_line(error)}"

    # --- results ------------------------------------------------------------------------------------------------

    @property
    def failures(self) -> list[str]:
        """Implementations of the package whose result is wrong, or that raised."""
        return [
            f"{name} on {self.spec.name}, {self.shape.name}, {status}: {reason}"
            for name, (status, reason) in self.refused.items()
            if name in self.spec.implementations and status in ("wrong", "failed")
        ]

    def rows(self, ceilings: Mapping[str, Any]) -> list[Row]:
        """One row per provider and pass that has a result, or a reason for having none."""
        rows = []
        for name in self.names:
            head = {
                "op": self.spec.name,
                "shape": self.shape.name,
                "kind": self.kind,
                "sizes": dict(self.shape.sizes),
                "provider": name,
                "fused": self._is_fused(name),
                "status": "ok",
                "reason": self.memory_missing.get(name),
            }
            if name in self.refused:
                status, reason = self.refused[name]
                rows.append({**head, "pass": None, "status": status, "reason": reason})
                continue
            for each in self.options.passes:
                if each not in self._passes(name):
                    reason = f"no backward on {self.options.device.upper()}"
                    if name in self.times:
                        rows.append({**head, "pass": each, "status": "not run", "reason": reason})
                    continue
                seconds = self.times.get(name, {}).get(each, [])
                memory = self.memory.get(name, {}).get("fwd" if each == "fwd" else "both")
                if not seconds and memory is None:  # interrupted before
                    continue
                row = {**head, "pass": each, "repetitions": len(seconds)}
                if seconds:
                    row |= self._speed(each, seconds, ceilings)
                row |= self._comparison(name, each)
                row |= {"extra_bytes": memory, "saved_bytes": self.saved.get(name) if each != "fwd" else None}
                rows.append(row)
        return rows

    def _comparison(self, name: str, each: str) -> Row:
        """The peer with the least time for this pass, and how many times this one's it is."""
        ratios = {
            peer.name: measure.median_ratio(self.rounds, peer.name, name, each)
            for peer in self.spec.peers
            if each in self.times.get(peer.name, {})
        }
        known = [(ratio, peer) for peer, ratio in ratios.items() if ratio is not None]
        if not known:
            return {}
        ratio, best = min(known)
        return {"best_peer": best, "best_peer_over_this": ratio}

    def _speed(self, each: str, seconds: list[float], ceilings: Mapping[str, Any]) -> Row:
        shape, parts = self.shape, {"fwd": ("forward",), "bwd": ("backward",)}.get(each, ("forward", "backward"))
        quantiles = torch.tensor(seconds, dtype=torch.float64).quantile(torch.tensor([0.2, 0.5, 0.8]).double()).tolist()
        row = {key: 1e3 * value for key, value in zip(("p20_ms", "p50_ms", "p80_ms"), quantiles, strict=True)}
        # The spec counts bytes in float32.
        moved = sum(getattr(shape, f"bytes_{part}") for part in parts) * self.options.dtype.itemsize / 4
        row["gbps"] = moved / quantiles[1] * 1e-9
        row["gflops"] = sum(getattr(shape, f"flops_{part}") for part in parts) / quantiles[1] * 1e-9
        if ceilings:
            row["of_copy"] = row["gbps"] / memory_gbps(ceilings, moved)
            row["of_matmul"] = row["gflops"] / ceilings["matmul_gflops"]
        return row


def _one_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[0] if lines else "no message")[:300]
