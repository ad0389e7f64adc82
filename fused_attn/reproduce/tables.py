"""What the tables and figures are made of: ``tables.yaml``, read and checked."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from ..train.config import TrainConfig
from ..train.errors import TrainError, reason
from ..train.recipes import RECIPES
from .measures import MEASURES

#: The package's own tables.
TABLES = Path(__file__).parent / "tables.yaml"
SCALES = ("full", "small", "smoke")
FIGURES = ("bars", "lines", "curves", "panels", "scales")
#: Numbers of a row in a table that are no measures: its place in a figure of lines.
PLACES = ("x", "series")


@dataclass(frozen=True)
class Row:
    """A run of a table, at one scale.

    ``full`` holds the settings of the paper's scale; they differ from ``settings`` in what the scale reduces.
    ``reported`` holds what the paper reports, ``place`` where it stands in a figure.
    """

    name: str
    settings: Mapping[str, Any]
    full: Mapping[str, Any]
    reported: Mapping[str, float]
    place: Mapping[str, Any]

    @property
    def slug(self) -> str:
        """Name of the row's folder."""
        return re.sub(r"[^a-z0-9]+", "-", self.name.lower()).strip("-")

    def config(self, out: Path, **settings: Any) -> TrainConfig:
        """The settings of the row's run in ``out``; ``settings`` are put over the row's.

        Raises:
            TrainError: a setting is unknown or out of range.
        """
        return _config(self.name, {**self.settings, **settings}, out)

    def differences(self) -> dict[str, tuple[Any, Any]]:
        """Setting -> (the paper's scale, this one), where they differ."""
        full, now = (_config(self.name, each, Path()).as_json() for each in (self.full, self.settings))
        return {name: (full[name], value) for name, value in now.items() if full[name] != value}


@dataclass(frozen=True)
class Table:
    """A table or figure at one scale."""

    id: str
    title: str
    source: str
    scale: str
    rows: tuple[Row, ...]
    measures: tuple[str, ...]
    figure: str = "bars"
    curves: tuple[str, ...] = ()
    x: str = ""
    counts: Mapping[str, int] | None = None
    #: What differs from the paper at any scale, what the scale reduces, and what is to know of the paper's numbers.
    notes: tuple[str, ...] = field(default=())


class Tables:
    """The tables of a file.

    Args:
        path: a YAML file in the form of ``tables.yaml``, whose first lines describe it.

    Raises:
        TrainError: the file cannot be read, or a table in it cannot be made; the text names it.
    """

    def __init__(self, path: Path = TABLES) -> None:
        self.path = path
        try:
            self._data = yaml.safe_load(path.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            raise TrainError(f"tables: {path} cannot be read ({reason(error)})") from error
        if not isinstance(self._data, dict) or not all(
            isinstance(self._data.get(key), dict) for key in ("papers", "groups", "tables")
        ):
            raise TrainError(f"tables: {path} must hold papers, groups and tables")

    @property
    def ids(self) -> tuple[str, ...]:
        return tuple(self._data["tables"])

    def table(self, id: str, scale: str) -> Table:
        """One table at one scale.

        Raises:
            TrainError: there is no such table or scale, or the file is wrong in it.
        """
        if id not in self.ids:
            raise TrainError(f"table must be one of {', '.join(self.ids)}, got {id!r}")
        if scale not in SCALES:
            raise TrainError(f"scale must be one of {', '.join(SCALES)}, got {scale!r}")
        try:
            return self._table(id, scale)
        except TrainError as error:
            raise TrainError(f"tables: {self.path}, {id}: {reason(error)}") from error
        except (AttributeError, KeyError, TypeError) as error:
            raise TrainError(f"tables: {self.path}, {id}: {type(error).__name__}: {reason(error)}") from error

    def _table(self, id: str, scale: str) -> Table:
        data = self._data["tables"][id]
        known = {"title", "paper", "group", "measures", "figure", "curves", "x", "counts", "note", "rows"}
        _known("a table", data, known)
        paper = data.get("paper", id.partition("/")[0])
        group = self._data["groups"][data.get("group", id.partition("/")[0])]
        _known("a group", group, {"differs", "settings", "rows", *SCALES})
        measures, curves = tuple(data["measures"]), tuple(data.get("curves", ()))
        for name in (*measures, *curves):
            if name not in MEASURES:
                raise TrainError(f"measures must be of {', '.join(MEASURES)}, got {name!r}")
        figure = data.get("figure", "bars")
        if figure not in FIGURES:
            raise TrainError(f"figure must be one of {', '.join(FIGURES)}, got {figure!r}")
        rows = []
        for name, numbers in data["rows"].items():
            row = group["rows"][name]
            _known(f"the row {name}", row, {"settings", "scales", *SCALES})
            if scale not in row.get("scales", SCALES):
                continue
            _known(f"the row {name} of a table", numbers, {*MEASURES, *PLACES})
            rows.append(
                Row(
                    name,
                    self._settings(group, row, scale),
                    self._settings(group, row, "full"),
                    {key: float(value) for key, value in numbers.items() if key not in PLACES},
                    {key: value for key, value in numbers.items() if key in PLACES},
                )
            )
        if len({row.slug for row in rows}) < len(rows) or not rows:
            raise TrainError(f"there must be rows with different names, got {[row.name for row in rows]}")
        notes = (group.get("differs"), group.get(scale, {}).get("note"), data.get("note"))
        return Table(
            id,
            data["title"],
            self._data["papers"][paper],
            scale,
            tuple(rows),
            measures,
            figure,
            curves,
            data.get("x", ""),
            data.get("counts"),
            tuple(note for note in notes if note),
        )

    def _settings(self, group: Mapping[str, Any], row: Mapping[str, Any], scale: str) -> dict[str, Any]:
        """Settings of a row, each layer over the one before it; ``model_options`` still a mapping."""
        below = self._data.get(scale, {})
        reduced = [below, group.get(scale, {}), row.get(scale, {})]
        for each in reduced:
            _known(f"the scale {scale}", each, {"settings", "models", "note"})
        layers = [group.get("settings", {}), row.get("settings", {}), *(each.get("settings", {}) for each in reduced)]
        recipe = next((layer["recipe"] for layer in reversed(layers) if "recipe" in layer), None)
        if recipe is not None and recipe not in RECIPES:
            raise TrainError(f"recipe must be one of {', '.join(RECIPES)}, got {recipe!r}")
        of_recipe = dict(RECIPES[recipe][1]) if recipe is not None else {}
        options = dict(item.split("=", 1) for item in of_recipe.pop("model_options", ()))
        settings: dict[str, Any] = of_recipe
        for layer in layers:
            options |= layer.get("model_options", {})
            settings |= layer
        for each in reduced:
            settings["model"] = each.get("models", {}).get(settings["model"], settings["model"])
        return {**settings, "model_options": {key: value for key, value in options.items() if value is not None}}


def _config(name: str, settings: Mapping[str, Any], out: Path) -> TrainConfig:
    options = tuple(f"{key}={value}" for key, value in settings["model_options"].items())
    try:
        return TrainConfig.from_json({**settings, "model_options": options, "out": out})
    except (TrainError, TypeError) as error:
        raise TrainError(f"the row {name}: {reason(error)}") from error


def _known(what: str, data: Mapping[str, Any], keys: set[str]) -> None:
    if unknown := sorted(map(str, data.keys() - keys)):
        raise TrainError(f"{what} must have none but {', '.join(sorted(keys))}, got {', '.join(unknown)}")
