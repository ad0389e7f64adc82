"""``fused-attn reproduce``: the tables and figures of the papers."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from ..options import check, make_folder
from ..train import atomic
from ..train.environment import describe
from ..train.errors import TrainError
from ..train.json_files import dumps, read_object
from ..train.results import read_metrics
from . import cost, counts, report, rows
from .measures import MEASURES
from .rows import INTERRUPTED, Job
from .tables import TABLES, Row, Table, Tables

#: Seconds to time training steps of a row for.
COST_SECONDS = {"full": 30.0, "small": 20.0, "smoke": 0.0}


@dataclass(frozen=True)
class ReproduceConfig:
    """Run every row of a table or figure of the papers, and write it beside the paper's numbers.

    Without a table: list them all.  What is there already is not run again, and a run that was interrupted goes on, so
    the same command may be given until all is done.  A row that fails does not stop the others.
    """

    table: Annotated[str | None, tyro.conf.Positional] = None
    """Table or figure, such as sa/table1."""
    scale: Literal["full", "small", "smoke"] | None = None
    """full: the paper's recipe.  small: a reduction that two cores finish, which the table states.  smoke: seconds, on
    data that need no download; its numbers mean nothing."""
    out: Path | None = None
    """Folder for table.md, table.csv and figure.png, with a folder ROW/seedN for every run."""
    rows: Path | None = None
    """Folder for the folders of the runs, which tables of one paper may share; ``out`` when not given."""
    seeds: int = 1
    """Run every row with so many seeds, from 0; the table shows all that are there."""
    only: tuple[str, ...] = ()
    """Run these rows and no others; the table shows all that are there."""
    data_dir: Path | None = None
    """Local folder of the data set, as for ``fused-attn train``."""
    data_note: str = ""
    """What the table calls the data, where the name of the data set would mislead."""
    impl: Literal["auto", "reference", "cpu", "triton"] = "auto"
    """Implementation of the attention ops."""
    mixed_precision: Literal["no", "bf16"] = "no"
    """Dtype of autocast; no: everything in float32."""
    threads: int | None = None
    """CPU threads of PyTorch; its own choice when not given."""
    checkpoint_every: int = 500
    """Optimizer steps between checkpoints."""
    isolate: bool = True
    """Give every run a process of its own: one that is killed does not end the others."""
    measure: bool = False
    """Measure what a step of every network costs on this machine, for the list."""
    tables: Path | None = None
    """File of the tables; the package's own when not given, whose first lines describe the form."""

    def __post_init__(self) -> None:
        check("reproduce", type(self), vars(self), TrainError)


def run(config: ReproduceConfig) -> int:
    """List the tables, or run one; returns the exit status: 0, 1 (rows failed) or 130 (interrupted).

    Raises:
        TrainError: a setting is not usable.
    """
    tables = Tables(config.tables or TABLES)
    if config.table is None or config.scale is None or config.out is None:
        if config.table is not None:
            missing = "scale" if config.scale is None else "out"
            raise TrainError(f"{missing} must be given with a table, e.g. --scale small --out runs/table; got none")
        of_the_list = ["table", "tables", "measure", *(["threads"] if config.measure else [])]
        _without_effect(config, "a table", [name for name in vars(config) if name not in of_the_list])
        from . import listing

        if config.measure:
            print(listing.measure(tables, config.threads))
        print(listing.text(tables), end="")
        return 0
    _without_effect(config, "the list", ["measure"])
    if config.scale == "smoke":
        _without_effect(config, "images that must be loaded", ["data_dir", "data_note"])
    table = tables.table(config.table, config.scale)
    if table.counts:
        _without_effect(config, "a training", ["seeds", "only", "rows", "data_dir", "data_note", "impl"])
        table = tables.table(config.table, "full")  # at every scale: counting is cheap
    base, chosen = config.rows or config.out, _chosen(table, config)
    wanted = [] if table.counts else [_job(row, seed, base, config) for seed in range(config.seeds) for row in chosen]
    if config.rows is not None:
        make_folder(config.rows, TrainError, "rows")
    _claim(config)
    if table.counts:
        results = [report.Results(row, counts=_counts(row, table)) for row in table.rows]
        print(report.write(table, results, config.seeds, config.out), end="")
        return 0
    failed, interrupted = rows.run(wanted, config.isolate)
    if not interrupted and any(MEASURES[name].of == "cost" for name in table.measures):
        interrupted = _measure_costs(wanted, failed, config)
    results = [_results(row, base, config, failed) for row in table.rows]
    print(report.write(table, results, config.seeds, config.out), end="")
    if interrupted:
        print("fused-attn: interrupted; the same command goes on")
        return INTERRUPTED
    return 1 if failed else 0


def _without_effect(config: ReproduceConfig, what: str, names: Sequence[str]) -> None:
    """Refuse options that were given and have no effect.

    Raises:
        TrainError: names the first such option.
    """
    defaults = {field.name: field.default for field in dataclasses.fields(ReproduceConfig)}
    for name in names:
        if (value := getattr(config, name)) != defaults[name]:
            raise TrainError(f"{name}: it is for {what}; got {value!r}")


def _counts(row: Row, table: Table) -> dict[str, int]:
    config = row.config(Path())
    return counts.of_network(config.model, **table.counts or {}, **config.parsed_model_options())


def _chosen(table: Table, config: ReproduceConfig) -> tuple[Row, ...]:
    names = [row.name for row in table.rows]
    for name in config.only:
        if name not in names:
            raise TrainError(f"only must be of {', '.join(map(repr, names))}, got {name!r}")
    return tuple(row for row in table.rows if not config.only or row.name in config.only)


def _claim(config: ReproduceConfig) -> None:
    """Make the folder, or check that it is that of the same table at the same scale.

    Raises:
        TrainError: it is another's.
    """
    assert config.out is not None
    make_folder(config.out, TrainError)
    path, now = config.out / "reproduce.json", {"table": config.table, "scale": config.scale}
    if not path.exists():
        if foreign := [name for name in ("table.md", "table.csv", "figure.png") if (config.out / name).exists()]:
            raise TrainError(
                f"out must be a new folder, or that of a table; {config.out} has a {foreign[0]} of another"
            )
    else:
        before = read_object(path, "out")
        if any(before.get(key) != value for key, value in now.items()):
            raise TrainError(
                f"out must be a new folder, or that of {config.table} at the scale {config.scale}; {config.out} holds "
                f"{before.get('table')} at the scale {before.get('scale')}"
            )
        if config.rows is None and before.get("rows") is not None:
            raise TrainError(f"rows must be given as before, {before['rows']}; got none")
    now["rows"] = None if config.rows is None else str(config.rows)
    atomic.write_text(path, dumps({**now, "seeds": config.seeds, "environment": describe()}, indent=1) + "\n")


def _job(row: Row, seed: int, base: Path, config: ReproduceConfig) -> Job:
    settings = {
        "seed": seed,
        "impl": config.impl,
        "mixed_precision": config.mixed_precision,
        "threads": config.threads,
        "checkpoint_every": config.checkpoint_every,
    }
    if config.data_dir is not None and config.scale != "smoke":
        settings["data_dir"] = config.data_dir
    if config.data_note and config.scale != "smoke":
        settings["data_note"] = config.data_note
    job = Job(row, seed, row.config(base / row.slug / f"seed{seed}", **settings))
    if job.config.dataset == "imagefolder" and job.config.data_dir is None:
        raise TrainError(f"data_dir must be given: the folder of images of {row.name}; got none")
    return job


def _measure_costs(jobs: list[Job], failed: dict[Job, str], config: ReproduceConfig) -> bool:
    """Measure a step of every row whose first run is complete and that has no cost yet; whether it was interrupted."""
    for job in jobs:
        try:
            if job.seed > 0 or job in failed or not job.is_done() or cost.read(job.config) is not None:
                continue
            print(f"cost of a step: {job.row.name}", flush=True)
            why = rows.measure_cost(job.config, COST_SECONDS[config.scale], config.isolate)
        except TrainError as error:
            why = str(error)
        except KeyboardInterrupt:
            return True
        if why is not None:
            failed[job] = f"cost of a step: {why}"
    return False


def _results(row: Row, base: Path, config: ReproduceConfig, failed: dict[Job, str]) -> report.Results:
    """What is there of a row, whichever call ran it."""
    results = report.Results(row)
    of_this_call = {job.seed: why for job, why in failed.items() if job.row is row}
    found = {int(path.name[4:]) for path in (base / row.slug).glob("seed*") if path.name[4:].isdecimal()}
    for seed in sorted(found | {*range(config.seeds)}):
        job = _job(row, seed, base, config)
        try:
            if job.is_done():
                results.metrics[seed], results.folders[seed] = read_metrics(job.config.out), job.config.out
        except TrainError as error:
            if seed not in of_this_call:
                results.unused[seed] = str(error)
    results.failed = of_this_call
    if results.metrics:
        with contextlib.suppress(TrainError):  # which the row that was to be measured has failed with
            results.cost = cost.read(_job(row, 0, base, config).config)
    if config.mixed_precision != "no" or config.impl != "auto":
        settings = {**row.settings, "mixed_precision": config.mixed_precision, "impl": config.impl}
        results.row = dataclasses.replace(row, settings=settings)
    return results
