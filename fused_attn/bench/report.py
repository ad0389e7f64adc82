"""Results of a benchmark: the table in the terminal, JSON, CSV and Markdown."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..train.atomic import write_text
from ..train.json_files import dumps
from . import plots
from .rows import MIB, PASS_TITLES, Report, Row, allocator, machine, processor, unique

COLUMNS = (
    "op", "shape", "kind", "provider", "pass", "status", "reason", "repetitions", "p20_ms", "p50_ms", "p80_ms",
    "best_peer", "best_peer_over_this", "gbps", "of_copy", "gflops", "of_matmul", "extra_bytes", "saved_bytes",
)  # fmt: skip


def stem(report: Report) -> str:
    """Name of the result files: the op's; with device, dtype and allocator where they are not the usual ones."""
    usual = (report["device"], report["dtype"]) == ("cpu", "fp32")
    name = report["op"] if usual else f"{report['op']}_{report['device']}_{report['dtype']}"
    kind = allocator(report)
    return name if kind is None else f"{name}_{'default_allocator' if kind == 'default' else kind}"


def write(report: Report, folder: Path) -> None:
    """Write JSON and CSV, each complete or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / f"{stem(report)}.json", dumps(report, indent=1) + "\n")
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(report["rows"])
    write_text(folder / f"{stem(report)}.csv", text.getvalue())


def render(report: Report, folder: Path) -> None:
    """Write Markdown and pictures; they hold nothing that the JSON does not."""
    name = stem(report)
    write_text(folder / f"{name}.md", markdown(report))
    plots.bars(report, folder / f"{name}.png")
    plots.growth(report, folder / f"{name}_growth.png")


# --- terminal ---------------------------------------------------------------------------------------------------


def print_table(report: Report) -> None:
    """One table per case, with everything that was measured."""
    from rich.console import Console
    from rich.table import Table

    class Output(Console):
        def on_broken_pipe(self) -> None:  # rich's own ends the process
            raise

    console = Output()
    if not console.is_terminal:
        console = Output(width=160)
    ceilings = report["ceilings"]
    console.print(f"\n[bold]{report['op']}[/bold], {report['dtype']}, {report['device']}; {machine(report)}")
    if ceilings:
        console.print(
            f"this machine {_moves(ceilings)} and multiplies matrices at {ceilings['matmul_gflops']:.0f} GFLOP/s; "
            "percentages are shares of these",
            highlight=False,
        )
    for shape in unique(report["rows"], "shape"):
        rows = [row for row in report["rows"] if row["shape"] == shape]
        table = Table(title=shape, title_justify="left")
        table.add_column("")
        table.add_column("pass")
        for heading in ("p50 ms", "p20", "p80", "vs best peer", "GB/s", "", "GFLOP/s", "", "peak MiB", "saved MiB"):
            table.add_column(heading, justify="right")
        for row in rows:
            name = f"[bold]{row['provider']}[/bold]" if row["fused"] else row["provider"]
            if row["status"] != "ok":
                continue
            table.add_row(
                name,
                row["pass"],
                *(_number(row.get(key), digits) for key, digits in (("p50_ms", 3), ("p20_ms", 3), ("p80_ms", 3))),
                _number(row.get("best_peer_over_this"), 2, "x"),
                _number(row.get("gbps"), 3),
                _percent(row.get("of_copy")),
                _number(row.get("gflops"), 3),
                _percent(row.get("of_matmul")),
                _mebibytes(row.get("extra_bytes")),
                _mebibytes(row.get("saved_bytes")),
            )
        if table.row_count:
            console.print(table)
        else:
            console.print(f"{shape}:", highlight=False)
        for line in dict.fromkeys(_remark(row) for row in rows if row["reason"]):
            console.print(line, markup=False, highlight=False)


def _moves(ceilings: Mapping[str, Any]) -> str:
    """What it moves at most, with the verb."""
    levels = ceilings.get("bandwidth")
    if not levels:
        return f"copies ({ceilings['copy_gbps']:.1f} GB/s)"
    sizes = sorted(levels, key=int)
    rates = ", ".join(f"{max(levels[size].values()):.0f} GB/s of {int(size) >> 20} MiB" for size in sizes)
    return f"moves (reads, writes or copies: {rates})"


def _remark(row: Row) -> str:
    if row["status"] == "ok":
        return f"  {row['provider']}: {row['reason']}"
    which = f", {row['pass']}" if row["pass"] else ""
    return f"  {row['provider']}{which}: {row['status']}: {row['reason']}"


def _number(value: float | None, digits: int, unit: str = "") -> str:
    """At least ``digits`` digits, without an exponent."""
    if value is None:
        return "-"
    whole = int(abs(value))
    decimals = max(0, digits - (len(str(whole)) if whole else 0))
    return f"{value:,.{decimals}f}{unit}"


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.1%}" if value < 0.1 else f"{value:.0%}"


def _mebibytes(value: int | None) -> str:
    return "-" if value is None else f"{value / MIB:,.1f}"


# --- Markdown ---------------------------------------------------------------------------------------------------


def markdown(report: Report) -> str:
    """The tables of the README: time by pass, shares of the ceilings, memory."""
    timed = [row for row in report["rows"] if row.get("p50_ms") and row["kind"] == "shape"]
    lines = [
        f"{machine(report)}, {report['dtype']}.  Median milliseconds [20th, 80th percentile]; the ratio is the "
        "best peer's time over the fused op's in the same round, the median of all rounds."
    ]
    for each in sorted(unique(timed, "pass"), key=list(PASS_TITLES).index):
        rows = [row for row in timed if row["pass"] == each]
        lines += _table(PASS_TITLES[each], rows, _median)
        for name in unique((row for row in rows if row["fused"]), "provider"):
            mine = [row for row in rows if row["provider"] == name]
            ratios = {row["shape"]: row.get("best_peer_over_this") for row in mine}
            cells = [f"**{ratios[shape]:.1f}x**" if ratios.get(shape) else "-" for shape in unique(rows, "shape")]
            lines.append(f"| best peer / `{name}` | {' | '.join(cells)} |")

    fused = [row for row in timed if row["fused"] and row.get("of_copy")]
    if fused:
        ceilings = report["ceilings"]
        lines += [
            "",
            "Least bytes and FLOPs of the op over its time; in brackets, the share of what this machine "
            f"{_moves(ceilings)} and multiplies ({ceilings['matmul_gflops']:.0f} GFLOP/s) at most:",
            "",
            "| fused op | pass | GB/s | GFLOP/s |",
            "| --- | --- | ---: | ---: |",
        ]
        for row in fused:
            gbps, gflops = _number(row["gbps"], 3), _number(row["gflops"], 3)
            copy, product = _percent(row["of_copy"]), _percent(row["of_matmul"])
            title = f"`{row['provider']}`, {row['shape']} | {PASS_TITLES[row['pass']]}"
            lines.append(f"| {title} | {gbps} [{copy}] | {gflops} [{product}] |")

    lines += _memory_tables(report)
    reasons = {}
    for row in report["rows"]:
        if row["status"] != "ok" and row["kind"] == "shape":
            reasons.setdefault((row["provider"], row["status"], row["reason"]), None)
    if reasons:
        lines += ["", f"Not timed: {'; '.join(f'{name} ({why})' for name, _, why in reasons)}."]
    return "\n".join(lines) + "\n"


def summary(reports: Iterable[Report]) -> str:
    """One line for each op and shape: forward and backward of the fused op beside its fastest peer."""
    lines: list[str] = []
    reports = list(reports)
    days = dates(reports)
    for report in reports:
        timed = [
            row for row in report["rows"] if row["kind"] == "shape" and row["pass"] == "both" and row.get("p50_ms")
        ]
        for mine in (row for row in timed if row["fused"] and row.get("best_peer_over_this")):
            same = (row for row in timed if row["shape"] == mine["shape"])
            peer = next(row for row in same if row["provider"] == mine["best_peer"])
            if not lines:
                where = machine(report).replace(report["environment"]["date"], days)
                where = where.replace(processor(report), processors(reports))
                lines = [
                    f"{where}, {report['dtype']}, forward + backward, medians, the ratio that of rounds; the "
                    "share is that of the copy bandwidth which this machine reaches at most; memory: held at the peak "
                    "beyond the inputs.",
                    "",
                    "| op | shape | fused, ms | best peer, ms | | ratio | of copy | fused, MiB | peer, MiB |",
                    "| --- | --- | ---: | ---: | --- | ---: | ---: | ---: | ---: |",
                ]
            lines.append(
                f"| `{report['op']}` | {mine['shape']} | {_number(mine['p50_ms'], 3)} | {_number(peer['p50_ms'], 3)} "
                f"| {peer['provider']} | **{mine['best_peer_over_this']:.1f}x** | {_percent(mine.get('of_copy'))} "
                f"| {_mebibytes(mine['extra_bytes'])} | {_mebibytes(peer['extra_bytes'])} |"
            )
    return "\n".join(lines) + "\n"


def processors(reports: Iterable[Report]) -> str:
    """The processor of the measurements; where there are several, that of most ops, then those of the others."""
    ops: dict[str, list[str]] = {}
    for report in reports:
        ops.setdefault(processor(report), []).append(f"`{report['op']}`")
    most, *others = sorted(ops, key=lambda name: -len(ops[name])) or [""]
    return most + "".join(f" ({', '.join(ops[name])}: {name})" for name in others)


def dates(reports: Iterable[Report]) -> str:
    """The day of the measurements, or the first and the last."""
    days = sorted({report["environment"]["date"] for report in reports})
    return days[0] if len(days) == 1 else f"{days[0]} to {days[-1]}" if days else ""


def _memory_tables(report: Report) -> list[str]:
    """Peak memory of training where there is a backward pass, and what is saved for it."""
    lines = []
    for kind, title in (("shape", "peak extra memory, MiB"), ("growth", "its growth, MiB")):
        rows = {}
        for row in report["rows"]:
            if row["kind"] == kind and row.get("extra_bytes") is not None:
                key = row["shape"], row["provider"]
                if key not in rows or row["pass"] != "fwd":
                    rows[key] = row
        lines += _table(title, list(rows.values()), lambda row: f"{row['extra_bytes'] / MIB:.1f}")
    rows = [
        row
        for row in report["rows"]
        if row["kind"] == "shape" and row["pass"] == "both" and row.get("saved_bytes") is not None
    ]
    return lines + _table("saved for backward, MiB", rows, lambda row: f"{row['saved_bytes'] / MIB:.1f}")


def _median(row: Row) -> str:
    return "{} [{}, {}]".format(*(_number(row[key], 3) for key in ("p50_ms", "p20_ms", "p80_ms")))


def _table(title: str, rows: Sequence[Row], cell) -> list[str]:
    """Providers by shapes."""
    if not rows:
        return []
    shapes, cells = unique(rows, "shape"), {(row["shape"], row["provider"]): cell(row) for row in rows}
    lines = ["", f"| {title} | {' | '.join(shapes)} |", "| --- |" + " ---: |" * len(shapes)]
    fused = {row["provider"] for row in rows if row["fused"]}
    for name in unique(rows, "provider"):
        label = f"**fused** (`{name}`)" if name in fused else name
        lines.append(f"| {label} | {' | '.join(cells.get((shape, name), '-') for shape in shapes)} |")
    return lines
