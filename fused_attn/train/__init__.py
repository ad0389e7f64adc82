"""Training: ``fused-attn train``, or :func:`train` with a :class:`TrainConfig`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .._extras import needs
from .errors import TrainError

if TYPE_CHECKING:
    from .config import TrainConfig
    from .loop import train

__all__ = ["TrainConfig", "TrainError", "train"]


def __getattr__(name: str) -> Any:
    # Errors, recipes and the description of the machine work without the extra.  Accelerate and torchmetrics take
    # seconds to import: not for a look at the settings.
    if name == "TrainConfig":
        with needs("train", "fused_attn.train"):
            from .config import TrainConfig

        return TrainConfig
    if name == "train":
        with needs("train", "fused_attn.train"):
            from .loop import train

        return train
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
