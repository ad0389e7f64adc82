"""JSON as the standard has it: numbers that are not finite are null."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from .errors import TrainError, reason


def dumps(value: Any, indent: int | None = None) -> str:
    """JSON text of ``value``, with null where a number is not finite."""
    return json.dumps(_finite(value), indent=indent, allow_nan=False)


def loads(text: str) -> Any:
    """The value of a JSON text; a bare NaN or Infinity, which Python writes unless told not to, is None.

    Raises:
        ValueError: the text is not JSON.
    """
    try:
        return json.loads(text, parse_constant=lambda name: None)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def read_object(path: Path, what: str) -> dict[str, Any]:
    """The object in a JSON file.

    Args:
        path: of the file.
        what: begins the error's text.

    Raises:
        TrainError: the file is missing or unreadable, is not JSON, or holds something other than an object.
    """
    try:
        value = loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise TrainError(f"{what}: {path} cannot be read ({reason(error)})") from error
    if not isinstance(value, dict):
        raise TrainError(f"{what}: {path} must hold a JSON object, got {type(value).__name__}")
    return value


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
