"""Options that have no effect in a run: giving one is an error, so that nobody believes it had one."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from .config import TrainConfig
from .data import SOURCES, source
from .errors import TrainError
from .recipes import RECIPES


def _momentum(config: TrainConfig) -> str | None:
    return None if "sgd" in (config.optimizer, config.attention_optimizer) else "it is of SGD, and Adam has none"


def _step_schedule(config: TrainConfig) -> str | None:
    return None if config.schedule == "step" else f"it is of the schedule step, not of {config.schedule}"


def _crop_scale(config: TrainConfig) -> str | None:
    if source(config.dataset, config.image_size).files:
        return None
    return f"it is for images that stay in their files; those of {config.dataset} are cropped by crop_padding"


def _crop_padding(config: TrainConfig) -> str | None:
    if not source(config.dataset, config.image_size).files:
        return None
    return f"it is for images in memory; those of {config.dataset} stay in their files and are cropped by crop_scale"


def _skip_unreadable(config: TrainConfig) -> str | None:
    if config.dataset not in SOURCES or SOURCES[config.dataset].hub_name or SOURCES[config.dataset].files:
        return None
    return f"{config.dataset} has no image files"


def _evaluation(config: TrainConfig) -> str | None:
    return None if config.eval_every else "nothing is evaluated with eval_every 0"


#: Option -> why it has no effect in a run; None where it has one.
_WHY_NOT: dict[str, Callable[[TrainConfig], str | None]] = {
    "momentum": _momentum,
    "nesterov": _momentum,
    "milestones": _step_schedule,
    "gamma": _step_schedule,
    "crop_scale": _crop_scale,
    "crop_padding": _crop_padding,
    "skip_unreadable": _skip_unreadable,
    "eval_batch_size": _evaluation,
}
#: Values that ask for nothing: these may be given in a run in which the option has no effect.
_NOTHING = {"momentum": 0.0, "nesterov": False, "skip_unreadable": False}


def check(config: TrainConfig, before: TrainConfig | None = None) -> None:
    """Refuse options that were given and have no effect in this run.

    A value counts as given unless it is the default or the recipe's.

    Args:
        config: of the run.
        before: its settings so far, where it is resumed: only those that changed are looked at.

    Raises:
        TrainError: names the first such option.
    """
    for name, usual in _usual(config, before).items():
        value = getattr(config, name)
        if value != usual and value != _NOTHING.get(name, ...) and (why := _WHY_NOT[name](config)) is not None:
            raise TrainError(f"{name}: {why}; got {value!r}")


def _usual(config: TrainConfig, before: TrainConfig | None) -> dict[str, Any]:
    if before is not None:
        return {name: getattr(before, name) for name in _WHY_NOT}
    _, recipe = RECIPES.get(config.recipe, ("", {}))
    defaults = {field.name: field.default for field in dataclasses.fields(TrainConfig)}
    return {name: recipe.get(name, defaults[name]) for name in _WHY_NOT}
