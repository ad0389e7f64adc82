"""What the options of the commands may be: one table of bounds, and the check of values against types and table."""

from __future__ import annotations

import tempfile
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro


@dataclass(frozen=True)
class Bound:
    """Numbers from ``low`` to ``high``, either of which may be left out.  Every bound has two finite ends, so that
    neither inf nor nan nor a number that overflows in float32 passes."""

    low: float
    high: float
    open_low: bool = False
    open_high: bool = False

    def holds(self, value: float) -> bool:
        above = self.low < value if self.open_low else self.low <= value
        below = value < self.high if self.open_high else value <= self.high
        return above and below

    def expected(self, value: float) -> str:
        """What ``value``, which is out of bounds, should have been."""
        if self.high == 1:
            return f"in {'(' if self.open_low else '['}{self.low:g}, 1{')' if self.open_high else ']'}"
        least = f"{'above' if self.open_low else 'at least'} {self.low:g}"
        most = f"{'below' if self.open_high else 'at most'} {self.high:,}"
        return least if value <= self.low else most if value >= self.high else f"{least} and {most}"


COUNT = Bound(1, 10**9)
IMAGES = Bound(1, 2**20)  # in a step: more fit no memory
FACTOR = Bound(0, 1e6)
POSITIVE = Bound(0, 1e6, open_low=True)
SHARE = Bound(0, 1, open_high=True)
SEED = Bound(0, 2**32 - 1)  # what NumPy's generator takes
THREADS = Bound(1, 1024)  # OpenMP ends the process where the system gives it no more of them
SECONDS = Bound(0, 86_400)

#: command -> option -> bound of its value, or of each value of a list.  Every option that is a number has one; None:
#: the data or the model set both ends, and the command checks them.
BOUNDS: dict[str, dict[str, Bound | None]] = {
    "train": {
        "image_size": Bound(1, 4096),
        "validation": Bound(0, 10**9),
        "train_images": COUNT,
        "epochs": Bound(1, 10**6),
        "max_steps": COUNT,
        "batch_size": IMAGES,
        "accumulate": IMAGES,
        "eval_batch_size": IMAGES,
        "lr": POSITIVE,
        "momentum": SHARE,
        "weight_decay": Bound(0, 1e3),
        "attention_lr": POSITIVE,
        "milestones": Bound(1, 10**6),
        "gamma": Bound(0, 1, open_low=True),
        "warmup_epochs": FACTOR,
        "label_smoothing": SHARE,
        "aux_weights": FACTOR,
        "ema": SHARE,
        "clip_norm": POSITIVE,
        "crop_padding": Bound(0, 4096),
        "crop_scale": Bound(0, 1, open_low=True),
        "rotate": Bound(0, 180),
        "seed": SEED,
        "threads": THREADS,
        "eval_every": Bound(0, 10**9),
        "log_every": COUNT,
        "checkpoint_every": COUNT,
    },
    "bench": {"threads": THREADS, "seconds": SECONDS},
    "bench networks": {"batch_size": Bound(2, 2**20), "threads": THREADS, "seconds": SECONDS},
    "scales": {"images": IMAGES, "stage": Bound(1, 1000), "seed": SEED},
    "inspect": {"image": None, "head": None, "point": Bound(0, 1)},
    "demo": {},
    "reproduce": {"seeds": Bound(1, 1000), "threads": THREADS, "checkpoint_every": COUNT},
    "convert": {"image_size": Bound(1, 4096), "batch_size": IMAGES, "threads": THREADS, "seconds": SECONDS},
}


def check(command: str, declared: Any, values: Mapping[str, Any], error: type[Exception]) -> None:
    """Check the values of a command's options.

    Args:
        command: a key of ``BOUNDS``.
        declared: the dataclass or function whose annotations are the types of the options.
        values: option -> value; ``tyro.MISSING`` passes.
        error: what to raise.

    Raises:
        error: a value is not of its type or out of its bounds; the text names the option, what was expected and what
            came, in one line.
    """
    types_of = typing.get_type_hints(declared)
    for name, value in values.items():
        if value is tyro.MISSING:
            continue
        if not _fits(value, types_of[name]):
            raise error(f"{name} must be {_words(types_of[name])}, got {value!r}")
        bound = BOUNDS[command].get(name)
        several = isinstance(value, tuple)
        for item in value if several else (value,):
            if bound is not None and item is not None and not bound.holds(item):
                raise error(f"{name} must be {bound.expected(item)}{' each' if several else ''}, got {value!r}")


def _fits(value: Any, expected: Any) -> bool:
    arguments = typing.get_args(expected)
    match typing.get_origin(expected):
        case typing.Union | types.UnionType:
            return any(_fits(value, one) for one in arguments)
        case typing.Literal:
            return isinstance(value, str) and value in arguments
        case _ if arguments:  # tuple[X, ...]
            return isinstance(value, tuple) and all(_fits(item, arguments[0]) for item in value)
    if expected in (int, float):
        return isinstance(value, (int, expected)) and not isinstance(value, bool)
    return isinstance(value, expected)


_WORDS = {int: "an integer", float: "a number", bool: "true or false", str: "a text", Path: "a path"}


def _words(expected: Any) -> str:
    arguments = typing.get_args(expected)
    match typing.get_origin(expected):
        case typing.Union | types.UnionType:
            return " or ".join(_words(one) for one in arguments if one is not types.NoneType) + ", or nothing"
        case typing.Literal:
            return f"one of {', '.join(arguments)}"
        case _ if arguments:
            return f"a list of which each is {_words(arguments[0])}"
    return _WORDS[expected]


def make_folder(path: Path, error: type[Exception], option: str = "out") -> None:
    """Make a folder that a command writes into before its work, not after it, and try whether files can be made in it.

    Args:
        path: of the folder.
        error: to raise.
        option: that the folder was given as, for the error's text.

    Raises:
        error: it cannot be made, is a file, or takes no files.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as problem:
        raise error(f"{option}: the folder {path} cannot be made ({problem})") from problem
    check_folder(path, error, option)


def check_folder(path: Path, error: type[Exception], option: str = "out") -> None:
    """Try whether files can be made in the folder that ``out``, or ``option``, is, or is in.

    Raises:
        error: they cannot.
    """
    try:
        tempfile.TemporaryFile(dir=path).close()
    except OSError as problem:
        raise error(f"{option}: the folder {path} cannot be written into ({problem})") from problem
