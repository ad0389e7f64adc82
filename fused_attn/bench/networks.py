"""``fused-attn bench networks``: training steps of attention-augmented Wide ResNets by coverage, fused and reference.

``python -m fused_attn.bench.networks CONFIG`` prints the memory of one network; it is what the benchmark starts in a
process of its own for each on the CPU.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from ..models import create_model
from ..options import check, make_folder
from ..testing.numerics import mismatches
from ..train.atomic import write_text
from ..train.environment import describe
from ..train.json_files import dumps
from . import BenchError, measure
from .rows import machine
from .runner import DTYPES, PEER_FACTOR

MIB = 2**20
IMAGE_SIZE, NUM_CLASSES = 32, 100
#: what the table calls it -> attention_stages, attention_blocks; the second is all that the replication could fit
COVERAGES: dict[str, tuple[tuple[int, ...], str]] = {
    "none": ((), "all"),
    "stage 3, first block": ((3,), "first"),
    "stage 3, all blocks": ((3,), "all"),
    "stage 2, all blocks": ((2,), "all"),
    "stage 1, all blocks": ((1,), "all"),
    "all stages, all blocks": ((1, 2, 3), "all"),
}
IMPLEMENTATIONS = {"auto": "fused", "reference": "reference"}


@dataclass(frozen=True)
class NetworksConfig:
    """Measure training steps of a Wide ResNet at each attention coverage, with the fused op and with the reference."""

    model: str | None = None
    """an aa_wrn model; aa_wrn_16_2 on the CPU and aa_wrn_28_10 on a GPU when not given"""
    batch_size: int | None = None
    """images in a step; 8 on the CPU and 128 on a GPU when not given"""
    coverage: tuple[str, ...] = tuple(COVERAGES)
    """blocks with attention: rows of the table"""
    dtype: Literal["fp32", "bf16", "fp16"] = "fp32"
    """dtype of the convolutions and the attention, by autocast; weights are in float32"""
    device: Literal["cpu", "cuda"] = "cpu"
    """where to run"""
    threads: int | None = None
    """CPU threads of PyTorch; its own choice when not given"""
    seconds: float = 60.0
    """seconds to time all networks for, together; each has at least three steps, however long they take"""
    out: Path | None = None
    """folder for networks.json, networks.md and networks.png; with device and dtype in the name where they are not CPU
    and fp32"""

    def __post_init__(self) -> None:
        check("bench networks", type(self), vars(self), BenchError)


class TrainingStep:
    """A network with its optimizer and a batch; calling it does one step: forward, loss, backward, SGD with momentum.

    Weights and images are the same for every implementation.
    """

    def __init__(self, config: NetworksConfig, coverage: str, impl: str, batch_size: int) -> None:
        stages, blocks = COVERAGES[coverage]
        torch.manual_seed(0)
        self.device, self.dtype = config.device, DTYPES[config.dtype]
        network = create_model(
            config.model,
            num_classes=NUM_CLASSES,
            image_size=IMAGE_SIZE,
            impl=impl,
            attention_stages=stages,
            attention_blocks=blocks,
        )
        self.network = network.to(self.device, memory_format=torch.channels_last)
        images = torch.randn(batch_size, 3, IMAGE_SIZE, IMAGE_SIZE)
        self.images = images.to(self.device, memory_format=torch.channels_last)
        self.labels = torch.randint(NUM_CLASSES, (batch_size,)).to(self.device)
        self.optimizer = torch.optim.SGD(self.network.parameters(), lr=0.01, momentum=0.9, weight_decay=5e-4)

    def loss(self, images: int | None = None) -> Tensor:
        """Loss on the first ``images`` images of the batch."""
        with torch.autocast(self.device, self.dtype, enabled=self.dtype in (torch.bfloat16, torch.float16)):
            return F.cross_entropy(self.network(self.images[:images]), self.labels[:images])

    def __call__(self, images: int | None = None) -> None:
        self.loss(images).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def results(self) -> dict[str, Tensor]:
        """Loss and all gradients."""
        loss = self.loss()
        gradients = torch.autograd.grad(loss, list(self.network.parameters()))
        return {"out": loss.detach()[None], "gradients": torch.cat([gradient.flatten() for gradient in gradients])}


def errors(config: NetworksConfig, coverage: str) -> list[str]:
    """How loss and gradients of two images, with the fused op, miss the bar against the reference in float64."""
    fused, reference, oracle = (
        TrainingStep(config, coverage, impl, batch_size=2) for impl in ("auto", "reference", "reference")
    )
    oracle.dtype, oracle.network, oracle.images = torch.float64, oracle.network.double(), oracle.images.double()
    # Roundings flip ReLUs, whose effect on a gradient is not the op's: the bar is that of a peer.
    return mismatches(fused.results(), reference.results(), oracle.results(), PEER_FACTOR)


def peak_memory(config: NetworksConfig, coverage: str, impl: str) -> int:
    """Most bytes held in one step beyond weights, momentum and images; on the CPU, for a process of its own."""
    step = TrainingStep(config, coverage, impl, config.batch_size)
    step(images=2)  # momentum, libraries and threads are there
    if config.device == "cuda":
        return measure.peak_allocated(step)
    before = measure.trim()
    return max(0, measure.peak_resident(step) - before)


def run(config: NetworksConfig) -> int:
    """Measure, show and write; returns the exit status: 0, 1 (the fused op is wrong in a network) or 130 (interrupted).

    Raises:
        BenchError: a setting cannot be measured.
    """
    config = _complete(config)
    if config.out is not None:
        make_folder(config.out, BenchError)
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    # Without attention there is nothing to fuse.
    cases = [
        (name, impl) for name in config.coverage for impl in IMPLEMENTATIONS if impl == "auto" or COVERAGES[name][0]
    ]
    measured = _Networks(config, cases)
    status = 0
    # Each network is built, checked, timed and its memory measured.
    with tqdm(
        total=3 * len(cases), bar_format="{l_bar}{bar}| {elapsed} {postfix}", mininterval=0.5, leave=False
    ) as bar:
        try:
            measured.run(bar)
        except KeyboardInterrupt:
            print("fused-attn: interrupted; what was measured is kept", file=sys.stderr)
            status = 130
    report = measured.report(interrupted=status != 0)
    if config.out is not None:
        write(report, config.out)
        render(report, config.out)
    print(markdown(report), end="")
    return status or int(any(row["status"] == "wrong" for row in report["rows"]))


class _Networks:
    """The cases, as far as they have been measured."""

    def __init__(self, config: NetworksConfig, cases: Sequence[tuple[str, str]]) -> None:
        self.config, self.cases = config, cases
        self.refused: dict[tuple[str, str], tuple[str, str]] = {}
        self.parameters: dict[str, int] = {}
        self.times: dict[tuple[str, str], dict[str, list[float]]] = {}
        self.memory: dict[tuple[str, str], int] = {}

    def run(self, bar: tqdm) -> None:
        clock, steps = measure.Clock(torch.device(self.config.device)), {}
        for case in self.cases:
            bar.set_postfix_str(f"check of {_title(case)}")
            if self._checked(case):
                steps[case] = TrainingStep(self.config, *case, self.config.batch_size)
                self.parameters[case[0]] = sum(parameter.numel() for parameter in steps[case].network.parameters())
            bar.update(1)
        for case in list(steps):
            bar.set_postfix_str(f"first step of {_title(case)}")
            try:
                steps[case]()
            except torch.OutOfMemoryError:
                self.refused[case] = ("not run", "out of memory")
                del steps[case]

        def turn(step: TrainingStep) -> Callable[[int], dict[str, float]]:
            def timed(number: int) -> dict[str, float]:
                start = clock.start()
                step()
                return {"step": clock.seconds(start, clock.mark())}

            return timed

        done = 0.0

        def on_round(part: float) -> None:
            nonlocal done
            bar.set_postfix_str("timing")
            bar.update((part - done) * len(self.cases))
            done = part

        turns = {case: turn(step) for case, step in steps.items()}
        measure.interleave(turns, seconds=self.config.seconds, least=3, warmup=1, into=self.times, on_round=on_round)
        del turns, steps
        self._write()
        for case in self.cases:
            bar.set_postfix_str(f"memory of {_title(case)}")
            if case not in self.refused:
                self._measure_memory(case)
            bar.update(1)

    def _checked(self, case: tuple[str, str]) -> bool:
        coverage, impl = case
        if impl == "auto" and COVERAGES[coverage][0]:
            wrong = errors(self.config, coverage)
            if wrong:
                self.refused[case] = ("wrong", "; ".join(wrong))
        return case not in self.refused

    def _measure_memory(self, case: tuple[str, str]) -> None:
        if self.config.device == "cuda":
            with suppress(torch.OutOfMemoryError):  # what was timed stays
                self.memory[case] = peak_memory(self.config, *case)
            return
        settings = asdict(self.config) | {"out": None, "threads": torch.get_num_threads()}
        arguments = [dumps({"config": settings, "case": case})]
        what = f"the memory of {self.config.model} with attention in {_title(case)}"
        try:
            self.memory[case] = measure.run_child("fused_attn.bench.networks", arguments, what)["bytes"]
        except RuntimeError as error:
            print(f"fused-attn: {error}", file=sys.stderr)

    def _write(self) -> None:
        if self.config.out is not None:
            write(self.report(interrupted=True), self.config.out)

    def report(self, interrupted: bool) -> dict[str, Any]:
        rows = []
        for case in self.cases:
            status, reason = self.refused.get(case, ("ok", None))
            row = {"coverage": case[0], "impl": IMPLEMENTATIONS[case[1]], "status": status, "reason": reason}
            row |= {"parameters": self.parameters.get(case[0]), "peak_bytes": self.memory.get(case)}
            seconds = self.times.get(case, {}).get("step", [])
            if seconds:
                quantiles = torch.tensor(seconds).double().quantile(torch.tensor([0.2, 0.5, 0.8]).double()).tolist()
                row |= {key: 1e3 * value for key, value in zip(("p20_ms", "p50_ms", "p80_ms"), quantiles, strict=True)}
                row |= {"repetitions": len(seconds), "images_per_second": self.config.batch_size / quantiles[1]}
            if seconds or row["peak_bytes"] is not None or status != "ok":
                rows.append(row)
        settings = {key: getattr(self.config, key) for key in ("model", "batch_size", "dtype", "device")}
        return {**settings, "interrupted": interrupted, "environment": describe(), "rows": rows}


def _title(case: tuple[str, str]) -> str:
    return f"{case[0]} ({IMPLEMENTATIONS[case[1]]})"


def _complete(config: NetworksConfig) -> NetworksConfig:
    """The settings with this device's defaults.

    Raises:
        BenchError: a setting is out of range.
    """
    on_gpu = config.device == "cuda"
    if on_gpu and not torch.cuda.is_available():
        raise BenchError("device cuda: PyTorch finds no GPU on this machine")
    for name in config.coverage or [""]:
        if name not in COVERAGES:
            raise BenchError(f"coverage must be some of {', '.join(map(repr, COVERAGES))}, got {name!r}")
    config = replace(
        config,
        model=("aa_wrn_28_10" if on_gpu else "aa_wrn_16_2") if config.model is None else config.model,
        batch_size=(128 if on_gpu else 8) if config.batch_size is None else config.batch_size,
    )
    if not config.model.startswith("aa_wrn_"):
        raise BenchError(f"model must be an aa_wrn model, got {config.model!r}")
    try:
        with torch.device("meta"):
            create_model(config.model)
    except ValueError as error:
        raise BenchError(f"model {config.model}: {error}") from None
    return config


# --- results ----------------------------------------------------------------------------------------------------


def _stem(report: dict[str, Any]) -> str:
    usual = (report["device"], report["dtype"]) == ("cpu", "fp32")
    return "networks" if usual else f"networks_{report['device']}_{report['dtype']}"


def write(report: dict[str, Any], folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / f"{_stem(report)}.json", dumps(report, indent=1) + "\n")


def render(report: dict[str, Any], folder: Path) -> None:
    """Write Markdown and a picture; they hold nothing that the JSON does not."""
    write_text(folder / f"{_stem(report)}.md", markdown(report))
    plot(report, folder / f"{_stem(report)}.png")


def markdown(report: dict[str, Any]) -> str:
    """The table of the README."""
    plain = next((row for row in report["rows"] if row["coverage"] == "none"), {})
    lines = [
        f"{report['model']}, batch {report['batch_size']}, {report['dtype']}; {machine(report)}.  One training step: "
        "median milliseconds [20th, 80th percentile], memory beyond weights, momentum and images, and their "
        "multiples of the plain network's.",
        "",
        "| attention in | implementation | step, ms | of plain | images/s | peak extra memory, MiB | of plain |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for row in report["rows"]:
        cells = ["-"] * 5
        if row.get("p50_ms"):
            cells[0] = "{:,.0f} [{:,.0f}, {:,.0f}]".format(*(row[key] for key in ("p50_ms", "p20_ms", "p80_ms")))
            cells[2] = f"{row['images_per_second']:,.1f}"
            if plain.get("p50_ms"):
                cells[1] = f"{row['p50_ms'] / plain['p50_ms']:.2f}x"
        if row["peak_bytes"] is not None:
            cells[3] = f"{row['peak_bytes'] / MIB:,.0f}"
            if plain.get("peak_bytes"):
                cells[4] = f"{row['peak_bytes'] / plain['peak_bytes']:.2f}x"
        if row["status"] != "ok":
            cells[0] = f"{row['status']}: {row['reason']}"
        impl = "-" if row["coverage"] == "none" else "**fused**" if row["impl"] == "fused" else row["impl"]
        lines.append(f"| {row['coverage']} | {impl} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def plot(report: dict[str, Any], path: Path) -> None:
    """Bars of step time and memory by coverage."""
    from matplotlib.figure import Figure

    from .plots import FUSED, PEERS

    panels = (("step, ms", "p50_ms", 1.0), ("peak extra memory, MiB", "peak_bytes", 1 / MIB))
    panels = [panel for panel in panels if any(row.get(panel[1]) for row in report["rows"])]
    if not panels:
        return
    coverages = list(dict.fromkeys(row["coverage"] for row in report["rows"]))
    figure = Figure(figsize=(5.5 * len(panels) + 1.5, 0.55 * len(coverages) + 1.6), layout="constrained")
    for axes, (title, key, factor) in zip(
        figure.subplots(1, len(panels), squeeze=False, sharey=True)[0], panels, strict=True
    ):
        largest = max(row[key] * factor for row in report["rows"] if row.get(key))
        for row in report["rows"]:
            if not row.get(key):
                continue
            plain, fused = row["coverage"] == "none", row["impl"] == "fused"
            place = coverages.index(row["coverage"]) + (0 if plain else -0.2 if fused else 0.2)
            color, label = (
                (PEERS[-2], "no attention") if plain else (FUSED, "fused") if fused else (PEERS[0], "reference")
            )
            axes.barh(place, row[key] * factor, 0.38, color=color, label=label)
            axes.text(row[key] * factor, place, f" {row[key] * factor:,.0f}", va="center", fontsize=8)
        axes.set_yticks(range(len(coverages)), coverages, fontsize=9)
        axes.set(title=title, xlim=(0, 1.15 * largest))
        axes.spines[["top", "right"]].set_visible(False)
    handles = dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
    axes.invert_yaxis()
    figure.legend(list(handles.values()), list(handles), loc="outside lower center", ncols=3, fontsize=9)
    figure.suptitle(
        f"training step of {report['model']}, batch {report['batch_size']}, {report['dtype']}; {machine(report)}",
        fontsize=9,
    )
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    request = json.loads(sys.argv[1])
    torch.set_num_threads(request["config"]["threads"])
    settings = {name: tuple(value) if isinstance(value, list) else value for name, value in request["config"].items()}
    print(dumps({"bytes": peak_memory(NetworksConfig(**settings), *request["case"])}))
