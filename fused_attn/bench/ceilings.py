"""What this machine can do at most, measured: bytes copied and products of matrices per second."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch

from .measure import Clock

COPY_BYTES = 2**28
#: on a GPU; beyond its L2 cache, and enough to fill it
GPU_COPY_BYTES = 2**31
SECONDS = 0.5


def measure_ceilings(dtype: torch.dtype, device: str) -> dict[str, float]:
    """Measure both ceilings with the threads that PyTorch has now.

    Returns:
        ``copy_gbps``, bytes read plus bytes written by a large copy in 1e9 per second, and ``matmul_gflops`` of a
        square product in ``dtype``: each the best of several, as a ceiling should be.
    """
    size = (GPU_COPY_BYTES if device == "cuda" else COPY_BYTES) // dtype.itemsize
    source = torch.ones(size, dtype=dtype, device=device)
    target = torch.zeros_like(source)
    copy = _best(partial(target.copy_, source), device)

    # Where half precision is slow (a hundredth of float32 on a CPU without instructions for it), a kernel converts.
    dtypes = {dtype, torch.float32} if device == "cpu" else {dtype}
    return {
        "copy_gbps": 2 * size * dtype.itemsize / copy * 1e-9,
        "matmul_gflops": max(_matmul_gflops(each, device) for each in dtypes),
    }


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
