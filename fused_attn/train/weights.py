"""Weights of networks: read from safetensors files and runs, never from a pickle, and loaded into a network."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from ..modules import resize_state_dict
from . import checkpoint
from .errors import TrainError, reason


def file_of(source: Path, option: str, finished: bool = False) -> Path:
    """Find the weights of a run: those evaluated at its end or, before that, those of its last checkpoint.

    Where ``source`` is a safetensors file, it is returned itself.

    Args:
        source: folder or file.
        option: begins the error's text.
        finished: accept only a run that has ended.

    Raises:
        TrainError: there is no such file.
    """
    if not source.is_dir():
        if source.suffix != ".safetensors" or not source.is_file():
            what = "a file of another kind (pickled weights are never loaded)" if source.is_file() else "no such file"
            raise TrainError(f"{option} must be a .safetensors file or the folder of a run, got {source}: {what}")
        return source
    final, saved = source / "model.safetensors", checkpoint.find(source / "checkpoints")
    if final.exists():
        return final
    if finished or not saved:
        expected = "model.safetensors" if finished else "model.safetensors or a checkpoint"
        raise TrainError(f"{option}: {source} must hold {expected}, found {'none' if finished else 'neither'}")
    average = saved[-1] / "ema.safetensors"
    return average if average.exists() else saved[-1] / "model.safetensors"


def read(file: Path, option: str) -> dict[str, Tensor]:
    """The state dict in a safetensors file; of an average, that of the network in it.

    Raises:
        TrainError: it is damaged or unreadable.
    """
    if (file.parent / "checksums.json").exists():
        weights = checkpoint.load(file.parent)[0][file.stem]
    else:
        try:
            weights = load_file(file)
        except Exception as error:  # safetensors raises its own, the file system's and ValueError
            raise _could_not_be_loaded(file, option, error) from error
    if file.name == "ema.safetensors":
        return {name.removeprefix("module."): each for name, each in weights.items() if name.startswith("module.")}
    return weights


def load(network: nn.Module, weights: dict[str, Tensor], file: Path, option: str) -> None:
    """Load all weights of a network.

    Raises:
        TrainError: they are another network's, or not finite.
    """
    own = network.state_dict()
    for name, tensor in weights.items():
        if name in own and tensor.is_floating_point() != own[name].is_floating_point():
            raise TrainError(f"{option}: {name} in {file} must be {own[name].dtype}, got {tensor.dtype}")
    if bad := not_finite(weights.items()):
        raise TrainError(f"{option}: the weights in {file} must be finite, got inf or nan in {bad}")
    try:
        network.load_state_dict(weights)
    except RuntimeError as error:
        raise _could_not_be_loaded(file, option, error) from error


def initialise(
    network: nn.Module, source: Path, build_wider: Callable[[], nn.Module], option: str = "init_from"
) -> dict[str, Any]:
    """Begin with the weights in ``source``.

    A tensor of another shape is left as it is where its shape is a matter of the number of classes: the classifier's,
    and what takes its results.  Tables of positions of another image size are interpolated, as by
    :func:`~fused_attn.modules.resize_state_dict`.  Everything else must fit.

    Args:
        network: gets the weights.
        source: a safetensors file, or the folder of a run.
        build_wider: the same network for one class more.
        option: begins the error's text.

    Returns:
        what the metrics say about it: the file, its SHA-256, the names of the tensors left as they are, and a line for
        each that was resized.

    Raises:
        TrainError: there are no such weights, or they do not fit.
    """
    file = file_of(source, option)
    weights, own = read(file, option), network.state_dict()
    try:
        weights, resized = resize_state_dict(network, weights)
    except ValueError as error:
        raise _could_not_be_loaded(file, option, error) from error
    fresh = [name for name, each in own.items() if name in weights and weights[name].shape != each.shape]
    if fresh:
        with torch.device("meta"):
            wider = build_wider().state_dict()
        fresh = [name for name in fresh if wider[name].shape != own[name].shape]
    load(network, {**weights, **{name: own[name] for name in fresh}}, file, option)
    return {"file": str(file), "sha256": checkpoint.checksum(file), "left_fresh": fresh, "resized": resized}


def said(found: dict[str, Any]) -> str:
    """What :func:`initialise` returned, in words."""
    fresh = f"; freshly drawn: {', '.join(found['left_fresh'])}" if found["left_fresh"] else ""
    return "\n".join((f"weights of {found['file']}{fresh}", *(f"resized: {line}" for line in found["resized"])))


def not_finite(tensors: Iterable[tuple[str, Tensor]]) -> str | None:
    """Name of the first tensor that holds an inf or a nan."""
    return next((name for name, each in tensors if each.is_floating_point() and not each.isfinite().all()), None)


def _could_not_be_loaded(file: Path, option: str, error: Exception) -> TrainError:
    return TrainError(f"{option}: the weights in {file} could not be loaded ({reason(error)})")
