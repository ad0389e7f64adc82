"""Small runs on scikit-learn's digits, at 8x8 pixels: a step takes milliseconds.

As a script, the server of ``two_processes``.
"""

import hashlib
import json
import math
import multiprocessing
import os
import socket
from pathlib import Path

import commands
import fork_server
import pytest
import torch
from torch import nn

from fused_attn.models import bottleneck_resnet
from fused_attn.train import TrainConfig, loop, train

#: Numbers that a run that was stopped and resumed must have as the one that was not.
COMPARED = ("train_loss", "train_accuracy", "test_loss", "test_accuracy", "steps")
#: Of the linear model: nothing is drawn at random.
PLAIN = {"crop_padding": 0, "channels_last": False, "max_steps": 12, "train_images": 200, "epochs": 2}
#: Blocks in the stages of a ResNet-50 in ``two_processes``, where the usual ones would take longer than all else.
FEW_BLOCKS = (2, 1)
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 2)


def small(out: Path, **changes) -> TrainConfig:
    """The configuration of a small run in ``out``."""
    settings = {"model": "wrn_10_1", "dataset": "digits", "image_size": 8, "train_images": 256, "batch_size": 32}
    settings |= {"epochs": 1, "log_every": 1, "threads": 1}
    return TrainConfig(out=out, **{**settings, **changes})


def linear(config, dataset):
    """A model without batch statistics: any split of a batch has the same mean gradient."""
    torch.manual_seed(3)
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 10))


# --- what a run leaves behind ---------------------------------------------------------------------------------------


def strict(text):
    def refuse(name):
        raise AssertionError(f"{name} is not JSON")

    return json.loads(text, parse_constant=refuse)


def events(folder, kind="step"):
    """Those in the log, without the time that they took."""
    logged = [strict(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [{k: v for k, v in event.items() if k != "seconds"} for event in logged if event["event"] == kind]


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def rewritten(path, state):
    """Replace the state of a checkpoint, with right checksums of all that is in it."""
    torch.save(state, path / "state.pt")
    files = [file for file in path.iterdir() if file.name != "checksums.json"]
    sums = {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files}
    (path / "checksums.json").write_text(json.dumps(sums))


def assert_same_weights(one, other):
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert torch.equal(tensor, other[name]), name


def assert_same_results(folder, other):
    assert (folder / "model.safetensors").read_bytes() == (other / "model.safetensors").read_bytes()
    assert events(folder, "epoch") == events(other, "epoch")
    ours, theirs = (json.loads((out / "metrics.json").read_text()) for out in (folder, other))
    assert [ours[name] for name in COMPARED] == [theirs[name] for name in COMPARED]


# --- runs that end early --------------------------------------------------------------------------------------------


def stopped(config, where, name, replacement, error, match=None):
    """Train with a function replaced that ends the run with an error."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(where, name, replacement)
        with pytest.raises(error, match=match):
            train(config)


def killed(config, done):
    """Train until ``done`` steps are done."""
    original = loop.Run._step

    def step(run, parts):
        if run.step == done:
            raise MemoryError
        original(run, parts)

    stopped(config, loop.Run, "_step", step, MemoryError)


def poison(monkeypatch, *steps, value=math.nan, gradient=False, where=lambda run: True):
    """Make the loss, or only its gradient, ``value`` in these steps, counted from 1."""
    original = loop.Run._loss

    def loss(run, outputs, labels):
        logits, found = original(run, outputs, labels)
        if run.step + 1 in steps and where(run):
            # The root of 0 is 0, with a derivative of 0 * inf.
            found = found + (logits * 0.0).sum().sqrt() if gradient else found * value
        return logits, found

    monkeypatch.setattr(loop.Run, "_loss", loss)


# --- several processes ----------------------------------------------------------------------------------------------


def two_processes(out, poisoned=(), **settings):
    """Train the linear model, or one that is named, in two processes; ``poisoned`` steps have a loss of nan in one."""
    arguments = [str(out), json.dumps(settings if "model" in settings else {**PLAIN, **settings}), json.dumps(poisoned)]
    result = fork_server.ask(__file__, commands.environment(), arguments)
    assert result.get("statuses") == [0, 0], result


def _two_processes(arguments):
    with socket.create_server(("localhost", 0)) as server:
        port = server.getsockname()[1]
    fork = multiprocessing.get_context("fork")
    processes = [fork.Process(target=_process, args=(rank, port, *arguments)) for rank in range(2)]
    fork_server.run_all(processes)


def _process(rank, port, out, settings, poisoned):
    """What torchrun tells a process, and the training."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    settings = {name: tuple(each) if isinstance(each, list) else each for name, each in json.loads(settings).items()}
    bottleneck_resnet.BLOCKS[50] = FEW_BLOCKS
    if "model" not in settings:
        loop.build_network = linear
    steps = json.loads(poisoned)
    poison(pytest.MonkeyPatch(), *steps, where=lambda run: run.accelerator.process_index == run.step % 2)
    train(small(Path(out), **settings))


if __name__ == "__main__":
    # What a run imports when it needs it, which takes longer than its steps.
    import kornia.augmentation  # noqa: F401
    import matplotlib.pyplot  # noqa: F401
    import sklearn.datasets  # noqa: F401
    import torch._dynamo
    import torch.distributed.fsdp

    fork_server.serve(_two_processes)
