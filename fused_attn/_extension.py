"""Loading of the compiled C++ kernels.  The package works without them; ``fused-attn info`` says so."""

from __future__ import annotations

import warnings
from pathlib import Path

import torch

#: States what it takes: why it was left out, be it for want of a compiler or on request, nothing here can know.
NOT_BUILT = "it was not built: that takes a C++ compiler at installation, and FUSED_ATTN_NO_EXTENSION not set to 1"
#: What to do about a missing extension.
REMEDY = """To build it where a C++20 compiler is:
  pip install --no-deps --force-reinstall --no-cache-dir SOURCE
SOURCE is the folder, archive or address that the package came from. Without --no-cache-dir, pip may take a wheel
without kernels that it built earlier."""

#: Instruction sets the kernels are compiled for, lowest first.
CPU_CAPABILITIES = ("generic", "avx2", "avx512", "amx")


def _load() -> str | None:
    libraries = sorted(Path(__file__).parent.glob("_C*.so"))
    if not libraries:
        return NOT_BUILT
    try:
        torch.ops.load_library(str(libraries[0]))
    except OSError as error:
        return f"{libraries[0].name} does not load with torch {torch.__version__}: {error}"
    return None


_REASON = _load()
_warned = False


def warn_of_reference() -> None:
    """Say, once per process, that the reference runs where a C++ kernel would, and what to do about it."""
    global _warned
    if not _warned:
        _warned = True
        warnings.warn(
            f"fused_attn runs the PyTorch reference, which is slower, on the CPU: the C++ extension is not available "
            f"({_REASON}).\n{REMEDY}",
            stacklevel=4,
        )


if _REASON is not None:
    # torch.compile then calls it while it traces, instead of tracing into it.
    torch.compiler.assume_constant_result(warn_of_reference)


def available() -> bool:
    """Whether the C++ kernels are loaded."""
    return _REASON is None


def reason() -> str | None:
    """Why the C++ kernels are not loaded; None when they are."""
    return _REASON


def cpu_capability() -> str:
    """Instruction set the C++ kernels use: the best this processor has, unless :func:`set_cpu_capability` chose."""
    return CPU_CAPABILITIES[torch.ops.fused_attn_cpu.cpu_capability()]


def set_cpu_capability(name: str) -> None:
    """Run the C++ kernels compiled for ``name``: for tests of the instruction sets below this machine's best.

    Raises:
        ValueError: ``name`` is unknown.
        RuntimeError: this processor does not have it.
    """
    if name not in CPU_CAPABILITIES:
        raise ValueError(f"name must be one of {', '.join(CPU_CAPABILITIES)}, got {name!r}")
    torch.ops.fused_attn_cpu.set_cpu_capability(CPU_CAPABILITIES.index(name))


def set_always_tiles(always: bool) -> None:
    """Use matrix tiles, of the instruction set "amx", also for calls that are faster without them: for tests."""
    torch.ops.fused_attn_cpu.set_always_tiles(always)
