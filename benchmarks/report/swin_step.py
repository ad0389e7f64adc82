"""A training step of Swin with the fused op and with plain PyTorch: results/swin_step.{json,md}.

    python benchmarks/report/swin_step.py [--model swin_tiny] [--batch 4] [--size 224] [--threads 2] [--seconds 120]

Forward, loss, backward and AdamW in float32 on the CPU, in turns; memory of each in a process of its own.  Plain
PyTorch is the same network, with the same weights, whose windows attend as in timm and torchvision: biases gathered
from the table, the mask of shifted windows added, ``scaled_dot_product_attention``.  Windows are cut, rolled and joined
by the same code in both.  The gather is ``index_select``, with a faster gradient than the published ``table[index]``.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# Runs from a clone without installation too.
sys.path.insert(0, str(Path(__file__).parents[2]))

from fused_attn import create_model
from fused_attn.bench import measure
from fused_attn.modules import WindowAttention2d
from fused_attn.ops.rel_attention_2d.reference import relative_index
from fused_attn.train.environment import describe

RESULTS = Path(__file__).parents[1] / "results"
MIB = 2**20
FORMS = ("fused", "plain PyTorch")
#: Most that gradients may differ by, over the largest of their parameter.
TOLERANCE = 1e-3


class PlainWindowAttention(WindowAttention2d):
    """``WindowAttention2d`` on PyTorch alone; indices and masks are made once for each size and shift."""

    def attend(self, windows: Tensor, segments: Tensor | None = None) -> Tensor:
        size = windows.shape[1:3]
        if (kept := self.__dict__.setdefault("kept", {}).get(size)) is None:
            rows, columns = (relative_index(length, length, "query_minus_key", windows.device) for length in size)
            index = rows[:, None, :, None] * (2 * size[1] - 1) + columns[None, :, None, :]
            mask = None
            if segments is not None:
                parts = segments.flatten(1)
                apart = (parts[:, :, None] != parts[:, None, :])[:, None]
                mask = torch.zeros(apart.shape, dtype=windows.dtype).masked_fill(apart, float("-inf"))
            kept = self.kept[size] = index.flatten(), mask
        index, mask = kept
        positions = size[0] * size[1]
        query, key, value = self.qkv(windows.flatten(1, 2)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        bias = self.bias_table(size).flatten(1).index_select(1, index).view(1, -1, positions, positions)
        if mask is not None:  # of every window of an image, for every image
            bias = (bias + mask).repeat(len(windows) // len(mask), 1, 1, 1)
        out = F.scaled_dot_product_attention(query, key, value, attn_mask=bias)
        return self.proj(out.transpose(1, 2).flatten(2).unflatten(1, size))


class Step:
    """A training step; every form has the same weights, images and labels."""

    def __init__(self, form: str, model: str, batch: int, size: int) -> None:
        torch.manual_seed(0)
        self.network = create_model(model, num_classes=1000)
        if form != "fused":
            for module in self.network.modules():
                if isinstance(module, WindowAttention2d):
                    module.__class__ = PlainWindowAttention
        self.images, self.labels = torch.randn(batch, 3, size, size), torch.randint(1000, (batch,))
        self.optimizer = torch.optim.AdamW(self.network.parameters(), lr=1e-4)

    def __call__(self, images: int | None = None) -> None:
        F.cross_entropy(self.network(self.images[:images]), self.labels[:images]).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def gradients(self) -> list[Tensor]:
        loss = F.cross_entropy(self.network(self.images[:1]), self.labels[:1])
        return [*torch.autograd.grad(loss, [*self.network.parameters()])]


def difference(first: Step, second: Step) -> float:
    """Of the gradients of one image, the largest over the largest of its parameter; tables first get random numbers."""
    for step in (first, second):
        torch.manual_seed(1)
        for name, parameter in step.network.named_parameters():
            if name.endswith("relative_position_bias_table"):
                nn.init.normal_(parameter)
    pairs = zip(first.gradients(), second.gradients(), strict=True)
    return max(float((a - b).abs().max() / b.abs().max()) for a, b in pairs)


def peak_memory(step: Step) -> int:
    """Most bytes held beyond weights, AdamW's state and images in one step."""
    step(images=1)  # AdamW's state, indices, masks, libraries and threads are there
    before = measure.trim()
    return measure.peak_resident(step) - before


def measure_times(steps: dict[str, Step], seconds: float) -> tuple[dict[str, list[float]], float]:
    """Seconds of every step, and the median ratio of the plain one's to the fused one's in the same round."""
    clock = measure.Clock(torch.device("cpu"))

    def turn(step: Step) -> Callable[[int], dict[str, float]]:
        def timed(number: int) -> dict[str, float]:
            start = clock.start()
            step()
            return {"step": clock.seconds(start, clock.mark())}

        return timed

    rounds: measure.Rounds = []
    turns = {form: turn(step) for form, step in steps.items()}
    times = measure.interleave(turns, seconds=seconds, least=3, warmup=1, rounds_into=rounds)
    ratio = measure.median_ratio(rounds, FORMS[1], FORMS[0], "step")
    return {form: times[form]["step"] for form in steps}, ratio


def markdown(report: dict) -> str:
    environment, rows = report["environment"], {row["form"]: row for row in report["rows"]}
    fused, plain = (rows[form] for form in FORMS)
    lines = [
        f"{report['model']}, {fused['parameters']:,} parameters, {report['size']} px, batch {report['batch']}, fp32; "
        f"{environment['cpu']}, {environment['threads']} of {environment['cores']} cores, torch "
        f"{environment['torch']}, {environment['date']}. One training step: median milliseconds [20th, 80th "
        "percentile], and memory beyond weights, AdamW's state and images. Plain PyTorch, gathered biases and "
        f"`scaled_dot_product_attention`, takes {report['ratio']:.2f} times as long (median of rounds) and "
        f"{plain['peak'] / fused['peak']:.2f} times the memory.",
        "",
        "| attention | step, ms | images/s | peak extra memory, MiB |",
        "| --- | ---: | ---: | ---: |",
    ]
    for form, row in rows.items():
        name = f"**{form}**" if form == "fused" else form
        lines.append(
            f"| {name} | {row['p50_ms']:,.0f} [{row['p20_ms']:,.0f}, {row['p80_ms']:,.0f}] "
            f"| {1e3 * report['batch'] / row['p50_ms']:.1f} | {row['peak'] / MIB:,.0f} |"
        )
    return "\n".join(lines) + "\n"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", default="swin_tiny", help="a Swin (%(default)s)")
    parser.add_argument("--batch", type=int, default=4, help="images (%(default)s)")
    parser.add_argument("--size", type=int, default=224, help="pixels (%(default)s)")
    parser.add_argument("--threads", type=int, default=2, help="threads of PyTorch (%(default)s)")
    parser.add_argument("--seconds", type=float, default=120, help="to time both for (%(default)s)")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for the results (%(default)s)")
    parser.add_argument("--memory", choices=FORMS, help="measure the memory of one, in this process, and print it")
    arguments = parser.parse_args(argv)
    torch.set_num_threads(arguments.threads)
    settings = {"model": arguments.model, "batch": arguments.batch, "size": arguments.size}
    if arguments.memory:
        print(json.dumps({"peak": peak_memory(Step(arguments.memory, **settings))}, allow_nan=False))
        return 0
    steps = {form: Step(form, **settings) for form in FORMS}
    apart = difference(*steps.values())
    if apart > TOLERANCE:
        print(f"gradients differ by {apart:.2g} of their largest", file=sys.stderr)
        return 1
    times, ratio = measure_times(steps, arguments.seconds)
    parameters = sum(parameter.numel() for parameter in steps["fused"].network.parameters())
    del steps
    report = {**settings, "environment": describe(), "ratio": ratio, "gradients_apart": apart, "rows": []}
    for form, seconds in times.items():
        p20, p50, p80 = (1e3 * statistics.quantiles(seconds, n=10, method="inclusive")[i] for i in (1, 4, 7))
        options = [text for name, value in settings.items() for text in (f"--{name}", str(value))]
        command = [sys.executable, __file__, "--memory", form, "--threads", str(arguments.threads), *options]
        environment = measure.child_environment()
        output = subprocess.run(command, check=True, capture_output=True, text=True, env=environment).stdout
        peak = json.loads(output.splitlines()[-1])["peak"]
        row = {"form": form, "parameters": parameters, "peak": peak, "repetitions": len(seconds)}
        report["rows"].append(row | {"p20_ms": p20, "p50_ms": p50, "p80_ms": p80})
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / "swin_step.json").write_text(json.dumps(report, indent=1, allow_nan=False) + "\n")
    (arguments.out / "swin_step.md").write_text(markdown(report))
    print(markdown(report))
    return 0


if __name__ == "__main__":
    sys.exit(main())
