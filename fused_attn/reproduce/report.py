"""Table and figure of what was run: ``table.md``, ``table.csv`` and ``figure.png``, from the folders of the runs."""

from __future__ import annotations

import contextlib
import csv
import io
import math
import os
import statistics
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..train import atomic
from ..train.log import RunLog
from .measures import MEASURES
from .tables import Row, Table

#: A picture's colours: ours, and the paper's.
OURS, PAPERS = "#1f77b4", "#888888"


@dataclass
class Results:
    """What is there of a row: metrics.json of the seeds that are complete, the folders that they are in, the cost of
    a step and the counts of the network; and why seeds failed, or are there but not used."""

    row: Row
    metrics: dict[int, Mapping[str, Any]] = field(default_factory=dict)
    folders: dict[int, Path] = field(default_factory=dict)
    cost: Mapping[str, Any] | None = None
    counts: Mapping[str, Any] | None = None
    failed: dict[int, str] = field(default_factory=dict)
    unused: dict[int, str] = field(default_factory=dict)

    def values(self, name: str) -> list[float]:
        """The numbers of a measure: one for every complete seed, or one for the row; nan where it was not finite.  None
        from a run without that number, as without a validation set."""
        measure = MEASURES[name]
        one = {"cost": self.cost, "counts": self.counts}.get(measure.of)
        sources = [one] if one is not None else [] if measure.of == "cost" else list(self.metrics.values())
        if measure.of == "counts" and sources:
            sources = sources[:1]
        numbers = []
        for source in sources:
            with contextlib.suppress(KeyError):
                numbers.append(measure.value(source))
        return [math.nan if number is None else number for number in numbers]


def spread(values: Sequence[float]) -> tuple[float, float | None]:
    """(mean, standard deviation of the sample), the latter None of a single value; nan where a value is not finite."""
    if not all(map(math.isfinite, values)):
        return math.nan, math.nan if len(values) > 1 else None
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None


def write(table: Table, results: Sequence[Results], seeds: int, folder: Path) -> str:
    """Write table and figure of what is there into ``folder``; returns the text of the table."""
    text = markdown(table, results, seeds)
    atomic.write_text(folder / "table.md", text)
    atomic.write_text(folder / "table.csv", comma_separated(table, results))
    if any(each.values(name) for each in results for name in table.measures):
        temporary = folder / f".figure.png.{os.getpid()}.writing"
        _FIGURES[table.figure](table, results, temporary)
        temporary.replace(folder / "figure.png")
    return text


# --- table --------------------------------------------------------------------------------------------------------


def markdown(table: Table, results: Sequence[Results], seeds: int) -> str:
    """The table, what it was measured on, and what differs from the paper."""
    reported = [name for name in table.measures if any(name in row.reported for row in table.rows)]
    headings = ["row", *([] if table.counts else ["seeds"])]
    for name in table.measures:
        headings += [MEASURES[name].heading, *(["in the paper"] if name in reported else [])]
    lines = [
        f"# {table.title} ({table.id}{'' if table.counts else ', scale ' + table.scale})",
        "",
        f"{table.source}.",
        "",
        "| " + " | ".join(headings) + " |",
        "| --- |" + " ---: |" * (len(headings) - 1),
    ]
    for each in results:
        cells = [each.row.name, *([] if table.counts else [str(len(each.metrics))])]
        for name in table.measures:
            cells.append(_cell(name, each.values(name)))
            if name in reported:
                paper = each.row.reported.get(name)
                cells.append("-" if paper is None else format(paper, MEASURES[name].format))
        lines.append("| " + " | ".join(cells) + " |")
    several = any(len(each.metrics) > 1 for each in results)
    notes = ["Mean ± standard deviation over the seeds."] if several else []
    if any(math.isnan(value) for each in results for name in table.measures for value in each.values(name)):
        notes.append("nan: the number was not finite.")
    notes += [f"{note[0].upper()}{note[1:]}{'' if note.endswith('.') else '.'}" for note in table.notes]
    if table.left_out and not table.counts:
        notes.append(f"Rows that this scale does not have: {'; '.join(table.left_out)}.")
    lines += ["", *notes, ""] if notes else [""]
    if not table.counts:
        lines += [*_machines(results), *_incidents(results), *_differences(results)]
    lines += _unfinished(results, seeds if not table.counts else 0)
    return "\n".join(lines).rstrip() + "\n"


def _cell(name: str, values: Sequence[float]) -> str:
    if not values:
        return "-"
    mean, deviation = spread(values)
    form = MEASURES[name].format
    return f"{mean:{form}}" + ("" if deviation is None else f" ± {deviation:{form}}")


def _machines(results: Sequence[Results]) -> list[str]:
    """The data, and what was measured on what; with the rows of each, where they differ."""
    data: dict[str, list[str]] = defaultdict(list)
    training: dict[str, list[tuple[str, str]]] = defaultdict(list)
    costs: dict[str, list[tuple[str, str]]] = defaultdict(list)
    for each in results:
        for seed, run in each.metrics.items():
            name = f"{each.row.name}, seed {seed}"
            data[run["data"]].append(name)
            training[machine(run["environment"])].append((name, run["environment"]["date"]))
        if each.cost is not None:
            costs[machine(each.cost["environment"])].append((each.row.name, each.cost["environment"]["date"]))
    if not training:
        return []
    if len(data) == 1:
        lines = [f"Data: {next(iter(data))}.  Measured on:", ""]
    else:
        lines = ["Data:", "", *(f"- {name} ({'; '.join(rows)})" for name, rows in data.items()), "", "Measured on:", ""]
    for what, where in (("training", training), ("cost of a step", costs)):
        for name, rows in where.items():
            of = f" ({'; '.join(row for row, _ in rows)})" if len(where) > 1 else ""
            lines.append(f"- {what}: {name}, {_dates({date for _, date in rows})}{of}")
    return [*lines, ""]


def _incidents(results: Sequence[Results]) -> list[str]:
    """What runs left out of their training."""
    lines = []
    for each in results:
        for seed, run in each.metrics.items():
            for key, what in (("skipped_steps", "steps without effect"), ("unreadable_images", "unreadable images")):
                if count := run.get(key, 0):
                    lines.append(f"- {each.row.name}, seed {seed}: {count:,} {what} left out")
    return [*lines, ""] if lines else []


def machine(environment: Mapping[str, Any]) -> str:
    """What a result was measured on, without the date."""
    processor = f"{environment['cpu']}, {environment['cpu_capability']}, {environment['threads']} thread(s)"
    device = environment["gpu"] or processor
    return f"{device}, torch {environment['torch']}, fused-attn {environment['fused_attn']}"


def _dates(dates: set[str]) -> str:
    return min(dates) if len(dates) == 1 else f"{min(dates)} to {max(dates)}"


def _differences(results: Sequence[Results]) -> list[str]:
    """Settings that the scale, or the user, changed, each with the rows that have it so."""
    found: dict[str, list[str]] = defaultdict(list)
    for each in results:
        differences = dict(each.row.differences())
        for name, (full, now) in differences.items():
            found[f"{name}: {_shown(now)} in place of {_shown(full)}"].append(each.row.name)
    if not found:
        return []
    lines = ["Settings other than the paper's scale:", ""]
    for text, rows in found.items():
        lines.append(f"- {text}" + ("" if len(rows) == len(results) else f" ({'; '.join(rows)})"))
    return [*lines, ""]


def _shown(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(_shown, value)) or "none"
    return "none" if value is None else f"{value:,}" if isinstance(value, int) else str(value)


def _unfinished(results: Sequence[Results], seeds: int) -> list[str]:
    lines = []
    for each in results:
        for seed, why in each.failed.items():
            lines.append(f"- {each.row.name}, seed {seed}: failed: {why}")
        for seed, why in each.unused.items():
            lines.append(f"- {each.row.name}, seed {seed}: is there, but not used: {why}")
        there = {*each.metrics, *each.failed, *each.unused}
        missing = [seed for seed in range(seeds) if seed not in there]
        if missing:
            lines.append(f"- {each.row.name}: not complete: seed {', '.join(map(str, missing))}")
    return ["Not in the table:", "", *lines, ""] if lines else []


def comma_separated(table: Table, results: Sequence[Results]) -> str:
    """One line for every row and measure."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["table", "scale", "row", "measure", "seeds", "mean", "standard_deviation", "paper"])
    for each in results:
        for name in table.measures:
            values = each.values(name)
            mean, deviation = spread(values) if values else (None, None)
            paper = each.row.reported.get(name)
            numbers = [len(values), mean, deviation, paper]
            writer.writerow([table.id, table.scale, each.row.name, name, *("" if n is None else n for n in numbers)])
    return text.getvalue()


# --- figures ------------------------------------------------------------------------------------------------------


def _bars(table: Table, results: Sequence[Results], path: Path) -> None:
    """A panel for every measure: ours with its standard deviation, and the paper's."""
    from matplotlib.figure import Figure

    names = [name for name in table.measures if any(each.values(name) for each in results)]
    size = (3.6 * len(names) + 1.8, 0.42 * len(results) + 1.4)
    figure = Figure(figsize=size, layout="constrained")
    panels = figure.subplots(1, len(names), squeeze=False, sharey=True)[0]
    for axes, name in zip(panels, names, strict=True):
        ends: list[float] = []
        for place, each in enumerate(results):
            values = each.values(name)
            if values and all(map(math.isfinite, values)):
                mean, deviation = spread(values)
                axes.errorbar(mean, place, xerr=deviation, fmt="o", color=OURS, capsize=3, label="ours")
                axes.plot(values, [place] * len(values), ".", color=OURS, alpha=0.4, ms=4)
                ends += [mean, *values]
            if (paper := each.row.reported.get(name)) is not None:
                axes.plot(paper, place, "x", color=PAPERS, label="paper")
                ends.append(paper)
        if ends and min(ends) > 0 and max(ends) > 20 * min(ends):
            axes.set_xscale("log")
        else:
            axes.locator_params(axis="x", nbins=4)
        axes.set_yticks(range(len(results)), [each.row.name for each in results], fontsize=8)
        axes.set_xlabel(MEASURES[name].heading, fontsize=8)
        axes.grid(alpha=0.3)
    panels[0].invert_yaxis()
    _legend(figure, panels)
    _title(figure, table)
    figure.savefig(path, dpi=110, format="png")


def _lines(table: Table, results: Sequence[Results], path: Path) -> None:
    """The first measure against the number of every row, a line for every series; the paper's dashed."""
    from matplotlib.figure import Figure

    name = table.measures[0]
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    for number, series in enumerate(dict.fromkeys(each.row.place["series"] for each in results)):
        rows = [each for each in results if each.row.place["series"] == series]
        ours = [(each.row.place["x"], *spread(values)) for each in rows if (values := each.values(name))]
        paper = [(each.row.place["x"], each.row.reported[name]) for each in rows if name in each.row.reported]
        if ours:
            x, means, deviations = zip(*ours, strict=True)
            bars = [deviation or 0.0 for deviation in deviations]
            axes.errorbar(x, means, yerr=bars, fmt="o-", color=f"C{number}", capsize=3, label=f"{series}, ours")
        if paper:
            axes.plot(*zip(*paper, strict=True), "x--", color=f"C{number}", alpha=0.6, label=f"{series}, paper")
    axes.set(xlabel=table.x, ylabel=MEASURES[name].heading)
    axes.grid(alpha=0.3)
    axes.legend()
    _title(figure, table)
    figure.savefig(path, dpi=110, format="png")


def _curves(table: Table, results: Sequence[Results], path: Path) -> None:
    """Measures of every epoch, thin for each seed, and what the paper ends with as a cross."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.4 * len(table.curves) + 0.6, 3.8), layout="constrained")
    panels = figure.subplots(1, len(table.curves), squeeze=False)[0]
    for axes, name in zip(panels, table.curves, strict=True):
        for number, each in enumerate(results):
            last = 0.0
            for seed, folder in each.folders.items():
                epochs, values = _logged(folder, name)
                label = each.row.name if seed == min(each.folders) else None
                axes.plot(epochs, values, ".-", lw=1, ms=3, color=f"C{number}", label=label)
                last = max([last, *epochs])
            if (paper := _reported(each.row, name)) is not None:
                axes.plot(last, paper, "x", color=f"C{number}", ms=9)
        axes.set(xlabel="epoch", ylabel=MEASURES[name].heading)
        axes.grid(alpha=0.3)
    _legend(figure, panels)
    _title(figure, table)
    figure.savefig(path, dpi=110, format="png")


def _reported(row: Row, name: str) -> float | None:
    """What the paper reports of a measure; of an error, 100 % less an accuracy."""
    if name == "test_error" and "test_accuracy" in row.reported:
        return 100.0 - row.reported["test_accuracy"]
    return row.reported.get(name)


def _logged(folder: Path, name: str) -> tuple[list[float], list[float]]:
    """(epochs, values) of a measure in the log of a run."""
    kind = "step" if name == "gradient_mean" else "epoch"
    epochs, numbers = [], []
    for event in RunLog(folder).events(kind):
        with contextlib.suppress(KeyError):  # a log of epochs has no accuracy where none was measured
            number = MEASURES[name].value(event)
            epochs.append(event["epoch"])
            numbers.append(math.nan if number is None else number)
    return epochs, numbers


def _panels(table: Table, results: Sequence[Results], path: Path) -> None:
    """What the layers of every row's first run do to an image, one picture below the other."""
    from PIL import Image

    from ..cli.inspect_model import draw_run

    pictures = []
    for each in results:
        for folder in list(each.folders.values())[:1]:
            draw_run(folder, path)
            with Image.open(path) as picture:
                pictures.append(picture.convert("RGB"))
    whole = Image.new("RGB", (max(p.width for p in pictures), sum(p.height for p in pictures)), "white")
    top = 0
    for picture in pictures:
        whole.paste(picture, (0, top))
        top += picture.height
    whole.save(path, format="png")


def _scales(table: Table, results: Sequence[Results], path: Path) -> None:
    """Spread of the gates over the channels, of every row's first run."""
    from ..cli import draw_scales

    config = draw_scales.ScalesConfig(runs=(Path(),), out=Path())
    measured = {}
    for each in results:
        for folder in list(each.folders.values())[:1]:
            measured[each.row.name] = draw_scales.of_run(folder, config)
    draw_scales.plot(measured, config.stage, path)


def _legend(figure: Any, panels: Sequence[Any]) -> None:
    handles = {
        label: handle for axes in panels for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    if handles:
        figure.legend(list(handles.values()), list(handles), loc="outside lower center", ncols=4, fontsize=8)


def _title(figure: Any, table: Table) -> None:
    figure.suptitle(f"{table.title} ({table.id}{'' if table.counts else ', scale ' + table.scale})", fontsize=9)


_FIGURES: dict[str, Callable[[Table, Sequence[Results], Path], None]] = {
    "bars": _bars,
    "lines": _lines,
    "curves": _curves,
    "panels": _panels,
    "scales": _scales,
}
