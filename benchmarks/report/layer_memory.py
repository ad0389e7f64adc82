"""Activation memory of MRLA-ResNets beside the published formulation: results/layer_memory.{json,md}.

    python benchmarks/report/layer_memory.py [--batch 2] [--size 224]

What autograd keeps between the forward and the backward pass of one training step, and the most that the step holds,
each network in a process of its own, in float32 on the CPU.  The published formulation concatenates keys and values of
all layers so far at every layer and multiplies them in one batched product.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

import torch

# Runs from a clone without installation too.
sys.path.insert(0, str(Path(__file__).parents[2]))

from fused_attn import create_model
from fused_attn.bench import measure
from fused_attn.models import bottleneck_resnet
from fused_attn.train.environment import describe

RESULTS = Path(__file__).parents[1] / "results"
MIB = 2**20
#: model -> forms of its attention: ours, and where they differ the published one
CASES = {
    name: ("ours", "published") if "base" in name else ("ours",)
    for depth in (50, 101)
    for name in (f"resnet{depth}", f"mrla_light_resnet{depth}", f"mrla_base_resnet{depth}")
}


class PublishedCache:
    """Keys and values of a stage as the authors' code keeps them: two tensors that grow with every layer."""

    def __init__(self) -> None:
        self.keys = self.values = None

    def append(self, key, value) -> None:
        key, value = key.unsqueeze(1), value.unsqueeze(1)
        self.keys = key if self.keys is None else torch.cat([self.keys, key], dim=1)
        self.values = value if self.values is None else torch.cat([self.values, value], dim=1)

    def attend(self, query, *, scale, impl) -> torch.Tensor:
        batch, layers, channels, *spatial = self.values.shape
        weights = torch.einsum("bgd,blgd->bgl", query * scale, self.keys).softmax(-1)
        values = self.values.reshape(batch, layers, query.shape[1], -1)
        return torch.einsum("bgl,blgn->bgn", weights, values).reshape(batch, channels, *spatial)


def measure_case(name: str, form: str, batch: int, size: int) -> dict[str, int]:
    """Bytes saved for backward, and the most held beyond weights and images, in one step."""
    if form == "published":
        bottleneck_resnet.LayerCache = PublishedCache
    torch.manual_seed(0)
    network = create_model(name, num_classes=1000)
    images = torch.randn(batch, 3, size, size)
    own = {tensor.untyped_storage().data_ptr() for tensor in (*network.parameters(), *network.buffers(), images)}
    saved: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    def step() -> None:
        network(images).sum().backward()

    network(images[:1]).sum().backward()  # gradients of the weights and libraries are there
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = network(images)
    total = sum(saved.values())
    del out
    before = measure.trim()
    return {"saved": total, "peak": measure.peak_resident(step) - before}


def markdown(report: dict) -> str:
    environment, batch = report["environment"], report["batch"]
    lines = [
        f"{environment['cpu']}, torch {environment['torch']}, {environment['date']}: {report['size']} px, batch "
        f"{batch}, float32, one training step.",
        "",
        "| MiB per image | saved for backward | peak |",
        "| --- | ---: | ---: |",
    ]
    for row in report["rows"]:
        form = "" if len(CASES[row["model"]]) == 1 else f", {row['form']}"
        saved, peak = (f"{row[key] / batch / MIB:,.0f}" for key in ("saved", "peak"))
        lines.append(f"| {row['model']}{form} | {saved} | {peak} |")
    return "\n".join(lines) + "\n"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--batch", type=int, default=2, help="images (%(default)s)")
    parser.add_argument("--size", type=int, default=224, help="pixels (%(default)s)")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for the results (%(default)s)")
    parser.add_argument("--case", nargs=2, metavar=("MODEL", "FORM"), help="measure one network and print it")
    arguments = parser.parse_args(argv)
    if arguments.case:
        print(json.dumps(measure_case(*arguments.case, arguments.batch, arguments.size), allow_nan=False))
        return 0
    report = {"environment": describe(), "batch": arguments.batch, "size": arguments.size, "rows": []}
    for name, forms in CASES.items():
        for form in forms:
            command = [sys.executable, __file__, "--case", name, form]
            command += ["--batch", str(arguments.batch), "--size", str(arguments.size)]
            output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            report["rows"].append({"model": name, "form": form, **json.loads(output.splitlines()[-1])})
            print(report["rows"][-1], file=sys.stderr, flush=True)
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / "layer_memory.json").write_text(json.dumps(report, indent=1, allow_nan=False) + "\n")
    (arguments.out / "layer_memory.md").write_text(markdown(report))
    print(markdown(report))
    return 0


if __name__ == "__main__":
    sys.exit(main())
