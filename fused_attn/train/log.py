"""The log of a run: ``log.jsonl`` is the record; ``log.csv`` and ``curves.png`` are made from it."""

from __future__ import annotations

import contextlib
import csv
import io
import math
from pathlib import Path
from typing import Any

from .atomic import write_text
from .errors import TrainError, reason
from .json_files import dumps, loads

#: kind of event -> numbers that it must have, next to ``step``; null where one is not finite.
FIELDS = {"step": ("epoch", "loss", "lr"), "epoch": ("epoch", "seconds")}


class RunLog:
    """Appends events to ``log.jsonl``; each line carries ``event`` (step, epoch or skipped) and ``step``."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.path = folder / "log.jsonl"

    def write(self, event: str, **fields: Any) -> None:
        with self.path.open("a") as file:
            file.write(dumps({"event": event, **fields}) + "\n")

    def events(self, kind: str | None = None) -> list[dict[str, Any]]:
        """Logged events; a last line that a crash cut short is left out.

        Raises:
            TrainError: another line is not an event; the text has its number.
        """
        if not self.path.exists():
            return []
        events = []
        *lines, last = self.path.read_bytes().split(b"\n")
        for number, line in enumerate(lines, start=1):
            try:
                if line.strip():
                    events.append(_event(line))
            except ValueError as error:
                raise TrainError(
                    f"{self.path}, line {number} must be a logged event, got {line[:60]!r} ({reason(error)}); "
                    "remove the line"
                ) from error
        with contextlib.suppress(ValueError):
            events.append(_event(last))
        return [event for event in events if kind in (None, event["event"])]

    def rewind(self, step: int) -> None:
        """Remove the events after ``step``: the run resumes there and does those steps again."""
        kept = [event for event in self.events() if event["step"] <= step]
        write_text(self.path, "".join(dumps(event) + "\n" for event in kept))

    def summarise(self) -> None:
        """Write ``log.csv``, a line per evaluated epoch, and ``curves.png``."""
        epochs = self.events("epoch")
        if not epochs:
            return
        text = io.StringIO()
        writer = csv.DictWriter(
            text, fieldnames=[name for name in epochs[-1] if name != "event"], extrasaction="ignore"
        )
        writer.writeheader()
        writer.writerows(epochs)
        write_text(self.folder / "log.csv", text.getvalue())
        plot(self.events(), self.folder / "curves.png")


def _event(line: bytes) -> dict[str, Any]:
    """One line of the log.

    Raises:
        ValueError: it is not an event.
    """
    event = loads(line.decode())
    if not isinstance(event, dict) or not isinstance(event.get("event"), str):
        raise ValueError("it has no event")
    names = {"step", *FIELDS.get(event["event"], ())}
    if event["event"] in FIELDS:
        names |= event.keys() - {"event"}
    for name in sorted(names):
        value = event.get(name)
        optional = name != "step" and name in event
        if isinstance(value, bool) or not (isinstance(value, (int, float)) or (value is None and optional)):
            raise ValueError(f"{name} must be a number, got {value!r}")
    return event


def plot(events: list[dict[str, Any]], path: Path) -> None:
    """Loss, accuracy and learning rate against the epoch."""
    from matplotlib.figure import Figure

    def numbers(of: list[dict[str, Any]], name: str, factor: float = 1.0) -> list[float]:
        return [math.nan if event.get(name) is None else factor * event[name] for event in of]

    steps = [event for event in events if event["event"] == "step"]
    epochs = [event for event in events if event["event"] == "epoch"]
    figure = Figure(figsize=(12, 3.6), layout="constrained")
    loss, accuracy, rate = figure.subplots(1, 3)
    if steps:
        x = numbers(steps, "epoch")
        loss.plot(x, numbers(steps, "loss"), lw=0.6, alpha=0.4, label="train, per step")
        rate.plot(x, numbers(steps, "lr"))
    for split in ("train", "validation", "test"):
        known = [e for e in epochs if f"{split}_loss" in e]
        if known:
            x = numbers(known, "epoch")
            loss.plot(x, numbers(known, f"{split}_loss"), "o-", ms=3, label=split)
            accuracy.plot(x, numbers(known, f"{split}_accuracy", 100), "o-", ms=3, label=split)
    for axes, title in ((loss, "loss"), (accuracy, "accuracy (%)"), (rate, "learning rate")):
        axes.set(xlabel="epoch", title=title)
        axes.grid(alpha=0.3)
        if axes.get_legend_handles_labels()[0]:
            axes.legend()
    temporary = path.with_name(f".{path.name}")
    figure.savefig(temporary, dpi=120, format="png")
    temporary.replace(path)
