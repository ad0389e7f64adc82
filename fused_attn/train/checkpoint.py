"""Checkpoints: complete or absent, never half-written, and the last two kept.

A checkpoint is a folder ``step-N`` with ``model.safetensors``, ``ema.safetensors`` where there is an average,
``state.pt`` (optimizer and counters, read with ``weights_only=True``) and ``checksums.json``.  It is written under a
temporary name, flushed to the disk, and renamed.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from .atomic import flush
from .errors import TrainError, reason
from .json_files import dumps, read_object

KEEP = 2


def save(folder: Path, step: int, weights: Mapping[str, Mapping[str, Tensor]], state: Mapping[str, Any]) -> Path:
    """Write checkpoint ``step`` and drop all but the last two.

    Args:
        folder: holds the checkpoints of one run.
        step: optimizer steps done.
        weights: file stem -> state dict.
        state: tensors, numbers, strings and containers of them.

    Raises:
        TrainError: the disk is full or the folder cannot be written; earlier checkpoints are as they were.
    """
    final, temporary = folder / f"step-{step:08d}", folder / f".writing-{step:08d}"
    if final.exists():  # interrupted right after it was written: the same step has the same state
        return final
    try:
        folder.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        for stem, tensors in weights.items():
            contiguous = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
            save_file(contiguous, temporary / f"{stem}.safetensors")
        torch.save(dict(state), temporary / "state.pt")
        checksums = {path.name: checksum(path) for path in sorted(temporary.iterdir())}
        (temporary / "checksums.json").write_text(dumps(checksums, indent=1))
        for path in temporary.iterdir():
            flush(path)
        flush(temporary)
        os.rename(temporary, final)
        flush(folder)
    except Exception as error:
        shutil.rmtree(temporary, ignore_errors=True)
        kept = find(folder)
        raise TrainError(
            f"checkpoint {final} could not be written ({reason(error)}); "
            + (f"the last complete one is {kept[-1]}" if kept else "there is none before it")
        ) from error
    for old in find(folder)[:-KEEP]:
        shutil.rmtree(old)
    return final


def find(folder: Path) -> list[Path]:
    """Paths of the complete checkpoints in ``folder``, oldest first; copies under other names are left out."""
    paths = folder.iterdir() if folder.is_dir() else ()
    found = [path for path in paths if re.fullmatch(r"step-\d+", path.name) and path.is_dir()]
    return sorted(found, key=step_of)


def step_of(path: Path) -> int:
    """Optimizer steps done at a checkpoint."""
    return int(path.name.removeprefix("step-"))


def load(path: Path) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
    """(weights, state) of one checkpoint.

    Raises:
        TrainError: a file is missing, damaged or unreadable; the text names it and the checkpoint before it.
    """
    try:
        checksums = read_object(path / "checksums.json", "checksums")
        files = {file.name for file in path.iterdir()} - {"checksums.json"}
        if missing := {"model.safetensors", "state.pt"} - files:
            raise ValueError(
                f"{', '.join(sorted(missing))} must be there, found {', '.join(sorted(files)) or 'nothing'}"
            )
        if unlisted := files - checksums.keys():
            raise ValueError(f"checksums.json must list {', '.join(sorted(unlisted))}")
        for name, expected in checksums.items():
            if checksum(path / name) != expected:
                raise ValueError(f"{name} is damaged: its checksum is not the one it was written with")
        weights = {file.stem: load_file(file) for file in path.glob("*.safetensors")}
        state = torch.load(path / "state.pt", weights_only=True, map_location="cpu")
        if not isinstance(state, dict):
            raise ValueError(f"state.pt must hold a dict, got {type(state).__name__}")
        return weights, state
    except Exception as error:
        raise unusable(path, error) from error


def unusable(path: Path, error: Exception) -> TrainError:
    """The error of a checkpoint that cannot be read or does not fit; it names the one before it."""
    before = [other for other in find(path.parent) if step_of(other) < step_of(path)]
    hint = f"resume from {before[-1].name}" if before else "begin again, as there is none before it"
    return TrainError(f"checkpoint {path} cannot be read ({reason(error)}); remove it to {hint}")


def write_weights(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write one safetensors file, complete or not at all."""
    temporary = path.with_name(f".{path.name}.writing")
    save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, temporary)
    flush(temporary)
    os.replace(temporary, path)


def checksum(path: Path) -> str:
    """SHA-256 of a file."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
