"""Folders of runs that someone edited, copied or damaged: each is one line that names the file, never a traceback."""

import json
import re
import shutil

import pytest
import runs
import torch
from safetensors.torch import load_file, save_file

from fused_attn import cli
from fused_attn.train import TrainError, checkpoint, train
from fused_attn.train.config import saved_config
from fused_attn.train.log import RunLog


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Two of four steps done."""
    out = tmp_path_factory.mktemp("runs") / "run"
    runs.killed(runs.small(out, train_images=64, epochs=2, ema=0.5), 3)
    return out


@pytest.fixture
def copy(run, tmp_path):
    shutil.copytree(run, tmp_path / "run")
    return tmp_path / "run"


@pytest.fixture
def resumed(copy, one_line):
    """Resumes a spoiled copy; returns the one line that it must end with."""

    def resume(*arguments):
        before = runs.contents(copy)
        status, errors = one_line("train", "--resume", "--out", copy, *arguments)
        assert status == 2
        assert before == runs.contents(copy)
        return errors

    return resume


def edited(folder, **changes):
    saved = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**saved, **changes}))


# --- config.json ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"[1, 2]", "config.json must hold a JSON object, got list"),
        (b'"text"', "config.json must hold a JSON object, got str"),
        (b"3", "config.json must hold a JSON object, got int"),
        (b"null", "config.json must hold a JSON object, got NoneType"),
        (b"{", "config.json cannot be read"),
        (b"", "config.json cannot be read"),
        (b"\xff\xfe\x00", "config.json cannot be read"),
        (b"[" * 100_000, "config.json cannot be read .*nested too deeply"),
        (b'{"lr": ' + b"9" * 5000 + b"}", "config.json cannot be read"),
        (b"{}", "config.json must name the run's dataset and model"),
    ],
)
@pytest.mark.parametrize("command", ["train", "inspect", "scales"])
def test_config_of_another_kind(copy, one_line, content, message, command):
    (copy / "config.json").write_bytes(content)
    arguments = {
        "train": ["--resume", "--out", copy],
        "inspect": [copy],
        "scales": [copy, "--out", copy.parent / "scales"],
    }
    status, errors = one_line(command, *arguments[command])
    assert status == 2
    assert re.search(message, errors), errors


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lr": "0.1"}, "config.json: lr must be a number, got '0.1'"),
        ({"lr": None}, "config.json: lr must be a number, got None"),
        ({"lr": float("nan")}, "config.json: lr must be a number, got None"),
        ({"epochs": 1.5}, "config.json: epochs must be an integer, got 1.5"),
        ({"epochs": True}, "config.json: epochs must be an integer, got True"),
        ({"seed": -1}, "config.json: seed must be at least 0, got -1"),
        ({"milestones": 3}, "config.json: milestones must be a list of which each is an integer, got 3"),
        ({"milestones": [[1]]}, "config.json: milestones must be a list of which each is an integer"),
        ({"model": ["wrn_10_1"]}, "config.json: model must be a text, got "),
        ({"data_dir": 3}, "config.json: data_dir must be a path, or nothing, got 3"),
        ({"flip": "yes"}, "config.json: flip must be true or false, or nothing, got 'yes'"),
        ({"mixup": 0.2}, "config.json has settings that this version does not know: mixup"),
    ],
)
def test_settings_of_another_kind(copy, resumed, changes, message):
    edited(copy, **changes)
    assert re.search(message, resumed())


def test_kept_results_have_settings_that_this_version_reads():
    from pathlib import Path

    kept = sorted((Path(__file__).parents[2] / "benchmarks/results").rglob("config.json"))
    assert len(kept) > 10
    for path in kept:
        assert saved_config(path.parent, "kept").model


def test_a_folder_without_a_run(tmp_path, capsys):
    assert cli.main(["train", "--resume", "--out", str(tmp_path)]) == 2
    assert "--resume: out must hold a checkpoint, found none in" in capsys.readouterr().err


# --- log.jsonl --------------------------------------------------------------------------------------------------

STEP = '{"event": "step", "step": 1, "epoch": 0.5, "loss": 2.3, "lr": 0.1}'


@pytest.mark.parametrize(
    "line",
    [
        "[1]",
        '"step"',
        "3",
        "{}",
        '{"event": 3, "step": 1}',
        '{"event": "step", "step": "1", "epoch": 0.5, "loss": 2.3, "lr": 0.1}',
        '{"event": "step", "step": 1, "epoch": 0.5, "loss": "2.3", "lr": 0.1}',
        '{"event": "step", "step": 1, "epoch": 0.5, "lr": 0.1}',
        '{"event": "epoch", "step": 2, "epoch": 1.0, "seconds": 1.0, "test_loss": [1]}',
        '{"event": "epoch", "step": 2}',
        '{"event": "step", "step": 1, "ep',
        "\x00\x00\x00",
    ],
)
def test_a_line_of_the_log_that_is_no_event(copy, resumed, line):
    (copy / "log.jsonl").write_text(f"{STEP}\n{line}\n{STEP}\n")
    assert re.search("log.jsonl, line 2 must be a logged event, got .*; remove the line", resumed())


def test_bytes_in_the_log(copy, resumed):
    (copy / "log.jsonl").write_bytes(STEP.encode() + b"\n\xff\xfe\n")
    assert re.search("log.jsonl, line 2 must be a logged event", resumed())


def test_a_last_line_that_a_crash_cut_short_is_left_out(copy):
    (copy / "log.jsonl").write_text(f'{STEP}\n\n{{"event": "step", "st')
    assert [event["step"] for event in RunLog(copy).events()] == [1]
    train(saved_config(copy, "copy", resume=True))
    assert [event["step"] for event in RunLog(copy).events("step")] == [1, 3, 4]


def test_numbers_that_an_older_version_logged_as_nan_are_null(copy):
    (copy / "log.jsonl").write_text(STEP.replace("2.3", "NaN") + "\n")
    assert RunLog(copy).events()[0]["loss"] is None


# --- checkpoints ------------------------------------------------------------------------------------------------


def rewritten(folder, weights=None, **changes):
    """Replace what is in the newest checkpoint, with right checksums."""
    path = checkpoint.find(folder / "checkpoints")[-1]
    if weights is not None:
        save_file(weights, path / "model.safetensors")
    state = torch.load(path / "state.pt", weights_only=True)
    state.update({name: value for name, value in changes.items() if value is not ...})
    for name in [name for name, value in changes.items() if value is ...]:
        del state[name]
    runs.rewritten(path, state)


def test_a_checkpoint_of_another_model(copy, resumed):
    other = {"weight": torch.zeros(3)}
    rewritten(copy, weights=other)
    assert re.search("checkpoint .*step-00000002 cannot be read .*state_dict.*; remove it to begin again", resumed())


@pytest.mark.parametrize(
    "changes",
    [
        {"step": ...},
        {"step": "many"},
        {"step": -4},
        {"seconds": float("nan")},
        {"optimizer": ...},
        {"optimizer": {}},
        {"optimizer": {"state": {}, "param_groups": []}},
        {"optimizer": 3},
        {"totals": torch.zeros(2)},
        {"totals": 3},
        {"skipped": "some"},
        {"extended": 3},
        {"length": 3},
        {"scaler": ...},
        {"data": 3},
        {"data": {}},
    ],
)
def test_a_state_of_another_kind(copy, resumed, changes):
    rewritten(copy, **changes)
    assert re.search("checkpoint .*step-00000002 cannot be read ", resumed())


def test_momentum_of_other_parameters(copy, resumed):
    path = checkpoint.find(copy / "checkpoints")[-1]
    optimizer = torch.load(path / "state.pt", weights_only=True)["optimizer"]
    optimizer["state"][0]["momentum_buffer"] = torch.zeros(3)
    rewritten(copy, optimizer=optimizer)
    assert re.search("step-00000002 cannot be read .*optimizer is that of other parameters", resumed())


def test_an_average_that_is_missing(copy, resumed):
    path = checkpoint.find(copy / "checkpoints")[-1]
    (path / "ema.safetensors").unlink()
    rewritten(copy)
    assert re.search("step-00000002 cannot be read ", resumed())


def test_a_state_that_is_no_dict(copy, resumed):
    path = checkpoint.find(copy / "checkpoints")[-1]
    runs.rewritten(path, [1])
    assert re.search("step-00000002 cannot be read .*must hold a dict, got list", resumed())


@pytest.mark.parametrize("sums", ["{}", "[]", "3", '{"state.pt": 3}'])
def test_checksums_that_leave_a_file_out(copy, resumed, sums):
    (checkpoint.find(copy / "checkpoints")[-1] / "checksums.json").write_text(sums)
    assert re.search("step-00000002 cannot be read ", resumed())


def test_a_copy_of_a_checkpoint_is_none(copy):
    newest = checkpoint.find(copy / "checkpoints")[-1]
    shutil.copytree(newest, newest.with_name("step-00000009.bak"))
    (newest.parent / "step-00000010").write_text("a file")
    (newest.parent / "step-x").mkdir()
    assert checkpoint.find(copy / "checkpoints") == [newest]


def test_checkpoints_are_in_the_order_of_their_steps(tmp_path):
    for step in (99_999_999, 100_000_000):
        (tmp_path / f"step-{step:08d}").mkdir()
    assert [checkpoint.step_of(path) for path in checkpoint.find(tmp_path)] == [99_999_999, 100_000_000]


# --- weights and metrics of runs that have ended ----------------------------------------------------------------


@pytest.fixture(scope="module")
def gated(tmp_path_factory):
    out = tmp_path_factory.mktemp("gated") / "run"
    train(runs.small(out, model="se_resnet34", train_images=64, max_steps=1, model_options=("width=8",)))
    return out


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda file, weights: file.write_bytes(b"damaged"), "the weights in .* could not be loaded"),
        (lambda file, weights: file.write_bytes(file.read_bytes()[:5000]), "the weights in .* could not be loaded"),
        (lambda file, weights: save_file({"a": torch.zeros(1)}, file), "could not be loaded .*state_dict"),
        (
            lambda file, weights: save_file({**weights, "fc.bias": weights["fc.bias"] * float("nan")}, file),
            "must be finite, got inf or nan in fc.bias",
        ),
        (lambda file, weights: file.unlink(), "must hold model.safetensors, found none"),
    ],
)
def test_scales_of_damaged_weights(gated, tmp_path, one_line, spoil, message):
    shutil.copytree(gated, tmp_path / "run")
    file = tmp_path / "run/model.safetensors"
    spoil(file, load_file(file))
    status, errors = one_line("scales", tmp_path / "run", "--images", "2", "--out", tmp_path / "out")
    assert status == 2
    assert re.search(f"^fused-attn: error: runs.*{message}", errors), errors


def test_scales_of_a_stage_that_is_not_there(gated, tmp_path, capsys):
    assert cli.main(["scales", str(gated), "--images", "2", "--stage", "9", "--out", str(tmp_path / "out")]) == 2
    assert "stage must be one with squeeze-excite layers in these networks, got 9" in capsys.readouterr().err


@pytest.mark.parametrize("content", ["[]", "{", '{"steps": "1"}', "{}"])
def test_metrics_that_are_damaged_are_written_again(gated, tmp_path, content):
    shutil.copytree(gated, tmp_path / "run")
    (tmp_path / "run/metrics.json").write_text(content)
    metrics = train(saved_config(tmp_path / "run", "copy", resume=True))
    assert metrics["steps"] == json.loads((tmp_path / "run/metrics.json").read_text())["steps"] == 1
    with pytest.raises(TrainError, match="is complete at step 1"):
        train(saved_config(tmp_path / "run", "copy", resume=True))
