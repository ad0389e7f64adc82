"""Training: ``fused-attn train``, or :func:`train` with a :class:`TrainConfig`."""

from .config import TrainConfig
from .errors import TrainError

__all__ = ["TrainConfig", "TrainError", "train"]


def __getattr__(name: str):
    # Accelerate and torchmetrics take seconds to import: not for a look at the settings.
    if name == "train":
        from .loop import train

        return train
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
