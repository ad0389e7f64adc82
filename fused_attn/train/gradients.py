"""The mean gradient of a parameter, for the log of a run."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn

from .errors import TrainError


def mean_of(network: nn.Module, name: str) -> Callable[[], float]:
    """What reads the mean of a parameter's gradient, or of the part of it that ``NAME[N]`` names.

    Raises:
        TrainError: there is no such parameter, or no such part of it.
    """
    stem, bracket, index = name.removesuffix("]").partition("[")
    parameters = dict(network.named_parameters())
    if stem not in parameters:
        raise TrainError(f"log_gradient must be one of {', '.join(parameters)}, got {name!r}")
    parameter = parameters[stem]
    if not bracket:
        return lambda: _mean(parameter.grad)
    if not (name.endswith("]") and index.isdecimal() and int(index) < len(parameter)):
        raise TrainError(f"log_gradient must have an index from 0 to {len(parameter) - 1}, got {name!r}")
    return lambda: _mean(None if parameter.grad is None else parameter.grad[int(index)])


def _mean(gradient: Tensor | None) -> float:
    return math.nan if gradient is None else float(gradient.detach().double().mean())


def last(events: Sequence[dict[str, Any]]) -> dict[str, float | None]:
    """For the metrics: ``gradient_mean`` of the last of the logged steps, if it has one."""
    return {"gradient_mean": event["gradient_mean"] for event in events if "gradient_mean" in event}
