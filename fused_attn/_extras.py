"""What training and benchmarks need beyond PyTorch, and the one line that says how to get it."""

from __future__ import annotations

from importlib.util import find_spec

#: extra of pyproject.toml -> the modules that it brings
EXTRAS = {
    "train": (
        "accelerate", "datasets", "kornia", "matplotlib", "numpy", "PIL", "pyarrow", "safetensors", "sklearn",
        "torchmetrics", "tqdm", "tyro",
    ),
    "bench": ("matplotlib", "rich", "tqdm", "tyro"),
}  # fmt: skip


class MissingExtraError(ImportError):
    """Packages of an extra are not installed: the text names them and the command that installs them."""


def require(extra: str, what: str) -> None:
    """Check that the packages of an extra are installed, without importing them.

    Args:
        extra: a key of ``EXTRAS``.
        what: needs them; begins the error's text.

    Raises:
        MissingExtraError: some are not.
    """
    missing = [module for module in EXTRAS[extra] if find_spec(module) is None]
    if missing:
        raise MissingExtraError(f"{what} needs {', '.join(missing)}: pip install 'fused-attn[{extra}]'")
