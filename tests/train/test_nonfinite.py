"""Losses, gradients and weights that are inf or nan: the run stops, or leaves the step out without a trace."""

import math

import pytest
import torch
from commands import TRAIN
from runs import events, killed, poison, strict, two_processes
from safetensors.torch import load_file
from torch import nn

from fused_attn import cli
from fused_attn.train import checkpoint, loop, parallel, train
from fused_attn.train.errors import NonFiniteError

STEPS = {"max_steps": 7, "epochs": 2, "checkpoint_every": 3, "ema": 0.5, "crop_padding": 0}


@pytest.mark.parametrize(
    ("poisoned", "message"),
    [
        ({"value": math.nan}, "step 5: the loss must be finite, got nan"),
        ({"value": math.inf}, "step 5: the loss must be finite, got inf"),
        ({"gradient": True}, "step 5: the norm of the gradient must be finite, got nan"),
    ],
)
@pytest.mark.parametrize("clip", [None, 1.0])
def test_run_stops_at_the_first_step_and_keeps_its_last_checkpoint(
    small, tmp_path, monkeypatch, poisoned, message, clip
):
    poison(monkeypatch, 5, **poisoned)
    with pytest.raises(NonFiniteError, match=rf"{message}; .* its last checkpoint is .*step-00000003"):
        train(small(tmp_path / "run", **STEPS, clip_norm=clip))
    assert not (tmp_path / "run/metrics.json").exists()
    assert [path.name for path in checkpoint.find(tmp_path / "run/checkpoints")] == ["step-00000003"]
    assert [event["step"] for event in events(tmp_path / "run", "step")] == [1, 2, 3, 4]
    monkeypatch.undo()
    train(small(tmp_path / "run", **STEPS, clip_norm=clip, resume=True))
    train(small(tmp_path / "whole", **STEPS, clip_norm=clip))
    ours, whole = (load_file(tmp_path / name / "model.safetensors") for name in ("run", "whole"))
    assert all(torch.equal(ours[name], whole[name]) for name in whole)


def test_command_ends_with_status_3(tmp_path, capsys):
    status = cli.main([*TRAIN, "--model", "wrn_10_1", "--lr", "1e6", "--epochs", "20", "--out", str(tmp_path)])
    errors = capsys.readouterr().err.splitlines()
    assert status == 3
    assert errors[-1].startswith("fused-attn: error: step ")
    assert "must be finite, got" in errors[-1]
    for path in tmp_path.glob("*.json*"):
        for line in path.read_text().splitlines() if path.suffix == ".jsonl" else [path.read_text()]:
            strict(line)


def poisoned_norm(config, dataset):
    """Batch norm sees a nan where the loss does: what a skipped step must not leave in its statistics."""
    torch.manual_seed(3)
    return nn.Sequential(nn.Flatten(), nn.BatchNorm1d(64), nn.Dropout(0.2), nn.Linear(64, 10))


def nan_images(monkeypatch, *steps):
    original = loop.Run._to_device

    def to_device(run, batch, transform):
        images, labels = original(run, batch, transform)
        return (images * math.nan if transform is run.transform and run.step + 1 in steps else images), labels

    monkeypatch.setattr(loop.Run, "_to_device", to_device)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_skipped_step_leaves_no_trace_but_its_count(small, tmp_path, monkeypatch, accumulate):
    monkeypatch.setattr(loop, "build_network", poisoned_norm)
    settings = {**STEPS, "channels_last": False, "accumulate": accumulate, "on_nonfinite": "skip"}
    states = []
    original = loop.Run._step

    def step(run, parts):
        before = {name: value.clone() for name, value in run.network.state_dict().items()}
        average = {name: value.clone() for name, value in run.average.state_dict().items()}
        totals = run.totals.clone()
        original(run, parts)
        states.append((before, run.network.state_dict(), average, run.average.state_dict(), totals, run.totals.clone()))
        if run.step in (4, 5):
            for was, now in (states[-1][:2], states[-1][2:4]):
                assert all(torch.equal(was[name], now[name]) for name in now)
            assert torch.equal(totals, run.totals)
        elif run.step > 1:
            assert not torch.equal(before["1.running_mean"], run.network.state_dict()["1.running_mean"])

    monkeypatch.setattr(loop.Run, "_step", step)
    nan_images(monkeypatch, 4, 5)
    metrics = train(small(tmp_path / "run", **settings))
    assert len(states) == 7
    assert metrics["skipped_steps"] == 2
    assert [event["step"] for event in events(tmp_path / "run", "skipped")] == [4, 5]
    assert [event["loss"] for event in events(tmp_path / "run", "step")][3:5] == [None, None]
    assert all(math.isfinite(metrics[name]) for name in ("train_loss", "test_loss"))
    assert strict((tmp_path / "run/metrics.json").read_text())["skipped_steps"] == 2


def test_skipping_is_bitwise_resumable(small, tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "build_network", poisoned_norm)
    settings = {**STEPS, "channels_last": False, "on_nonfinite": "skip"}
    nan_images(monkeypatch, 2, 5)
    whole = train(small(tmp_path / "whole", **settings))
    killed(small(tmp_path / "run", **settings), 5)
    metrics = train(small(tmp_path / "run", **settings, resume=True))
    for name in ("skipped_steps", "train_loss", "train_accuracy", "test_loss"):
        assert metrics[name] == whole[name], name
    assert (tmp_path / "run/model.safetensors").read_bytes() == (tmp_path / "whole/model.safetensors").read_bytes()
    for kind in ("step", "skipped"):
        assert events(tmp_path / "run", kind) == events(tmp_path / "whole", kind)


def test_a_stopped_run_goes_on_with_skip(small, tmp_path, monkeypatch):
    poison(monkeypatch, 5)
    with pytest.raises(NonFiniteError):
        train(small(tmp_path / "run", **STEPS))
    assert train(small(tmp_path / "run", **STEPS, resume=True, on_nonfinite="skip"))["skipped_steps"] == 1


def test_a_run_that_skips_everything_is_not_complete(small, tmp_path, monkeypatch):
    poison(monkeypatch, *range(1, 100))
    with pytest.raises(NonFiniteError, match="step 7: some step since the last evaluation must have a finite loss"):
        train(small(tmp_path / "run", **STEPS, on_nonfinite="skip"))
    assert not (tmp_path / "run/metrics.json").exists()


@pytest.fixture
def scaled(monkeypatch):
    """The loss scaling of fp16, on the CPU and in float32: what the scaler does to a step does not depend on either."""
    original = parallel.make_accelerator

    def make(config):
        accelerator = original(config)
        accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=1000)
        return accelerator

    monkeypatch.setattr(parallel, "make_accelerator", make)


def test_a_gradient_that_the_scaler_handles_is_its_own_business(small, tmp_path, monkeypatch, scaled):
    poison(monkeypatch, 2, 4, gradient=True)
    metrics = train(small(tmp_path / "run", **STEPS, clip_norm=1.0))
    assert metrics["skipped_steps"] == 0
    _, state = checkpoint.load(checkpoint.find(tmp_path / "run/checkpoints")[-1])
    assert state["scaler"]["scale"] == 2.0  # halved twice
    weights = load_file(tmp_path / "run/model.safetensors").values()
    assert all(each.isfinite().all() for each in weights)


def test_the_scaler_does_not_handle_a_loss(small, tmp_path, monkeypatch, scaled):
    poison(monkeypatch, 2)
    with pytest.raises(NonFiniteError, match="step 2: the loss must be finite, got nan"):
        train(small(tmp_path / "run", **STEPS))
    assert train(small(tmp_path / "skip", **STEPS, clip_norm=1.0, on_nonfinite="skip"))["skipped_steps"] == 1


def test_a_gradient_that_no_scale_repairs_stops_the_run(small, tmp_path, monkeypatch, scaled):
    poison(monkeypatch, *range(2, 100), gradient=True)
    with pytest.raises(NonFiniteError, match=r"step 5: the norm of the gradient must be finite"):  # 4, 2, 1, 0.5
        train(small(tmp_path / "run", **STEPS))


def test_weights_that_are_not_finite_are_not_saved(small, tmp_path, monkeypatch):
    original = loop.Run._step

    def step(run, parts):
        original(run, parts)
        if run.step == 5:
            next(run.network.parameters()).data.view(-1)[0] = math.inf

    monkeypatch.setattr(loop.Run, "_step", step)
    monkeypatch.setattr(loop.Run, "_update", lambda run, loss: True)
    with pytest.raises(NonFiniteError, match=r"step 6: .* of the model must be finite, got inf or nan; nothing"):
        train(small(tmp_path / "run", **STEPS))
    assert [path.name for path in checkpoint.find(tmp_path / "run/checkpoints")] == ["step-00000003"]


def test_an_evaluation_that_is_not_finite_is_null_and_said(small, tmp_path, monkeypatch, capsys):
    original = loop.Run._to_device

    def to_device(run, batch, transform):  # one test image of 360
        images, labels = original(run, batch, transform)
        if transform is run.eval_transform and len(images) > 1:
            images = torch.cat([images[:1] * math.nan, images[1:]])
        return images, labels

    monkeypatch.setattr(loop.Run, "_to_device", to_device)
    metrics = train(small(tmp_path / "run", **STEPS))
    assert metrics["test_loss"] is None
    assert metrics["test_accuracy"] > 0
    assert strict((tmp_path / "run/metrics.json").read_text())["test_loss"] is None
    assert events(tmp_path / "run", "epoch")[-1]["test_loss"] is None
    assert "nan" not in (tmp_path / "run/log.csv").read_text()
    assert (tmp_path / "run/curves.png").exists()
    captured = capsys.readouterr()
    assert "test_loss is inf or nan, which the files have as null" in captured.out + captured.err


def test_processes_agree_on_what_is_skipped(tmp_path):
    two_processes(tmp_path / "skip", poisoned=(2, 3), max_steps=5, on_nonfinite="skip")
    assert strict((tmp_path / "skip/metrics.json").read_text())["skipped_steps"] == 2
    assert [event["step"] for event in events(tmp_path / "skip", "skipped")] == [2, 3]
    assert all(each.isfinite().all() for each in load_file(tmp_path / "skip/model.safetensors").values())
