"""The training run."""

from __future__ import annotations

import contextlib
import fcntl
import json
import signal
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from accelerate.utils import broadcast, set_seed
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torchmetrics import MeanMetric
from torchmetrics.classification import MulticlassAccuracy
from tqdm import tqdm

from .. import create_model
from . import augment, checkpoint, data
from .config import TrainConfig
from .environment import describe
from .errors import TrainError
from .files import ImageFiles, load_ahead
from .log import RunLog
from .optim import build_optimizer, learning_rate

#: The file of a run's folder that the process writing into it holds locked.
LOCK = ".lock"


def train(config: TrainConfig) -> dict[str, Any]:
    """Run or resume the training that ``config`` describes, in this process or under ``torchrun``.

    Writes into ``config.out``: config.json, log.jsonl, log.csv, curves.png, checkpoints/, and at the end
    model.safetensors and metrics.json.

    Returns:
        what metrics.json holds.

    Raises:
        TrainError: a setting, the data, the folder or a checkpoint is not usable.
        KeyboardInterrupt: interrupted; the state at the last completed step is saved.
    """
    return Run(config).train()


class Run:
    """One run: network, data and state.  Everything random in a step is drawn from (seed, step, process) alone, so a
    resumed run needs no generator states to continue bit for bit."""

    def __init__(self, config: TrainConfig) -> None:
        self.config = config
        if config.threads is not None:
            torch.set_num_threads(config.threads)
        torch.use_deterministic_algorithms(config.deterministic, warn_only=True)
        torch.backends.cudnn.benchmark = not config.deterministic
        self.accelerator = make_accelerator(config)
        self.checkpoints = config.out / "checkpoints"
        self._claim_folder()

        self.dataset = data.load(config.dataset, config.data_dir, config.image_size)
        self.images, self.validation = self.dataset.train, None
        if config.validation:
            self.images, self.validation = data.hold_out(self.images, config.validation)
        if config.train_images is not None:
            if config.train_images > len(self.images):
                raise TrainError(f"train_images must be at most {len(self.images)}, got {config.train_images}")
            self.images = self.images[: config.train_images]
        self.steps_per_epoch = len(self.images) // config.batch_size
        if self.steps_per_epoch == 0:
            raise TrainError(
                f"batch_size must be at most the {len(self.images)} training images, got {config.batch_size}"
            )
        self.last_step = config.epochs * self.steps_per_epoch
        if config.max_steps is not None:
            self.last_step = min(self.last_step, config.max_steps)
        parts = self.accelerator.num_processes * config.accumulate
        if config.batch_size % parts:
            raise TrainError(
                f"batch_size must be a multiple of processes * accumulate = {parts}, got {config.batch_size}"
            )

        self.transform, self.eval_transform = augment.build(config, self.dataset)
        set_seed(config.seed)
        self.network = build_network(config, self.dataset)
        if config.channels_last:
            self.network.to(memory_format=torch.channels_last)
        self.network.to(self.accelerator.device)
        self._try_out()
        self.average = (
            AveragedModel(self.network, multi_avg_fn=get_ema_multi_avg_fn(config.ema)) if config.ema > 0 else None
        )
        optimizer = build_optimizer(config, self.network.parameters())
        compiled = torch.compile(self.network) if config.compile else self.network
        self.model, self.optimizer = self.accelerator.prepare(compiled, optimizer)

        self.step = 0
        self.totals = torch.zeros(3, dtype=torch.float64, device=self.accelerator.device)  # loss, correct, images
        self.seconds = 0.0
        self.log = RunLog(config.out)
        self.interrupted = False
        if config.resume:
            self._resume()
        if self.accelerator.is_main_process:
            checkpoint.write_text(config.out / "config.json", json.dumps(config.as_json(), indent=1) + "\n")

    def _try_out(self) -> None:
        """Run one image, so that an ``impl`` that cannot run here is an error before anything is written."""
        # A network that returns auxiliary logits in training keeps what makes them in `auxiliary`.
        classifiers, weights = len(getattr(self.network, "auxiliary", ())), self.config.aux_weights
        if classifiers != len(weights):
            raise TrainError(
                f"aux_weights must hold one weight for each of the {classifiers} auxiliary classifiers of "
                f"{self.config.model}, got {len(weights)}"
            )
        try:
            with torch.no_grad(), self.accelerator.autocast():
                self.network.eval()(self._to_device(self.dataset.test[:1], self.eval_transform)[0])
        except (RuntimeError, ValueError) as error:
            raise TrainError(f"model {self.config.model}: {error}") from error

    # --- the run ------------------------------------------------------------------------------------------------

    def train(self) -> dict[str, Any]:
        config, started = self.config, time.monotonic() - self.seconds
        self.bar = tqdm(
            total=self.last_step,
            initial=self.step,
            unit="step",
            dynamic_ncols=True,
            mininterval=0.5 if sys.stderr.isatty() else 10,
            disable=not self.accelerator.is_main_process,
        )
        # A resumed run may have no epoch left to do: then its last results are those in the log.
        kept = ("_loss", "_accuracy")
        results: dict[str, float] = {
            name: value for event in self.log.events("epoch") for name, value in event.items() if name.endswith(kept)
        }
        with self._interrupts(), self.bar:
            while self.step < self.last_step:
                epoch, first = divmod(self.step, self.steps_per_epoch)
                batches = data.epoch_batches(self.images, config.batch_size, config.seed, epoch, first)
                for parts in load_ahead(map(self._parts, batches), data.in_memory):
                    self._step(parts)
                    self.seconds = time.monotonic() - started
                    epoch_ends = self.step % self.steps_per_epoch == 0
                    if epoch_ends or self.step == self.last_step:
                        results = self._end_of_epoch(epoch + 1, results)
                    elif self.step % config.checkpoint_every == 0:
                        self._save()
                    if self._any_interrupted():
                        self._save()
                        raise KeyboardInterrupt
                    if self.step == self.last_step:
                        break
        return self._finish(results)

    def _parts(self, batch: data.Images | ImageFiles) -> list[data.Images | ImageFiles]:
        """This process's share of a batch: one part for every forward and backward pass."""
        processes, process = self.accelerator.num_processes, self.accelerator.process_index
        share = self.config.batch_size // (processes * self.config.accumulate)
        firsts = [(part * processes + process) * share for part in range(self.config.accumulate)]
        return [batch[first : first + share] for first in firsts]

    def _step(self, parts: list[data.Images]) -> None:
        """One optimizer step on this process's share of a batch."""
        config, accelerator = self.config, self.accelerator
        set_seed(hash((config.seed, self.step, accelerator.process_index)) % 2**32)
        rate = learning_rate(config, self.step, self.steps_per_epoch)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.model.train()
        step_loss = torch.zeros((), device=accelerator.device)
        for part in parts:
            share = len(part)
            images, labels = self._to_device(part, self.transform)
            with accelerator.accumulate(self.model):
                logits, loss = self._loss(self.model(images), labels)
                accelerator.backward(loss)
                if config.clip_norm is not None and accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(self.model.parameters(), config.clip_norm)
                self.optimizer.step()
                self.optimizer.zero_grad()
            detached = loss.detach()
            step_loss += detached / config.accumulate
            correct = (logits.detach().argmax(1) == labels).sum()
            self.totals += torch.stack([detached.double() * share, correct.double(), torch.full_like(correct, share)])
        if self.average is not None:
            self.average.update_parameters(self.network)
        self.step += 1
        if self.step % config.log_every == 0 or self.step == self.last_step:
            loss = float(accelerator.reduce(step_loss, "mean"))
            if accelerator.is_main_process:
                epoch = round(self.step / self.steps_per_epoch, 6)
                self.log.write("step", step=self.step, epoch=epoch, loss=loss, lr=rate)
                self.bar.set_postfix(epoch=f"{epoch:.2f}", loss=f"{loss:.4f}", lr=f"{rate:.4f}", refresh=False)
        self.bar.update()

    def _loss(self, outputs: Tensor | tuple[Tensor, list[Tensor]], labels: Tensor) -> tuple[Tensor, Tensor]:
        """The logits that count, and the loss: with auxiliary classifiers the weighted sum of all losses."""
        logits, auxiliary = outputs if isinstance(outputs, tuple) else (outputs, [])
        losses = [
            F.cross_entropy(out.float(), labels, label_smoothing=self.config.label_smoothing)
            for out in (logits, *auxiliary)
        ]
        weighted = (weight * loss for weight, loss in zip(self.config.aux_weights, losses[1:], strict=True))
        return logits.float(), sum(weighted, losses[0])

    def _end_of_epoch(self, epoch: int, results: dict[str, float]) -> dict[str, float]:
        """Evaluate where it is due, log, and save; returns the newest results."""
        config = self.config
        loss, correct, count = self.accelerator.reduce(self.totals, "sum").tolist()
        last = self.step == self.last_step
        if config.eval_every and (epoch % config.eval_every == 0 or last):
            results = {"train_loss": loss / count, "train_accuracy": correct / count}
            if self.validation is not None:
                results |= self.evaluate(self.validation, "validation")
            if self.validation is None or last:
                results |= self.evaluate(self.dataset.test, "test")
            if self.accelerator.is_main_process:
                position = round(self.step / self.steps_per_epoch, 6)
                self.log.write("epoch", step=self.step, epoch=position, seconds=round(self.seconds, 1), **results)
                self.log.summarise()
                shown = "  ".join(f"{name} {value:.4f}" for name, value in results.items())
                self.bar.write(f"epoch {position:g}: {shown}")
        self.totals.zero_()
        self._save()
        return results

    def evaluate(self, images: data.Images | ImageFiles, split: str) -> dict[str, float]:
        """Loss and accuracy of the network, or of its average, on ``images``; each process does its share."""
        accelerator = self.accelerator
        network = self.average.module if self.average is not None else self.network
        network.eval()
        if accelerator.num_processes > 1:  # batch statistics are each process's own; kept are those of the first
            for buffer in network.buffers():
                broadcast(buffer)
        loss, accuracy = MeanMetric(), MulticlassAccuracy(self.dataset.num_classes, average="micro")
        loss, accuracy = loss.to(accelerator.device), accuracy.to(accelerator.device)
        mine = images[accelerator.process_index :: accelerator.num_processes]
        with torch.no_grad(), accelerator.autocast():
            size = self.config.eval_batch_size
            batches = ([mine[first : first + size]] for first in range(0, len(mine), size))
            for (part,) in load_ahead(batches, data.in_memory):
                batch, labels = self._to_device(part, self.eval_transform)
                logits = network(batch).float()
                loss.update(F.cross_entropy(logits, labels, reduction="none"))
                accuracy.update(logits, labels)
        return {f"{split}_loss": float(loss.compute()), f"{split}_accuracy": float(accuracy.compute())}

    def _to_device(self, batch: data.Images | ImageFiles, transform: nn.Module) -> tuple[Tensor, Tensor]:
        device = self.accelerator.device
        with torch.no_grad():
            images = transform(batch.images.to(device, non_blocking=True).float() / 255.0)
        if self.config.channels_last:
            images = images.contiguous(memory_format=torch.channels_last)
        return images, batch.labels.to(device, non_blocking=True)

    # --- state --------------------------------------------------------------------------------------------------

    def _claim_folder(self) -> None:
        out = self.config.out
        occupied = out.exists() and (not out.is_dir() or any(path.name != LOCK for path in out.iterdir()))
        self.accelerator.wait_for_everyone()
        if self.config.resume:
            if not checkpoint.find(self.checkpoints):
                raise TrainError(f"--resume: out must hold a checkpoint, found none in {self.checkpoints}")
            try:
                saved = json.loads((out / "config.json").read_text())
            except (OSError, ValueError) as error:
                raise TrainError(f"--resume: {out / 'config.json'} cannot be read ({error})") from error
            self.config.check_resumes(saved)
        elif occupied:
            raise TrainError(f"out must be a new or empty folder, or --resume given to go on with its run; got {out}")
        else:
            try:
                out.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise TrainError(f"out: the folder {out} cannot be made ({error})") from error
        if self.accelerator.is_main_process:
            self._lock_folder()

    def _lock_folder(self) -> None:
        """Until this process ends, however it ends, no other can write into the run's folder."""
        self.lock = open(self.config.out / LOCK, "w")  # noqa: SIM115
        try:
            fcntl.lockf(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise TrainError(f"out: another process is writing into {self.config.out} ({error})") from error

    def _save(self) -> None:
        totals = self.accelerator.reduce(self.totals, "sum").cpu()
        if self.accelerator.is_main_process:
            weights = {"model": self.network.state_dict()}
            if self.average is not None:
                weights["ema"] = self.average.state_dict()
            scaler = self.accelerator.scaler
            state = {
                "step": self.step,
                "seconds": self.seconds,
                "totals": totals,
                "optimizer": self.optimizer.state_dict(),
                "scaler": scaler.state_dict() if scaler is not None else None,
            }
            checkpoint.save(self.checkpoints, self.step, weights, state)
        self.accelerator.wait_for_everyone()

    def _resume(self) -> None:
        path = checkpoint.find(self.checkpoints)[-1]
        weights, state = checkpoint.load(path)
        if state["step"] >= self.last_step and (self.config.out / "metrics.json").exists():
            raise TrainError(f"--resume: the run in {self.config.out} is complete at step {state['step']}")
        self.network.load_state_dict(weights["model"])
        if self.average is not None:
            self.average.load_state_dict(weights["ema"])
        self.optimizer.load_state_dict(state["optimizer"])
        if state["scaler"] is not None and self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(state["scaler"])
        self.step, self.seconds = state["step"], state["seconds"]
        if self.accelerator.is_main_process:
            self.totals.copy_(state["totals"])
            self.log.rewind(self.step)
            print(f"resuming {self.config.out} at step {self.step} of {self.last_step}", flush=True)

    def _finish(self, results: dict[str, float]) -> dict[str, Any]:
        metrics = {
            **results,
            "epochs": round(self.step / self.steps_per_epoch, 6),
            "steps": self.step,
            "seconds": round(self.seconds, 1),
            "images_per_second": round(self.step * self.config.batch_size / max(self.seconds, 1e-9), 1),
            "parameters": sum(parameter.numel() for parameter in self.network.parameters()),
            "data": self.config.data_note or self.config.dataset,
            "processes": self.accelerator.num_processes,
            "environment": describe(),
            "config": self.config.as_json(),
        }
        if self.accelerator.is_main_process:
            evaluated = self.average.module if self.average is not None else self.network
            checkpoint.write_weights(self.config.out / "model.safetensors", evaluated.state_dict())
            checkpoint.write_text(self.config.out / "metrics.json", json.dumps(metrics, indent=1) + "\n")
        self.accelerator.wait_for_everyone()
        return metrics

    # --- interruption -------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def _interrupts(self):
        """The first Ctrl-C or SIGTERM lets the step finish and saves; a second one acts at once."""

        def handle(number, frame):
            self.interrupted = True
            signal.signal(number, previous[number])

        previous = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
        for number in previous:
            signal.signal(number, handle)
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)

    def _any_interrupted(self) -> bool:
        if self.accelerator.num_processes == 1:
            return self.interrupted
        flag = torch.tensor(float(self.interrupted), device=self.accelerator.device)
        return bool(self.accelerator.reduce(flag, "sum") > 0)


def make_accelerator(config: TrainConfig) -> Accelerator:
    # Accelerate keeps one state per process, and refuses another precision for a second run in the same process.
    AcceleratorState._reset_state(reset_partial_state=False)
    GradientState._reset_state()
    return Accelerator(
        # Without a GPU it sees torchrun's processes only when told to use the CPU.
        cpu=not torch.cuda.is_available(),
        mixed_precision=config.mixed_precision,
        gradient_accumulation_steps=config.accumulate,
    )


def build_network(config: TrainConfig, dataset: data.Dataset) -> nn.Module:
    """The model that ``config`` names, for the classes, channels and size of ``dataset``.

    Raises:
        TrainError: the model or one of its options is unknown or out of range.
    """
    options = {
        "num_classes": dataset.num_classes,
        "in_chans": dataset.in_chans,
        "image_size": dataset.image_size,
        "impl": config.impl,
        **config.parsed_model_options(),
    }
    try:
        return create_model(config.model, **options)
    except (TypeError, ValueError) as error:
        raise TrainError(f"model {config.model}: {error}") from error


def read_metrics(folder: Path) -> dict[str, Any]:
    """metrics.json of a finished run."""
    return json.loads((folder / "metrics.json").read_text())
