"""The training run."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import signal
import sys
import time
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from accelerate.utils import broadcast, gather_object, set_seed
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torchmetrics import MeanMetric
from torchmetrics.classification import MulticlassAccuracy
from tqdm import tqdm

from .. import create_model
from . import applies, atomic, augment, checkpoint, data, folder, gradients, identity, parallel, weights
from .config import MAY_GROW, TrainConfig
from .environment import describe
from .errors import NonFiniteError, TrainError, reason
from .files import ImageFiles, load_ahead
from .json_files import dumps
from .log import RunLog
from .optim import attention_factor, build_optimizers, learning_rate
from .results import read_metrics, shown

#: Least scale of the loss at which fp16's loss scaling may still explain a gradient that is not finite.
LEAST_SCALE = 1.0


def train(config: TrainConfig) -> dict[str, Any]:
    """Run or resume the training that ``config`` describes, in this process or under ``torchrun``.

    Writes into ``config.out``: config.json, log.jsonl, log.csv, curves.png, checkpoints/, and at the end
    model.safetensors and metrics.json.

    Returns:
        what metrics.json holds.

    Raises:
        TrainError: a setting, the data, the folder or a checkpoint is not usable.
        NonFiniteError: a loss, gradient or weight is inf or nan; the checkpoints are as they were before it.
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
        self.accelerator = parallel.make_accelerator(config)
        self.sharded = config.parallel == "fsdp" and self.accelerator.num_processes > 1
        self.checkpoints = config.out / "checkpoints"
        taken = folder.is_taken(config.out)
        self.accelerator.wait_for_everyone()
        if not config.resume:
            applies.check(config)
        self.before = folder.claim(config, taken)
        if config.resume:
            applies.check(config, self.before)
        if self.accelerator.is_main_process:
            self.lock = folder.lock(config.out)

        self.dataset = data.of_run(config)
        self.images, self.validation = self.dataset.train, None
        if config.validation:
            self.images, self.validation = data.hold_out(self.images, config.validation)
        if config.train_images is not None:
            self.images = data.take(self.images, config.train_images)
        self.steps_per_epoch = len(self.images) // config.batch_size
        if self.steps_per_epoch == 0:
            raise TrainError(
                f"batch_size must be at most the {len(self.images)} training images, got {config.batch_size}"
            )
        self.last_step = self._last_step(config)
        parts = self.accelerator.num_processes * config.accumulate
        if config.batch_size % parts:
            raise TrainError(
                f"batch_size must be a multiple of processes * accumulate = {parts}, got {config.batch_size}"
            )

        self.transform, self.eval_transform = augment.build(config, self.dataset)
        set_seed(config.seed)
        self.network = build_network(config, self.dataset)
        if config.channels_last and not self.sharded:  # shards are of contiguous parameters
            self.network.to(memory_format=torch.channels_last)
        self.network.to(self.accelerator.device)
        self._try_out()
        # A resumed run has its own weights; the file may be gone.
        resumes = config.resume and bool(checkpoint.find(self.checkpoints))
        self.initialised = None if config.init_from is None or resumes else self._initialise()
        self.average = (
            AveragedModel(self.network, multi_avg_fn=get_ema_multi_avg_fn(config.ema)) if config.ema > 0 else None
        )
        if self.sharded:
            for each in (self.network,) if self.average is None else (self.network, self.average.module):
                parallel.shard(each, self.accelerator)
        self.gradient = gradients.mean_of(self.network, config.log_gradient)
        optimizers = build_optimizers(config, self.network)
        compiled = torch.compile(self.network) if config.compile else self.network
        # For evaluation: with autocast, and without a wrapper for copies in several processes.
        self.model = self.accelerator.prepare_model(compiled, evaluation_mode=self.sharded)
        self.optimizers = {name: self.accelerator.prepare(each) for name, each in optimizers.items()}

        self.step = 0
        self.totals = torch.zeros(3, dtype=torch.float64, device=self.accelerator.device)  # loss, correct, images
        self.seconds = 0.0
        self.skipped = 0
        self.unreadable: dict[str, str] = {}
        self.extended: list[dict[str, Any]] = []
        self.log = RunLog(config.out)
        self.interrupted = False
        if resumes:
            self._resume()
        elif config.resume and self.accelerator.is_main_process:
            self.log.rewind(0)
            print(f"{config.out} has no checkpoint yet: starting from the beginning", flush=True)
        if self.accelerator.is_main_process:
            atomic.write_text(config.out / "config.json", dumps(config.as_json(), indent=1) + "\n")

    def _last_step(self, config: TrainConfig) -> int:
        steps = config.epochs * self.steps_per_epoch
        return steps if config.max_steps is None else min(steps, config.max_steps)

    def _initialise(self) -> dict[str, Any]:
        wider = dataclasses.replace(self.dataset, num_classes=self.dataset.num_classes + 1)
        found = weights.initialise(self.network, self.config.init_from, lambda: build_network(self.config, wider))
        if self.accelerator.is_main_process:
            print(weights.said(found), flush=True)
        return found

    def _try_out(self) -> None:
        """Run one image, so that an ``impl`` that cannot run here is an error before anything is written."""
        # A network that returns auxiliary logits in training keeps what makes them in `auxiliary`.
        classifiers, weights = len(getattr(self.network, "auxiliary", ())), self.config.aux_weights
        if classifiers != len(weights):
            raise TrainError(
                f"aux_weights must hold one weight for each of the {classifiers} auxiliary classifiers of "
                f"{self.config.model}, got {len(weights)}"
            )
        black = data.Images(torch.zeros(1, *self.dataset.test.shape, dtype=torch.uint8), torch.zeros(1).long())
        try:
            with torch.no_grad(), self.accelerator.autocast():
                logits = self.network.eval()(self._to_device(black, self.eval_transform)[0])
        except (RuntimeError, ValueError, TypeError) as error:
            raise TrainError(f"model {self.config.model}: {reason(error)}") from error
        if not isinstance(logits, Tensor) or logits.shape != (1, self.dataset.num_classes):
            got = tuple(logits.shape) if isinstance(logits, Tensor) else f"a {type(logits).__name__}"
            raise TrainError(
                f"model {self.config.model} must give (B, {self.dataset.num_classes}) logits, got {got} for one image"
            )

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
        results: dict[str, float | None] = {
            name: value for event in self.log.events("epoch") for name, value in event.items() if name.endswith(kept)
        }
        with self._interrupts(), self.bar:
            if self.step:
                results = self._catch_up(results)
            while self.step < self.last_step:
                epoch, first = divmod(self.step, self.steps_per_epoch)
                for parts in self._batches(epoch, first):
                    self._step(parts)
                    self.seconds = time.monotonic() - started
                    if self._evaluates_here():
                        self._save()  # before the evaluation, which an image that cannot be read ends
                        results = self._evaluate(results)
                    elif self.step % config.checkpoint_every == 0:
                        self._save()
                    if self._on_any(self.interrupted):
                        self._save()
                        raise KeyboardInterrupt
                    if self.step == self.last_step:
                        break
        return self._finish(results)

    def _batches(self, epoch: int, first: int) -> Iterator[list[data.Images]]:
        """This process's share of each batch of an epoch, in memory."""
        batches = data.epoch_batches(self.images, self.config.batch_size, self.config.seed, epoch, first)
        try:
            yield from load_ahead(map(self._parts, batches), data.in_memory_filled)
        except TrainError:  # an image that cannot be read: the steps before it are kept
            if self.accelerator.num_processes == 1:  # others would have to join in
                self._save()
            raise

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
        rates = {"optimizer": rate, "attention_optimizer": rate * attention_factor(config)}
        for name, optimizer in self.optimizers.items():
            for group in optimizer.param_groups:
                group["lr"] = rates[name]
        self.model.train()
        # The forward pass writes batch statistics: a step that is left out must not leave its own.
        before = [buffer.clone() for buffer in self.network.buffers()] if config.on_nonfinite == "skip" else []
        step_loss, totals = torch.zeros((), device=accelerator.device), torch.zeros_like(self.totals)
        for part in parts:
            share = len(part)
            images, labels = self._to_device(part, self.transform)
            with accelerator.accumulate(self.model):
                logits, loss = self._loss(self.model(images), labels)
                accelerator.backward(loss)
            detached = loss.detach()
            step_loss += detached / config.accumulate
            correct = (logits.detach().argmax(1) == labels).sum()
            totals += torch.stack([detached.double() * share, correct.double(), torch.full_like(correct, share)])
        logs = self.step + 1 == self.last_step or (self.step + 1) % config.log_every == 0
        gradient = self.gradient() if logs else {}
        if self._update(step_loss):
            self.totals += totals
            if self.average is not None:
                self.average.update_parameters(self.network)
        else:
            with torch.no_grad():
                for buffer, value in zip(self.network.buffers(), before, strict=True):
                    buffer.copy_(value)
        self.step += 1
        if logs:
            loss = float(accelerator.reduce(step_loss, "mean"))
            if accelerator.is_main_process:
                epoch = round(self.step / self.steps_per_epoch, 6)
                self.log.write("step", step=self.step, epoch=epoch, loss=loss, lr=rate, **gradient)
                self.bar.set_postfix(epoch=f"{epoch:.2f}", loss=f"{loss:.4f}", lr=f"{rate:.4f}", refresh=False)
        self.bar.update()

    def _update(self, loss: Tensor) -> bool:
        """Step the optimizers, where loss and gradients are finite; otherwise stop, or say that the step is left out.

        With fp16, a gradient that is not finite is the gradient scaler's: it leaves the step out and halves its scale.
        That helps where the scaling caused the overflow, which below ``LEAST_SCALE`` it did not.  It never helps a loss
        that is not finite, which is computed before scaling.
        """
        accelerator, scaler = self.accelerator, self.accelerator.scaler
        if scaler is not None and not scaler.is_enabled():  # fp16 on the CPU
            scaler = None
        norm = torch.ones_like(loss) if scaler is not None else self._clip()
        # Reading the flag waits for the backward pass, once a step.  The next batch's copy from pageable memory would
        # wait for it anyway; what is no longer hidden behind it is the launch of the optimizer's kernels.
        usable = not self._on_any(~(loss.isfinite() & norm.isfinite()))
        if usable:
            if scaler is not None and self.config.clip_norm is not None:
                self._clip()
            for optimizer in self.optimizers.values():
                optimizer.step()
            if scaler is not None and accelerator.optimizer_step_was_skipped and scaler.get_scale() < LEAST_SCALE:
                usable, norm = False, torch.full_like(norm, torch.nan)
        for optimizer in self.optimizers.values():
            optimizer.zero_grad()
        if not usable:
            self._not_finite(loss, norm)
        return usable

    def _clip(self) -> Tensor:
        """Norm of the whole gradient before clipping; with ``clip_norm`` the gradient is clipped."""
        if self.config.clip_norm is not None:
            return parallel.whole(self.accelerator.clip_grad_norm_(self.model.parameters(), self.config.clip_norm))
        gradients = [each.grad for each in self.model.parameters() if each.grad is not None]
        return parallel.whole(nn.utils.get_total_norm(gradients))

    def _not_finite(self, loss: Tensor, norm: Tensor) -> None:
        """Count and log a step that is left out, or stop the run."""
        loss, norm = float(self.accelerator.reduce(loss, "mean")), float(norm)
        what = f"the loss must be finite, got {loss}"
        if math.isfinite(loss):
            what = f"the norm of the gradient must be finite, got {norm}"
        number = self.step + 1
        if self.config.on_nonfinite == "stop":
            kept = checkpoint.find(self.checkpoints)
            raise NonFiniteError(
                f"step {number}: {what}; the run stopped before its weights took it up, and "
                + (f"its last checkpoint is {kept[-1]}" if kept else "there is no checkpoint before it")
                + "; --on-nonfinite skip leaves such steps out"
            )
        self.skipped += 1
        if self.accelerator.is_main_process:
            self.log.write("skipped", step=number, loss=loss, gradient_norm=norm)
            self.bar.write(f"step {number} is left out: {what}")

    def _loss(self, outputs: Tensor | tuple[Tensor, list[Tensor]], labels: Tensor) -> tuple[Tensor, Tensor]:
        """The main logits, and the loss: with auxiliary classifiers the weighted sum of all losses."""
        logits, auxiliary = outputs if isinstance(outputs, tuple) else (outputs, [])
        losses = [
            F.cross_entropy(out.float(), labels, label_smoothing=self.config.label_smoothing)
            for out in (logits, *auxiliary)
        ]
        weighted = (weight * loss for weight, loss in zip(self.config.aux_weights, losses[1:], strict=True))
        return logits.float(), sum(weighted, losses[0])

    def _evaluates_here(self) -> bool:
        return self.step % self.steps_per_epoch == 0 or self.step == self.last_step

    def _catch_up(self, results: dict[str, float | None]) -> dict[str, float | None]:
        """Evaluate a resumed run at its checkpoint, if it ended between writing that and logging the evaluation."""
        if not self._evaluates_here():
            return results
        logged = self.accelerator.is_main_process and any(
            event["step"] == self.step for event in self.log.events("epoch")
        )
        if not self._on_any(logged):
            return self._evaluate(results)
        if self.step % self.steps_per_epoch == 0:
            self.totals.zero_()
        return results

    def _evaluate(self, results: dict[str, float | None]) -> dict[str, float | None]:
        """At the end of an epoch or of the run: evaluate where it is due, and log; returns the newest results."""
        config, epoch = self.config, -(-self.step // self.steps_per_epoch)
        loss, correct, count = self.accelerator.reduce(self.totals, "sum").tolist()
        if count == 0 and self.skipped:
            raise NonFiniteError(
                f"step {self.step}: some step since the last evaluation must have a finite loss and gradient, got none"
            )
        last = self.step == self.last_step
        if config.eval_every and (epoch % config.eval_every == 0 or last):
            of_training = (loss / count, correct / count) if count else (math.nan, math.nan)
            results = dict(zip(("train_loss", "train_accuracy"), of_training, strict=True))
            if self.validation is not None:
                results |= self.evaluate(self.validation, "validation")
            if self.validation is None or last:
                results |= self.evaluate(self.dataset.test, "test")
            self._note_unreadable()
            odd = [name for name, value in results.items() if not math.isfinite(value)]
            results |= dict.fromkeys(odd)
            if self.accelerator.is_main_process:
                position = round(self.step / self.steps_per_epoch, 6)
                self.log.write("epoch", step=self.step, epoch=position, seconds=round(self.seconds, 1), **results)
                self.log.summarise()
                self.bar.write(f"epoch {position:g}: {shown(results)}")
                if odd:
                    self.bar.write(f"epoch {position:g}: {', '.join(odd)} is inf or nan, which the files have as null")
        self.totals.zero_()
        return results

    def evaluate(self, images: data.Images | ImageFiles, split: str) -> dict[str, float]:
        """Loss and accuracy of the network, or of its average, on ``images``; each process does its share."""
        accelerator = self.accelerator
        network = self.average.module if self.average is not None else self.network
        network.eval()
        if accelerator.num_processes > 1:  # batch statistics are each process's own; kept are those of the first
            for buffer in network.buffers():
                broadcast(buffer)
        loss = MeanMetric(nan_strategy="disable")  # the mean of the others would hide a nan
        accuracy = MulticlassAccuracy(self.dataset.num_classes, average="micro")
        loss, accuracy = loss.to(accelerator.device), accuracy.to(accelerator.device)
        mine = images[accelerator.process_index :: accelerator.num_processes]
        with torch.no_grad(), accelerator.autocast():
            size = self.config.eval_batch_size
            # As many forward passes in all processes, which gather a sharded network's parameters together.
            firsts = range(0, -(-len(images) // accelerator.num_processes), size)
            batches = ([mine[first : first + size] if first < len(mine) else images[:1]] for first in firsts)
            for first, (part,) in zip(firsts, load_ahead(batches, data.in_memory), strict=True):
                batch, labels = self._to_device(part, self.eval_transform)
                logits = network(batch).float()
                if first >= len(mine):
                    continue
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

    def _note_unreadable(self) -> None:
        """Log which images were skipped since the last time, on any of the processes."""
        if not self.config.skip_unreadable:
            return
        for name, why in sorted(gather_object(list(self.dataset.skipped.copy().items()))):
            if name not in self.unreadable:
                self.unreadable[name] = why
                if self.accelerator.is_main_process:
                    self.log.write("unreadable", step=self.step, image=name, reason=why)
                    self.bar.write(f"the image {name} is passed over: {why}")

    def _save(self) -> None:
        self._note_unreadable()
        totals = self.accelerator.reduce(self.totals, "sum").cpu()
        tensors = {"model": self.network.state_dict()}
        if self.average is not None:
            tensors["ema"] = self.average.state_dict()
        optimizers = {name: optimizer.state_dict() for name, optimizer in self.optimizers.items()}
        if self.sharded:
            tensors, optimizers = parallel.whole(tensors), parallel.whole(optimizers)
        if self.accelerator.is_main_process:
            for stem, each in tensors.items():
                if bad := weights.not_finite(each.items()):
                    raise NonFiniteError(
                        f"step {self.step}: {bad} of the {stem} must be finite, got inf or nan; nothing was saved"
                    )
            scaler = self.accelerator.scaler
            state = {
                "step": self.step,
                "seconds": self.seconds,
                "totals": totals,
                "skipped": self.skipped,
                "length": {"epochs": self.config.epochs, "max_steps": self.config.max_steps},
                "extended": self.extended,
                "initialised": self.initialised,
                "data": identity.of(self.dataset),
                **optimizers,
                "scaler": scaler.state_dict() if scaler is not None else None,
            }
            checkpoint.save(self.checkpoints, self.step, tensors, state)
        self.accelerator.wait_for_everyone()

    def _resume(self) -> None:
        path = checkpoint.find(self.checkpoints)[-1]
        tensors, state = checkpoint.load(path)
        try:
            if "data" in state:  # earlier versions wrote none
                identity.check(state["data"], self.dataset, self.config.out)
            self._take_up(tensors, state)
        except TrainError:
            raise
        except (KeyError, TypeError, ValueError, RuntimeError, AttributeError, IndexError) as error:
            raise checkpoint.unusable(path, error) from error
        if self.step > self.last_step:
            raise TrainError(
                f"--resume: epochs and max_steps must allow the {self.step} steps that {path} has, got {self.last_step}"
            )
        if self.step == self.last_step and self._is_finished():
            raise TrainError(f"--resume: the run in {self.config.out} is complete at step {self.step}")
        if self.accelerator.is_main_process:
            self.log.rewind(self.step)
            self.unreadable = {event["image"]: event["reason"] for event in self.log.events("unreadable")}
            print(f"resuming {self.config.out} at step {self.step} of {self.last_step}", flush=True)
        self._extend()

    def _take_up(self, tensors: dict[str, dict[str, Tensor]], state: dict[str, Any]) -> None:
        """The state in a checkpoint.

        Raises:
            ValueError, or what PyTorch raises: it is that of another run.
        """
        parallel.load_network(self.network, tensors["model"])
        if self.average is not None:
            parallel.load_network(self.average, tensors["ema"])
        for name, optimizer in self.optimizers.items():
            parallel.load_optimizer(optimizer, state[name])
            for parameter, values in optimizer.state.items():
                if any(
                    isinstance(each, Tensor) and each.shape not in ((), parameter.shape) for each in values.values()
                ):
                    raise ValueError(f"{name} is that of other parameters")
        if state["scaler"] is not None and self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(state["scaler"])
        self.step, self.seconds = int(state["step"]), float(state["seconds"])
        if self.step < 0 or not math.isfinite(self.seconds):
            raise ValueError(f"step and seconds must be numbers from 0, got {self.step} and {self.seconds}")
        # Checkpoints of earlier versions have none of these.
        self.skipped, self.extended = int(state.get("skipped", 0)), list(state.get("extended", []))
        length = dict(state.get("length", {}))
        self.length = {name: length.get(name, getattr(self.before, name)) for name in MAY_GROW}
        self.initialised = state.get("initialised")
        if state["totals"].shape != self.totals.shape:
            raise ValueError(f"totals must be {len(self.totals)} numbers, got {tuple(state['totals'].shape)}")
        if self.accelerator.is_main_process:
            self.totals.copy_(state["totals"])

    def _extend(self) -> None:
        """Record that the run is longer than it was when its checkpoint was written, and say what that changes."""
        config, was = self.config, self.length
        now = {name: getattr(config, name) for name in MAY_GROW}
        if was == now:
            return
        self.extended.append({"step": self.step, "from": was, "to": now})
        if self.accelerator.is_main_process:
            changes = ", ".join(f"{name} {was[name]} -> {now[name]}" for name in MAY_GROW if was[name] != now[name])
            before, after = (
                learning_rate(dataclasses.replace(config, **each), self.step, self.steps_per_epoch)
                for each in (was, now)
            )
            if before != after:
                changes += f"; the {config.schedule} schedule is now that of the longer run: learning rate "
                changes += f"{before:.4g} -> {after:.4g}"
            print(changes, flush=True)

    def _is_finished(self) -> bool:
        """Whether metrics.json is that of the last step; that of a shorter run is still there while it is extended."""
        try:
            return read_metrics(self.config.out)["steps"] == self.last_step
        except (TrainError, KeyError):
            return False

    def _finish(self, results: dict[str, float | None]) -> dict[str, Any]:
        metrics = {
            **results,
            "epochs": round(self.step / self.steps_per_epoch, 6),
            "steps": self.step,
            "seconds": round(self.seconds, 1),
            "images_per_second": round(self.step * self.config.batch_size / max(self.seconds, 1e-9), 1),
            "parameters": sum(parameter.numel() for parameter in self.network.parameters()),
            "training_images": len(self.images),
            "image_shape": [self.dataset.in_chans, *self.dataset.image_size],
            "classes": self.dataset.num_classes,
            "data": self.config.data_note or self.config.dataset,
            "processes": self.accelerator.num_processes,
            **gradients.last(self.log.events("step")),
            "skipped_steps": self.skipped,
            "unreadable_images": len(self.unreadable),
            "init_from": self.initialised,
            "extended": self.extended,
            "environment": describe(),
            "config": self.config.as_json(),
        }
        evaluated = parallel.whole((self.average.module if self.average is not None else self.network).state_dict())
        if self.accelerator.is_main_process:
            checkpoint.write_weights(self.config.out / "model.safetensors", evaluated)
            atomic.write_text(self.config.out / "metrics.json", dumps(metrics, indent=1) + "\n")
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

    def _on_any(self, flag: bool | Tensor) -> bool:
        """Whether the flag is set on any of the processes."""
        if self.accelerator.num_processes == 1:
            return bool(flag)
        flag = torch.as_tensor(flag, device=self.accelerator.device).float()
        return bool(self.accelerator.reduce(flag, "sum") > 0)


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
    except Exception as error:  # a model checks its options as far as they are of its types
        raise TrainError(f"model {config.model}: {reason(error)}") from error
