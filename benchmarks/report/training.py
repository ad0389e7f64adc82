"""Keeps training runs that belong together: logs, curves, and a table of them, results/NAME.md.

Run from the repository root (the README gives the runs' command lines):
``python benchmarks/report/training.py NAME RUN [RUN ...] [--reference RUN]``.  The reference is the first run, or its
first steps, repeated with ``--impl reference``.  results/NAME/paper.json, written by hand, adds what a paper reports.
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from fused_attn.train.log import RunLog

RESULTS = Path(__file__).parents[1] / "results"
KEPT = ("config.json", "log.csv", "log.jsonl", "curves.png", "metrics.json")


def keep(run: Path, folder: Path) -> Path:
    """Copy what is small of a run into the results."""
    folder.mkdir(parents=True, exist_ok=True)
    for file in KEPT:
        if (run / file).exists() and run.resolve() != folder.resolve():
            shutil.copy(run / file, folder / file)
    return folder


def metrics(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "metrics.json").read_text())


def title(folder: Path) -> str:
    config = metrics(folder)["config"]
    return " ".join([config["model"], *config["model_options"]])


def losses(folder: Path) -> dict[int, float]:
    return {event["step"]: event["loss"] for event in RunLog(folder).events("step") if event["loss"] is not None}


def head(folder: Path) -> str:
    found = metrics(folder)
    config, environment = found["config"], found["environment"]
    return (
        f"{found['data']}, batch {config['batch_size']}, {config['threads']} thread(s) of {environment['cpu']}, "
        f"torch {environment['torch']}, {environment['date']}"
    )


def numbers(event: dict[str, Any]) -> str:
    """Cells of a table; a loss that is null was not finite."""
    formats = {"train_loss": ".3f", "train_accuracy": ".1%", "test_loss": ".3f", "test_accuracy": ".1%"}
    return " | ".join("-" if event[name] is None else f"{event[name]:{each}}" for name, each in formats.items()) + " |"


def epochs_table(folder: Path) -> list[str]:
    """One run, epoch by epoch."""
    lines = [
        f"{title(folder)}, {metrics(folder)['parameters']:,} parameters, {head(folder)}:",
        "",
        "| epoch | steps | minutes | train loss | train accuracy | test loss | test accuracy |",
        "| ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for event in RunLog(folder).events("epoch"):
        lines.append(f"| {event['epoch']:g} | {event['step']:,} | {event['seconds'] / 60:.0f} | {numbers(event)}")
    return lines


def runs_table(folders: Sequence[Path], paper: dict[str, Any]) -> list[str]:
    """Several runs, each after its last epoch, beside what the paper reports of the network."""
    heading = "| network | parameters | epochs | minutes | train loss | train accuracy | test loss | test accuracy |"
    more = " loss in the paper | accuracy in the paper |" if paper else ""
    columns = (heading + more).count("|") - 2
    lines = [f"{head(folders[0])}:", "", heading + more, "| --- |" + " ---: |" * columns]
    for folder in folders:
        found = metrics(folder)
        line = (
            f"| {title(folder)} | {found['parameters']:,} | {found['epochs']:g} | {found['seconds'] / 60:.1f} "
            f"| {numbers(found)}"
        )
        if paper:
            line += " {} | {} |".format(*paper["reported"].get(title(folder), ("-", "-")))
        lines.append(line)
    return [*lines, *(["", paper["note"]] if paper else [])]


def plot_runs(folders: Sequence[Path], to: Path) -> None:
    figure = Figure(figsize=(9, 3.4), layout="constrained")
    loss, accuracy = figure.subplots(1, 2)
    for folder in folders:
        events = RunLog(folder).events("epoch")
        epochs = [event["epoch"] for event in events]
        (line,) = loss.plot(epochs, [event["test_loss"] for event in events], label=title(folder))
        loss.plot(epochs, [event["train_loss"] for event in events], color=line.get_color(), lw=1, ls="--")
        accuracy.plot(epochs, [100 * event["test_accuracy"] for event in events], color=line.get_color())
    loss.set(xlabel="epoch", ylabel="loss (dashed: training)")
    accuracy.set(xlabel="epoch", ylabel="test accuracy, %")
    for axes in (loss, accuracy):
        axes.grid(alpha=0.3)
    figure.legend(*loss.get_legend_handles_labels(), loc="outside right center", fontsize="small")
    figure.savefig(to, dpi=120)


def plot_agreement(fused: Path, reference: Path, to: Path) -> str:
    """How far the losses of a run and of its repetition are apart, as a picture and in words."""
    first, second = losses(fused), losses(reference)
    common = sorted(set(first) & set(second))
    differences = [abs(first[step] - second[step]) for step in common]
    figure = Figure(figsize=(7, 3.2), layout="constrained")
    axes = figure.subplots()
    axes.plot(common, [first[step] for step in common], lw=2.5, alpha=0.5, label="C++ kernel")
    axes.plot(common, [second[step] for step in common], lw=1, label="impl=reference")
    axes.set(xlabel="step", ylabel="training loss", title=f"{title(fused)}, same seed")
    axes.legend()
    axes.grid(alpha=0.3)
    figure.savefig(to, dpi=120)
    every, fifth = metrics(fused)["config"]["log_every"], common[min(4, len(common) - 1)]
    return (
        f"{title(fused)} on the reference implementation, same seed, over the first {common[-1]} steps: the logged "
        f"losses (every {every} steps) differ by {sum(differences) / len(differences):.2g} on average, "
        f"{max(differences):.2g} at most, and by {max(differences[:5]):.1g} at most in the first {fifth} steps."
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name")
    parser.add_argument("runs", type=Path, nargs="+")
    parser.add_argument("--reference", type=Path)
    options = parser.parse_args()
    results, link = RESULTS / options.name, options.name
    folders = [keep(run, results / run.name) for run in options.runs]
    paper = results / "paper.json"
    reported = json.loads(paper.read_text()) if paper.exists() else {}
    lines = epochs_table(folders[0]) if len(folders) == 1 else runs_table(folders, reported)
    words, pictures = [], []
    if len(folders) == 1:
        pictures.append(f"[Curves]({link}/{folders[0].name}/curves.png)")
    else:
        plot_runs(folders, results / "curves.png")
        pictures.append(f"[Curves]({link}/curves.png)")
    if options.reference:
        reference = keep(options.reference, results / "reference")
        words.append(plot_agreement(folders[0], reference, results / "agreement.png"))
        pictures.append(f"[agreement]({link}/agreement.png)")
    text = "\n".join([*lines, "", " ".join([*words, ", ".join(pictures) + "."])]) + "\n"
    (RESULTS / f"{options.name}.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
