"""Runs that go on: saved before they are evaluated, started again before their first checkpoint, and made longer."""

import json
import math

import pytest
from runs import assert_same_results, assert_same_weights, contents, events, killed, stopped
from safetensors.torch import load_file

from fused_attn.train import TrainError, checkpoint, loop, train
from fused_attn.train.optim import learning_rate

SETTINGS = {"train_images": 128, "epochs": 3, "ema": 0.9, "rotate": 5.0, "checkpoint_every": 3}  # 4 steps an epoch


def steps_saved(folder):
    return [checkpoint.step_of(path) for path in checkpoint.find(folder / "checkpoints")]


@pytest.fixture(scope="module")
def whole(tmp_path_factory, small):
    out = tmp_path_factory.mktemp("whole") / "run"
    train(small(out, **SETTINGS))
    return out


@pytest.mark.parametrize("epoch", [1, 3])
def test_an_evaluation_that_fails_costs_no_step(small, tmp_path, whole, epoch):
    """As an image that cannot be read makes it fail; the resumed run evaluates, and its log is whole."""
    original = loop.Run.evaluate

    def evaluate(run, images, split):
        if run.step == 4 * epoch:
            raise TrainError("the image x.jpg could not be read")
        return original(run, images, split)

    failing = loop.Run, "evaluate", evaluate, TrainError, "could not be read"
    stopped(small(tmp_path / "run", **SETTINGS), *failing)
    assert steps_saved(tmp_path / "run")[-1] == 4 * epoch
    stopped(small(tmp_path / "run", **SETTINGS, resume=True), *failing)
    train(small(tmp_path / "run", **SETTINGS, resume=True))
    assert_same_results(tmp_path / "run", whole)


def test_killed_between_the_line_in_the_log_and_the_next_step(small, tmp_path, whole):
    original = loop.RunLog.summarise

    def summarise(log):
        original(log)
        if len(log.events("epoch")) == 2:
            raise MemoryError

    stopped(small(tmp_path / "run", **SETTINGS), loop.RunLog, "summarise", summarise, MemoryError)
    train(small(tmp_path / "run", **SETTINGS, resume=True))
    assert_same_results(tmp_path / "run", whole)  # one line for each epoch


def test_a_training_image_that_cannot_be_read_costs_no_step(small, tmp_path, whole):
    original, seen = loop.data.in_memory, []

    def in_memory(parts):
        if run_of_training := len(parts[0]) == 32:
            seen.append(run_of_training)
        if len(seen) == 6:
            raise TrainError("the image x.jpg could not be read")
        return original(parts)

    stopped(small(tmp_path / "run", **SETTINGS), loop.data, "in_memory", in_memory, TrainError, "could not be read")
    assert steps_saved(tmp_path / "run")[-1] == 5
    train(small(tmp_path / "run", **SETTINGS, resume=True))
    assert_same_results(tmp_path / "run", whole)


@pytest.fixture
def killed_early(small, tmp_path):
    """Folder of a run that ended before its first checkpoint, in step 3."""
    killed(small(tmp_path / "run", **SETTINGS), 2)
    assert not steps_saved(tmp_path / "run")
    return tmp_path / "run"


def test_a_run_without_a_checkpoint_begins_again(small, killed_early, capsys, whole):
    train(small(killed_early, **SETTINGS, resume=True))
    assert "has no checkpoint yet: starting from the beginning" in capsys.readouterr().out
    assert_same_results(killed_early, whole)
    assert [event["step"] for event in events(killed_early)] == list(range(1, 13))


def test_a_run_without_a_checkpoint_has_its_settings(small, killed_early):
    with pytest.raises(TrainError, match=r"--resume: lr of the run in .* is 0.1, got 0.2"):
        train(small(killed_early, **SETTINGS, resume=True, lr=0.2))


def test_what_a_killed_process_was_writing_is_no_run(small, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run/.config.json.writing").write_text("{")
    train(small(tmp_path / "run", max_steps=1))


# --- longer -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("schedule", ["constant", "step"])
@pytest.mark.parametrize("shorter", [{"epochs": 2}, {"max_steps": 6}])
def test_a_finished_run_is_extended_to_the_longer_one(small, tmp_path, schedule, shorter):
    settings = {**SETTINGS, "schedule": schedule, "eval_every": 3}
    if schedule == "step":
        settings["milestones"] = (1, 2)
    train(small(tmp_path / "whole", **settings))
    train(small(tmp_path / "run", **{**settings, **shorter}))
    metrics = train(small(tmp_path / "run", **settings, resume=True))
    ours, whole = (load_file(tmp_path / name / "model.safetensors") for name in ("run", "whole"))
    assert_same_weights(ours, whole)
    assert events(tmp_path / "run", "epoch")[-1] == events(tmp_path / "whole", "epoch")[-1]
    (extension,) = metrics["extended"]
    step = 8 if "epochs" in shorter else 6
    assert extension == {
        "step": step,
        "from": {"epochs": 3, "max_steps": None, **shorter},
        "to": {"epochs": 3, "max_steps": None},
    }


def test_the_cosine_of_an_extended_run_is_that_of_the_new_length(small, tmp_path, capsys):
    shorter = small(tmp_path / "run", **{**SETTINGS, "epochs": 2})
    train(shorter)
    before = {name: (tmp_path / "run" / name).read_bytes() for name in ("metrics.json", "model.safetensors")}
    longer = small(tmp_path / "run", **{**SETTINGS, "epochs": 4}, resume=True)
    rates = [f"{learning_rate(config, 8, 4):.4g}" for config in (shorter, longer)]
    run = loop.Run(longer)
    said = capsys.readouterr().out
    assert "epochs 2 -> 4" in said
    assert f"the cosine schedule is now that of the longer run: learning rate {rates[0]} -> {rates[1]}" in said
    # Until the new end the results of the old one stay.
    assert before == {name: (tmp_path / "run" / name).read_bytes() for name in before}
    run.lock.close()
    train(longer)
    logged = [event["lr"] for event in events(tmp_path / "run")]
    lengths = [shorter] * 8 + [longer] * 8
    assert logged == [learning_rate(config, step, 4) for step, config in enumerate(lengths)]
    assert json.loads((tmp_path / "run/metrics.json").read_text())["steps"] == 16


def test_killed_at_the_new_end_before_the_metrics(small, tmp_path):
    """metrics.json is that of the shorter run: the longer one is not complete yet."""
    settings = {**SETTINGS, "schedule": "constant"}
    train(small(tmp_path / "run", **{**settings, "epochs": 2}))
    longer = small(tmp_path / "run", **settings, resume=True)
    stopped(longer, loop.Run, "_finish", lambda *args: 1 / 0, ZeroDivisionError)
    assert train(longer)["steps"] == 12
    with pytest.raises(TrainError, match="is complete at step 12"):
        train(longer)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"epochs": 2}, "--resume: epochs of the run in .* may only grow from 3, got 2"),
        (
            {"max_steps": 5},
            "--resume: epochs and max_steps must allow the 12 steps that .*step-00000012 has, got 5",
        ),
        ({"init_from": "other.safetensors"}, "--resume: init_from of the run in .* is None, got 'other.safetensors'"),
    ],
)
def test_a_run_does_not_get_shorter(small, whole, changes, message):
    before = contents(whole)
    with pytest.raises(TrainError, match=message):
        train(small(whole, **{**SETTINGS, **changes}, resume=True))
    assert contents(whole) == before


def test_a_run_without_a_limit_gets_one(small, tmp_path, capsys):
    """Beyond the steps done; up to there it is the run without, and it can be taken away again."""
    train(small(tmp_path / "whole", **SETTINGS))
    stopped(small(tmp_path / "run", **SETTINGS), loop.Run, "evaluate", lambda *args: 1 / 0, ZeroDivisionError)
    metrics = train(small(tmp_path / "run", **SETTINGS, resume=True, max_steps=6))
    assert metrics["steps"] == 6
    assert "max_steps None -> 6" in capsys.readouterr().out
    with pytest.raises(TrainError, match=r"max_steps of the run in .* may only grow from 6, got 5"):
        train(small(tmp_path / "run", **SETTINGS, resume=True, max_steps=5))
    train(small(tmp_path / "run", **SETTINGS, resume=True))
    ours, whole = (load_file(tmp_path / name / "model.safetensors") for name in ("run", "whole"))
    assert_same_weights(ours, whole)


def test_settings_that_an_older_config_does_not_know_have_their_defaults(small, tmp_path, whole):
    run = tmp_path / "run"
    run.mkdir()
    saved = json.loads((whole / "config.json").read_text())
    del saved["label_smoothing"]
    (run / "config.json").write_text(json.dumps(saved))
    with pytest.raises(TrainError, match=r"label_smoothing .* is 0.0, got 0.1"):
        train(small(run, **SETTINGS, resume=True, label_smoothing=0.1))


def test_an_evaluation_without_training_statistics_is_null(small, tmp_path):
    """The checkpoint of an older version had none; a line that was removed from its log is written again."""
    run = loop.Run(small(tmp_path / "run", **SETTINGS))
    run.bar = loop.tqdm(disable=True)
    run.step = 4
    results = run._evaluate({})
    run.lock.close()
    assert results["train_loss"] is None
    assert math.isfinite(results["test_loss"])
