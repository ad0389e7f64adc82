"""Who is told of the calls of public functions, while weights of attention are recorded."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

#: Each gets what checks and runs the public function, an ``operators.Public``, and the arguments of its check.
LISTENERS: list[Callable[[Any, tuple], None]] = []


def tell(public: Any, args: tuple) -> None:
    """Tell all of a call that is about to run."""
    for listener in LISTENERS:
        listener(public, args)
