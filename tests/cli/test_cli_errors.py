"""What a user can get wrong in any command: one line ``fused-attn: error: ...``, before the work, no traceback."""

import dataclasses
import json
import re

import pytest
import torch
from commands import TRAIN

from fused_attn import cli
from fused_attn.train import TrainConfig, applies, data, loop

SMALL = [*TRAIN, "--max-steps", "1"]
WRN, AUGMENTED = ["--model", "wrn_10_1"], ["--model", "aa_wrn_10_1"]


@pytest.fixture(autouse=True)
def _here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("text")
    (tmp_path / "folder").mkdir()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([*WRN, "--model-options", "num_classes=3"], "model_options must not have num_classes"),
        ([*WRN, "--model-options", "in_chans=3"], "model_options must not have in_chans"),
        ([*WRN, "--model-options", "image_size=3"], "model_options must not have image_size"),
        ([*WRN, "--model-options", "name=x"], "model wrn_10_1: "),
        ([*AUGMENTED, "--model-options", "heads=0"], "model aa_wrn_10_1: heads must be at least 1, got 0"),
        ([*AUGMENTED, "--model-options", "heads=many"], "model aa_wrn_10_1: "),
        ([*AUGMENTED, "--model-options", "attention_stages=5"], "model aa_wrn_10_1: "),
        ([*AUGMENTED, "--model-options", "heads=" + "(" * 500], "model aa_wrn_10_1: "),
        (
            ["--model", "resnet20", "--model-options", "features_only=True"],
            r"model resnet20 must give \(B, 10\) logits, got a list for one image",
        ),
        (["--model", "wrn_" + "9" * 5000 + "_1"], "model wrn_9+"),
        ([*WRN, "--crop-padding", "9"], "crop_padding must be at most 8, the size of the images, got 9"),
        ([*WRN, "--data-dir", "file"], "data_dir"),
        ([*WRN, "--init-from", ""], "init_from: . must hold model.safetensors or a checkpoint, found neither"),
        ([*WRN, "--init-from", "file"], "init_from must be a .safetensors file or the folder of a run, got file"),
    ],
)
def test_settings_of_training(one_line, tmp_path, arguments, message):
    status, errors = one_line(*SMALL, "--out", "run", *arguments)
    assert status == 2
    assert re.search(message, errors), errors
    assert not (tmp_path / "run/config.json").exists()


HUB = ["--dataset", "owner/name"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--crop-scale", "0.5"], "crop_scale: it is for images that stay in their files; those of digits are cropped"),
        ([*HUB, "--crop-padding", "2"], "crop_padding: it is for images in memory; those of owner/name stay in their"),
        (
            ["--dataset", "imagefolder", "--crop-padding", "0"],
            "crop_padding: it is for images in memory; those of image",
        ),
        (["--dataset", "synthetic", "--skip-unreadable"], "skip_unreadable: synthetic has no image files; got True"),
        (["--optimizer", "adam", "--momentum", "0.8"], "momentum: it is of SGD, and Adam has none; got 0.8"),
        (
            ["--recipe", "sa-resnet", "--optimizer", "adam", "--nesterov"],
            "nesterov: it is of SGD, and Adam has none; got True",
        ),
        (["--milestones", "3", "5"], r"milestones: it is of the schedule step, not of cosine; got \(3, 5\)"),
        (["--schedule", "constant", "--gamma", "0.5"], "gamma: it is of the schedule step, not of constant; got 0.5"),
        (["--recipe", "wrn", "--schedule", "cosine", "--gamma", "0.5"], "gamma: it is of the schedule step, not of co"),
        (
            ["--eval-every", "0", "--eval-batch-size", "7"],
            "eval_batch_size: nothing is evaluated with eval_every 0; got 7",
        ),
    ],
)
def test_options_that_have_no_say(one_line, tmp_path, arguments, message):
    status, errors = one_line(*SMALL, *WRN, "--out", "run", *arguments)
    assert status == 2
    assert re.search(f"error: {message}", errors), errors
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "changes",
    [
        {"optimizer": "adam"},
        {"optimizer": "adam", "momentum": 0.0, "nesterov": False},
        {"optimizer": "adam", "attention_optimizer": "sgd", "momentum": 0.8},
        {"schedule": "step", "milestones": (1, 2), "gamma": 0.5},
        {"dataset": "imagefolder", "crop_scale": 0.5, "skip_unreadable": True},
        {"dataset": "owner/name", "image_size": None, "crop_padding": 2},
        {"dataset": "cifar10", "crop_padding": 2, "skip_unreadable": True},
        {"eval_every": 0},
        # Of a recipe, not given: the model or the data, the optimizer and the schedule may be others.
        {"recipe": "replication-wrn", "milestones": (18, 36, 48), "schedule": "cosine"},
        {
            "recipe": "attention-wise",
            "dataset": "imagefolder",
            "crop_padding": 0,
            "eval_batch_size": 1000,
            "eval_every": 0,
        },
        {"recipe": "of another version"},
    ],
)
def test_options_that_have_a_say_or_are_not_given(tmp_path, changes):
    settings = {"model": "wrn_10_1", "dataset": "digits", "out": tmp_path, "image_size": 8, **changes}
    applies.check(TrainConfig(**settings))


def test_a_run_with_such_an_option_is_resumed(one_line, tmp_path, capsys):
    """Those of earlier versions may have one; a new one is refused."""
    assert cli.main([*SMALL, *WRN, "--out", "run"]) == 0
    path = tmp_path / "run/config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "crop_scale": 0.5, "eval_batch_size": 9}))
    capsys.readouterr()
    resumed = ["train", "--resume", "--out", "run", "--max-steps", "2"]
    assert one_line(*resumed, "--skip-unreadable") == (
        2,
        "fused-attn: error: skip_unreadable: digits has no image files; got True\n",
    )
    assert cli.main(resumed) == 0


def test_a_data_set_of_one_class(one_line, tmp_path, monkeypatch):
    whole = data.load("digits", image_size=8)
    monkeypatch.setattr(data, "load", lambda *args, **kwargs: dataclasses.replace(whole, num_classes=1))
    status, errors = one_line(*SMALL, *WRN, "--out", "run")
    assert status == 2
    assert "dataset digits must have at least 2 classes, got 1" in errors
    assert not (tmp_path / "run/config.json").exists()


WORK = {
    "train": [*SMALL, *WRN],
    "demo": ["demo", "--smoke"],
    "inspect": ["inspect", "attention_wise_b"],
    "scales": ["scales", "folder"],
    "bench": ["bench", "squeeze_excite", "--seconds", "0", "--no-memory", "--shape", "B=1,C=8,H=2,W=2,hidden=2"],
    "bench networks": ["bench", "networks", "--seconds", "0", "--model", "aa_wrn_10_1", "--batch-size", "2"],
    "convert": ["convert", "--model", "timm:test_vit"],
}


@pytest.mark.parametrize("command", WORK)
@pytest.mark.parametrize("out", ["file", "file/below", "/proc", "/proc/below"])
def test_results_that_could_not_be_written(one_line, monkeypatch, command, out):
    """Said before anything is trained or measured."""

    def worked(*args, **kwargs):
        raise AssertionError("it began to work")

    monkeypatch.setattr(data, "load", worked)
    monkeypatch.setattr("fused_attn.bench.command.measure_ceilings", worked)
    monkeypatch.setattr("fused_attn.bench.networks._Networks.run", worked)
    monkeypatch.setattr("fused_attn.cli.convert_model.Subject", worked)
    status, errors = one_line(*WORK[command], "--out", out)
    assert status == 2
    assert re.search(r"error: out[ :]", errors), errors


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("inspect attention_wise_b --out folder", "out must be a file in a folder that exists, got folder"),
        ("inspect attention_wise_b --dataset=", "dataset must be one of"),
        ("inspect attention_wise_b --head -1", "head must be from 0 to 7, got -1"),
        ("inspect file", "model file: name must be a registered model"),
        ("scales --out s", "runs must name at least one folder, got none"),
        ("scales folder folder --out s", "runs must have different names, got folder, folder"),
        ("scales folder --out s", "runs must be folders of finished runs, got folder"),
        ("bench none", "op must be one of"),
        ("bench squeeze_excite --shape=", "shape must be KEY=NUMBER"),
        (
            "bench squeeze_excite --shape B=1,C=8",
            "with the keys B, C, H, W, hidden and, if wanted, n; H, W, hidden missing in 'B=1,C=8'",
        ),
        ("bench squeeze_excite --shape B=0,C=8,H=2,W=2,hidden=2", "positive numbers; got 'B=0'"),
        ("bench squeeze_excite --shape B=9999999999999999999,C=8,H=2,W=2,hidden=2", "shape must have sizes with a"),
        ("bench squeeze_excite --pass=", "pass must be some of fwd,bwd,both, got ''"),
        ("bench networks --model=", "model must be an aa_wrn model, got ''"),
        ("bench networks --coverage", "coverage must be some of"),
        ("bench networks --coverage x", "coverage must be some of"),
    ],
)
def test_settings_of_the_other_commands(one_line, arguments, message):
    status, errors = one_line(*arguments.split())
    assert status == 2
    assert message in errors


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        MemoryError("Unable to allocate 9 TiB for an array"),
        torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 9 TiB"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:127] err == 0.\nDefaultCPUAllocator: can't allocate memory"),
    ],
)
def test_memory_that_is_not_there_is_the_machines_failure(one_line, monkeypatch, error):
    def build(config, dataset):
        raise error

    monkeypatch.setattr(loop, "build_optimizers", build)
    status, errors = one_line(*SMALL, *WRN, "--out", "run")
    assert status == 1
    assert "memory" in errors or "allocate" in errors


def test_an_error_of_our_own_keeps_its_traceback(tmp_path, monkeypatch):
    def build(config, dataset):
        raise RuntimeError("a bug")

    monkeypatch.setattr(loop, "build_optimizers", build)
    with pytest.raises(RuntimeError, match="a bug"):
        cli.main([*SMALL, *WRN, "--out", str(tmp_path / "run")])


def test_allocation_of_this_machine_is_recognised(one_line, monkeypatch):
    """The text that PyTorch has for it."""
    monkeypatch.setattr(loop, "build_optimizers", lambda config, network: torch.empty(2**58, dtype=torch.uint8))
    status, _ = one_line(*SMALL, *WRN, "--out", "run")
    assert status == 1


@pytest.mark.parametrize("name", ["iterdir", "open"])
def test_folders_without_rights(one_line, tmp_path, monkeypatch, name):
    """The tests may run as root, whom no folder refuses."""

    def refused(*args, **kwargs):
        raise PermissionError(13, "Permission denied")

    if name == "open":
        monkeypatch.setattr("fused_attn.train.folder.open", refused, raising=False)
    else:
        monkeypatch.setattr("pathlib.Path.iterdir", refused)
    status, errors = one_line(*SMALL, *WRN, "--out", "folder")
    assert status == 2
    assert re.search("error: out: folder cannot be (read|written into) .*Permission denied", errors), errors
