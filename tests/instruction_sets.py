"""The C++ kernels of an instruction set."""

import contextlib
from collections.abc import Iterator

from fused_attn import _extension


@contextlib.contextmanager
def instruction_set(name: str) -> Iterator[None]:
    """Run the kernels compiled for ``name``; "amx" uses matrix tiles for every call that they can take.

    Raises:
        RuntimeError: this processor does not have it.
    """
    best = _extension.cpu_capability()
    _extension.set_cpu_capability(name)
    _extension.set_always_tiles(name == "amx")
    try:
        assert _extension.cpu_capability() == name
        yield
    finally:
        _extension.set_always_tiles(False)
        _extension.set_cpu_capability(best)
