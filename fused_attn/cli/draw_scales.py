"""``fused-attn scales``: how much the gates of squeeze-excite differ between channels, in trained networks."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import tyro
from torch import Tensor, nn

from ..modules import SqueezeExcite
from ..options import check, make_folder
from ..train.atomic import write_text
from ..train.environment import describe
from ..train.errors import TrainError
from ..train.json_files import dumps

_BATCH = 32


@dataclass(frozen=True)
class ScalesConfig:
    """Standard deviation of the squeeze-excite gates over the channels, per layer and image: a table and a plot.

    Figure 6 of Ye, "Introduce the Result Into Self-Attention".
    """

    runs: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """Folders of finished ``fused-attn train`` runs, one curve and plot colour each."""
    out: Path
    """Folder for scales.png, scales.md and scales.json."""
    images: int = 128
    """Test images, drawn at random."""
    stage: int = 3
    """Stage whose layers the plot shows for every image; the table has all stages."""
    seed: int = 0
    """Seed of the choice of test images."""
    data_dir: Path | None = None
    """Local folder of the data set; the runs' own when not given."""

    def __post_init__(self) -> None:
        check("scales", type(self), vars(self), TrainError)
        if not self.runs:
            raise TrainError("runs must name at least one folder, got none")


def deviations(model: nn.Module, images: Tensor) -> dict[str, Tensor]:
    """Standard deviation over the channels of the gates of every :class:`SqueezeExcite` in a model.

    Args:
        model: put into evaluation mode.
        images: (B, in_chans, H, W), normalised as for the training.

    Returns:
        name of the layer -> (B,) standard deviations, in the order of ``model.named_modules()``.

    Raises:
        ValueError: the model has no such layer.
    """
    layers = {name: module for name, module in model.named_modules() if isinstance(module, SqueezeExcite)}
    if not layers:
        raise ValueError("model must have squeeze-excite layers, got none")
    found: dict[str, list[Tensor]] = defaultdict(list)

    def hook(name):
        def run(module, args, kwargs, out):
            result = kwargs.get("result", args[1] if len(args) > 1 else None)
            scales = module.scales(args[0], result, result_share=kwargs.get("result_share"))
            found[name].append(scales.float().std(dim=1, correction=0))

        return run

    handles = [module.register_forward_hook(hook(name), with_kwargs=True) for name, module in layers.items()]
    try:
        with torch.no_grad():
            model.eval()
            for batch in images.split(_BATCH):
                model(batch)
    finally:
        for handle in handles:
            handle.remove()
    return {name: torch.cat(found[name]) for name in layers}


def run(config: ScalesConfig) -> int:
    """Measure all runs, and write table, plot and numbers."""
    names = [folder.name for folder in config.runs]
    if len(set(names)) < len(names):
        raise TrainError(f"runs must have different names, got {', '.join(names)}")
    make_folder(config.out, TrainError)
    measured = {folder.name: of_run(folder, config) for folder in config.runs}
    layers = {layer for each in measured.values() for layer in each}
    if not any(layer.startswith(_prefix(config.stage)) for layer in layers):
        raise TrainError(f"stage must be one with squeeze-excite layers in these networks, got {config.stage}")
    rows = [
        {"run": name, "layer": layer, "mean": values.mean().item(), "deviations": values.tolist()}
        for name, layers in measured.items()
        for layer, values in layers.items()
    ]
    result = {"images": config.images, "seed": config.seed, "environment": describe(), "rows": rows}
    write_text(config.out / "scales.json", dumps(result, indent=1) + "\n")
    table = markdown(rows)
    write_text(config.out / "scales.md", table)
    plot(measured, config.stage, config.out / "scales.png")
    print(table, end="")
    return 0


def of_run(folder: Path, config: ScalesConfig) -> dict[str, Tensor]:
    """Layer -> (images,) deviations of the network in the folder of a finished run, as :func:`deviations` gives them.

    Raises:
        TrainError: there is no finished run, or its data or network do not do.
    """
    from ..train import augment, data, weights
    from ..train.config import saved_config
    from ..train.loop import build_network

    changes = {} if config.data_dir is None else {"data_dir": config.data_dir}
    # The run may have been on another machine.
    trained = saved_config(folder, "runs must be folders of finished runs, got " + str(folder), impl="auto", **changes)
    file = weights.file_of(folder, "runs", finished=True)
    dataset = data.of_run(trained)
    if config.images > len(dataset.test):
        raise TrainError(f"images must be at most the {len(dataset.test)} of the test set, got {config.images}")
    network = build_network(trained, dataset)
    weights.load(network, weights.read(file, "runs"), file, "runs")
    order = torch.randperm(len(dataset.test), generator=torch.Generator().manual_seed(config.seed))
    (chosen,) = data.in_memory([dataset.test[order[: config.images]]])
    if not len(chosen):
        raise TrainError(f"images: none of the {config.images} that were drawn could be read")
    _, normalize = augment.build(trained, dataset)
    try:
        return deviations(network, normalize(chosen.images.float() / 255.0))
    except ValueError as error:
        raise TrainError(f"model {trained.model}: {error}") from error


def _prefix(stage: int) -> str:
    """What the names of a stage's layers begin with."""
    return f"stages.{stage - 1}."


def markdown(rows: list[dict]) -> str:
    """Mean, lowest and highest deviation of every layer."""
    lines = ["| run | layer | mean | lowest | highest |", "| --- | --- | ---: | ---: | ---: |"]
    for row in rows:
        values = row["deviations"]
        lines.append(f"| {row['run']} | {row['layer']} | {row['mean']:.4f} | {min(values):.4f} | {max(values):.4f} |")
    return "\n".join(lines) + "\n"


def plot(measured: dict[str, dict[str, Tensor]], stage: int, path: Path) -> None:
    """Left: deviation of every image in the layers of one stage; right: mean deviation of every layer."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 4), layout="constrained")
    images, means = figure.subplots(1, 2)
    for index, (name, layers) in enumerate(measured.items()):
        color = f"C{index}"
        chosen = [values for layer, values in layers.items() if layer.startswith(_prefix(stage))]
        for count, values in enumerate(chosen):
            images.plot(values.tolist(), color=color, lw=0.8, alpha=0.7, label=None if count else name)
        means.plot([values.mean().item() for values in layers.values()], "o-", color=color, ms=3, label=name)
    longest = max(measured.values(), key=len)
    means.set_xticks(range(len(longest)), [layer.removesuffix(".se") for layer in longest], rotation=90, fontsize=7)
    images.set(title=f"layers of stage {stage}", xlabel="image", ylabel="standard deviation of the gates")
    means.set(title="mean over the images", xlabel="layer")
    for axes in (images, means):
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
        if axes.get_legend_handles_labels()[0]:
            axes.legend()
    figure.savefig(path, dpi=120, format="png")
