"""The mean gradient of a parameter, for the log of a run."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from torch import nn

from . import parallel
from .errors import TrainError


def mean_of(network: nn.Module, name: str | None) -> Callable[[], dict[str, float]]:
    """What reads ``gradient_mean``, of a parameter or of the part of it that ``NAME[N]`` names; nothing for None.

    Raises:
        TrainError: there is no such parameter, or no such part of it.
    """
    if name is None:
        return dict
    stem, bracket, index = name.removesuffix("]").partition("[")
    parameters = dict(network.named_parameters())
    if stem not in parameters:
        raise TrainError(f"log_gradient must be one of {', '.join(parameters)}, got {name!r}")
    parameter, part = parameters[stem], slice(None)
    if bracket:
        if not (name.endswith("]") and index.isdecimal() and int(index) < len(parameter)):
            raise TrainError(f"log_gradient must have an index from 0 to {len(parameter) - 1}, got {name!r}")
        part = slice(int(index), int(index) + 1)

    def read() -> dict[str, float]:
        gradient = parallel.whole(parameter.grad)
        return {"gradient_mean": math.nan if gradient is None else float(gradient[part].detach().double().mean())}

    return read


def last(events: Sequence[dict[str, Any]]) -> dict[str, float | None]:
    """For the metrics: ``gradient_mean`` of the last of the logged steps, if it has one."""
    return {name: value for event in events[-1:] for name, value in event.items() if name == "gradient_mean"}
