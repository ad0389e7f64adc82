"""The log of a run: ``log.jsonl`` is the record; ``log.csv`` and ``curves.png`` are made from it."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import Any

from .checkpoint import write_text


class RunLog:
    """Appends events to ``log.jsonl``; each line carries ``event`` (step or epoch) and ``step``."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.path = folder / "log.jsonl"

    def write(self, event: str, **fields: Any) -> None:
        with self.path.open("a") as file:
            file.write(json.dumps({"event": event, **fields}) + "\n")

    def events(self, kind: str | None = None) -> list[dict[str, Any]]:
        """Logged events; a last line that a crash cut short is left out."""
        events = []
        if self.path.exists():
            for line in self.path.read_text().splitlines():
                try:
                    events.append(json.loads(line))
                except json.JSONDecodeError:
                    break
        return [event for event in events if kind in (None, event["event"])]

    def rewind(self, step: int) -> None:
        """Forget what came after ``step``: it is about to be done again."""
        kept = [event for event in self.events() if event["step"] <= step]
        write_text(self.path, "".join(json.dumps(event) + "\n" for event in kept))

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


def plot(events: list[dict[str, Any]], path: Path) -> None:
    """Loss, accuracy and learning rate against the epoch."""
    from matplotlib.figure import Figure

    steps = [event for event in events if event["event"] == "step"]
    epochs = [event for event in events if event["event"] == "epoch"]
    figure = Figure(figsize=(12, 3.6), layout="constrained")
    loss, accuracy, rate = figure.subplots(1, 3)
    if steps:
        loss.plot([e["epoch"] for e in steps], [e["loss"] for e in steps], lw=0.6, alpha=0.4, label="train, per step")
        rate.plot([e["epoch"] for e in steps], [e["lr"] for e in steps])
    for split in ("train", "validation", "test"):
        known = [e for e in epochs if f"{split}_loss" in e]
        if known:
            x = [e["epoch"] for e in known]
            loss.plot(x, [e[f"{split}_loss"] for e in known], "o-", ms=3, label=split)
            accuracy.plot(x, [100 * e[f"{split}_accuracy"] for e in known], "o-", ms=3, label=split)
    for axes, title in ((loss, "loss"), (accuracy, "accuracy (%)"), (rate, "learning rate")):
        axes.set(xlabel="epoch", title=title)
        axes.grid(alpha=0.3)
        if axes.get_legend_handles_labels()[0]:
            axes.legend()
    temporary = path.with_name(f".{path.name}")
    figure.savefig(temporary, dpi=120, format="png")
    temporary.replace(path)
