"""``fused-attn inspect``: what the attention layers of a network make of one image."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import torch
import tyro
from torch import Tensor, nn

from ..modules import ElementwiseAttentionBlock
from ..options import check, check_folder
from ..train import augment, data, weights
from ..train.config import TrainConfig, saved_config
from ..train.data import Dataset
from ..train.errors import TrainError
from . import draw_attention, draw_elementwise


def run(
    source: Annotated[str, tyro.conf.Positional],
    /,
    image: int | None = None,
    file: Path | None = None,
    point: tuple[float, ...] = (0.5, 0.5),
    head: int | None = None,
    checkpoint: Path | None = None,
    dataset: str | None = None,
    data_dir: Path | None = None,
    out: Path | None = None,
    overwrite: bool = False,
) -> int:
    """Draw, layer by layer, what attention makes of one image.  Of attention over positions (AA-WRN, Swin, CoAtNet):
    for one point of the image the weights with which every head looks at the others.  Of element-wise attention: the
    weights and their softmaxes, and the output before and after the convolution, after the skip and after the ReLU.

    Args:
        source: Folder of a run, or name of a model, which is then drawn with fresh weights and statistics.
        image: Which image of the test set, counted from 0; the first when not given.
        file: An image file instead, cut in its middle and resized to what the network takes.
        point: y and x of the point, from 0 0, the upper left corner, to 1 1.
        head: Which attention head, counted from 0; all of them, or the first of element-wise attention, when not given.
        checkpoint: Weights of a model, a .safetensors file, trained on normalised images.  A run has its own.
        dataset: Data set of a model; digits when not given.  A run has its own.
        data_dir: Local folder of the data set; the run's own when not given.
        out: The picture, a PNG file; inspect.png in the folder of the run, or MODEL.png, when not given.
        overwrite: Replace the picture where there is one.
    """
    check("inspect", run, locals(), TrainError)
    if len(point) != 2:
        raise TrainError(f"point must be two numbers, y and x, got {point}")
    if image is not None and file is not None:
        raise TrainError(f"image is of the test set and must not be given with file={file}, got {image}")
    folder = Path(source)
    if folder.is_dir():
        for name, value in (("dataset", dataset), ("checkpoint", checkpoint)):
            if value is not None:
                text = f"{name} belongs to a model without a run; that of {folder} has its own, got {str(value)!r}"
                raise TrainError(text)
        changes = {} if data_dir is None else {"data_dir": data_dir}
        # The run may have been on another machine.
        config = saved_config(
            folder, f"source must hold a run, with its config.json, got {folder}", impl="auto", **changes
        )
        path = out or folder / "inspect.png"
    elif "/" in source:
        raise TrainError(f"source must be the folder of a run or the name of a model, got {source!r}: no such folder")
    else:
        if checkpoint is not None and checkpoint.is_dir():
            raise TrainError(f"checkpoint must be a .safetensors file, got the folder {checkpoint}: a run is a source")
        config = TrainConfig(
            source,
            "digits" if dataset is None else dataset,
            out=Path(),
            data_dir=data_dir,
            normalize=checkpoint is not None,
        )
        path = out or Path(f"{source}.png")
    if not path.parent.is_dir() or path.is_dir():
        raise TrainError(f"out must be a file in a folder that exists, got {path}")
    if path.exists() and not overwrite:
        raise TrainError(f"out must be a new file, got {path}, which --overwrite replaces")
    check_folder(path.parent, TrainError)

    trained = (folder, "source") if folder.is_dir() else (checkpoint, "checkpoint") if checkpoint is not None else None
    _draw(config, trained, path, image or 0, file, (point[0], point[1]), head)
    print(path)
    return 0


def draw_run(folder: Path, path: Path, image: int = 0, head: int = 0) -> None:
    """Draw a test image in the trained network of a run, as ``fused-attn inspect`` does, into a PNG file.

    Raises:
        TrainError: the folder holds no run, or its data or network do not do.
    """
    config = saved_config(folder, f"source must hold a run, with its config.json, got {folder}", impl="auto")
    _draw(config, (folder, "source"), path, image, None, (0.5, 0.5), head)


def _draw(
    config: TrainConfig,
    trained: tuple[Path, str] | None,
    path: Path,
    image: int,
    file: Path | None,
    point: tuple[float, float],
    head: int | None,
) -> None:
    """``trained``: the run or file of the weights, and the option that named it."""
    from ..train.loop import build_network

    loaded = data.of_run(config)
    torch.manual_seed(config.seed)
    network = build_network(config, loaded).eval()
    if trained is not None:
        place = weights.file_of(*trained)
        weights.load(network, weights.read(place, trained[1]), place, trained[1])
    if file is None:
        pixels, label = _test_image(loaded, image)
        shown = f"{config.data_note or config.dataset}, test image {image}"
    else:
        pixels, label, shown = draw_attention.read_image(file, loaded.in_chans, loaded.image_size), None, file.name
    truth = "" if label is None else f"class {label}, "
    evaluation = augment.build(config, loaded)[1]
    with torch.no_grad():
        pixels = pixels.float() / 255.0
        try:
            _draw_layers(
                network, evaluation[0](pixels), evaluation(pixels), point, head, path, f"{config.model}, {shown}", truth
            )
        except ValueError as error:
            raise TrainError(f"model {config.model}: {error}") from error


def _test_image(loaded: Dataset, image: int) -> tuple[Tensor, int]:
    """(1, C, H, W), and its class."""
    if not 0 <= image < len(loaded.test):
        raise TrainError(f"image must be from 0 to {len(loaded.test) - 1}, the test set's last, got {image}")
    (one,) = data.in_memory([loaded.test[image : image + 1]])
    if not len(one):
        raise TrainError(f"image {image} of the test set could not be read")
    return one.images, int(one.labels)


def _draw_layers(
    network: nn.Module, seen: Tensor, pixels: Tensor, point: tuple[float, float], head: int | None, path: Path,
    title: str, truth: str,
) -> None:  # fmt: skip
    """``seen`` is the image as it is shown, ``pixels`` what the network takes."""
    if any(isinstance(module, ElementwiseAttentionBlock) for module in network.modules()):
        head = head or 0
        panels, logits = draw_elementwise.trace(network, pixels, head)
        title += f", head {head}: {truth}predicted {int(logits.argmax())}"
        return draw_elementwise.draw(panels, path, title)
    layers, logits = draw_attention.trace(network, pixels, point)
    title += f", point {point[0]:g} {point[1]:g}: {truth}predicted {int(logits.argmax())}"
    return draw_attention.draw(layers, seen, path, title, head)
