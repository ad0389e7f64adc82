"""The folder of a run: a new one or one to resume, which one process at a time may write into."""

from __future__ import annotations

import fcntl
from pathlib import Path
from typing import IO

from ..options import make_folder
from .config import TrainConfig, resumed_config
from .errors import TrainError

#: File in a run's folder; the process that writes into the folder holds a lock on it.
LOCK = ".lock"


def is_taken(out: Path) -> bool:
    """Whether the folder holds anything but the lock and the temporary files of a killed process.

    Raises:
        TrainError: the folder cannot be read.
    """
    try:
        return out.exists() and (
            not out.is_dir() or any(path.name != LOCK and path.suffix != ".writing" for path in out.iterdir())
        )
    except OSError as error:
        raise TrainError(f"out: {out} cannot be read ({error})") from error


def claim(config: TrainConfig, taken: bool) -> TrainConfig:
    """Make the folder of a new run, or check that the run in it is the one to go on with.

    Args:
        config: of the run.
        taken: :func:`is_taken`, asked before any process wrote into it.

    Returns:
        the settings that the run had so far.

    Raises:
        TrainError: the folder is taken or cannot be made; there is no run to resume, or one of other settings.
    """
    out = config.out
    if config.resume:
        before = resumed_config(out)
        config.check_resumes(before)
        return before
    if taken:
        raise TrainError(f"out must be a new or empty folder, or --resume given to go on with its run; got {out}")
    make_folder(out, TrainError)
    return config


def lock(out: Path) -> IO[str]:
    """Lock a run's folder against other processes until the returned file is closed or this process ends, however.

    Raises:
        TrainError: another has it, or it cannot be written into.
    """
    try:
        file = open(out / LOCK, "w")  # noqa: SIM115
    except OSError as error:
        raise TrainError(f"out: {out} cannot be written into ({error})") from error
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        file.close()
        raise TrainError(f"out: another process is writing into {out} ({error})") from error
    return file


def is_locked(out: Path) -> bool:
    """Whether another process writes into a run's folder."""
    if not (out / LOCK).exists():
        return False
    with open(out / LOCK, "r+") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return True
    return False
