"""Pictures of benchmark results."""

from __future__ import annotations

import math
from pathlib import Path

from .rows import MIB, PASS_TITLES, Report, Row, machine, unique

FUSED = "#d1495b"
#: distinct without the fused op's red, also for colour-blind readers (after Okabe and Ito)
PEERS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#8c6d31", "#5c5c5c", "#b3b300")


def _colors(report: Report) -> dict[str, str]:
    fused = {row["provider"] for row in report["rows"] if row["fused"]}
    peers = [name for name in unique(report["rows"], "provider") if name not in fused]
    colors = {name: PEERS[i % len(PEERS)] for i, name in enumerate(peers)}
    return colors | dict.fromkeys(fused, FUSED)


def _label(row: Row) -> str:
    return f"fused ({row['provider']})" if row["fused"] else row["provider"]


def bars(report: Report, path: Path) -> None:
    """Bars against the peers: a column of panels per case; time of each pass and memory one below the other."""
    from matplotlib.figure import Figure

    rows = [row for row in report["rows"] if row["kind"] == "shape" and row["status"] == "ok"]
    shapes, colors = unique(rows, "shape"), _colors(report)
    panels = [
        (f"{title}, ms", each, "p50_ms", 1.0)
        for each, title in PASS_TITLES.items()
        if each != "bwd" and any(row["pass"] == each and row.get("p50_ms") for row in rows)
    ]
    for each in ("both", "fwd"):
        if any(row["pass"] == each and row.get("extra_bytes") is not None for row in rows):
            panels.append(("peak extra memory, MiB", each, "extra_bytes", 1 / MIB))
            break
    if not panels:
        return
    providers = {row["provider"]: _label(row) for row in rows}
    reasons = {(row["shape"], row["provider"], row["pass"]): row["reason"] for row in report["rows"] if row["pass"]}
    height = 0.34 * len(providers) + 0.8
    figure = Figure(figsize=(max(3.4 * len(shapes) + 2.2, 7.0), height * len(panels) + 0.8), layout="constrained")
    grid = figure.subplots(len(panels), len(shapes), squeeze=False, sharey=True)
    for panel, line in zip(panels, grid, strict=True):
        title, each, key, factor = panel
        for axes, shape in zip(line, shapes, strict=True):
            values = {
                row["provider"]: row[key] * factor
                for row in rows
                if row["shape"] == shape and row["pass"] == each and row.get(key) is not None
            }
            fused = [values[name] for name in values if colors[name] == FUSED]
            if not values:
                axes.text(0.5, 0.5, "not measured", transform=axes.transAxes, ha="center", color="gray")
            for place, name in enumerate(providers if values else ()):
                if name not in values:
                    why = reasons.get((shape, name, each), "-")
                    axes.text(0, place, f" {why}", va="center", fontsize=8, color="gray")
                    continue
                value = values[name]
                axes.barh(place, value, 0.72, color=colors[name])
                times = f"  ({value / min(fused):.1f}x)" if fused and min(fused) > 0 and colors[name] != FUSED else ""
                weight = "bold" if colors[name] == FUSED else "normal"
                axes.text(value, place, f" {_short(value)}{times}", va="center", fontsize=8, weight=weight)
            axes.set_yticks(range(len(providers)), list(providers.values()), fontsize=8)
            axes.set_xlim(0, 1.45 * (max(values.values(), default=0.0) or 1.0))
            axes.tick_params(axis="x", labelsize=7)
            axes.spines[["top", "right"]].set_visible(False)
            axes.set_title(f"{shape}\n{title}" if panel is panels[0] else title, fontsize=9)
    grid[0][0].invert_yaxis()
    figure.suptitle(f"{report['op']}, {report['dtype']}\n{machine(report)}", fontsize=9)
    figure.savefig(path, dpi=110)


def growth(report: Report, path: Path) -> None:
    """Time and memory of a training step against N, both axes logarithmic."""
    from matplotlib.figure import Figure

    rows = [row for row in report["rows"] if row["kind"] == "growth" and row["status"] == "ok"]
    xs, name_of_x = _sizes(rows)
    panels = []
    each = "both" if any(row["pass"] == "both" for row in rows) else "fwd"
    for key, factor, title in (("p50_ms", 1.0, "time, ms"), ("extra_bytes", 1 / MIB, "peak extra memory, MiB")):
        chosen = [row for row in rows if row["pass"] == each and row.get(key)]
        if len(unique(chosen, "shape")) > 1:
            panels.append((key, factor, title, chosen))
    if not panels:
        return
    colors = _colors(report)
    figure = Figure(figsize=(6.0 * len(panels) + 2.5, 4.6), layout="constrained")
    handles = {}
    for axes, (key, factor, title, chosen) in zip(
        figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True
    ):
        for name in unique(chosen, "provider"):
            line = [row for row in chosen if row["provider"] == name]
            style = {"linewidth": 3.0, "zorder": 3} if line[0]["fused"] else {"linewidth": 1.6, "linestyle": "--"}
            (handle,) = axes.plot(
                [xs[row["shape"]] for row in line],
                [row[key] * factor for row in line],
                marker="o",
                color=colors[name],
                **style,
            )
            handles.setdefault(_label(line[0]), handle)
        ticks = sorted({xs[row["shape"]] for row in chosen})
        axes.set(xscale="log", yscale="log", xlabel=name_of_x, title=f"{PASS_TITLES[each]}: {title}")
        axes.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
        axes.minorticks_off()
        axes.yaxis.set_major_formatter(lambda value, _: _short(value))
        axes.grid(alpha=0.3)
    figure.legend(list(handles.values()), list(handles), loc="outside right upper", fontsize=8)
    figure.suptitle(f"{report['op']}, {report['dtype']}\n{machine(report)}", fontsize=9)
    figure.savefig(path, dpi=110)


def _sizes(rows: list[Row]) -> tuple[dict[str, int], str]:
    """By shape, the product of those sizes that change from shape to shape; and what it is."""
    sizes = {row["shape"]: row["sizes"] for row in rows}
    keys = [key for key in next(iter(sizes.values()), {}) if len({size.get(key) for size in sizes.values()}) > 1]
    if not keys:
        return {shape: i + 1 for i, shape in enumerate(sizes)}, "case"
    return {shape: math.prod(size[key] for key in keys) for shape, size in sizes.items()}, f"N = {'·'.join(keys)}"


def _short(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
