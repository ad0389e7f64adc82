"""What the columns of a table hold, and how they come from the files of a run."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

#: metrics.json of a run, or cost.json of a row, or the counts of its network -> the number, None where it is not finite
Value = Callable[[Mapping[str, Any]], "float | None"]


@dataclass(frozen=True)
class Measure:
    """A column: heading, format of its numbers, and how to get one.

    ``of`` names what holds it: the ``metrics`` of every seed's run; the ``cost`` of a training step, measured once for
    a row; or the ``counts`` of a network, which are in the metrics of a run too.
    """

    heading: str
    format: str
    value: Value
    of: str = "metrics"


def _percent(name: str) -> Value:
    return lambda metrics: None if metrics[name] is None else 100.0 * metrics[name]


def _error(metrics: Mapping[str, Any]) -> float | None:
    return None if metrics["test_accuracy"] is None else 100.0 * (1.0 - metrics["test_accuracy"])


def _epoch_loss(metrics: Mapping[str, Any]) -> float | None:
    """The mean loss of the last epoch times its number of batches, the incomplete one included."""
    if metrics["train_loss"] is None:
        return None
    return metrics["train_loss"] * math.ceil(metrics["training_images"] / metrics["config"]["batch_size"])


MEASURES = {
    "train_accuracy": Measure("train accuracy, %", ".2f", _percent("train_accuracy")),
    "validation_accuracy": Measure("validation accuracy, %", ".2f", _percent("validation_accuracy")),
    "test_accuracy": Measure("test accuracy, %", ".2f", _percent("test_accuracy")),
    "test_error": Measure("test error, %", ".2f", _error),
    "train_loss": Measure("train loss", ".3f", lambda metrics: metrics["train_loss"]),
    "epoch_loss": Measure("train loss, sum over an epoch's batches", ".3f", _epoch_loss),
    "gradient_mean": Measure("mean gradient of the first weights", ".1e", lambda metrics: metrics["gradient_mean"]),
    "hours": Measure("training, hours", ".2f", lambda metrics: metrics["seconds"] / 3600.0),
    "parameters": Measure("parameters, millions", ".3f", lambda counts: counts["parameters"] / 1e6, "counts"),
    "macs": Measure("multiply-adds of an image, billions", ".3f", lambda counts: counts["flops"] / 2e9, "counts"),
    "step_ms": Measure("training step, ms", ",.0f", lambda cost: cost["step_ms"], "cost"),
    "peak_mib": Measure("peak memory of a step, MiB", ",.0f", lambda cost: cost["peak_bytes"] / 2**20, "cost"),
}
