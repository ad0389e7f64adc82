"""A report and its rows, as tables and pictures read them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

#: One provider's time of one pass of one case, and its memory: column -> value.
Row = dict[str, Any]
#: All that one run measured: ``"rows"``, and on what.
Report = dict[str, Any]

MIB = 2**20
PASS_TITLES = {"both": "forward + backward", "fwd": "forward", "bwd": "backward"}


def unique(rows: Iterable[Row], key: str) -> list[str]:
    return list(dict.fromkeys(row[key] for row in rows))


def allocator(report: Report) -> str | None:
    """What CPU memory came from, ``"default"`` or a name, where it was not the C library told to keep what is freed."""
    kind = report.get("allocator", "caching")
    return None if report["device"] != "cpu" or kind == "caching" else kind


def processor(report: Report) -> str:
    return report["environment"]["gpu" if report["device"] == "cuda" else "cpu"]


def machine(report: Report) -> str:
    environment, where = report["environment"], processor(report)
    if report["device"] == "cpu":
        where += f", {environment['threads']} of {environment['cores']} cores, {environment['cpu_capability']}"
    where += f", torch {environment['torch']}, {environment['date']}"
    kind = allocator(report)
    if kind is None:
        return where
    return f"{where}, the C library's default allocator" if kind == "default" else f"{where}, {kind}"
