"""``--init-from``: weights of a file or of another run, never of a pickle, and which tensors do not come from there."""

import hashlib
import json
import re

import pytest
import torch
from commands import TRAIN
from safetensors.torch import load_file, save_file

from fused_attn import create_model
from fused_attn.modules import resize_state_dict
from fused_attn.train import TrainError, checkpoint, loop, train

SETTINGS = {"train_images": 64, "max_steps": 2}


@pytest.fixture(scope="module")
def source(tmp_path_factory, small):
    out = tmp_path_factory.mktemp("source") / "run"
    train(small(out, train_images=64, ema=0.5))
    return out


@pytest.fixture
def at_start(monkeypatch):
    """The weights with which each run begins."""
    seen = []
    original = loop.Run.train

    def run(self):
        seen.append({name: value.clone() for name, value in self.network.state_dict().items()})
        return original(self)

    monkeypatch.setattr(loop.Run, "train", run)
    return seen


def assert_same(one, other, names):
    for name in names:
        assert torch.equal(one[name], other[name]), name


@pytest.mark.parametrize("place", ["", "model.safetensors"])
def test_a_run_begins_with_the_weights_of_a_folder_or_file(small, tmp_path, source, at_start, place):
    metrics = train(small(tmp_path / "run", **SETTINGS, init_from=source / place, seed=5))
    expected = load_file(source / "model.safetensors")
    assert_same(at_start[0], expected, expected)
    digest = hashlib.sha256((source / "model.safetensors").read_bytes()).hexdigest()
    assert metrics["init_from"] == {
        "file": str(source / "model.safetensors"),
        "sha256": digest,
        "left_fresh": [],
        "resized": [],
    }
    assert json.loads((tmp_path / "run/config.json").read_text())["init_from"] == str(source / place)


def test_a_run_that_has_not_ended_gives_the_average_of_its_last_checkpoint(small, tmp_path, source, at_start):
    (tmp_path / "unfinished").mkdir()
    (tmp_path / "unfinished/checkpoints").symlink_to(source / "checkpoints")
    train(small(tmp_path / "run", **SETTINGS, init_from=tmp_path / "unfinished"))
    expected = load_file(source / "model.safetensors")
    assert_same(at_start[0], expected, expected)


def test_a_classifier_of_other_classes_is_freshly_drawn(small, tmp_path, source, at_start, capsys):
    weights = create_model("wrn_10_1", num_classes=7, in_chans=1, image_size=8).state_dict()
    save_file(weights, tmp_path / "seven.safetensors")
    train(small(tmp_path / "fresh", **SETTINGS, seed=5))
    metrics = train(small(tmp_path / "run", **SETTINGS, seed=5, init_from=tmp_path / "seven.safetensors"))
    head = ["fc.weight", "fc.bias"]
    assert metrics["init_from"]["left_fresh"] == head
    assert_same(at_start[1], weights, weights.keys() - set(head))
    assert_same(at_start[1], at_start[0], head)
    assert "freshly drawn: fc.weight, fc.bias" in capsys.readouterr().out


def test_tables_of_another_image_size_are_resized_and_it_is_said(small, tmp_path, at_start, capsys):
    weights = create_model("aa_wrn_10_1", num_classes=7, in_chans=1, image_size=12).state_dict()
    save_file(weights, tmp_path / "larger.safetensors")
    metrics = train(small(tmp_path / "run", **SETTINGS, model="aa_wrn_10_1", init_from=tmp_path / "larger.safetensors"))
    tables = [name for name in weights if name.endswith(("rel_h", "rel_w"))]
    found = metrics["init_from"]
    assert found["left_fresh"] == ["fc.weight", "fc.bias"]
    assert [line.split(" from ")[0] for line in found["resized"]] == tables != []
    assert_same(at_start[0], weights, weights.keys() - {*tables, *found["left_fresh"]})
    network = create_model("aa_wrn_10_1", num_classes=7, in_chans=1, image_size=8)
    assert_same(at_start[0], resize_state_dict(network, weights)[0], tables)
    printed = capsys.readouterr().out
    assert all(f"resized: {name} from " in printed for name in tables)


def test_a_result_fed_back_is_of_its_classes_too(small, tmp_path, at_start):
    weights = create_model("se_r_resnet34", num_classes=7, in_chans=1, image_size=8, width=8).state_dict()
    save_file(weights, tmp_path / "seven.safetensors")
    settings = {**SETTINGS, "model": "se_r_resnet34", "model_options": ("width=8",), "aux_weights": (0.4, 0.4)}
    metrics = train(small(tmp_path / "run", **settings, init_from=tmp_path / "seven.safetensors"))
    fresh = metrics["init_from"]["left_fresh"]
    assert any("fc1" in name for name in fresh)
    assert_same(at_start[0], weights, weights.keys() - set(fresh))
    assert all(weights[name].shape != at_start[0][name].shape for name in fresh)


def test_a_resumed_run_does_not_begin_again(small, tmp_path, source):
    """Not even where the file is gone; and its metrics still say where it began."""
    save_file(load_file(source / "model.safetensors"), tmp_path / "start.safetensors")
    settings = {**SETTINGS, "max_steps": 4, "epochs": 2, "init_from": tmp_path / "start.safetensors"}
    whole = train(small(tmp_path / "whole", **settings))
    train(small(tmp_path / "run", **{**settings, "max_steps": 2}))
    (tmp_path / "start.safetensors").unlink()
    metrics = train(small(tmp_path / "run", **settings, resume=True))
    assert metrics["init_from"] == whole["init_from"]
    ours, theirs = (
        checkpoint.load(checkpoint.find(tmp_path / name / "checkpoints")[-1])[0]["model"] for name in ("run", "whole")
    )
    assert ours.keys() == theirs.keys()


def spoiled(source, tmp_path):
    """Sources that cannot be used, and what is said of each."""
    weights = load_file(source / "model.safetensors")
    float_name = next(name for name, each in weights.items() if each.is_floating_point())
    files = {
        "nan": {**weights, float_name: torch.full_like(weights[float_name], torch.nan)},
        "missing": {name: each for name, each in weights.items() if name != float_name},
        "more": {**weights, "other.weight": torch.zeros(3)},
        "shape": {**weights, float_name: torch.zeros(3)},
        "integers": {**weights, float_name: torch.zeros(weights[float_name].shape, dtype=torch.int8)},
    }
    for name, tensors in files.items():
        save_file(tensors, tmp_path / f"{name}.safetensors")
    (tmp_path / "damaged.safetensors").write_bytes((source / "model.safetensors").read_bytes()[:1000])
    torch.save(weights, tmp_path / "pickle.pt")
    (tmp_path / "empty").mkdir()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("pickle.pt", r"must be a .safetensors file or the folder of a run, .*\(pickled weights are never loaded\)"),
        ("nowhere", "must be a .safetensors file or the folder of a run, got .*nowhere: no such file"),
        ("empty", "must hold model.safetensors or a checkpoint, found neither"),
        ("damaged.safetensors", "the weights in .*damaged.safetensors could not be loaded"),
        ("nan.safetensors", "must be finite, got inf or nan in "),
        ("missing.safetensors", "could not be loaded .*Missing key"),
        ("more.safetensors", "could not be loaded .*Unexpected key.*other.weight"),
        ("shape.safetensors", "could not be loaded .*size mismatch"),
        ("integers.safetensors", "must be torch.float32, got torch.int8"),
    ],
)
def test_what_cannot_be_begun_with_is_said_in_one_line(source, tmp_path, one_line, name, message):
    spoiled(source, tmp_path)
    options = ["--max-steps", "1", "--init-from", tmp_path / name, "--out", tmp_path / "run"]
    status, error = one_line(*TRAIN, "--model", "wrn_10_1", *options)
    assert status == 2
    assert re.search(f"^fused-attn: error: init_from.*{message}", error), error
    assert not (tmp_path / "run/config.json").exists()


def test_the_option_is_a_path_or_nothing(small, tmp_path):
    with pytest.raises(TrainError, match="init_from must be a path, or nothing, got 3"):
        small(tmp_path / "run", init_from=3)
