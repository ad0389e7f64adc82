"""Runs of a table: which are there, and those that are missing, each in a process of its own."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from ..bench.measure import with_package
from ..train import folder
from ..train.config import MAY_GROW, TrainConfig, saved_config
from ..train.errors import TrainError, reason
from ..train.json_files import dumps
from ..train.results import read_metrics
from .tables import Row

#: Exit status of a command that Ctrl-C or SIGTERM ended.
INTERRUPTED = 130


@dataclass(frozen=True, eq=False)
class Job:
    """One row with one seed; ``title`` is what its progress is headed with."""

    row: Row
    seed: int
    config: TrainConfig

    @property
    def title(self) -> str:
        return f"{self.row.name}, seed {self.seed}"

    def is_done(self) -> bool:
        """Whether the run is there and complete.

        Raises:
            TrainError: the folder holds a run of other settings or data, one that was made longer, or a damaged one.
        """
        out = self.config.out
        if not (out / "config.json").exists():
            return False
        self._check_same(saved_config(out, "rows"))
        if not (out / "metrics.json").exists():
            return False
        metrics = read_metrics(out)
        if missing := {"config", "environment", "data"} - metrics.keys():
            raise TrainError(f"rows: {out / 'metrics.json'} is damaged: it lacks {', '.join(sorted(missing))}")
        if metrics.get("extended"):
            raise TrainError(f"rows: the run in {out} was made longer, so its schedule is not that of the table")
        return True

    def _check_same(self, saved: TrainConfig) -> None:
        """What a row depends on; of its length and data, ``--resume`` takes others too."""
        try:
            self.config.check_resumes(saved)
        except TrainError as error:
            raise TrainError(str(error).removeprefix("--resume: ")) from error
        for name in (*MAY_GROW, "data_note", *(["data_dir"] if self.config.dataset == "imagefolder" else [])):
            was, now = getattr(saved, name), getattr(self.config, name)
            if was != now and not (was and now and name == "data_dir" and was.resolve() == now.resolve()):
                raise TrainError(f"{name} of the run in {self.config.out} is {was}, got {now}; give another folder")


def run(jobs: Sequence[Job], isolate: bool) -> tuple[dict[Job, str], bool]:
    """Run what is not there yet.

    Args:
        jobs: in this order.
        isolate: each in a process of its own, so that one that is killed, or crashes, does not end the others.

    Returns:
        job -> why it failed; and whether the user interrupted, which leaves the rest undone.  What another process is
        running is left to it.
    """
    failed: dict[Job, str] = {}
    for number, job in enumerate(jobs, start=1):
        head = f"[{number}/{len(jobs)}] {job.title}"
        try:
            if job.is_done():
                print(f"{head}: is there", flush=True)
                continue
            if folder.is_locked(job.config.out):
                print(f"{head}: another process runs it", flush=True)
                continue
            print(f"{head}: {job.config.out}", flush=True)
            why = (_in_child if isolate else _here)("train", job.config)
        except TrainError as error:
            why = reason(error)
        except KeyboardInterrupt:
            return failed, True
        if why is not None:
            failed[job] = why
            print(f"{head}: failed: {why}", flush=True)
    return failed, False


def measure_cost(config: TrainConfig, seconds: float, isolate: bool) -> str | None:
    """Time training steps of a complete run for so many seconds, and measure their memory; why it failed, or None.

    Raises:
        KeyboardInterrupt: the user interrupted.
    """
    return (_in_child if isolate else _here)("cost", config, seconds)


def _here(what: str, config: TrainConfig, *more: float) -> str | None:
    """Run in this process; why it failed, or None."""
    try:
        WORK[what](config, *more)
    except Exception as error:
        if not isinstance(error, TrainError):
            traceback.print_exc()
        return reason(error)
    return None


def _in_child(what: str, config: TrainConfig, *more: float) -> str | None:
    """Run in a new process; why it failed, or None.

    Raises:
        KeyboardInterrupt: SIGINT or SIGTERM came; the child has saved its state.
    """
    request = dumps({"what": what, "config": config.as_json(), "more": more})
    read, write = os.pipe()
    command = [sys.executable, "-m", "fused_attn.reproduce.rows", str(write), request]
    # A session of its own: Ctrl-C in a terminal reaches this process alone, which passes it on, once.
    child = subprocess.Popen(command, pass_fds=[write], start_new_session=True, env=with_package())
    os.close(write)
    received: list[int] = []

    def forward(number: int, frame: Any) -> None:
        received.append(number)
        child.send_signal(number)

    previous = {number: signal.signal(number, forward) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        with os.fdopen(read) as pipe:
            said = pipe.read()
        status = child.wait()
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
    if received:
        raise KeyboardInterrupt
    if status == 0:
        return None
    if said:
        return said
    return f"its process was ended by {signal.Signals(-status).name}" if status < 0 else f"exit status {status}"


def _train(config: TrainConfig) -> None:
    import dataclasses

    from ..train.loop import train

    train(dataclasses.replace(config, resume=(config.out / "config.json").exists()))


def _cost(config: TrainConfig, seconds: float) -> None:
    from . import cost

    cost.write(config, seconds)


#: What a process of a row does.
WORK: dict[str, Callable[..., None]] = {"train": _train, "cost": _cost}


def _end_with_parent() -> None:
    """Interrupt this process, which saves its state, when the one that started it is gone."""
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, daemon=True).start()


def main(pipe: int, request: dict[str, Any]) -> int:
    """Do the work of one row and return the exit status; why it failed goes into the pipe."""
    _end_with_parent()
    try:
        WORK[request["what"]](TrainConfig.from_json(request["config"]), *request["more"])
        return 0
    except KeyboardInterrupt:
        return INTERRUPTED
    except Exception as error:
        if not isinstance(error, TrainError):
            traceback.print_exc()
        with os.fdopen(pipe, "w") as out:
            out.write(reason(error))
        return 1


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), json.loads(sys.argv[2])))
