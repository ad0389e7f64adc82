"""Settings of a run: one flat dataclass, which tyro turns into the options of ``fused-attn train``."""

from __future__ import annotations

import ast
import dataclasses
import math
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from ..options import check
from . import checkpoint
from .errors import TrainError, reason
from .json_files import read_object

#: Settings that may change between the start of a run and its resumption: no step computed so far depends on them.
MAY_CHANGE = (
    "out", "resume", "data_dir", "data_note", "log_every", "checkpoint_every", "eval_batch_size", "threads",
    "on_nonfinite", "skip_unreadable", "parallel",
)  # fmt: skip
#: Settings of a run's length, which may grow.
MAY_GROW = ("epochs", "max_steps")
#: Arguments of a model that are settings of the run, or facts of its data.
NOT_MODEL_OPTIONS = {
    "num_classes": "it is that of the data set",
    "in_chans": "it is that of the data set",
    "image_size": "it is an option of its own",
    "impl": "it is an option of its own",
}


@dataclass(frozen=True)
class TrainConfig:
    """Train a model on images and write its log, curves, checkpoints and final metrics into a folder."""

    model: str
    """Name of a model (``fused-attn info`` lists them)."""
    dataset: str
    """digits, cifar10, cifar100, fashion_mnist, synthetic, imagefolder, or owner/name of a data set on the hub."""
    out: Path
    """Folder of the run: a new or an empty one, unless ``--resume`` is given."""

    resume: bool = False
    """Go on from the last checkpoint in ``out``, or, where there is none yet, from the beginning.  ``epochs`` and
    ``max_steps`` may grow, and a run without ``max_steps`` may get one; the cosine schedule is then, from the next step
    on, that of the new length."""
    init_from: Path | None = None
    """Weights to begin with: a .safetensors file, or the folder of a run.  A classifier for another number of classes
    starts at random; tables of positions of another image size are interpolated.  Both are said."""
    recipe: str | None = None
    """Start from the settings of a paper; every other option overrides it."""
    data_dir: Path | None = None
    """Local folder of the data set in the hub's Parquet layout (imagefolder: train/CLASS/FILE and val/CLASS/FILE);
    otherwise it is loaded from the hub by name."""
    data_note: str = ""
    """What the metrics call the data, where the name of the data set would mislead."""
    image_size: int | None = None
    """Resize images to this height and width; the data set's own size (digits: 32, imagefolder: 224) when not given.
    Images from files are resized to 8/7 of it and cropped."""
    validation: int = 0
    """Number of training images to hold out for evaluation, the same ones for every seed; the test set is then read
    once, at the end."""
    train_images: int | None = None
    """Use only this many training images, spread evenly over the classes: the first of each, the second of
    each, and so on.  The same ones for every seed; a smaller set is part of a larger one."""
    label_column: str | None = None
    """Column of the labels in a data set of the hub; ``label``, or the only column of classes, when not given."""
    skip_unreadable: bool = False
    """Skip images that cannot be decoded, instead of stopping: another of the same step stands in for a training
    image, and the test set has one fewer.  The log names each, and the metrics count them."""

    model_options: Annotated[tuple[str, ...], tyro.conf.arg(metavar="KEY=VALUE ...")] = ()
    """Further arguments of the model, e.g. attention_blocks=first relative=False."""
    impl: Literal["auto", "reference", "cpu", "triton"] = "auto"
    """Implementation of the attention ops."""

    epochs: int = 200
    """Passes over the training images."""
    max_steps: int | None = None
    """Stop after this many optimizer steps."""
    batch_size: int = 128
    """Images in an optimizer step, over all processes and accumulation steps."""
    accumulate: int = 1
    """Forward and backward passes in an optimizer step, each on an equal part of the batch."""
    eval_batch_size: int = 250
    """Images in a forward pass of evaluation, per process."""

    optimizer: Literal["sgd", "adam", "adamw"] = "sgd"
    """SGD with momentum, Adam, or AdamW, whose weight decay is not part of the gradient."""
    lr: float = 0.1
    """Highest learning rate of the schedule."""
    momentum: float = 0.9
    """Momentum of SGD, in [0, 1)."""
    nesterov: bool = True
    """Nesterov's form of SGD's momentum."""
    weight_decay: float = 5e-4
    """Factor of the L2 penalty, or of AdamW's decay, which is on every parameter."""
    attention_optimizer: Literal["sgd", "adam", "adamw"] | None = None
    """Separate optimizer for the parameters of the attention modules; the other one then has only the rest.  Its kind
    is that of ``optimizer`` where only ``attention_lr`` is given; both share schedule, momentum and weight decay."""
    attention_lr: float | None = None
    """Highest learning rate of the attention's optimizer; ``lr`` where only ``attention_optimizer`` is given."""
    schedule: Literal["constant", "step", "cosine"] = "cosine"
    """Learning rate.  step: multiplied by ``gamma`` at every milestone.  cosine: falls to 0 at the end of the run."""
    milestones: tuple[int, ...] = (60, 120, 160)
    """Epochs at which the step schedule multiplies the learning rate."""
    gamma: float = 0.2
    """Factor of the step schedule."""
    warmup_epochs: float = 0.0
    """Epochs of linear warm-up of the learning rate from 0, before the schedule."""
    label_smoothing: float = 0.0
    """Label smoothing of the cross-entropy, in [0, 1)."""
    aux_weights: tuple[float, ...] = ()
    """Weight of each auxiliary classifier's loss, added to the main loss, in the order of the model's stages."""
    ema: float = 0.0
    """Decay per step of an exponential moving average of the weights, which is evaluated in their place; 0: none."""
    clip_norm: float | None = None
    """Scale gradients of a greater norm down to this one; no clipping when not given."""
    on_nonfinite: Literal["stop", "skip"] = "stop"
    """At a loss or gradient that is inf or nan: stop with an error and exit status 3, before it reaches the weights; or
    skip that step, count it and go on.  With fp16, steps whose gradients its loss scaling overflows are always
    skipped."""

    crop_padding: int | None = None
    """Images in memory: zero-pad by this many pixels on each side and crop at random; the usual for the data set when
    not given."""
    crop_scale: float | None = None
    """Images from files: crop at random at least this share of the area, and resize the crop; 0.08 when not given."""
    flip: bool | None = None
    """Mirror each image left to right with a probability of 1/2; the usual for the data set when not given."""
    rotate: float = 0.0
    """Rotate each image at random by up to this many degrees either way."""
    normalize: bool = True
    """Subtract the mean of every channel and divide by its standard deviation; otherwise pixels are in [0, 1], unless
    ``pixel_mean`` is set."""
    pixel_mean: bool = False
    """Images in memory: subtract the mean of every pixel of the training images instead, before padding and crop, and
    divide by nothing, as He et al. do on CIFAR-10."""

    mixed_precision: Literal["no", "fp16", "bf16"] = "no"
    """Dtype of autocast; no: everything in float32."""
    channels_last: bool = True
    """channels_last memory format for the network and its inputs; otherwise contiguous."""
    compile: bool = False
    """Compile the network with torch.compile."""
    parallel: Literal["ddp", "fsdp"] = "ddp"
    """What several processes have of the network: ddp: each all of it; fsdp: each a shard of the parameters, their
    gradients and the optimizer's state.  Of no account in a single process."""
    seed: int = 0
    """Seed of the initial weights, the order of the images and all that is drawn in a step."""
    threads: int | None = None
    """CPU threads of PyTorch; its own choice when not given."""
    deterministic: bool = True
    """Use algorithms that give the same bits at every run; warn where PyTorch has none."""

    log_gradient: str | None = None
    """Name of a parameter, or with [N] at its end of its N-th part along its first dimension: the mean of its gradient
    before clipping is in the log next to the loss, and that of the last step in the metrics."""
    eval_every: int = 1
    """Epochs between evaluations; 0: none, not even at the end."""
    log_every: int = 10
    """Optimizer steps between lines of the log."""
    checkpoint_every: int = 500
    """Optimizer steps between checkpoints; one is also written at the end of every epoch that is evaluated."""

    def __post_init__(self) -> None:
        for name, expected in typing.get_type_hints(type(self)).items():
            value = getattr(self, name)
            if Path in (expected, *typing.get_args(expected)) and isinstance(value, str):
                object.__setattr__(self, name, Path(value))
        check("train", type(self), vars(self), TrainError)
        # Accelerate rescales the loss after each optimizer's step: the second would divide by another scale.
        two = self.separate_attention
        _check(not two or self.mixed_precision != "fp16", "mixed_precision", "no or bf16 with two optimizers", "fp16")
        # Gradients are multiplied by fp16's scale until the optimizer's step.
        no_scale = self.log_gradient is None or self.mixed_precision != "fp16"
        _check(no_scale, "mixed_precision", "no or bf16 with log_gradient", "fp16")
        sharded = self.parallel == "fsdp"
        _check(not sharded or self.mixed_precision != "fp16", "mixed_precision", "no or bf16 with fsdp", "fp16")
        _check(not sharded or not self.compile, "compile", "False with fsdp", self.compile)
        nesterov = self.nesterov and "sgd" in (self.optimizer, self.attention_optimizer)
        _check(not nesterov or self.momentum > 0, "momentum", "above 0 with nesterov", self.momentum)
        rising = all(one < other for one, other in zip(self.milestones, self.milestones[1:], strict=False))
        _check(rising, "milestones", "in rising order", self.milestones)
        self.parsed_model_options()

    @property
    def separate_attention(self) -> bool:
        """Whether the attention modules' parameters have an optimizer of their own."""
        return self.attention_optimizer is not None or self.attention_lr is not None

    def parsed_model_options(self) -> dict[str, Any]:
        """``model_options`` as keyword arguments; values are Python literals, or strings where they are none."""
        options = {}
        for item in self.model_options:
            name, equals, value = item.partition("=")
            _check(bool(equals) and name.isidentifier(), "model_options", "KEY=VALUE", item)
            if name in NOT_MODEL_OPTIONS:
                raise TrainError(f"model_options must not have {name}, {NOT_MODEL_OPTIONS[name]}; got {item!r}")
            _check(name not in options, "model_options", "each KEY once", item)
            try:
                options[name] = ast.literal_eval(value)
            except (ValueError, SyntaxError, MemoryError, RecursionError):  # the last two: nested too deeply
                options[name] = value
        return options

    def as_json(self) -> dict[str, Any]:
        return {
            name: str(value) if isinstance(value, Path) else list(value) if isinstance(value, tuple) else value
            for name, value in dataclasses.asdict(self).items()
        }

    @classmethod
    def from_json(cls, settings: Mapping[str, Any]) -> TrainConfig:
        """The settings that :meth:`as_json` wrote.

        Raises:
            TrainError: one is out of range.
        """
        return cls(**{name: tuple(value) if isinstance(value, list) else value for name, value in settings.items()})

    def check_resumes(self, saved: TrainConfig) -> None:
        """Refuse to continue a run whose settings were others.

        Raises:
            TrainError: names the first setting that differs, or the length that would shrink.
        """
        before = saved.as_json()
        for name, value in self.as_json().items():
            was = before[name]
            if name in MAY_GROW:
                # A run without a limit may get one; whether it is beyond the steps done, the checkpoint says.
                if was is not None and _length(value) < was:
                    raise TrainError(f"--resume: {name} of the run in {self.out} may only grow from {was}, got {value}")
            elif name not in MAY_CHANGE and was != value:
                raise TrainError(
                    f"--resume: {name} of the run in {self.out} is {was!r}, got {value!r}; "
                    "start a new run for other settings"
                )


def saved_config(folder: Path, what: str, **changes: Any) -> TrainConfig:
    """The settings of the run in ``folder``; settings that its config.json does not know are at their defaults.

    Args:
        folder: of a run.
        what: begins the error's text.
        changes: settings to replace.

    Raises:
        TrainError: config.json is missing, damaged or of another version, or a setting is out of range.
    """
    path = folder / "config.json"
    saved = read_object(path, what)
    known = {field.name for field in dataclasses.fields(TrainConfig)}
    if unknown := sorted(saved.keys() - known):
        raise TrainError(f"{what}: {path} has settings that this version does not know: {', '.join(unknown)}")
    if missing := sorted({"model", "dataset"} - saved.keys()):
        raise TrainError(f"{what}: {path} must name the run's {' and '.join(missing)}")
    try:
        return TrainConfig.from_json({**saved, "out": folder, "resume": False, **changes})
    except TrainError as error:
        raise TrainError(f"{what}: {path}: {reason(error)}") from error


def resumed_config(folder: Path) -> TrainConfig:
    """The settings of the run in ``folder``, which is to be resumed.

    Raises:
        TrainError: there is no run, or its config.json is not usable.
    """
    if not (folder / "config.json").exists() and not checkpoint.find(folder / "checkpoints"):
        raise TrainError(f"--resume: out must hold a checkpoint, found none in {folder}, nor the config.json of a run")
    return saved_config(folder, "--resume", resume=True)


def _length(value: int | None) -> float:
    return math.inf if value is None else value


def _check(holds: bool, name: str, expected: str, got: object) -> None:
    if not holds:
        raise TrainError(f"{name} must be {expected}, got {got!r}")
