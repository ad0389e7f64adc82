"""``fused-attn inspect``: the panels are what the network computes, and what cannot be drawn is said in one line."""

import json
import re
import shutil

import pytest
import torch
from torch import nn

from fused_attn import cli, create_model
from fused_attn.cli.draw_elementwise import draw, trace
from fused_attn.train import TrainConfig, train

NAMES = [
    "input",
    "x weights",
    "input · x weights",
    "softmax of its rows",
    "y weights",
    "input · y weights",
    "softmax of its columns",
    "product of the softmaxes",
    "before convolution",
    "after convolution",
    "after skip",
    "after batch norm",
    "after ReLU",
]


@pytest.mark.parametrize("batch_norm", [True, False])
def test_panels_are_steps_of_the_network(batch_norm):
    model = create_model("attention_wise", in_chans=2, heads=3, image_size=(5, 6), batch_norm=batch_norm).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.5)
    image, head = torch.randn(1, 2, 5, 6), 1
    with torch.no_grad():
        layers, logits = trace(model, image, head)
        torch.testing.assert_close(logits, model(image))
        x = image
        for block, panels in zip(model.layers, layers, strict=True):
            assert list(panels) == [name for name in NAMES if batch_norm or name != "after batch norm"]
            values = {name: value for name, (_, value) in panels.items()}
            assert all(value.shape == (2, 5, 6) for value in values.values())
            torch.testing.assert_close(values["input"], x[0])
            assert torch.equal(values["x weights"], block.attention.weight_row[head])
            assert torch.equal(values["y weights"], block.attention.weight_col[head])
            torch.testing.assert_close(values["softmax of its rows"].sum(2), torch.ones(2, 5))
            torch.testing.assert_close(values["softmax of its columns"].sum(1), torch.ones(2, 6))
            # Fresh statistics, mean 0 and variance 1: the head's output is the product times the input.
            product = values["product of the softmaxes"]
            torch.testing.assert_close(values["before convolution"], product * x[0], rtol=1e-4, atol=1e-6)
            convolved = block.conv(block.attention(x))
            torch.testing.assert_close(values["after convolution"], convolved[0])
            torch.testing.assert_close(values["after skip"], (convolved + x)[0])
            x = block(x)
            torch.testing.assert_close(values["after ReLU"], x[0])


@pytest.mark.parametrize("channels", [1, 2, 3])
def test_pictures_of_grey_and_coloured_images(tmp_path, channels):
    model = create_model("attention_wise_a", in_chans=channels, image_size=8).eval()
    with torch.no_grad():
        layers, _ = trace(model, torch.zeros(1, channels, 8, 8))  # constant panels too
    draw(layers, tmp_path / "a.png", "title")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "run"
    settings = {"image_size": 8, "train_images": 64, "batch_size": 32, "epochs": 1, "threads": 1}
    train(TrainConfig("attention_wise_one_head", "digits", out=out, ema=0.5, normalize=False, **settings))
    return out


def test_a_run_is_drawn_with_the_weights_that_it_ended_with_or_saved_last(finished, tmp_path, monkeypatch):
    seen = []
    original = trace
    monkeypatch.setattr("fused_attn.cli.draw_elementwise.trace", lambda *args: seen.append(original(*args)) or seen[-1])
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    config = json.loads((run / "config.json").read_text())
    (run / "config.json").write_text(json.dumps({**config, "impl": "triton"}))  # trained on a GPU
    assert cli.main(["inspect", str(run), "--image", "3"]) == 0
    assert (run / "inspect.png").read_bytes().startswith(b"\x89PNG")
    (run / "model.safetensors").unlink()
    assert cli.main(["inspect", str(run), "--image", "3", "--out", str(tmp_path / "own.png")]) == 0
    assert (tmp_path / "own.png").exists()
    assert cli.main(["inspect", str(run), "--image", "4"]) == 0
    assert torch.equal(seen[0][1], seen[1][1])
    assert not torch.equal(seen[0][1], seen[2][1])


def test_a_model_is_drawn_without_a_run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["inspect", "attention_wise_b"]) == 0
    assert capsys.readouterr().out == "attention_wise_b.png\n"
    assert (tmp_path / "attention_wise_b.png").stat().st_size > 20_000


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["runs/none"], "source must be the folder of a run or the name of a model, got 'runs/none': no such folder"),
        (["attention_wise_z"], "model attention_wise_z: name must be a registered model"),
        (["wrn_10_1"], "model wrn_10_1: there must be element-wise attention layers in it"),
        (["attention_wise_b", "--head", "8"], "head must be from 0 to 7, got 8"),
        (["attention_wise_b", "--image", "360"], "image must be from 0 to 359, .* got 360"),
        (["attention_wise_b", "--image", "-1"], "image must be from 0 to 359, .* got -1"),
        (["attention_wise_b", "--out", "none/a.png"], "out must be a file in a folder that exists, got none/a.png"),
        (["attention_wise_b", "--dataset", "letters"], "dataset must be one of"),
        (["{run}", "--dataset", "digits"], "dataset belongs to a model without a run"),
        (["{empty}"], "must hold a run, with its config.json"),
        (["{unsaved}"], "must hold model.safetensors or a checkpoint, found neither"),
        (["{other}"], "the weights in .* could not be loaded .*state_dict"),
        (["{damaged}"], "the weights in .* could not be loaded"),
    ],
)
def test_what_cannot_be_drawn_is_said_in_one_line(finished, tmp_path, monkeypatch, one_line, arguments, message):
    monkeypatch.chdir(tmp_path)
    for name in ("empty", "unsaved", "other", "damaged"):
        (tmp_path / name).mkdir()
    for name in ("unsaved", "other", "damaged"):
        config = json.loads((finished / "config.json").read_text())
        config["model"] = "attention_wise_b" if name == "other" else config["model"]
        (tmp_path / name / "config.json").write_text(json.dumps(config))
    shutil.copy(finished / "model.safetensors", tmp_path / "other")
    (tmp_path / "damaged/model.safetensors").write_bytes(b"damaged")
    places = {"run": finished, **{name: tmp_path / name for name in ("empty", "unsaved", "other", "damaged")}}
    status, errors = one_line("inspect", *(argument.format(**places) for argument in arguments))
    assert status == 2
    assert re.search(message, errors), errors
    assert not list(tmp_path.glob("*.png"))
