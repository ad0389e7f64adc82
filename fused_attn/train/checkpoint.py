"""Checkpoints: complete or absent, never half-written, and the last two kept.

A checkpoint is a folder ``step-N`` with ``model.safetensors``, ``ema.safetensors`` where there is an average,
``state.pt`` (optimizer and counters, read with ``weights_only=True``) and ``checksums.json``.  It is written under a
temporary name, flushed to the disk, and renamed.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from .errors import TrainError

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
        checksums = {path.name: _checksum(path) for path in sorted(temporary.iterdir())}
        (temporary / "checksums.json").write_text(json.dumps(checksums, indent=1))
        for path in temporary.iterdir():
            _flush(path)
        _flush(temporary)
        os.rename(temporary, final)
        _flush(folder)
    except Exception as error:
        shutil.rmtree(temporary, ignore_errors=True)
        kept = find(folder)
        raise TrainError(
            f"checkpoint {final} could not be written ({error}); "
            + (f"the last complete one is {kept[-1]}" if kept else "there is none before it")
        ) from error
    for old in find(folder)[:-KEEP]:
        shutil.rmtree(old)
    return final


def find(folder: Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    return sorted(folder.glob("step-*")) if folder.is_dir() else []


def load(path: Path) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
    """(weights, state) of one checkpoint.

    Raises:
        TrainError: a file is missing, damaged or unreadable; the text names it and the checkpoint before it.
    """
    try:
        checksums = json.loads((path / "checksums.json").read_text())
        for name, expected in checksums.items():
            if _checksum(path / name) != expected:
                raise ValueError(f"{name} is damaged: its checksum is not the one it was written with")
        weights = {file.stem: load_file(file) for file in path.glob("*.safetensors")}
        return weights, torch.load(path / "state.pt", weights_only=True, map_location="cpu")
    except Exception as error:
        before = [other for other in find(path.parent) if other < path]
        hint = f"remove it to resume from {before[-1].name}" if before else "there is none before it"
        raise TrainError(f"checkpoint {path} cannot be read ({error}); {hint}") from error


def write_weights(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write one safetensors file, complete or not at all."""
    temporary = path.with_name(f".{path.name}.writing")
    save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, temporary)
    _flush(temporary)
    os.replace(temporary, path)


def write_text(path: Path, text: str) -> None:
    """Replace a text file, complete or not at all."""
    temporary = path.with_name(f".{path.name}.writing")
    temporary.write_text(text)
    _flush(temporary)
    os.replace(temporary, path)


def _checksum(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
