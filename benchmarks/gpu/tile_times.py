"""Time the tiles of the attention kernels on the GPU at hand: what triton_tile_table.py chooses from.

    python benchmarks/gpu/tile_times.py --compile 0/5     compiles a fifth of them, for Triton's cache: run five at once
    python benchmarks/gpu/tile_times.py --out FILE        times all, alone on the machine

Kernels are launched as the op launches them, in bfloat16, each with tiles that are tried in place of its own.  A tile
that does not compile has no time.  FILE is written after every tile.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import time
from collections.abc import Iterator
from datetime import date
from pathlib import Path
from typing import Any

import torch
import triton

from fused_attn.ops import SPECS
from fused_attn.ops._floor.declarations import OpSpec, Shape
from fused_attn.ops.rel_attention_2d import triton_launch, triton_tile_table
from fused_attn.ops.rel_attention_2d.triton_tile_table import Tile
from fused_attn.testing.numerics import draw_grad_out, evaluate

#: Kernel -> tiles: queries, keys, warps, stages.
TILES = {
    "forward": [
        *itertools.starmap(Tile, itertools.product((64, 128), (32, 64), (4,), (2, 3))),
        *(Tile(*tile) for tile in ((32, 64, 2, 2), (64, 64, 8, 2), (64, 128, 4, 2), (128, 64, 8, 2), (128, 128, 8, 2))),
    ],
    "backward_dq": [
        *itertools.starmap(Tile, itertools.product((64,), (32, 64), (4,), (1, 2, 3))),
        *(Tile(*tile) for tile in ((32, 32, 2, 2), (32, 64, 2, 2), (64, 32, 2, 2), (128, 32, 4, 2), (128, 64, 8, 2))),
    ],
    "backward_dkv": [
        *itertools.starmap(Tile, itertools.product((16, 32), (64, 128), (4,), (1, 2))),
        *(Tile(*tile) for tile in ((32, 32, 2, 2), (32, 64, 2, 2), (64, 64, 4, 2), (64, 64, 4, 3), (64, 128, 8, 2))),
    ],
    "backward_table": [Tile(64, keys, warps, stages) for keys in (32, 64) for warps in (4, 8) for stages in (1, 2)],
}
NAMES = {
    "forward": "rel_attention_fwd_kernel",
    "backward_dq": "rel_attention_bwd_dq_kernel",
    "backward_dkv": "rel_attention_bwd_dkv_kernel",
    "backward_table": "rel_attention_bwd_table_kernel",
}
OPS = ("rel_attention_2d", "bias_attention_2d", "decomposed_bias_attention")


def cases(device: str) -> Iterator[tuple[OpSpec, Shape, str, Tile]]:
    """What is tried: on the CPU, in the interpreter, one tile of each kernel at the first shape that is small."""
    for spec in (spec for spec in SPECS if spec.name in OPS):
        shapes = list(spec.gpu_shapes or spec.shapes) if device == "cuda" else [s for s in spec.samples if s.small][:1]
        for shape, (kernel, tiles) in itertools.product(shapes, TILES.items()):
            if kernel != "backward_table" or spec.name == "bias_attention_2d":
                yield from ((spec, shape, kernel, tile) for tile in (tiles if device == "cuda" else tiles[:1]))


class Forced:
    """Launches with a tile in the place of a kernel's own, and keeps the last launch that has it."""

    def __init__(self) -> None:
        self.kernel, self.tile, self.launch = "", None, None
        own, run = triton_tile_table.choose_tile, triton_launch.AttentionLaunch.run

        def choose_tile(kernel: str, *arguments: Any) -> Tile:
            return self.tile if kernel == self.kernel else own(kernel, *arguments)

        def run_and_keep(launch: triton_launch.AttentionLaunch) -> None:
            if launch.kernel.fn.__name__ == NAMES[self.kernel]:
                self.launch = launch
            run(launch)

        triton_tile_table.choose_tile, triton_launch.AttentionLaunch.run = choose_tile, run_and_keep

    def call(self, kernel: str, tile: Tile, spec: OpSpec, inputs: dict[str, Any], grad_out: torch.Tensor) -> None:
        self.kernel, self.tile, self.launch = kernel, tile, None
        triton_tile_table.blocks.cache_clear()
        evaluate(lambda **call: spec.function(**call, impl="triton"), inputs, grad_out)


def microseconds(launch: triton_launch.AttentionLaunch, device: str) -> float:
    """The least mean of five launches in a row."""
    if device != "cuda":
        start = time.perf_counter()
        launch.run()
        return (time.perf_counter() - start) * 1e6
    best = float("inf")
    for _ in range(4):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda._sleep(200_000)  # the host runs ahead
        start.record()
        for _ in range(5):
            launch.run()
        end.record()
        end.synchronize()
        best = min(best, start.elapsed_time(end) / 5)
    return best * 1e3


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--compile", metavar="PART/PARTS")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    options = parser.parse_args()
    if (options.out is None) == (options.compile is None):
        parser.error("expected one of --out and --compile")
    part, parts = map(int, (options.compile or "0/1").split("/"))
    forced, rows, drawn, dtype = Forced(), [], None, torch.bfloat16 if options.device == "cuda" else torch.float32
    report = {
        "environment": {
            "date": str(date.today()),
            "gpu": torch.cuda.get_device_name() if options.device == "cuda" else None,
            "torch": torch.__version__,
            "triton": triton.__version__,
        },
        "dtype": str(dtype).removeprefix("torch."),
        "unit": "microseconds",
        "tile": "queries, keys, warps, stages (backward_table: keys of both)",
        "rows": rows,
    }
    for spec, shape, kernel, tile in itertools.islice(cases(options.device), part, None, parts):
        if drawn != (spec, shape):
            drawn, inputs = (spec, shape), shape.inputs(dtype, options.device)
            grad_out = draw_grad_out(spec, inputs)
        row = {"op": spec.name, "shape": shape.name, "kernel": kernel, "tile": list(tile), "time": None}
        try:
            forced.call(kernel, tile, spec, inputs, grad_out)
        except Exception as error:  # too much shared memory, say
            row["error"] = f"{type(error).__name__}: {error}".splitlines()[0]
        else:
            if options.compile is None:
                row["time"] = round(microseconds(forced.launch, options.device), 1)
        rows.append(row)
        print(*row.values(), flush=True)
        if options.out is not None:
            options.out.parent.mkdir(parents=True, exist_ok=True)
            options.out.write_text(json.dumps(report, indent=1, allow_nan=False) + "\n")
    return 0 if any("error" not in row for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
