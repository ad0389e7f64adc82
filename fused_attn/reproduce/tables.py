"""What the tables and figures are made of: ``tables.yaml``, read and checked."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
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
#: Arguments of a count.
COUNTS = ("num_classes", "in_chans", "image_size")


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
    #: Names of rows that this scale does not have.
    left_out: tuple[str, ...] = ()
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
        try:
            _known("the file", self._data, {"papers", "groups", "tables", *SCALES})
        except TrainError as error:
            raise TrainError(f"tables: {path}: {reason(error)}") from error

    @property
    def ids(self) -> tuple[str, ...]:
        return tuple(self._data["tables"])

    def table(self, id: str, scale: str) -> Table:
        """One table at one scale.

        Raises:
            TrainError: there is no such table or scale, or the file is wrong in it.
        """
        _one_of("table", id, self.ids)
        _one_of("scale", scale, SCALES)
        try:
            return self._table(id, scale)
        except TrainError as error:
            raise TrainError(f"tables: {self.path}, {id}: {reason(error)}") from error
        except (AttributeError, KeyError, TypeError, ValueError) as error:
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
            _one_of("measures", name, MEASURES)
        figure = data.get("figure", "bars")
        _one_of("figure", figure, FIGURES)
        _known("counts", data.get("counts") or {}, {*COUNTS})
        self._check_scale(group, scale)
        rows, left_out = [], []
        for name, numbers in data["rows"].items():
            if not isinstance(name, str):
                raise TrainError(
                    f"the name of a row must be text, in quotes where YAML takes it for another; got {name!r}"
                )
            row = group["rows"][name]
            _known(f"the row {name}", row, {"settings", "scales", *SCALES})
            for each in (scales := row.get("scales", SCALES)):
                _one_of(f"the scales of the row {name}", each, SCALES)
            if scale not in scales:
                left_out.append(name)
                continue
            if figure == "lines" and not numbers.keys() >= {*PLACES}:
                raise TrainError(
                    f"the row {name} of a figure of lines must have {' and '.join(PLACES)}, got {[*numbers]}"
                )
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
        if not rows or "" in (slugs := [row.slug for row in rows]) or len({*slugs}) < len(rows):
            raise TrainError(
                f"there must be rows, whose names differ in letters a to z or digits, got {[row.name for row in rows]}"
            )
        below = (self._data.get(scale, {}), group.get(scale, {}))
        of_training = [] if data.get("counts") else [group.get("differs"), *(each.get("note") for each in below)]
        notes = (*of_training, data.get("note"))
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
            tuple(left_out),
            tuple(note for note in notes if note),
        )

    def _check_scale(self, group: Mapping[str, Any], scale: str) -> None:
        """Refuse what would be without effect: unknown keys, and networks in the place of some that no row has."""
        models = {self._settings(group, row, "")["model"] for row in group["rows"].values()}
        for each in (self._data, group, *group["rows"].values()):
            _known(f"the scale {scale}", each.get(scale, {}), {"settings", "models", "note"})
            if each is not self._data:
                _known(f"models of the scale {scale}", each.get(scale, {}).get("models", {}), models)

    def _settings(self, group: Mapping[str, Any], row: Mapping[str, Any], scale: str) -> dict[str, Any]:
        """Settings of a row, each layer over the one before it; ``model_options`` still a mapping."""
        reduced = [each.get(scale, {}) for each in (self._data, group, row)]
        layers = [group.get("settings", {}), row.get("settings", {}), *(each.get("settings", {}) for each in reduced)]
        recipe = next((layer["recipe"] for layer in reversed(layers) if "recipe" in layer), None)
        if recipe is not None:
            _one_of("recipe", recipe, RECIPES)
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


def _one_of(what: str, value: Any, values: Collection[str]) -> None:
    if value not in values:
        raise TrainError(f"{what} must be one of {', '.join(values)}, got {value!r}")


def _known(what: str, data: Mapping[str, Any], keys: set[str]) -> None:
    if unknown := sorted(map(str, data.keys() - keys)):
        raise TrainError(f"{what} must have none but {', '.join(sorted(keys))}, got {', '.join(unknown)}")
