"""What this machine can do at most, measured: bytes moved and products of matrices per second."""

from __future__ import annotations

import functools
import importlib.util
import os
import platform
import tempfile
import warnings
import zlib
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch

from .measure import Clock

COPY_BYTES = 2**28
#: on a GPU; beyond its L2 cache, and enough to fill it
GPU_COPY_BYTES = 2**31
SECONDS = 0.5
PROBE_SECONDS = 0.03

#: working sets whose bandwidth is measured on a CPU: within the caches and beyond them
BANDWIDTH_BYTES = tuple(2**power for power in (20, 22, 24, 26, 28))


def measure_ceilings(dtype: torch.dtype, device: str) -> dict[str, Any]:
    """Measure the ceilings with the threads that PyTorch has now.

    On a CPU with a compiler a native program measures them, ``probe.cpp``; on a GPU, or without, PyTorch's own
    operators do.

    Returns:
        ``source``, which of them; ``copy_gbps``, the most bytes moved (read plus written, by a copy where PyTorch
        measures) in 1e9 per second, of a large working set; and ``matmul_gflops`` in ``dtype``: each the best of
        several, as a ceiling should be.  From the probe also ``bandwidth``, bytes of a working set -> kind -> GB/s,
        ``arithmetic``, kind -> 1e9 per second, and ``one_thread``, both for one thread.
    """
    if device == "cpu" and (probe := load_probe()) is not None:
        found = {"source": "native probe", **_probed(probe, torch.get_num_threads())}
        kinds = ("float32", "bfloat16") if dtype == torch.bfloat16 else ("float32",)
        rates = [rate for kind, rate in found["arithmetic"].items() if kind.startswith(kinds)]
        if dtype == torch.float16:  # which the probe does not multiply
            rates.append(_matmul_gflops(dtype, device))
        largest = found["bandwidth"][str(BANDWIDTH_BYTES[-1])]
        one_thread = _probed(probe, 1)
        return {"copy_gbps": max(largest.values()), "matmul_gflops": max(rates), **found, "one_thread": one_thread}

    size = (GPU_COPY_BYTES if device == "cuda" else COPY_BYTES) // dtype.itemsize
    source = torch.ones(size, dtype=dtype, device=device)
    target = torch.zeros_like(source)
    copy = _best(partial(target.copy_, source), device)

    # Where half precision is slow (a hundredth of float32 on a CPU without instructions for it), a kernel converts.
    dtypes = {dtype, torch.float32} if device == "cpu" else {dtype}
    return {
        "source": "PyTorch's operators",
        "copy_gbps": 2 * size * dtype.itemsize / copy * 1e-9,
        "matmul_gflops": max(_matmul_gflops(each, device) for each in dtypes),
    }


def memory_gbps(ceilings: Mapping[str, Any], moved: float) -> float:
    """The most bytes per second, in 1e9, of a working set that is not larger than the bytes ``moved``."""
    levels = {int(size): rates for size, rates in ceilings.get("bandwidth", {}).items()}
    if not levels:
        return ceilings["copy_gbps"]
    return max(levels[max((size for size in levels if size <= moved), default=min(levels))].values())


def _probed(probe: Any, threads: int) -> dict[str, Any]:
    return {
        "bandwidth": {str(size): probe.bandwidth(size, threads, PROBE_SECONDS) for size in BANDWIDTH_BYTES},
        "arithmetic": probe.arithmetic(threads, PROBE_SECONDS),
    }


@functools.cache
def load_probe() -> Any:
    """The native program, compiled for this processor at its first use and kept by PyTorch; None without a compiler."""
    from torch.utils import cpp_extension

    cpuinfo = Path("/proc/cpuinfo")  # of Linux
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    features = [line for line in lines if line.startswith(("flags", "Features"))][:1]
    source = Path(__file__).with_name("probe.cpp")
    key = zlib.crc32("\n".join([platform.machine(), torch.__version__, *features, source.read_text()]).encode())
    name = f"fused_attn_probe_{key:08x}"
    root = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or cpp_extension.get_default_build_root())
    library = root / name / f"{name}.so"
    flags = ["-O3", "-std=c++20", "-march=native"]
    try:
        if not library.exists():
            # In a folder of its own: in a shared one, a build that was killed leaves a lock for which all others wait.
            library.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=root) as folder:
                cpp_extension.load(name, [str(source)], extra_cflags=flags, build_directory=folder)
                os.replace(Path(folder) / library.name, library)
        spec = importlib.util.spec_from_file_location(name, library)
        assert spec is not None  # as the name ends with .so
        assert spec.loader is not None
        probe = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(probe)
        return probe
    except (RuntimeError, OSError, ImportError) as error:
        reason = str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__
        warnings.warn(
            f"ceilings are measured with PyTorch's operators, as the probe does not build: {reason}", stacklevel=2
        )
        return None


def _matmul_gflops(dtype: torch.dtype, device: str) -> float:
    """1e9 FLOP per second of square products, large enough for each to be timed."""
    n, seconds = 256, 0.0
    while seconds < 0.02 and n < 16384:
        n *= 2
        a, b = (torch.randn(n, n, dtype=torch.float32, device=device).to(dtype) for _ in range(2))
        seconds = min(_best(multiply, device, seconds=0.0) for multiply in _products(a, b))
    return 2 * n**3 / min(_best(multiply, device) for multiply in _products(a, b)) * 1e-9


def _products(a: torch.Tensor, b: torch.Tensor) -> list[Callable[[], object]]:
    """Ways to a product of two square matrices, of which the fastest counts."""
    ways = [partial(torch.mm, a, b)]
    if a.device.type == "cpu" and torch.backends.mkldnn.is_available():
        # oneDNN, which linear layers use when they are compiled: on AMD CPUs MKL, behind mm, leaves AVX-512 unused,
        # and is half as fast.
        ways.append(partial(torch.ops.mkldnn._linear_pointwise, a, b, None, "none", [], ""))
        try:
            ways[-1]()
        except RuntimeError:  # a dtype that oneDNN does not multiply on this CPU
            ways.pop()
    return ways


def _best(function: Callable[[], object], device: str, seconds: float = SECONDS) -> float:
    """Shortest time of one call, over calls that last ``seconds`` together and at least three."""
    clock, times = Clock(torch.device(device)), []
    function()
    while len(times) < 3 or sum(times) < seconds:
        start = clock.start()
        function()
        times.append(clock.seconds(start, clock.mark()))
    return min(times)
