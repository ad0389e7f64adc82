"""What is installed, and what each op would run here."""

from __future__ import annotations

import platform
import textwrap

import torch

from .. import __version__, _extension
from ..models import list_models
from ..ops import SPECS
from ..train.environment import processor, version_of
from ..train.recipes import RECIPES


def report() -> str:
    """The text of ``fused-attn info``."""
    lines = [
        f"fused-attn {__version__}, torch {torch.__version__}, triton {version_of('triton') or 'not installed'}, "
        f"python {platform.python_version()}",
        f"processor: {processor()}, {torch.get_num_threads()} threads",
    ]
    if _extension.available():
        best = _extension.cpu_capability()
        lines.append(f"C++ kernels: loaded, running on {best} (of {', '.join(_extension.CPU_CAPABILITIES)})")
    else:
        lines.append(f"C++ kernels: not available: {_extension.reason()}")
        lines += textwrap.indent(_extension.REMEDY, "  ").splitlines()
    devices = ["cpu"]
    if torch.cuda.is_available():
        devices.append("cuda")
        capability = ".".join(map(str, torch.cuda.get_device_capability()))
        lines.append(f"GPU: {torch.cuda.get_device_name()}, compute capability {capability}")
    else:
        lines.append("GPU: none")

    for device in devices:
        lines += ["", f"ops on {device} tensors, float32:"]
        for spec in SPECS:
            inputs = spec.samples[0].inputs(torch.float32, device)
            reasons = {impl: spec.reason(impl, inputs) for impl in spec.implementations}
            chosen = next(impl for impl, reason in reasons.items() if reason is None)
            lines.append(f"  {spec.name}: auto runs {chosen!r}")
            for impl, reason in reasons.items():
                if impl != chosen:
                    lines.append(f"    {impl}: {'can run' if reason is None else f'cannot run: {reason}'}")
    lines += ["", "models (families take other sizes too):", *_wrapped(list_models())]
    lines += ["", "recipes:", *(f"  {name}: {text}" for name, (text, _) in RECIPES.items())]
    return "\n".join(lines)


def _wrapped(names: list[str]) -> list[str]:
    return textwrap.wrap(", ".join(names), 110, initial_indent="  ", subsequent_indent="  ")
