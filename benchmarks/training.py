"""Keeps a training run and its repetition on the reference implementation: results/training.md, logs and curves.

Run from the repository root after both runs (the README gives their command lines):
``python benchmarks/training.py runs/FUSED runs/REFERENCE``.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

from matplotlib.figure import Figure

from fused_attn.train.log import RunLog

RESULTS = Path(__file__).parent / "results"
KEPT = ("config.json", "log.csv", "log.jsonl", "curves.png", "metrics.json")


def keep(run: Path, name: str) -> Path:
    """Copy what is small of a run into the results."""
    folder = RESULTS / name
    folder.mkdir(parents=True, exist_ok=True)
    for file in KEPT:
        if (run / file).exists():
            shutil.copy(run / file, folder / file)
    return folder


def losses(folder: Path) -> dict[int, float]:
    return {event["step"]: event["loss"] for event in RunLog(folder).events("step")}


def main(fused_run: Path, reference_run: Path) -> None:
    fused, reference = keep(fused_run, "training"), keep(reference_run, "training_reference")
    metrics = json.loads((fused / "metrics.json").read_text())
    config, environment = metrics["config"], metrics["environment"]
    first, second = losses(fused), losses(reference)
    common = sorted(set(first) & set(second))
    differences = [abs(first[step] - second[step]) for step in common]

    figure = Figure(figsize=(7, 3.2), layout="constrained")
    axes = figure.subplots()
    axes.plot(common, [first[step] for step in common], lw=2.5, alpha=0.5, label=f"impl={config['impl']} (C++ kernel)")
    axes.plot(common, [second[step] for step in common], lw=1, label="impl=reference")
    axes.set(xlabel="step", ylabel="training loss", title=f"{config['model']}, same seed")
    axes.legend()
    axes.grid(alpha=0.3)
    figure.savefig(fused / "agreement.png", dpi=120)

    epochs = RunLog(fused).events("epoch")
    lines = [
        f"{config['model']} ({', '.join(config['model_options'])}), {metrics['parameters']:,} parameters, "
        f"{metrics['data']}, batch {config['batch_size']}, {config['threads']} thread(s) of {environment['cpu']}, "
        f"torch {environment['torch']}, {environment['date']}:",
        "",
        "| epoch | steps | minutes | train loss | train accuracy | test loss | test accuracy |",
        "| ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for event in epochs:
        lines.append(
            f"| {event['epoch']:g} | {event['step']:,} | {event['seconds'] / 60:.0f} | {event['train_loss']:.3f} "
            f"| {event['train_accuracy']:.1%} | {event['test_loss']:.3f} | {event['test_accuracy']:.1%} |"
        )
    lines += [
        "",
        f"The reference implementation, same seed, over the first {common[-1]} steps: the logged losses (every "
        f"{config['log_every']} steps) differ by {sum(differences) / len(differences):.2g} on average, "
        f"{max(differences):.2g} at most, and by {max(differences[:5]):.1g} at most in the first {common[4]} steps. "
        "[Curves](benchmarks/results/training/curves.png), [agreement](benchmarks/results/training/agreement.png).",
    ]
    (RESULTS / "training.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:3]))
