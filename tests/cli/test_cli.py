"""The command line: exit statuses, one-line errors, ``info`` and the demo."""

import errno
import json
import os
import re

import command_server
import pytest
import torch
from commands import TRAIN, python

from fused_attn import __version__, _extension, cli
from fused_attn.train.log import RunLog

SMALL = [*TRAIN, "--epochs", "1"]


@pytest.fixture
def failing(capsys):
    """Runs a command that must fail; returns its status and what it wrote to stderr."""

    def run(*arguments):
        try:
            status = cli.main([str(argument) for argument in arguments])
        except SystemExit as stop:  # how tyro ends on an option that it cannot read
            status = stop.code
        errors = capsys.readouterr().err
        assert "Traceback" not in errors
        return status, errors

    return run


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "wrn_10_x"], "model wrn_10_x: name must be a registered model, got 'wrn_10_x': did you mean"),
        (["--model", "wrn_10_1", "--dataset", "imagenet"], "dataset must be one of digits, cifar10, .* got 'imagenet'"),
        (["--model", "wrn_10_1", "--model-options", "depht=3"], "wrn_10_1 has no option 'depht'; its options are"),
        (["--model", "wrn_10_1", "--model-options", "relative"], "model_options must be KEY=VALUE, got 'relative'"),
        (["--model", "wrn_10_1", "--batch-size", "0"], "batch_size must be at least 1, got 0"),
        (["--model", "wrn_10_1", "--recipe", "best"], "recipe must be one of wrn, .* got 'best'"),
        (["--model", "wrn_10_1", "--resume"], "--resume: out must hold a checkpoint"),
    ],
)
def test_what_cannot_be_is_said_in_one_line(one_line, tmp_path, arguments, message):
    status, errors = one_line(*SMALL, "--out", tmp_path / "run", *arguments)
    assert status == 2
    assert re.search(message, errors), errors
    assert not (tmp_path / "run/config.json").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--learning-rate", "1"], "--learning-rate"),
        (["--lr", "fast"], "fast"),
        (["--optimizer", "lion"], "lion"),
        (["--impl", "fastest"], "fastest"),
    ],
)
def test_options_that_are_not_there_or_malformed(failing, tmp_path, arguments, message):
    status, errors = failing(*SMALL, "--model", "wrn_10_1", "--out", tmp_path / "run", *arguments)
    assert status == 2
    assert message in errors
    assert not (tmp_path / "run").exists()


def test_commands_that_are_not_there(failing, capsys):
    status, errors = failing("trian")
    assert status == 2
    commands = "train, reproduce, inspect, demo, bench, scales, convert, info"
    assert errors.startswith(f"fused-attn: error: the command must be one of {commands}, got 'trian'")
    assert failing()[0] == 2
    assert cli.main(["--help"]) == 0
    assert {"train", "reproduce", "inspect", "demo", "bench", "scales", "convert", "info"} <= set(
        capsys.readouterr().out.split()
    )


def test_required_options_are_named(failing):
    status, errors = failing("train", "--model", "wrn_10_1")
    assert status == 2
    assert "--dataset" in errors
    assert "--out" in errors


def test_missing_data_folder(failing, tmp_path):
    status, errors = failing(
        "train", "--model", "wrn_10_1", "--dataset", "cifar10", "--data-dir", tmp_path / "no", "--out", tmp_path / "run"
    )
    assert status == 2
    assert errors.startswith("fused-attn: error: data_dir must be a folder with the data set's Parquet files")


def test_train_ends_with_its_results_and_refuses_the_folder_afterwards(failing, tmp_path, capsys):
    arguments = [*SMALL, "--model", "wrn_10_1", "--out", str(tmp_path / "run"), "--data-note", "tiny digits"]
    assert cli.main(arguments) == 0
    metrics = json.loads((tmp_path / "run/metrics.json").read_text())
    assert metrics["data"] == "tiny digits"
    last = capsys.readouterr().out.splitlines()[-1]
    assert f"test_accuracy {metrics['test_accuracy']:.4f}" in last
    status, errors = failing(*arguments)
    assert status == 2
    assert "out must be a new or empty folder" in errors
    assert json.loads((tmp_path / "run/metrics.json").read_text()) == metrics


def test_a_recipe_gives_defaults_that_options_override(tmp_path):
    # One step of the recipe of another model: its optimiser and schedule, these options' sizes.
    options = ["--recipe", "replication-resnet34", "--model", "wrn_10_1", "--validation", "16", "--max-steps", "1"]
    status = cli.main([*SMALL, *options, "--out", str(tmp_path / "run")])
    assert status == 0
    config = json.loads((tmp_path / "run/metrics.json").read_text())["config"]
    schedule = config["optimizer"], config["lr"], config["schedule"], config["milestones"]
    assert schedule == ("adam", 1e-3, "step", [80, 120, 160])
    assert (config["model"], config["validation"], config["epochs"]) == ("wrn_10_1", 16, 1)


def test_a_log_that_cannot_be_written_is_an_error_of_one_line(failing, tmp_path, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(RunLog, "write", full)
    status, errors = failing(*SMALL, "--model", "wrn_10_1", "--out", tmp_path / "run")
    assert status == 1
    assert "fused-attn: error: " in errors.splitlines()[-1]
    assert "No space left" in errors.splitlines()[-1]


def test_a_summary_without_an_evaluation_ends_with_the_time(tmp_path, capsys):
    options = ["--model", "wrn_10_1", "--eval-every", "0", "--out", str(tmp_path / "run")]
    assert cli.main([*SMALL, *options]) == 0
    assert re.search(r"/run: 2 steps in \d+ s$", capsys.readouterr().out.splitlines()[-1])


@pytest.mark.parametrize(
    "arguments",
    [
        ["info"],
        ["--help"],
        ["train", "--help"],
        [*SMALL, "--model", "wrn_10_1", "--out", "run"],
        ["bench", "squeeze_excite", "--providers", "cpu", "--seconds", "0", "--shape", "B=1,C=8,H=2,W=2,hidden=2"],
    ],
    ids=" ".join,
)
def test_a_reader_that_closes_early_ends_a_command_quietly(tmp_path, arguments):
    status, errors = command_server.run(*arguments, cwd=tmp_path, stdout="closed")
    assert status == 141, errors
    assert "roken" not in errors
    assert "Traceback" not in errors
    assert "Exception ignored" not in errors


def test_a_reader_of_everything_that_closes_early(tmp_path):
    """As in ``fused-attn train ... 2>&1 | head``."""
    for command in ([*SMALL, "--model", "wrn_10_1", "--out", "run"], ["trian"]):
        status, _ = command_server.run(*command, cwd=tmp_path, stdout="closed", stderr="closed")
        assert status == 141


@pytest.mark.parametrize("arguments", [["info"], ["train", "--help"]], ids=" ".join)
def test_output_on_a_full_disk_is_an_error_of_one_line(tmp_path, arguments):
    status, errors = command_server.run(*arguments, cwd=tmp_path, stdout="/dev/full")
    assert status == 1
    assert errors == "fused-attn: error: [Errno 28] No space left on device\n"


def test_a_broken_pipe_that_is_not_the_output_is_an_error(failing, tmp_path, monkeypatch):
    def broken(*args, **kwargs):
        raise BrokenPipeError(errno.EPIPE, os.strerror(errno.EPIPE))

    monkeypatch.setattr(RunLog, "write", broken)
    status, errors = failing(*SMALL, "--model", "wrn_10_1", "--out", tmp_path / "run")
    assert status == 1
    assert errors.splitlines()[-1] == "fused-attn: error: [Errno 32] Broken pipe"


def test_info_says_what_auto_runs_and_why_not_the_rest(capsys):
    from fused_attn.ops import SPECS

    assert cli.main(["info"]) == 0
    text = capsys.readouterr().out
    assert f"fused-attn {__version__}, torch {torch.__version__}" in text
    assert (_extension.cpu_capability() if _extension.available() else _extension.reason()) in text
    for spec in SPECS:
        inputs = spec.samples[0].inputs(torch.float32, "cpu")
        reasons = {name: spec.reason(name, inputs) for name in spec.implementations}
        chosen = next(name for name, reason in reasons.items() if reason is None)
        assert f"{spec.name}: auto runs {chosen!r}" in text
        for reason in filter(None, reasons.values()):
            assert f"cannot run: {reason}" in text


@pytest.mark.skipif(not _extension.available(), reason="the demo compares the C++ kernels")
def test_demo_in_its_smoke_mode(tmp_path):
    process = python("-m", "fused_attn.cli", "demo", "--smoke", "--out", tmp_path / "demo", cwd=tmp_path)
    assert process.returncode == 0, process.stderr
    comparison = json.loads((tmp_path / "demo/comparison.json").read_text())
    assert comparison["seconds"]["cpu"] < comparison["seconds"]["reference"]
    assert comparison["peak_bytes"]["cpu"] < comparison["peak_bytes"]["reference"]
    # Eager PyTorch holds the attention map: B x heads x N x N floats.
    assert comparison["peak_bytes"]["reference"] > 8 * 8 * 1024 * 1024 * 4
    assert f"{comparison['seconds']['cpu'] * 1e3:.1f} ms" in process.stdout
    for name in ("curves.png", "comparison.png"):
        assert (tmp_path / "demo" / name).read_bytes().startswith(b"\x89PNG")


def test_version(capsys):
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"fused-attn {__version__}\n"
