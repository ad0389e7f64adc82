"""Peak memory of a process that trains alone, beside a copy (DDP) and in shards (FSDP): results/parallel_memory.*.

    python benchmarks/report/parallel_memory.py [--processes 2] [--steps 3]

Each process takes its part of the batch; the one alone takes the parts in turn.  Losses are those of one process within
rounding, or it fails.  Peak: the most that a process of its own holds in a step with optimizer, beyond what it held
with the libraries and the other processes, before the network was made.  float32, SGD with momentum, gloo, CPU.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F

# Runs from a clone without installation too.
sys.path.insert(0, str(Path(__file__).parents[2]))

from fused_attn import create_model
from fused_attn.bench import measure
from fused_attn.train import parallel
from fused_attn.train.environment import describe

RESULTS = Path(__file__).parents[1] / "results"
MIB = 2**20
#: name -> (options of create_model, size of the images, images of one process)
CASES: dict[str, tuple[dict[str, Any], int, int]] = {
    "aa_wrn_28_10": ({"num_classes": 10, "attention_blocks": "all"}, 32, 1),
    "mrla_base_resnet50": ({"num_classes": 1000}, 64, 2),
}
FORMS = {"one": "one process", "ddp": "DDP", "fsdp": "FSDP"}


def train(name: str, form: str, processes: int, steps: int) -> dict[str, Any]:
    """The losses of all images, and the peak, of this process: one of several that ``torch.distributed`` knows."""
    options, size, batch = CASES[name]
    torch.set_num_threads(1)
    rank = 0
    if form != "one":
        dist.init_process_group("gloo")
        rank = dist.get_rank()
        dist.barrier()
    before = measure.trim()
    torch.manual_seed(0)
    model = network = create_model(name, **options)
    if form == "fsdp":
        alone: Any = SimpleNamespace(device=torch.device("cpu"), num_processes=processes)
        parallel.shard(network, alone)
    elif form == "ddp":
        model = torch.nn.parallel.DistributedDataParallel(network)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.01, momentum=0.9)
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(processes, batch, 3, size, size, generator=generator)
    labels = torch.randint(options["num_classes"], (processes, batch), generator=generator)
    parts, losses = (range(processes) if form == "one" else [rank]), []

    def step() -> None:
        total = torch.zeros(())
        for part in parts:
            loss = F.cross_entropy(model(images[part]), labels[part]) / len(parts)
            loss.backward()
            total += loss.detach()
        if form != "one":
            dist.all_reduce(total, dist.ReduceOp.SUM)
            total /= processes
        optimizer.step()
        optimizer.zero_grad()
        losses.append(total.item())

    peak = max(measure.peak_resident(step) for _ in range(steps))
    if form != "one":
        dist.destroy_process_group()
    return {"losses": losses, "peak": peak - before}


def measured(name: str, form: str, processes: int, steps: int) -> dict[str, Any]:
    """The row of one network: peak bytes of the process that holds most, and the losses."""
    number = 1 if form == "one" else processes
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, __file__, "--case", name, form]
    command += ["--processes", str(processes), "--steps", str(steps)]
    rendezvous = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(number)}
    started = [
        subprocess.Popen(
            command,
            env={**measure.child_environment(), **rendezvous, "RANK": str(rank)},
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(number)
    ]
    outputs = [process.communicate()[0] for process in started]
    if any(process.returncode for process in started):
        raise SystemExit(f"{name}, {form}: a process failed")
    results = [json.loads(output.splitlines()[-1]) for output in outputs]
    return {
        "model": name,
        "form": form,
        "losses": results[0]["losses"],
        "peak": max(result["peak"] for result in results),
    }


def markdown(report: dict[str, Any]) -> str:
    environment = report["environment"]
    difference = report["difference"]
    as_alone = "to the bit" if difference == 0 else f"to {difference:.0e} of their value"
    lines = [
        f"{environment['cpu']}, torch {environment['torch']}, {environment['date']}: {report['processes']} processes "
        f"of one thread, float32, SGD with momentum. The losses of {report['steps']} steps are those of one process "
        f"{as_alone}.",
        "",
        "| peak of each process, MiB | " + " | ".join(FORMS.values()) + " |",
        "| --- |" + " ---: |" * len(FORMS),
    ]
    for name, (options, size, batch) in CASES.items():
        peaks = {row["form"]: row["peak"] for row in report["rows"] if row["model"] == name}
        blocks = ", attention in all blocks" if "attention_blocks" in options else ""
        cells = " | ".join(f"{peaks[form] / MIB:,.0f}" for form in FORMS)
        lines.append(f"| `{name}`{blocks}, {size} px, {batch} of the images each | {cells} |")
    return "\n".join(lines) + "\n"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--processes", type=int, default=2, help="of DDP and FSDP (%(default)s)")
    parser.add_argument("--steps", type=int, default=3, help="optimizer steps (%(default)s)")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for the results (%(default)s)")
    parser.add_argument("--case", nargs=2, metavar=("MODEL", "FORM"), help="be one process of a case, and print it")
    arguments = parser.parse_args(argv)
    if arguments.case:
        print(json.dumps(train(*arguments.case, arguments.processes, arguments.steps), allow_nan=False))
        return 0
    rows = [measured(name, form, arguments.processes, arguments.steps) for name in CASES for form in FORMS]
    alone = {row["model"]: row["losses"] for row in rows if row["form"] == "one"}
    difference = max(
        abs(loss - right) / right
        for row in rows
        for loss, right in zip(row["losses"], alone[row["model"]], strict=True)
    )
    if not difference < 1e-3:
        raise SystemExit(f"losses differ from those of one process by {difference:.1e} of their value")
    settings = {"processes": arguments.processes, "steps": arguments.steps, "difference": difference}
    report = {"environment": describe(), **settings, "rows": rows}
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / "parallel_memory.json").write_text(json.dumps(report, indent=1, allow_nan=False) + "\n")
    (arguments.out / "parallel_memory.md").write_text(markdown(report))
    print(markdown(report))
    return 0


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    sys.exit(main())
