"""What identifies the data of a run: with another set, or the same folder changed, its steps would be others."""

from __future__ import annotations

import hashlib
from itertools import zip_longest
from pathlib import Path
from typing import Any

from .data import Dataset
from .errors import TrainError

_GO_ON = "go on with the same data, or start a new run"


def of(dataset: Dataset) -> dict[str, Any]:
    """What a checkpoint keeps of the data: images in each split, classes, a digest of the training labels in order."""
    return {
        "train": len(dataset.train),
        "test": len(dataset.test),
        "classes": list(dataset.names),
        "labels": hashlib.sha256(dataset.train.labels.numpy().tobytes()).hexdigest(),
    }


def check(saved: dict[str, Any], dataset: Dataset, out: Path) -> None:
    """Refuse to go on with other data.

    Args:
        saved: what :func:`of` gave for the run so far.
        dataset: as it is now.
        out: folder of the run, for the error's text.

    Raises:
        TrainError: says what differs.
    """
    now = of(dataset)
    for number, (was, got) in enumerate(zip_longest(saved["classes"], now["classes"])):
        if was != got:
            was, got = ("none" if name is None else repr(name) for name in (was, got))
            raise TrainError(f"--resume: class {number} of the run in {out} is {was}, got {got}; {_GO_ON}")
    for split, what in (("train", "training"), ("test", "test")):
        if saved[split] != now[split]:
            raise TrainError(
                f"--resume: the data of the run in {out} have {saved[split]} {what} images, got {now[split]}; {_GO_ON}"
            )
    if saved["labels"] != now["labels"]:
        raise TrainError(f"--resume: training images of the run in {out} have other labels than before; {_GO_ON}")
