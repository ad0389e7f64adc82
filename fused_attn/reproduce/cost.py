"""What a training step of a row costs: time, and memory beyond weights, optimizer and images.

``python -m fused_attn.reproduce.cost REQUEST`` prints the memory of one step; it is what :func:`peak_of_step` starts in
a process of its own, whose allocator gives freed blocks back at once.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..bench import measure
from ..train import atomic
from ..train.config import TrainConfig
from ..train.environment import describe
from ..train.errors import TrainError, reason
from ..train.json_files import dumps, read_object
from ..train.results import read_metrics

#: The least number of steps that are timed.
LEAST = 5


def path_of(config: TrainConfig) -> Path:
    """The file of a row, next to the folders of its seeds."""
    return config.out.parent / "cost.json"


def write(config: TrainConfig, seconds: float) -> None:
    """Measure a training step of the finished run in ``config.out``, and write the row's cost.json.

    Raises:
        TrainError: there is no finished run.
    """
    metrics = read_metrics(config.out)
    channels, *size = metrics["image_shape"]
    settings = (config, (channels, size[0], size[1]), metrics["classes"], config.batch_size)
    measured = {**time_step(*settings, seconds), "peak_bytes": peak_of_step(*settings)}
    atomic.write_text(path_of(config), dumps({**measured, "environment": describe()}, indent=1) + "\n")


def read(config: TrainConfig) -> dict[str, Any] | None:
    """The row's cost.json, if it is there.

    Raises:
        TrainError: it is damaged.
    """
    path = path_of(config)
    if not path.exists():
        return None
    found = read_object(path, "rows")
    if missing := {"step_ms", "peak_bytes", "environment"} - found.keys():
        raise TrainError(f"rows: {path} is damaged: it lacks {', '.join(sorted(missing))}")
    return found


def time_step(
    config: TrainConfig, image: tuple[int, int, int], classes: int, batch_size: int, seconds: float
) -> dict[str, Any]:
    """Time training steps on images of noise: forward, loss, backward, optimizer.

    Args:
        config: of the run; its model, optimizer, memory format, precision and threads count.
        image: (C, H, W) of the images.
        classes: of the classifier.
        batch_size: images of a step.
        seconds: to time steps for; at least ``LEAST`` are timed, after one that is not.

    Returns:
        ``step_ms``, the median, ``batch_size`` and ``repetitions``.
    """
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    step = _step(config, image, classes, batch_size)
    step()
    times: list[float] = []
    end = time.perf_counter() + seconds
    while len(times) < LEAST or time.perf_counter() < end:
        start = time.perf_counter()
        step()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return {"step_ms": 1e3 * statistics.median(times), "batch_size": batch_size, "repetitions": len(times)}


def peak_of_step(config: TrainConfig, image: tuple[int, int, int], classes: int, batch_size: int) -> int:
    """The most bytes that a training step holds beyond weights, optimizer and images.

    Raises:
        TrainError: the memory could not be measured.
    """
    request = {"config": config.as_json() | {"threads": torch.get_num_threads()}, "image": image}
    request |= {"classes": classes, "batch_size": batch_size}
    if torch.cuda.is_available():
        return _peak(request)
    try:
        what = f"the memory of {config.model}"
        return measure.run_child("fused_attn.reproduce.cost", [dumps(request)], what)["bytes"]
    except RuntimeError as error:
        raise TrainError(reason(error)) from error


def _peak(request: dict[str, Any]) -> int:
    config = TrainConfig.from_json(request["config"])
    torch.set_num_threads(request["config"]["threads"])
    channels, height, width = request["image"]
    step = _step(config, (channels, height, width), request["classes"], request["batch_size"])
    step(2)  # momentum, libraries and threads are there
    if torch.cuda.is_available():
        return measure.peak_allocated(step)
    before = measure.trim()
    return max(0, measure.peak_resident(step) - before)


def _step(config: TrainConfig, image: tuple[int, int, int], classes: int, batch_size: int) -> Callable[..., None]:
    # What trains takes seconds to import, which a table that is only put together does without.
    from ..train.data import Dataset, Images
    from ..train.loop import build_network
    from ..train.optim import build_optimizers

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    nothing = Images(torch.zeros(1, *image, dtype=torch.uint8), torch.zeros(1).long())
    dataset = Dataset(nothing, nothing, classes, torch.zeros(image[0]), torch.ones(image[0]))
    torch.manual_seed(0)
    network = build_network(config, dataset).to(device).train()
    images, labels = torch.randn(batch_size, *image, device=device), torch.randint(classes, (batch_size,)).to(device)
    if config.channels_last:
        network.to(memory_format=torch.channels_last)
        images = images.contiguous(memory_format=torch.channels_last)
    optimizers = build_optimizers(config, network).values()
    dtype = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[config.mixed_precision]

    def step(first: int | None = None) -> None:
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            outputs = network(images[:first])
        logits, auxiliary = outputs if isinstance(outputs, tuple) else (outputs, [])
        loss = _loss(logits, labels[:first])
        for weight, each in zip(config.aux_weights, auxiliary, strict=True):
            loss = loss + weight * _loss(each, labels[:first])
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()

    return step


def _loss(logits: Tensor, labels: Tensor) -> Tensor:
    return torch.nn.functional.cross_entropy(logits.float(), labels)


if __name__ == "__main__":
    print(dumps({"bytes": _peak(json.loads(sys.argv[1]))}))
