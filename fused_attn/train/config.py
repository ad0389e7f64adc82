"""Settings of a run: one flat dataclass, which tyro turns into the options of ``fused-attn train``."""

from __future__ import annotations

import ast
import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from .errors import TrainError

#: Settings that may change between the start of a run and its resumption: they do not change what is computed.
MAY_CHANGE = ("out", "resume", "data_dir", "data_note", "log_every", "checkpoint_every", "eval_batch_size", "threads")


@dataclass(frozen=True)
class TrainConfig:
    """Train a model on images and write its log, curves, checkpoints and final metrics into a folder."""

    model: str
    """Name of a model (``fused-attn info`` lists them)."""
    dataset: str
    """digits, cifar10, cifar100, fashion_mnist, synthetic, imagefolder, or owner/name of a data set on the hub."""
    out: Path
    """Folder of the run; it must not exist or be empty, unless ``--resume``."""

    resume: bool = False
    """Go on from the last checkpoint in ``out``."""
    recipe: str | None = None
    """Start from the settings of a paper; every other option overrides it."""
    data_dir: Path | None = None
    """Local folder of the data set in the hub's Parquet layout (imagefolder: train/CLASS/FILE and val/CLASS/FILE);
    otherwise it is loaded from the hub by name."""
    data_note: str = ""
    """What to call the data in the metrics, where the name alone would mislead."""
    image_size: int | None = None
    """Resize images to this height and width; the data set's own size (digits: 32, imagefolder: 224) when not given.
    Images from files are resized to 8/7 of it and cropped."""
    validation: int = 0
    """Training images held out, the same ones for every seed; the test set is then read once, at the end."""
    train_images: int | None = None
    """Use only the first so many training images."""

    model_options: Annotated[tuple[str, ...], tyro.conf.arg(metavar="KEY=VALUE ...")] = ()
    """Further arguments of the model, e.g. attention_blocks=first relative=False."""
    impl: Literal["auto", "reference", "cpu", "triton", "cuda"] = "auto"
    """Implementation of the attention ops."""

    epochs: int = 200
    """Passes over the training images."""
    max_steps: int | None = None
    """Stop after so many optimizer steps."""
    batch_size: int = 128
    """Images to an optimizer step, over all processes and accumulation steps."""
    accumulate: int = 1
    """Forward and backward passes to an optimizer step."""
    eval_batch_size: int = 250
    """Images to a forward pass in evaluation, per process."""

    optimizer: Literal["sgd", "adam"] = "sgd"
    """SGD with momentum, or Adam."""
    lr: float = 0.1
    """Learning rate at its highest."""
    momentum: float = 0.9
    """Of SGD."""
    nesterov: bool = True
    """Nesterov's form of the momentum."""
    weight_decay: float = 5e-4
    """L2 penalty, on every parameter."""
    schedule: Literal["constant", "step", "cosine"] = "cosine"
    """step: multiply by ``gamma`` at every milestone.  cosine: to 0 at the end of the run."""
    milestones: tuple[int, ...] = (60, 120, 160)
    """Epochs of the step schedule."""
    gamma: float = 0.2
    """Factor of the step schedule."""
    warmup_epochs: float = 0.0
    """Linear warm-up from 0, before any schedule."""
    label_smoothing: float = 0.0
    """Of the cross-entropy."""
    aux_weights: tuple[float, ...] = ()
    """Weight of each auxiliary classifier's loss, added to the main loss, in the order of the model's stages."""
    ema: float = 0.0
    """Decay of an exponential moving average of the weights, which is then what is evaluated; 0: none."""
    clip_norm: float | None = None
    """Largest norm of the gradient."""

    crop_padding: int | None = None
    """Zero-pad by so many pixels and crop at random, per image; the data set's custom when not given."""
    crop_scale: float | None = None
    """Images from files: crop at random at least this share of the area, and resize it; 0.08 when not given."""
    flip: bool | None = None
    """Mirror half of the images; the data set's custom when not given."""
    rotate: float = 0.0
    """Rotate each image by up to so many degrees."""

    mixed_precision: Literal["no", "fp16", "bf16"] = "no"
    """Autocast dtype."""
    channels_last: bool = True
    """Memory format of the network and its inputs."""
    compile: bool = False
    """torch.compile the network."""
    seed: int = 0
    """Of the initialisation, the order of the images and everything drawn in a step."""
    threads: int | None = None
    """CPU threads; PyTorch's choice when not given."""
    deterministic: bool = True
    """Only algorithms that give the same bits at every run."""

    eval_every: int = 1
    """Epochs between evaluations; 0: none, not even at the end."""
    log_every: int = 10
    """Steps between lines of the log."""
    checkpoint_every: int = 500
    """Steps between checkpoints; one is also written at every end of an epoch that is evaluated."""

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size", "accumulate", "eval_batch_size", "log_every", "checkpoint_every"):
            _check(getattr(self, name) >= 1, name, "at least 1", getattr(self, name))
        _check(self.eval_every >= 0, "eval_every", "at least 0", self.eval_every)
        for name in ("max_steps", "train_images", "image_size", "threads"):
            value = getattr(self, name)
            _check(value is None or value >= 1, name, "at least 1", value)
        _check(self.lr > 0, "lr", "above 0", self.lr)
        _check(0 <= self.ema < 1, "ema", "in [0, 1)", self.ema)
        _check(0 <= self.label_smoothing < 1, "label_smoothing", "in [0, 1)", self.label_smoothing)
        _check(self.warmup_epochs >= 0, "warmup_epochs", "at least 0", self.warmup_epochs)
        _check(self.crop_scale is None or 0 < self.crop_scale <= 1, "crop_scale", "in (0, 1]", self.crop_scale)
        _check(self.validation >= 0, "validation", "at least 0", self.validation)
        for weight in self.aux_weights:
            _check(weight >= 0, "aux_weights", "at least 0 each", self.aux_weights)
        _check(not self.nesterov or self.momentum > 0, "momentum", "above 0 with nesterov", self.momentum)
        self.parsed_model_options()

    def parsed_model_options(self) -> dict[str, Any]:
        """``model_options`` as keyword arguments; values are Python literals, or strings where they are none."""
        options = {}
        for item in self.model_options:
            name, equals, value = item.partition("=")
            _check(bool(equals) and name.isidentifier(), "model_options", "KEY=VALUE", item)
            try:
                options[name] = ast.literal_eval(value)
            except (ValueError, SyntaxError):
                options[name] = value
        return options

    def as_json(self) -> dict[str, Any]:
        return {
            name: str(value) if isinstance(value, Path) else list(value) if isinstance(value, tuple) else value
            for name, value in dataclasses.asdict(self).items()
        }

    def check_resumes(self, saved: dict[str, Any]) -> None:
        """Refuse to continue a run whose settings were others.

        Raises:
            TrainError: names the first setting that differs.
        """
        for name, value in self.as_json().items():
            if name not in MAY_CHANGE and name in saved and saved[name] != value:
                raise TrainError(
                    f"--resume: {name} of the run in {self.out} is {saved[name]!r}, got {value!r}; "
                    "start a new run for other settings"
                )


def _check(holds: bool, name: str, expected: str, got: object) -> None:
    if not holds:
        raise TrainError(f"{name} must be {expected}, got {got!r}")
