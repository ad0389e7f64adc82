"""``fused-attn demo``: real images to a trained network, and the fused op beside eager PyTorch, on this machine."""

from __future__ import annotations

import statistics
import sys
from pathlib import Path

import torch

from ..bench import measure
from ..options import check
from ..train.atomic import write_text
from ..train.config import TrainConfig
from ..train.environment import describe
from ..train.errors import TrainError
from ..train.json_files import dumps

SHAPE = {"B": 8, "heads": 8, "H": 32, "W": 32, "d_k": 20, "d_v": 2}
IMPLEMENTATIONS = {"cpu": "fused", "reference": "eager PyTorch"}
ACCURACY = 0.95


def run(out: Path | None = None, smoke: bool = False) -> int:
    """Train a small attention-augmented network on real images, and compare the fused op with eager PyTorch.

    Args:
        out: folder for the run and the pictures; a new one under runs/ when not given.
        smoke: a few steps on few images, no demand on the accuracy.
    """
    check("demo", run, {"out": out, "smoke": smoke}, TrainError)
    from ..train.loop import train

    out = out or _next_folder(Path("runs"))
    config = TrainConfig(
        model="aa_wrn_10_1" if smoke else "aa_wrn_10_2",
        dataset="digits",
        out=out,
        batch_size=32,
        epochs=1 if smoke else 5,
        max_steps=4 if smoke else None,
        model_options=("heads=4",),
        lr=0.05,
        schedule="cosine",
        warmup_epochs=0.5,
        crop_padding=0,  # five epochs are too few to learn shifts as well: 98 % instead of 97 % for the plain network
        data_note="digits of scikit-learn, resized to 32x32",
    )
    print(f"training {config.model} on handwritten digits, 32x32: stage 1 attends over 1,024 positions", flush=True)
    metrics = train(config)
    accuracy = metrics["test_accuracy"]
    print(f"test accuracy {accuracy:.1%} after {metrics['seconds']:.0f} s ({metrics['parameters']:,} parameters)")

    print("\ncomparing rel_attention_2d with eager PyTorch, forward + backward ...", flush=True)
    comparison = compare(repetitions=1 if smoke else 5)
    write_text(out / "comparison.json", dumps({**comparison, "environment": describe()}, indent=1) + "\n")
    plot(comparison, out / "comparison.png")
    print(table(comparison))
    print(f"curves: {out / 'curves.png'}\ncomparison: {out / 'comparison.png'}")
    if not smoke and accuracy < ACCURACY:
        print(f"fused-attn: the demo must reach {ACCURACY:.0%} test accuracy, got {accuracy:.1%}", file=sys.stderr)
        return 1
    return 0


def compare(repetitions: int) -> dict:
    """Median seconds and peak extra bytes of forward + backward, float32, for each of ``IMPLEMENTATIONS``."""
    spec = measure.find_spec("rel_attention_2d")
    shape = ",".join(f"{name}={value}" for name, value in SHAPE.items())
    inputs = spec.shape(shape).inputs(torch.float32)
    functions = {impl: measure.provider(spec, impl, inputs) for impl in IMPLEMENTATIONS}
    calls = [(inputs, torch.randn_like(inputs["value"]))]  # the output has the shape of the value
    passes = dict.fromkeys(IMPLEMENTATIONS, ("both",))
    times = measure.time_interleaved(functions, calls, passes=passes, seconds=0.0, least=repetitions)
    try:
        memory = {impl: measure.peak_extra_bytes(spec.name, shape, impl) for impl in IMPLEMENTATIONS}
    except RuntimeError as error:
        lines = str(error).split("\n")  # between the first and the last is the traceback of the process that measured
        raise TrainError(" ".join(dict.fromkeys((lines[0], *lines[-2:])))) from error
    return {
        "shape": SHAPE,
        "seconds": {impl: statistics.median(times[impl]["both"]) for impl in IMPLEMENTATIONS},
        "peak_bytes": memory,
    }


def table(comparison: dict) -> str:
    seconds, peak = comparison["seconds"], comparison["peak_bytes"]
    shape = ", ".join(f"{name}={value}" for name, value in comparison["shape"].items())
    lines = [f"rel_attention_2d, {shape}, float32, forward + backward", f"{'':16}{'time':>12}{'peak memory':>16}"]
    for impl, label in IMPLEMENTATIONS.items():
        lines.append(f"{label:16}{seconds[impl] * 1e3:9.1f} ms{peak[impl] / 2**20:12.1f} MiB")
    ratio_time, ratio_memory = seconds["reference"] / seconds["cpu"], peak["reference"] / max(peak["cpu"], 1)
    lines.append(f"{'ratio':16}{ratio_time:11.1f}x{ratio_memory:15.1f}x")
    return "\n".join(lines)


def plot(comparison: dict, path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 3), layout="constrained")
    bars = (("seconds", "time (ms)", 1e3), ("peak_bytes", "peak memory (MiB)", 2**-20))
    for axes, (key, title, factor) in zip(figure.subplots(1, 2), bars, strict=True):
        values = [comparison[key][impl] * factor for impl in IMPLEMENTATIONS]
        drawn = axes.bar(list(IMPLEMENTATIONS.values()), values, color=["tab:blue", "tab:gray"])
        axes.bar_label(drawn, fmt="%.0f", padding=2)
        axes.set(title=title, ylim=(0, 1.15 * max(values)))
    shape = ", ".join(f"{name}={value}" for name, value in comparison["shape"].items())
    figure.suptitle(f"rel_attention_2d forward + backward, float32\n{shape}", fontsize=10)
    figure.savefig(path, dpi=120)


def _next_folder(parent: Path) -> Path:
    number = 1
    while (folder := parent / f"demo-{number}").exists():
        number += 1
    return folder
