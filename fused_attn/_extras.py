"""What training and benchmarks need beyond PyTorch, and the one line that says how to get it."""

from __future__ import annotations

import contextlib
import traceback
from collections.abc import Collection, Iterator
from importlib.metadata import packages_distributions
from importlib.util import find_spec

#: extra of pyproject.toml -> the modules that it brings
EXTRAS = {
    "train": (
        "accelerate", "datasets", "kornia", "matplotlib", "numpy", "PIL", "pyarrow", "yaml", "safetensors", "sklearn",
        "torchmetrics", "tqdm", "tyro",
    ),
    "bench": ("matplotlib", "rich", "tqdm", "tyro"),
}  # fmt: skip


class MissingExtraError(ImportError):
    """Packages of an extra are not installed, or cannot be imported: the text names them and what to type."""


@contextlib.contextmanager
def needs(extra: str, what: str) -> Iterator[None]:
    """Run what follows with the packages of an extra.

    Those that are missing are an error at once.  They are not imported here, which takes seconds; one that cannot be
    imported is an error when what follows imports it.

    Args:
        extra: a key of ``EXTRAS``.
        what: needs them; begins the error's text.

    Raises:
        MissingExtraError: a package is not installed, or raised an error while it was imported.
    """
    missing = [module for module in EXTRAS[extra] if find_spec(module) is None]
    if missing:
        raise MissingExtraError(
            f"{what} needs {', '.join(missing)}: pip install 'fused-attn[{extra}]', or '.[{extra}]' in a clone"
        )
    try:
        yield
    except Exception as error:
        if (broken := _not_imported(error, EXTRAS[extra])) is None:
            raise
        package = packages_distributions().get(broken, [broken])[0]
        raise MissingExtraError(
            f"{what} needs {broken}, which is installed but cannot be imported ({type(error).__name__}: {error}): "
            f"pip install --force-reinstall {package}"
        ) from error


def _not_imported(error: Exception, packages: Collection[str]) -> str | None:
    """Which of the packages was being imported, with whatever it imports itself, when the error was raised."""
    frames = (frame for frame, _ in traceback.walk_tb(error.__traceback__) if frame.f_code.co_name == "<module>")
    names = [frame.f_globals["__name__"] for frame in frames]
    if isinstance(error, ImportError) and error.name is not None:
        names.append(error.name)  # a compiled module, or a name that the package does not have
    return next((package for name in names if (package := name.partition(".")[0]) in packages), None)
