"""The list of tables and figures, with what their full runs cost: measured steps, and epochs of the paper's data."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import torch

from ..train import atomic
from ..train.config import TrainConfig
from ..train.environment import describe
from ..train.errors import TrainError, reason
from ..train.json_files import dumps, read_object
from . import cost
from .report import machine
from .tables import Row, Table, Tables

#: Measured by the package's authors; the machine is named in it.
SHIPPED = Path(__file__).parent / "costs.json"
#: data set of a full run -> (C, H, W), classes, training images
DATA = {
    "cifar10": ((3, 32, 32), 10, 50_000),
    "cifar100": ((3, 32, 32), 100, 50_000),
    "fashion_mnist": ((1, 28, 28), 10, 60_000),
    "imagefolder": ((3, 224, 224), 1000, 1_281_167),  # ImageNet
}
#: Pixels of the images in a step that is measured, about: what a step takes grows with its images.
PIXELS = 2**14
SECONDS = 1.0


def measured_here() -> Path:
    """The file of what was measured on this machine."""
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "fused-attn" / "reproduce_costs.json"


def text(tables: Tables) -> str:
    """Two lines for every table: id and title; rows, epochs and time of a full run with one seed."""
    path = measured_here() if measured_here().exists() else SHIPPED
    known = read_object(path, "costs") if path.exists() else {"seconds_per_image": {}}
    lines, source = [], None
    for id in tables.ids:
        table = tables.table(id, "full")
        if table.source != source:
            source = table.source
            lines += ["", source]
        lines += [f"  {id:24}{table.title}", f"  {'':24}{_cost(table, known['seconds_per_image'])}"]
    where = (
        "no step was measured yet"
        if "environment" not in known
        else f"{machine(known['environment'])}, {known['environment']['date']}"
    )
    return "\n".join(
        [
            "Tables and figures of the papers; fused-attn reproduce ID --scale full|small|smoke --out FOLDER runs one.",
            f"Times: full scale, one seed, from steps measured on {where}.",
            "fused-attn reproduce --measure measures them on this machine, which takes some minutes.",
            *lines,
            "",
        ]
    )


def measure(tables: Tables, threads: int | None) -> Path:
    """Measure a step of every network of a full run on this machine, and keep the times; returns their file."""
    if threads is not None:
        torch.set_num_threads(threads)
    path = measured_here()
    here, found = describe(), _known_here(path)
    done: set[str] = set()
    rows = [(table, row) for id in tables.ids for table in [tables.table(id, "full")] for row in table.rows]
    rows = [(table, row) for table, row in rows if not table.counts]
    for number, (_, row) in enumerate(rows, start=1):
        config = row.config(Path(), threads=threads)
        if (key := _key(config)) in done or config.dataset not in DATA:
            continue
        done.add(key)
        image, classes, _ = DATA[config.dataset]
        batch_size = max(2, min(config.batch_size, PIXELS // (image[1] * image[2])))
        print(f"[{number}/{len(rows)}] {key}", flush=True)
        try:
            step = cost.time_step(config, image, classes, batch_size, SECONDS)
        except RuntimeError as error:  # out of memory
            print(f"not measured: {reason(error)}", flush=True)
            continue
        found[key] = step["step_ms"] / 1e3 / batch_size
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            atomic.write_text(path, dumps({"environment": here, "seconds_per_image": found}, indent=1) + "\n")
        except OSError as error:
            raise TrainError(f"measure: {path} cannot be written ({error})") from error
    return path


def _known_here(path: Path) -> dict[str, float]:
    """What was measured before, of these tables or others, if it was on the same machine."""
    if not path.exists():
        return {}
    known = read_object(path, "costs")
    return dict(known["seconds_per_image"]) if machine(known["environment"]) == machine(describe()) else {}


def _key(config: TrainConfig) -> str:
    """What the time of a step depends on, as far as the tables differ in it."""
    optimizers = config.attention_optimizer or config.attention_lr is not None
    return " ".join([config.model, config.dataset, *config.model_options, *(["two optimizers"] if optimizers else [])])


def _cost(table: Table, seconds_per_image: Mapping[str, float]) -> str:
    if table.counts:
        return f"{len(table.rows)} rows, counted, not trained"
    costs = [_epoch(row, seconds_per_image) for row in table.rows]
    epochs = sorted({row.config(Path()).epochs for row in table.rows})
    words = f"{len(table.rows)} rows of {_range(epochs, str)} epochs" if len(table.rows) > 1 else f"{epochs[0]} epochs"
    if any(seconds is None for seconds, _ in costs):
        return f"{words}; no time measured"
    known = [(seconds, count) for seconds, count in costs if seconds is not None]
    total = sum(seconds * count for seconds, count in known)
    return f"{words}; {_range(sorted(seconds for seconds, _ in known), _duration)} an epoch, {_duration(total)} in all"


def _epoch(row: Row, seconds_per_image: Mapping[str, float]) -> tuple[float | None, float]:
    """(seconds of an epoch, epochs) of a run."""
    config = row.config(Path())
    seconds = seconds_per_image.get(_key(config))
    if config.dataset not in DATA:
        return None, config.epochs
    images = DATA[config.dataset][2] - config.validation
    steps = config.epochs * (images // config.batch_size)
    if config.max_steps is not None:
        steps = min(steps, config.max_steps)
    return None if seconds is None else seconds * images, steps / (images // config.batch_size)


def _range(values: list, shown) -> str:
    low, high = shown(values[0]), shown(values[-1])
    return low if low == high else f"{low} to {high}"


def _duration(seconds: float) -> str:
    for unit, size in (("d", 86_400), ("h", 3_600), ("min", 60)):
        if seconds >= 2 * size:
            value = seconds / size
            return f"{value:.3g} {unit}" if value < 100 else f"{value:,.0f} {unit}"
    return f"{seconds:.3g} s"
