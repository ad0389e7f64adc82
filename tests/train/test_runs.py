"""Whole runs: what a step computes, killing and resuming, several processes."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
import torch.nn.functional as F
from runs import (
    COMPARED,
    PLAIN,
    TORCHRUN,
    assert_same_results,
    assert_same_weights,
    contents,
    events,
    killed,
    linear,
    stopped,
    two_processes,
)
from safetensors.torch import load_file
from torch import nn

from fused_attn import create_model
from fused_attn.train import TrainError, augment, checkpoint, data, folder, loop, train
from fused_attn.train.optim import learning_rate

# --- what a step computes ---------------------------------------------------------------------------------------


@pytest.fixture
def linear_model(monkeypatch):
    monkeypatch.setattr(loop, "build_network", linear)


def test_run_is_the_training_loop_written_by_hand(small, tmp_path, linear_model):
    config = small(tmp_path / "run", **PLAIN, label_smoothing=0.1, warmup_epochs=0.5, clip_norm=0.5, ema=0.8)
    train(config)

    digits = data.load("digits", image_size=8)
    _, normalize = augment.build(config, digits)
    model = linear(config, digits)
    average = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0, momentum=0.9, nesterov=True, weight_decay=5e-4)
    losses = []
    for epoch in range(2):
        for batch in data.epoch_batches(data.take(digits.train, 200), 32, 0, epoch):
            optimizer.param_groups[0]["lr"] = learning_rate(config, len(losses), 6)
            logits = model(normalize(batch.images.float() / 255.0))
            targets = F.one_hot(batch.labels, 10) * 0.9 + 0.01
            loss = -(targets * logits.log_softmax(1)).sum(1).mean()
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 0.5)
            optimizer.step()
            losses.append(loss.item())
            for name, tensor in model.state_dict().items():  # the average starts at the first weights it sees
                average[name] = tensor.clone() if len(losses) == 1 else 0.8 * average[name] + 0.2 * tensor
    weights, _ = checkpoint.load(checkpoint.find(tmp_path / "run/checkpoints")[-1])
    torch.testing.assert_close(weights["model"], model.state_dict())
    torch.testing.assert_close(load_file(tmp_path / "run/model.safetensors"), average)
    assert [record["loss"] for record in events(tmp_path / "run")] == pytest.approx(losses, rel=1e-5)


class WithAuxiliary(nn.Module):
    """A classifier and two auxiliary ones, which share its first layer."""

    def __init__(self):
        super().__init__()
        self.first = nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.Tanh())
        self.fc = nn.Linear(16, 10)
        self.auxiliary = nn.ModuleList(nn.Linear(16, 10) for _ in range(2))

    def forward(self, x):
        x = self.first(x)
        return (self.fc(x), [layer(x) for layer in self.auxiliary]) if self.training else self.fc(x)


def with_auxiliary(config, dataset):
    torch.manual_seed(3)
    return WithAuxiliary()


def test_auxiliary_losses_are_added_with_their_weights(small, tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "build_network", with_auxiliary)
    config = small(tmp_path / "run", **PLAIN, aux_weights=(0.3, 0.2), label_smoothing=0.1)
    metrics = train(config)

    digits = data.load("digits", image_size=8)
    _, normalize = augment.build(config, digits)
    model = with_auxiliary(config, digits)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0, momentum=0.9, nesterov=True, weight_decay=5e-4)
    losses = []
    for epoch in range(2):
        for batch in data.epoch_batches(data.take(digits.train, 200), 32, 0, epoch):
            optimizer.param_groups[0]["lr"] = learning_rate(config, len(losses), 6)
            logits, (aux1, aux2) = model(normalize(batch.images.float() / 255.0))
            main, one, two = (F.cross_entropy(out, batch.labels, label_smoothing=0.1) for out in (logits, aux1, aux2))
            loss = main + 0.3 * one + 0.2 * two
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    torch.testing.assert_close(load_file(tmp_path / "run/model.safetensors"), model.state_dict())
    assert [record["loss"] for record in events(tmp_path / "run")] == pytest.approx(losses, rel=1e-5)
    with torch.no_grad():
        logits = model.eval()(normalize(digits.test.images.float() / 255.0))
    assert metrics["test_loss"] == pytest.approx(F.cross_entropy(logits, digits.test.labels).item(), rel=1e-5)


@pytest.mark.parametrize("weights", [(), (0.3,), (0.3, 0.2, 0.1)])
def test_every_auxiliary_classifier_needs_a_weight(small, tmp_path, monkeypatch, weights):
    monkeypatch.setattr(loop, "build_network", with_auxiliary)
    expected = (
        f"aux_weights must hold one weight for each of the 2 auxiliary classifiers of wrn_10_1, got {len(weights)}"
    )
    with pytest.raises(TrainError, match=expected):
        train(small(tmp_path / "run", aux_weights=weights))


def test_weights_without_auxiliary_classifiers_are_refused(small, tmp_path):
    with pytest.raises(TrainError, match="each of the 0 auxiliary classifiers of wrn_10_1, got 1"):
        train(small(tmp_path / "run", aux_weights=(0.3,)))


def test_accumulated_parts_are_one_batch(small, tmp_path, linear_model):
    train(small(tmp_path / "whole", **PLAIN))
    train(small(tmp_path / "parts", **PLAIN, accumulate=4))
    whole, parts = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "parts"))
    torch.testing.assert_close(parts, whole)
    losses = [[record["loss"] for record in events(tmp_path / name)] for name in ("whole", "parts")]
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)


def test_validation_images_are_not_trained_on_and_the_test_set_is_read_at_the_end(small, tmp_path, monkeypatch):
    seen = []
    original = loop.Run._step

    def step(run, parts):
        seen.extend(part.images for part in parts)
        original(run, parts)

    monkeypatch.setattr(loop.Run, "_step", step)
    metrics = train(small(tmp_path / "run", train_images=None, validation=600, epochs=2))
    _, held = data.hold_out(data.load("digits", image_size=8).train, 600)
    trained = {bytes(image.numpy()) for images in seen for image in images}
    held_out = {bytes(image.numpy()) for image in held.images}
    assert len(trained) > 700
    assert not trained & held_out
    epochs = [
        json.loads(line) for line in (tmp_path / "run/log.jsonl").read_text().splitlines() if "validation_" in line
    ]
    assert ["test_loss" in epoch for epoch in epochs] == [False, True]
    assert {"train_accuracy", "validation_accuracy", "test_accuracy"} <= metrics.keys()


def check_metrics_are_those_of_its_weights(config, metrics):
    digits = data.load("digits", image_size=8)
    _, normalize = augment.build(config, digits)
    model = create_model(config.model, in_chans=1, image_size=8)
    model.load_state_dict(load_file(config.out / "model.safetensors"))
    with torch.no_grad():
        logits = model.eval()(normalize(digits.test.images.float() / 255.0))
    assert metrics["test_loss"] == pytest.approx(F.cross_entropy(logits, digits.test.labels).item(), rel=1e-4)
    assert metrics["test_accuracy"] == pytest.approx((logits.argmax(1) == digits.test.labels).double().mean().item())


def test_run_learns_and_its_metrics_are_those_of_its_weights(small, tmp_path):
    config = small(tmp_path / "run", train_images=None, epochs=5, model="aa_wrn_10_1", lr=0.05, crop_padding=0)
    metrics = train(config)
    assert metrics["test_accuracy"] > 0.9
    check_metrics_are_those_of_its_weights(config, metrics)
    assert json.loads((tmp_path / "run/metrics.json").read_text()) == json.loads(json.dumps(metrics))
    assert metrics["environment"]["torch"] == torch.__version__
    assert metrics["config"]["lr"] == 0.05
    assert (tmp_path / "run/curves.png").read_bytes().startswith(b"\x89PNG")
    assert len((tmp_path / "run/log.csv").read_text().splitlines()) == 6


def test_lower_precision_changes_little(small, tmp_path):
    full = train(small(tmp_path / "full", epochs=2))
    half = train(small(tmp_path / "half", epochs=2, mixed_precision="bf16"))
    assert half["train_loss"] == pytest.approx(full["train_loss"], rel=0.05)
    assert half["train_loss"] != full["train_loss"]
    weights = load_file(tmp_path / "half/model.safetensors").values()
    assert {tensor.dtype for tensor in weights if tensor.is_floating_point()} == {torch.float32}


# --- stopping and resuming --------------------------------------------------------------------------------------

#: Everything random at once: dropout in network and attention, crops, rotation; several epochs; an average.
RANDOM = {
    "model": "aa_wrn_10_1",
    "model_options": ("dropout=0.1", "attention_dropout=0.1"),
    "train_images": 128,
    "batch_size": 16,
    "epochs": 8,
    "rotate": 10.0,
    "flip": True,
    "ema": 0.9,
    "checkpoint_every": 5,
}


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory, small):
    """Folder of the 64 steps of RANDOM in one go."""
    out = tmp_path_factory.mktemp("uninterrupted") / "run"
    train(small(out, **RANDOM))
    return out


def assert_same_run(folder, reference):
    ours, theirs = (checkpoint.load(checkpoint.find(out / "checkpoints")[-1]) for out in (folder, reference))
    for stem, weights in theirs[0].items():
        assert_same_weights(ours[0][stem], weights)
    for mine, other in zip(
        ours[1]["optimizer"]["state"].values(), theirs[1]["optimizer"]["state"].values(), strict=True
    ):
        assert torch.equal(mine["momentum_buffer"], other["momentum_buffer"])
    assert events(folder) == events(reference)
    assert_same_results(folder, reference)


def command_line(out):
    options = {name: value for name, value in RANDOM.items() if name not in ("flip", "model_options")}
    flags = [text for name, value in options.items() for text in (f"--{name.replace('_', '-')}", value)]
    options = ["--model-options", *RANDOM["model_options"]]
    fixed = ["--dataset", "digits", "--image-size", 8, "--log-every", 1, "--threads", 1, "--flip", "True"]
    return ["-m", "fused_attn.cli", "train", "--out", out, *flags, *fixed, *options]


def wait_for_steps(process, folder, count):
    while process.poll() is None:
        if (folder / "log.jsonl").exists() and (folder / "log.jsonl").read_text().count('"event": "step"') >= count:
            return
        time.sleep(0.002)
    pytest.fail(f"the run did not reach step {count}: {process.communicate()[1]}")


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_stopped_from_outside_and_resumed_is_bitwise_the_same_run(small, command, tmp_path, uninterrupted, number):
    folder = tmp_path / "run"
    process = command(*command_line(folder))
    wait_for_steps(process, folder, 13)
    process.send_signal(number)
    _, errors = process.communicate()
    saved = [int(path.name.removeprefix("step-")) for path in checkpoint.find(folder / "checkpoints")]
    logged = [record["step"] for record in events(folder)]
    assert saved[-1] < 64, "it was not stopped in time"
    if number == signal.SIGKILL:
        assert process.returncode == -signal.SIGKILL
        assert logged[-1] >= saved[-1] >= 10
    else:
        assert process.returncode == 130
        assert f"--resume --out {folder}" in errors
        assert "Traceback" not in errors
        assert saved[-1] == logged[-1]  # nothing is lost
    train(small(folder, **RANDOM, resume=True))
    assert_same_run(folder, uninterrupted)


def test_sigterm_saves_at_once(small, tmp_path, uninterrupted):
    folder = tmp_path / "run"
    original = loop.RunLog.write

    def write(log, event, **fields):
        original(log, event, **fields)
        if fields["step"] == 7:
            os.kill(os.getpid(), signal.SIGTERM)

    handlers = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    stopped(small(folder, **RANDOM), loop.RunLog, "write", write, KeyboardInterrupt)
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == handlers
    assert [path.name for path in checkpoint.find(folder / "checkpoints")] == ["step-00000005", "step-00000007"]
    train(small(folder, **RANDOM, resume=True))
    assert_same_run(folder, uninterrupted)


def test_two_optimizers_step_at_their_own_rates_and_resume_bitwise(small, tmp_path):
    """The appendix of the element-wise attention paper; momentum and Adam's moments are in the checkpoint."""
    settings = {
        "model": "attention_wise_a",
        "optimizer": "adam",
        "lr": 1e-3,
        "attention_optimizer": "sgd",
        "attention_lr": 0.1,
        "normalize": False,
        "accumulate": 2,
        "clip_norm": 1.0,
        "checkpoint_every": 3,
        "max_steps": 7,
    }
    train(small(tmp_path / "whole", **settings))
    original = loop.Run._step
    rates = []

    def step(run, parts):
        if run.step == 5:
            raise MemoryError
        original(run, parts)
        rates.append([optimizer.param_groups[0]["lr"] for optimizer in run.optimizers.values()])

    stopped(small(tmp_path / "parts", **settings), loop.Run, "_step", step, MemoryError)
    schedule = [learning_rate(small(tmp_path, **settings), number, 8) for number in range(5)]
    assert rates == [[rate, pytest.approx(100 * rate)] for rate in schedule]
    train(small(tmp_path / "parts", **settings, resume=True))
    (ours, mine), (theirs, other) = (
        checkpoint.load(checkpoint.find(tmp_path / name / "checkpoints")[-1]) for name in ("parts", "whole")
    )
    assert_same_weights(ours["model"], theirs["model"])
    for name, key in (("optimizer", "exp_avg_sq"), ("attention_optimizer", "momentum_buffer")):
        assert len(other[name]["state"]) > 0
        for one, two in zip(mine[name]["state"].values(), other[name]["state"].values(), strict=True):
            assert torch.equal(one[key], two[key])
    assert events(tmp_path / "parts") == events(tmp_path / "whole")


def test_pixels_are_normalised_or_left_as_they_are(small, tmp_path):
    digits = data.load("digits", image_size=8)
    images = digits.test.images[:4].float() / 255.0
    for normalize, expected in ((True, (images - digits.mean) / digits.std), (False, images)):
        for transform in augment.build(small(tmp_path, normalize=normalize, crop_padding=0), digits):
            torch.testing.assert_close(transform(images), expected)


def test_the_mean_of_every_pixel_goes_before_the_padding(small, tmp_path):
    digits = data.load("digits", image_size=8)
    images = digits.test.images[:4].float() / 255.0
    mean = (digits.train.images.double() / 255.0).mean(0).float()
    _, evaluation = augment.build(small(tmp_path, pixel_mean=True), digits)
    torch.testing.assert_close(evaluation(images), images - mean)
    training, _ = augment.build(small(tmp_path, pixel_mean=True, crop_padding=2, flip=False), digits)
    crops = training(images)
    padded = F.pad(images - mean, (2, 2, 2, 2))
    for image, crop in zip(padded, crops, strict=True):
        windows = [image[:, y : y + 8, x : x + 8] for y in range(5) for x in range(5)]
        assert min(float((crop - window).abs().max()) for window in windows) < 1e-6


def test_the_log_has_the_mean_gradient_of_a_parameter_or_of_a_part_of_it(small, tmp_path, linear_model):
    settings = {**PLAIN, "max_steps": 2, "log_gradient": "1.weight[3]", "clip_norm": 1e-3}
    metrics = train(small(tmp_path / "part", **settings))
    whole = train(small(tmp_path / "whole", **{**settings, "log_gradient": "1.bias"}))
    config = small(tmp_path / "part", **settings)
    digits = data.load("digits", image_size=8)
    model = linear(config, digits)
    batch = next(data.epoch_batches(data.take(digits.train, 200), 32, 0, 0))
    _, normalize = augment.build(config, digits)
    F.cross_entropy(model(normalize(batch.images.float() / 255.0)), batch.labels).backward()
    logged = [event["gradient_mean"] for event in events(tmp_path / "part")]
    assert logged[0] == pytest.approx(float(model[1].weight.grad[3].mean()), rel=1e-4)
    assert metrics["gradient_mean"] == logged[1]
    assert events(tmp_path / "whole")[0]["gradient_mean"] == pytest.approx(float(model[1].bias.grad.mean()), abs=1e-6)
    assert "gradient_mean" in whole


def test_resume_after_the_damaged_checkpoint_is_removed_as_advised(small, tmp_path, uninterrupted):
    folder = tmp_path / "run"
    killed(small(folder, **RANDOM), 17)
    newest = checkpoint.find(folder / "checkpoints")[-1]
    (newest / "model.safetensors").write_bytes(b"damaged")
    log = (folder / "log.jsonl").read_bytes()
    with pytest.raises(TrainError, match=rf"{newest.name} cannot be read .*remove it to resume from step-"):
        train(small(folder, **RANDOM, resume=True))
    assert (folder / "log.jsonl").read_bytes() == log
    for path in newest.iterdir():
        path.unlink()
    newest.rmdir()
    train(small(folder, **RANDOM, resume=True))
    assert_same_run(folder, uninterrupted)


def test_full_disk_stops_the_run_and_it_can_be_resumed(small, tmp_path, uninterrupted):
    folder = tmp_path / "run"
    original = checkpoint.save_file

    def save_file(tensors, path):
        if "00000015" in str(path):
            raise OSError(28, "No space left on device")
        original(tensors, path)

    match = r"step-00000015 could not be written .*No space left.*step-00000010"
    stopped(small(folder, **RANDOM), checkpoint, "save_file", save_file, TrainError, match)
    train(small(folder, **RANDOM, resume=True))
    assert_same_run(folder, uninterrupted)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "wrn_10_1"}, "model .* is 'aa_wrn_10_1', got 'wrn_10_1'"),
        ({"dataset": "synthetic"}, "dataset .* is 'digits', got 'synthetic'"),
        ({"seed": 1}, "seed .* is 0, got 1"),
        ({"batch_size": 32}, "batch_size .* is 16, got 32"),
        ({"model_options": ()}, "model_options .* got "),
    ],
)
def test_resume_with_other_settings_is_refused(small, uninterrupted, changes, message):
    before = contents(uninterrupted)
    with pytest.raises(TrainError, match=message):
        train(small(uninterrupted, **{**RANDOM, **changes}, resume=True))
    assert contents(uninterrupted) == before


def test_folders_that_are_taken_are_refused_and_left_alone(small, tmp_path, uninterrupted):
    before = contents(uninterrupted)
    with pytest.raises(TrainError, match="out must be a new or empty folder"):
        train(small(uninterrupted, **RANDOM))
    with pytest.raises(TrainError, match="is complete at step 64"):
        train(small(uninterrupted, **RANDOM, resume=True))
    assert contents(uninterrupted) == before
    with pytest.raises(TrainError, match="--resume: out must hold a checkpoint, found none"):
        train(small(tmp_path / "nothing", resume=True))
    (tmp_path / "file").write_text("")
    with pytest.raises(TrainError, match="out must be a new or empty folder"):
        train(small(tmp_path / "file"))


def test_a_folder_another_process_writes_into_is_refused(small, tmp_path):
    out = tmp_path / "run"
    out.mkdir()
    hold = (
        f"import fcntl, sys; f = open({str(out / folder.LOCK)!r}, 'w'); "
        "fcntl.lockf(f, fcntl.LOCK_EX); print(flush=True)"
    )
    with subprocess.Popen(
        [sys.executable, "-c", f"{hold}; sys.stdin.read()"], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as other:
        other.stdout.readline()
        with pytest.raises(TrainError, match="out: another process is writing into"):
            train(small(out))
        other.communicate()
    train(small(out, max_steps=2))


def test_killed_after_the_last_checkpoint_and_before_the_metrics(small, tmp_path):
    whole = train(small(tmp_path / "whole"))
    stopped(small(tmp_path / "run"), loop.Run, "_finish", lambda *args: 1 / 0, ZeroDivisionError)
    metrics = train(small(tmp_path / "run", resume=True))
    for name in COMPARED:
        assert metrics[name] == whole[name], name
    assert_same_weights(*(load_file(tmp_path / name / "model.safetensors") for name in ("run", "whole")))


# --- settings that do not fit -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_size": 300}, "batch_size must be at most the 256 training images, got 300"),
        ({"batch_size": 30, "accumulate": 4}, r"batch_size must be a multiple of processes \* accumulate = 4, got 30"),
        ({"log_gradient": "stem.bias"}, "log_gradient must be one of stem.weight, .*, got 'stem.bias'"),
        ({"log_gradient": "stem.weight[16]"}, r"log_gradient must have an index from 0 to 15, got 'stem.weight\[16\]'"),
        ({"log_gradient": "stem.weight[x]"}, "log_gradient must have an index from 0 to 15"),
        ({"train_images": 5000}, "train_images must be at most 1437, got 5000"),
        ({"model": "wrn_11_1"}, "model wrn_11_1: depth .* must be 6n.4"),
        ({"model": "wrm_10_1"}, "model wrm_10_1: name must be a registered model, got 'wrm_10_1': did you mean"),
        ({"model_options": ("depht=3",)}, "model wrn_10_1: wrn_10_1 has no option 'depht'; its options are"),
        ({"dataset": "digitz"}, "dataset must be one of digits, cifar10"),
        ({"model": "aa_wrn_10_1", "impl": "triton"}, "model aa_wrn_10_1: .*impl='triton' cannot run"),
    ],
)
def test_settings_that_do_not_fit(small, tmp_path, changes, message):
    with pytest.raises(TrainError, match=message):
        train(small(tmp_path / "run", **changes))
    assert not (tmp_path / "run/config.json").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"epochs": 0}, "epochs must be at least 1, got 0"),
        ({"max_steps": 0}, "max_steps must be at least 1, got 0"),
        ({"lr": 0.0}, "lr must be above 0"),
        ({"ema": 1.0}, r"ema must be in \[0, 1\)"),
        ({"label_smoothing": -0.1}, "label_smoothing must be in"),
        ({"momentum": 0.0}, "momentum must be above 0 with nesterov"),
        ({"model_options": ("relative",)}, "model_options must be KEY=VALUE, got 'relative'"),
    ],
)
def test_settings_out_of_range(small, tmp_path, changes, message):
    with pytest.raises(TrainError, match=message):
        small(tmp_path, **changes)


# --- several processes ------------------------------------------------------------------------------------------


def test_two_processes_take_the_steps_of_one(small, tmp_path, linear_model):
    train(small(tmp_path / "one", **PLAIN))
    two_processes(tmp_path / "two", accumulate=2)
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "two"))
    torch.testing.assert_close(two, one)
    losses = [[record["loss"] for record in events(tmp_path / name)] for name in ("one", "two")]
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    metrics = [json.loads((tmp_path / name / "metrics.json").read_text()) for name in ("one", "two")]
    assert [metric["processes"] for metric in metrics] == [1, 2]
    for name in ("train_loss", "train_accuracy", "test_loss", "test_accuracy"):
        assert metrics[1][name] == pytest.approx(metrics[0][name], rel=1e-5), name


def test_torchrun_of_the_command_line(small, command, tmp_path):
    folder = tmp_path / "run"
    config = small(folder, batch_size=16, max_steps=20, epochs=2, lr=0.3)
    flags = "--model wrn_10_1 --dataset digits --image-size 8 --train-images 256 --batch-size 16 --max-steps 20 "
    flags += "--epochs 2 --lr 0.3 --log-every 1 --threads 1"
    process = command(*TORCHRUN, "-m", "fused_attn.cli", "train", "--out", folder, *flags.split())
    _, errors = process.communicate()
    assert process.returncode == 0, errors
    assert [record["step"] for record in events(folder)] == list(range(1, 21))
    metrics = json.loads((folder / "metrics.json").read_text())
    assert metrics["processes"] == 2
    # Each process has its own batch statistics; the metrics must be those of the weights that are kept.
    check_metrics_are_those_of_its_weights(config, metrics)
