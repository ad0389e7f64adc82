"""Loading of the compiled C++ kernels.  The package works without them; ``fused-attn info`` says so."""

from __future__ import annotations

from pathlib import Path

import torch

#: Instruction sets the kernels are compiled for, lowest first.
CPU_CAPABILITIES = ("generic", "avx2", "avx512")


def _load() -> str | None:
    libraries = sorted(Path(__file__).parent.glob("_C*.so"))
    if not libraries:
        return "it was not built; install the package where a C++17 compiler is present"
    try:
        torch.ops.load_library(str(libraries[0]))
    except OSError as error:
        return f"{libraries[0].name} does not load with torch {torch.__version__}: {error}"
    return None


_REASON = _load()


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
