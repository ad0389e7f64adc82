"""The README's picture: time and memory of a training step against N, the fused op beside the best of its peers.

Run from the repository root: ``python benchmarks/report/picture.py``; ``make bench`` does.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

ROOT = Path(__file__).parents[2]
RESULT = ROOT / "benchmarks" / "results" / "rel_attention_2d.json"
PICTURE = ROOT / "docs" / "assets" / "growth.svg"
FUSED, PEER = "#d1495b", "#0072b2"
PANELS = (("p50_ms", 1.0, "time, ms"), ("extra_bytes", 2.0**-20, "memory beyond the inputs, MiB"))


def lines(key: str, factor: float) -> tuple[dict[int, float], dict[int, tuple[float, str]]]:
    """By N: the fused op's, and the least among its peers with the peer's name."""
    fused: dict[int, float] = {}
    peers: dict[int, tuple[float, str]] = {}
    for row in _steps():
        if row.get(key) is None:
            continue
        n, value = row["sizes"]["H"] * row["sizes"]["W"], row[key] * factor
        if row["fused"]:
            fused[n] = value
        elif n not in peers or value < peers[n][0]:
            peers[n] = value, row["provider"]
    return fused, peers


def _steps() -> Iterator[dict[str, Any]]:
    for row in json.loads(RESULT.read_text())["rows"]:
        if row["kind"] == "growth" and row["pass"] == "both" and row["status"] == "ok":
            yield row


def labels() -> list[str]:
    """Every number and name that the picture shows of the result file."""
    shown = []
    for key, factor, _ in PANELS:
        fused, peers = lines(key, factor)
        shown += [short(value) for value in fused.values()]
        shown += [short(value) for value, _ in peers.values()]
        shown += [name for _, name in peers.values()]
    return shown


def short(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def draw(path: Path = PICTURE) -> None:
    environment = json.loads(RESULT.read_text())["environment"]
    # The same bytes at every run; text stays text.
    with matplotlib.rc_context({"svg.hashsalt": "growth", "svg.fonttype": "none", "font.size": 10}):
        figure = Figure(figsize=(9.6, 4.0), layout="constrained")
        for axes, (key, factor, title) in zip(figure.subplots(1, 2), PANELS, strict=True):
            fused, peers = lines(key, factor)
            names = "\nor ".join(dict.fromkeys(name for _, name in peers.values()))
            axes.plot([*peers], [value for value, _ in peers.values()], "o--", color=PEER, label=names)
            axes.plot([*fused], [*fused.values()], "o-", color=FUSED, linewidth=2.5, label="fused")
            for n, value in fused.items():
                axes.annotate(short(value), (n, value), (0, -14), textcoords="offset points", ha="center", color=FUSED)
            for n, (value, _) in peers.items():
                axes.annotate(short(value), (n, value), (0, 8), textcoords="offset points", ha="center", color=PEER)
            axes.set(xscale="log", yscale="log", title=title)
            sizes = sorted({*fused, *peers})
            axes.set_xticks(sizes, [f"{n:,}" for n in sizes])
            axes.xaxis.set_minor_locator(NullLocator())
            axes.yaxis.set_minor_locator(NullLocator())
            axes.set_xlim(sizes[0] / 2, sizes[-1] * 2.5)
            axes.margins(y=0.25)
            axes.set_xlabel("N = H·W")
            axes.grid(alpha=0.3)
            axes.spines[["top", "right"]].set_visible(False)
            axes.legend(loc="lower right", frameon=False)
        figure.suptitle(
            "rel_attention_2d beside the best peer at each size, forward + backward, 8 heads, one image\n"
            f"{environment['threads']} cores of {environment['cpu']}, torch {environment['torch']}",
            fontsize=10,
        )
        figure.savefig(path, metadata={"Date": None})


if __name__ == "__main__":
    draw()
