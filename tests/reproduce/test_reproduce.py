"""Tables from beginning to end, at a scale of seconds: what is there afterwards, and what an interruption leaves."""

import csv
import fcntl
import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import commands
import pytest
import torch
import yaml
from runs import contents

from fused_attn import cli
from fused_attn.reproduce.tables import Tables

GROUPS = ("aa/", "aa-coverage", "sa/", "mrla/", "se-r/", "elementwise/")


def reproduce(*arguments):
    return cli.main(["reproduce", *map(str, arguments)])


@pytest.mark.parametrize("group", GROUPS)
def test_every_table_at_the_scale_of_seconds(group, tmp_path):
    """The first row of each, which many share; that the others are runs, ``test_tables.py`` shows."""
    threads, there = torch.get_num_threads(), set()
    for id in Tables().ids:
        if not id.startswith(group):
            continue
        out, table = tmp_path / id.replace("/", "-"), Tables().table(id, "smoke")
        names = [row.name for row in table.rows]
        ran = names if table.counts else names[-1:] if id == "aa-coverage" else names[:1]
        there |= set() if table.counts else {*ran}
        shared = ["--rows", tmp_path / "rows", "--only", *ran] if not table.counts else []
        assert reproduce(id, "--scale", "smoke", "--out", out, "--threads", threads, "--no-isolate", *shared) == 0, id
        text = (out / "table.md").read_text()
        assert table.title in text
        assert text.count("not complete") == (0 if table.counts else len({*names} - there))
        assert (out / "figure.png").read_bytes().startswith(b"\x89PNG")
        lines = list(csv.DictReader((out / "table.csv").open()))
        assert [(line["row"], line["measure"]) for line in lines] == [
            (name, measure) for name in names for measure in table.measures
        ]
        for line in lines:
            expected = ("1", True) if table.counts or line["row"] in there else ("0", False)
            assert (line["seeds"], bool(line["mean"])) == expected, id
            reported = next(row for row in table.rows if row.name == line["row"]).reported.get(line["measure"])
            assert line["paper"] == ("" if reported is None else str(reported))


ONE = {"model": "wrn_10_1", "dataset": "digits", "image_size": 8, "train_images": 256, "batch_size": 32, "log_every": 1}
MINE = {
    "papers": {"mine": "Nobody, a table of nothing"},
    "groups": {
        "mine": {
            "differs": "everything",
            "settings": {**ONE, "epochs": 4},
            "small": {"note": "half the epochs", "settings": {"epochs": 2}},
            "rows": {
                "plain": {"settings": {}},
                "attention": {"settings": {"model": "aa_wrn_10_1", "model_options": {"heads": 2}}},
                "explodes": {"settings": {"lr": 100000.0, "momentum": 0.0, "nesterov": False}},
            },
        }
    },
    "tables": {
        "mine/all": {
            "title": "All",
            "measures": ["test_accuracy", "train_loss", "parameters"],
            "rows": {"plain": {"test_accuracy": 12.5}, "attention": {}, "explodes": {}},
        },
        "mine/two": {
            "title": "Two",
            "measures": ["test_accuracy", "epoch_loss", "validation_accuracy"],
            "rows": {"plain": {"test_accuracy": 12.5}, "attention": {}},
        },
    },
}


@pytest.fixture
def mine(tmp_path):
    path = tmp_path / "tables.yaml"
    path.write_text(yaml.safe_dump(MINE, sort_keys=False))
    return ["--tables", path, "--threads", 1]


def test_a_row_that_fails_does_not_stop_the_others(mine, tmp_path, capsys):
    out = tmp_path / "out"
    arguments = ["mine/all", "--scale", "small", "--out", out, *mine, "--no-isolate"]
    assert reproduce(*arguments, "--seeds", 2) == 1
    text = (out / "table.md").read_text()
    assert "explodes, seed 0: failed: step " in text
    assert "explodes, seed 1: failed: step " in text
    assert "Nobody, a table of nothing." in text
    assert "Half the epochs." in text
    assert "- epochs: 2 in place of 4" in text
    assert "| plain | 2 | " in text
    assert "| explodes | 0 | - | - | - | - |" in text
    plain = json.loads((out / "plain" / "seed1" / "metrics.json").read_text())
    assert plain["config"]["seed"] == 1
    accuracies = [
        json.loads((out / "plain" / f"seed{seed}" / "metrics.json").read_text())["test_accuracy"] for seed in (0, 1)
    ]
    (line,) = [
        line
        for line in csv.DictReader((out / "table.csv").open())
        if (line["row"], line["measure"]) == ("plain", "test_accuracy")
    ]
    assert float(line["mean"]) == pytest.approx(50 * sum(accuracies))
    assert float(line["standard_deviation"]) == pytest.approx(100 * abs(accuracies[0] - accuracies[1]) / 2**0.5)
    # The table of fewer seeds, or of one row, has all that are there.
    table = (out / "table.csv").read_bytes()
    assert reproduce(*arguments, "--only", "plain") == 0
    assert (out / "table.csv").read_bytes() == table
    # What is there is not run again.
    before = {path: data for path, data in contents(out).items() if "explodes" not in str(path)}
    capsys.readouterr()
    assert reproduce(*arguments, "--seeds", 2, "--only", "plain", "attention") == 0
    assert capsys.readouterr().out.count(": is there") == 4
    after = contents(out)
    changed = {path.name for path, data in before.items() if after[path] != data}
    # The failed rows are not complete, and were not tried.
    assert changed <= {"table.md", "figure.png", "reproduce.json"}
    assert "explodes: not complete: seed 0, 1" in (out / "table.md").read_text()


def test_the_folder_of_another_table_and_rows_of_other_settings(mine, tmp_path, capsys):
    out = tmp_path / "out"
    arguments = ["--scale", "small", *mine, "--no-isolate", "--only", "plain"]
    assert reproduce("mine/two", "--out", out, *arguments) == 0
    before = contents(out)
    assert reproduce("mine/all", "--out", out, *arguments) == 2
    assert f"{out} holds mine/two at the scale small" in capsys.readouterr().err
    assert contents(out) == before
    # The rows may serve another table; but not those of another scale.
    assert reproduce("mine/all", "--out", tmp_path / "all", "--rows", out, *arguments) == 0
    assert "is there" in capsys.readouterr().out
    # The run is that of the shorter scale, which the longer one does not go on with.
    full = ["--scale", "full", *arguments[2:]]
    run = contents(out / "plain")
    assert reproduce("mine/two", "--out", tmp_path / "long", "--rows", out, *full) == 1
    assert "epochs of the run in" in (tmp_path / "long" / "table.md").read_text()
    assert contents(out / "plain") == run
    assert reproduce("mine/all", "--out", tmp_path / "all", *arguments) == 2
    assert f"rows must be given as before, {out}" in capsys.readouterr().err
    changed = yaml.safe_load((tmp_path / "tables.yaml").read_text())
    changed["groups"]["mine"]["settings"]["lr"] = 0.05
    (tmp_path / "tables.yaml").write_text(yaml.safe_dump(changed))
    assert reproduce("mine/all", "--out", tmp_path / "full", "--rows", out, *full) == 1
    assert "lr of the run in" in (tmp_path / "full" / "table.md").read_text()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["sa/table9", "--scale", "small", "--out", "x"], "table must be one of"),
        (["sa/table1", "--out", "x"], "scale must be given"),
        (["sa/table1", "--scale", "small"], "out must be given"),
        (["sa/table1", "--scale", "smoke", "--out", "x", "--only", "ResNet-21"], "only must be of"),
        (["sa/table1", "--scale", "smoke", "--out", "x", "--seeds", "0"], "seeds must be at least 1"),
        (["--tables", "none.yaml"], "cannot be read"),
        (["--only", "ResNet-20"], "only: it is for a table; got ('ResNet-20',)"),
        (["sa/table1", "--scale", "smoke", "--out", "x", "--measure"], "measure: it is for the list; got True"),
        (["sa/table1", "--scale", "smoke", "--out", "x", "--data-dir", "d"], "data_dir: it is for images that must be"),
        (["mrla/counts", "--scale", "full", "--out", "x", "--seeds", "3"], "seeds: it is for a training; got 3"),
        (["--scale", "smoke", "--out", "x"], "scale: it is for a table; got 'smoke'"),
        (["--threads", "1"], "threads: it is for a table; got 1"),
        (
            ["mrla/resnet50", "--scale", "small", "--out", "x"],
            "data_dir must be given: the folder of images of ResNet-50",
        ),
    ],
)
def test_wrong_arguments(arguments, words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert reproduce(*arguments) == 2
    assert words in capsys.readouterr().err
    assert not (tmp_path / "x").exists()


def test_a_count_is_that_of_the_papers_networks_at_every_scale(tmp_path):
    assert reproduce("mrla/counts", "--scale", "smoke", "--out", tmp_path) == 0
    assert "| ResNet-50 | 25.557 | 4.089 |" in (tmp_path / "table.md").read_text()


def test_a_damaged_run_or_one_of_other_data_is_named_and_not_used(mine, tmp_path, capsys):
    arguments = ["mine/two", "--scale", "small", "--out", tmp_path / "out", *mine, "--no-isolate"]
    plain, attention = (tmp_path / "out" / row / "seed0" for row in ("plain", "attention"))
    assert reproduce(*arguments, "--seeds", 2, "--data-note", "digits of a kind") == 0
    good = (plain / "metrics.json").read_text()
    # Numbers that were not finite.
    metrics = json.loads(good)
    (plain / "metrics.json").write_text(json.dumps(metrics | {"test_accuracy": None, "skipped_steps": 5}))
    assert reproduce(*arguments, "--data-note", "digits of a kind") == 0
    text = (tmp_path / "out" / "table.md").read_text()
    assert "| plain | 2 | nan ± nan |" in text
    assert "plain, seed 0: 5 steps without effect left out" in text
    # A run that was made longer, one that is damaged, and other data.
    for changed, words in ((metrics | {"extended": [{"step": 1}]}, "was made longer"), ({}, "is damaged: it lacks")):
        (plain / "metrics.json").write_text(json.dumps(changed))
        assert reproduce(*arguments, "--only", "attention", "--data-note", "digits of a kind") == 0
        text = (tmp_path / "out" / "table.md").read_text()
        assert "plain, seed 0: is there, but not used: " in text
        assert words in text
    assert reproduce(*arguments, "--only", "plain", "--data-note", "digits of a kind") == 1
    (plain / "metrics.json").write_text(good)
    before = contents(attention)
    assert reproduce(*arguments, "--data-note", "other digits") == 1
    assert "data_note of the run in" in capsys.readouterr().out
    assert contents(attention) == before


def test_a_row_that_another_process_runs_is_left_to_it(mine, tmp_path, capsys):
    out = tmp_path / "out"
    (out / "plain" / "seed0").mkdir(parents=True)
    holder = "import fcntl, sys; f = open(sys.argv[1], 'w'); fcntl.lockf(f, fcntl.LOCK_EX); print(flush=True); input()"
    command = [sys.executable, "-c", holder, str(out / "plain" / "seed0" / ".lock")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        process.stdout.readline()
        assert reproduce("mine/two", "--scale", "small", "--out", out, *mine, "--no-isolate", "--only", "plain") == 0
        process.communicate(b"\n")
    assert "plain, seed 0: another process runs it" in capsys.readouterr().out
    assert "plain: not complete: seed 0" in (out / "table.md").read_text()


def start(*arguments):
    command = [sys.executable, "-m", "fused_attn.cli", "reproduce", *map(str, arguments)]
    return subprocess.Popen(command, env=commands.environment(), stdout=subprocess.PIPE, text=True)


def wait_for_steps(process, folder, count):
    log = folder / "log.jsonl"
    while not (log.exists() and log.read_text().count('"step"') > count):
        assert process.poll() is None, "it ended too early"
        time.sleep(0.002)


def test_killed_in_the_middle_of_a_row_and_run_again_is_the_same_table(mine, tmp_path):
    whole, out = tmp_path / "whole", tmp_path / "out"
    arguments = ["mine/two", "--scale", "full", *mine, "--checkpoint-every", 5]
    process = start(*arguments, "--out", out, "--only", "attention")
    wait_for_steps(process, out / "attention" / "seed0", 12)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not (out / "table.csv").exists()
    assert not (out / "attention" / "seed0" / "metrics.json").exists()
    wait_for_lock(out / "attention" / "seed0")
    for folder in (out, whole):
        assert reproduce(*arguments, "--out", folder, "--no-isolate") == 0
    assert (out / "table.csv").read_bytes() == (whole / "table.csv").read_bytes()
    for row in ("plain", "attention"):
        ours, theirs = (folder / row / "seed0" / "model.safetensors" for folder in (out, whole))
        assert ours.read_bytes() == theirs.read_bytes()


def wait_for_lock(folder: Path):
    """Until the process of the row, which notices within a second that it is alone, has saved and ended."""
    end = time.monotonic() + 60
    while time.monotonic() < end:
        with (folder / ".lock").open("r+") as file:
            try:
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return
            except OSError:
                time.sleep(0.05)
    pytest.fail("the process of the row did not end")


def test_an_interruption_keeps_what_is_there(mine, tmp_path):
    out = tmp_path / "out"
    arguments = ["mine/two", "--scale", "full", *mine, "--out", out]
    process = start(*arguments, "--only", "attention")
    wait_for_steps(process, out / "attention" / "seed0", 3)
    process.send_signal(signal.SIGINT)
    printed, _ = process.communicate()
    assert process.returncode == 130
    assert "the same command goes on" in printed
    assert "attention: not complete: seed 0" in (out / "table.md").read_text()
    assert list((out / "attention" / "seed0" / "checkpoints").glob("step-*"))
    assert reproduce(*arguments, "--no-isolate") == 0
    assert "Not in the table" not in (out / "table.md").read_text()
