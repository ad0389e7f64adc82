"""Speed and memory of a fused op beside what a user would write instead: OP.json, OP.md and OP.png under --out.

Every implementation and peer is compared with the float64 reference first; one that is wrong ends the run without a
report.  Then all take turns (A B C A B C ...), after a warm-up, for about --seconds per shape.  Memory is measured in a
process of its own for each.

Run from the repository root: ``python benchmarks/rel_attention_2d.py --out benchmarks/results``.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch

# Runs from a clone without installation too.
sys.path.insert(0, str(Path(__file__).parents[1]))

from fused_attn.ops import measure
from fused_attn.ops.contract import OpSpec, Shape, convert, draw_grad_out, evaluate, mismatches
from fused_attn.train.environment import describe

#: Peers sum in other orders than the reference: this many times its error in float32 is still the same function.
PEER_FACTOR = 16.0
MIB = 2**20


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--op", default="rel_attention_2d", help="op to measure (%(default)s)")
    parser.add_argument("--impl", default="cpu", help="implementation to compare with the peers (%(default)s)")
    parser.add_argument("--out", type=Path, required=True, help="folder for the three files")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads (%(default)s)")
    parser.add_argument("--seconds", type=float, default=60.0, help="time to spend on each shape (%(default)s)")
    parser.add_argument("--least", type=int, default=7, help="least repetitions of each shape (%(default)s)")
    parser.add_argument("--shapes", default="", help="only shapes whose name contains this text")
    parser.add_argument("--no-memory", action="store_true", help="leave the memory measurements out")
    arguments = parser.parse_args(argv)

    torch.set_num_threads(arguments.threads)
    spec = measure.find_spec(arguments.op)
    shapes = [shape for shape in spec.shapes if arguments.shapes in shape.name]
    report: dict[str, Any] = {"op": spec.name, "impl": arguments.impl, "dtype": "float32", "environment": describe()}
    report["speed"] = [
        row
        for shape in shapes
        for row in measure_speed(spec, shape, arguments.impl, arguments.seconds, arguments.least)
    ]
    report["memory"], report["growth"] = [], []
    write(report, arguments.out)
    if not arguments.no_memory:
        # Where all N x N maps together have a few MiB, they do not show in a resident set.
        large = [shape for shape in shapes if shape.flops_forward > 1e9]
        report["memory"] = [row for shape in large for row in measure_memory(spec, shape, arguments.impl)]
        # The largest size is for the fused op alone: the others would need gigabytes.
        for i, shape in enumerate(spec.growth):
            peers = spec.peers[:1] if i + 1 < len(spec.growth) else ()
            report["growth"] += measure_memory(spec, shape, arguments.impl, peers)
        write(report, arguments.out)
    print(markdown(report))
    return 0


def write(report: dict[str, Any], folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    stem = folder / report["op"]
    stem.with_suffix(".json").write_text(json.dumps(report, indent=1) + "\n")
    stem.with_suffix(".md").write_text(markdown(report))
    plot(report, stem.with_suffix(".png"))


# --- measuring --------------------------------------------------------------------------------------------------


def measure_speed(spec: OpSpec, shape: Shape, impl: str, seconds: float, least: int) -> list[dict[str, Any]]:
    """One row per provider and phase: quantiles in milliseconds, and how much longer the fused op's best peer takes."""
    inputs = shape.inputs(torch.float32)
    grad_out = draw_grad_out(spec, inputs)
    reference = measure.provider(spec, "reference", inputs)
    oracle = evaluate(reference, convert(inputs, torch.float64), grad_out.double())
    same_dtype = evaluate(reference, inputs, grad_out)
    functions = {}
    for name in (impl, *(peer.name for peer in spec.peers)):
        try:
            functions[name] = measure.provider(spec, name, inputs)
        except NotImplementedError as error:
            print(f"{shape.name}: {name} left out: {error}", file=sys.stderr)
            continue
        results = evaluate(functions[name], inputs, grad_out)
        wrong = mismatches(results, same_dtype, oracle, 2.0 if name == impl else PEER_FACTOR)
        if wrong:
            raise SystemExit(f"{shape.name}: {name} is wrong, nothing is reported: {'; '.join(wrong)}")

    started = time.perf_counter()
    measure.time_interleaved(functions, inputs, grad_out, repetitions=1, warmup=1)
    round_seconds = (time.perf_counter() - started) / 2
    repetitions = max(least, min(200, int(seconds / round_seconds)))
    print(f"{shape.name}: {repetitions} rounds of {len(functions)} in turn", file=sys.stderr, flush=True)
    times = measure.time_interleaved(functions, inputs, grad_out, repetitions=repetitions, warmup=1)

    rows = []
    for name, phases in times.items():
        for phase, values in phases.items():
            p20, p50, p80 = torch.tensor(values, dtype=torch.float64).quantile(torch.tensor([0.2, 0.5, 0.8]).double())
            row = {"shape": shape.name, "provider": name, "phase": phase, "repetitions": repetitions}
            row |= {key: float(value) * 1e3 for key, value in (("p20_ms", p20), ("p50_ms", p50), ("p80_ms", p80))}
            flops = {"forward": shape.flops_forward, "backward": shape.flops_backward}
            row["gflops"] = flops.get(phase, sum(flops.values())) / float(p50) * 1e-9
            rows.append(row)
    for row in rows:
        others = [o["p50_ms"] for o in rows if o["phase"] == row["phase"] and o["provider"] != impl]
        row["best_peer_over_this"] = min(others) / row["p50_ms"] if others else None
    return rows


def measure_memory(spec: OpSpec, shape: Shape, impl: str, peers=None) -> list[dict[str, Any]]:
    """One row per provider: most bytes held beyond the inputs during forward and backward."""
    inputs = shape.inputs(torch.float32)
    size = sum(value.numel() * value.element_size() for value in inputs.values() if isinstance(value, torch.Tensor))
    del inputs
    rows = []
    for name in (impl, *(peer.name for peer in (spec.peers if peers is None else peers))):
        try:
            extra = measure.peak_extra_bytes(spec.name, shape.name, name)
        except NotImplementedError as error:
            print(f"{shape.name}: {name} left out: {error}", file=sys.stderr)
            continue
        print(f"{shape.name}: {name} holds {extra / MIB:.1f} MiB", file=sys.stderr, flush=True)
        rows.append(
            {
                "shape": shape.name,
                "provider": name,
                "extra_bytes": extra,
                "input_bytes": size,
                "limit": shape.memory_limit,
            }
        )
    return rows


# --- reporting --------------------------------------------------------------------------------------------------


def _unique(rows: list[dict[str, Any]], key: str) -> list[str]:
    return list(dict.fromkeys(row[key] for row in rows))


def markdown(report: dict[str, Any]) -> str:
    """The tables of the README."""
    machine, impl = report["environment"], report["impl"]
    lines = [
        f"{machine['cpu']}, {machine['threads']} of {machine['cores']} cores, {machine['cpu_capability']}, torch "
        f"{machine['torch']}, {machine['date']}.  Median milliseconds [20th, 80th percentile]; the ratio is the best "
        "peer's median over the fused op's."
    ]
    for phase in ("forward+backward", "forward"):
        rows = {(row["shape"], row["provider"]): row for row in report["speed"] if row["phase"] == phase}
        if not rows:
            continue
        shapes = _unique(report["speed"], "shape")
        lines += ["", f"| {phase.replace('+', ' + ')} | {' | '.join(shapes)} |", "| --- |" + " ---: |" * len(shapes)]
        for name in _unique(report["speed"], "provider"):
            cells = []
            for shape in shapes:
                row = rows.get((shape, name))
                cells.append(f"{row['p50_ms']:.1f} [{row['p20_ms']:.1f}, {row['p80_ms']:.1f}]" if row else "-")
            lines.append(f"| {_label(name, impl)} | {' | '.join(cells)} |")
        ratios = [rows[shape, impl]["best_peer_over_this"] if (shape, impl) in rows else None for shape in shapes]
        cells = [f"**{ratio:.1f}x**" if ratio else "-" for ratio in ratios]
        lines.append(f"| best peer / fused | {' | '.join(cells)} |")
    for key, title in (("memory", "peak extra memory, MiB"), ("growth", "its growth, MiB")):
        rows = {(row["shape"], row["provider"]): row["extra_bytes"] / MIB for row in report[key]}
        if not rows:
            continue
        shapes = _unique(report[key], "shape")
        lines += ["", f"| {title} | {' | '.join(shapes)} |", "| --- |" + " ---: |" * len(shapes)]
        for name in _unique(report[key], "provider"):
            cells = [f"{rows[shape, name]:.1f}" if (shape, name) in rows else "-" for shape in shapes]
            lines.append(f"| {_label(name, impl)} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _label(name: str, impl: str) -> str:
    return f"**fused** (`{impl}`)" if name == impl else name


def plot(report: dict[str, Any], path: Path) -> None:
    """Bars of time against the peers, and memory against N."""
    from matplotlib.figure import Figure

    impl, panels = report["impl"], (report["speed"] != []) + (report["growth"] != [])
    if panels == 0:
        return
    figure = Figure(figsize=(6.5 * panels, 4.2), layout="constrained")
    axes = list(figure.subplots(1, panels, squeeze=False)[0])
    if report["speed"]:
        bars = axes.pop(0)
        rows = [row for row in report["speed"] if row["phase"] == "forward+backward"]
        shapes, providers = _unique(rows, "shape"), _unique(rows, "provider")
        for i, name in enumerate(providers):
            medians = {row["shape"]: row["p50_ms"] for row in rows if row["provider"] == name}
            fused = {row["shape"]: row["p50_ms"] for row in rows if row["provider"] == impl}
            xs = [
                x + (i - (len(providers) - 1) / 2) * 0.8 / len(providers) for x, s in enumerate(shapes) if s in medians
            ]
            heights = [medians[shape] / fused[shape] for shape in shapes if shape in medians]
            color = "tab:blue" if name == impl else f"{0.25 + 0.55 * i / len(providers):.2f}"
            bars.bar(xs, heights, 0.8 / len(providers), label="fused" if name == impl else name, color=color)
        bars.set_xticks(range(len(shapes)), shapes, fontsize=8)
        bars.set(ylabel="time, forward + backward (fused = 1)", title=f"{report['op']}, float32")
        bars.legend(fontsize=8)
    if report["growth"]:
        lines = axes.pop(0)
        for name in _unique(report["growth"], "provider"):
            rows = [row for row in report["growth"] if row["provider"] == name]
            style = {"color": "tab:blue", "linewidth": 2.5} if name == impl else {"linestyle": "--"}
            label = "fused" if name == impl else name
            xs = [_unique(report["growth"], "shape").index(row["shape"]) for row in rows]
            lines.plot(xs, [row["extra_bytes"] / MIB for row in rows], marker="o", label=label, **style)
        names = [name.partition(",")[0] for name in _unique(report["growth"], "shape")]
        lines.set_xticks(range(len(names)), names)
        lines.set(
            yscale="log", ylabel="peak memory beyond the inputs (MiB)", title="forward + backward, batch 1, 8 heads"
        )
        lines.grid(axis="y", alpha=0.3)
        lines.legend(fontsize=8)
    figure.savefig(path, dpi=130)


if __name__ == "__main__":
    sys.exit(main())
