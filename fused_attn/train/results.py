"""The results of a run: read from its folder, and in words."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from .json_files import read_object


def read_metrics(out: Path) -> dict[str, Any]:
    """metrics.json of a finished run.

    Raises:
        TrainError: there is none, or it is damaged.
    """
    return read_object(out / "metrics.json", "metrics")


def shown(results: dict[str, Any]) -> str:
    """One line of losses and accuracies; numbers that are not finite, null in the JSON, are shown as nan."""
    values = {name: math.nan if value is None else value for name, value in results.items()}
    return "  ".join(f"{name} {value:.4f}" for name, value in values.items() if name.endswith(("_loss", "_accuracy")))
