"""``fused-attn inspect``: the panels are what the network computes, and what cannot be drawn is said in one line."""

import json
import re
import shutil

import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image
from torch import nn

from fused_attn import attention_maps, cli, create_model
from fused_attn.cli import draw_attention
from fused_attn.cli.draw_elementwise import draw, trace
from fused_attn.maps import AttentionMap
from fused_attn.modules import RelPosAttention2d
from fused_attn.train import TrainConfig, augment, data, train
from fused_attn.train.checkpoint import write_weights

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
    assert cli.main(["inspect", str(run), "--image", "4", "--out", str(tmp_path / "other.png")]) == 0
    assert torch.equal(seen[0][1], seen[1][1])
    assert not torch.equal(seen[0][1], seen[2][1])


def test_a_model_is_drawn_without_a_run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["inspect", "attention_wise_b"]) == 0
    assert capsys.readouterr().out == "attention_wise_b.png\n"
    assert (tmp_path / "attention_wise_b.png").stat().st_size > 20_000


def test_a_picture_is_replaced_where_that_is_asked_for(tmp_path, one_line):
    out = tmp_path / "a.png"
    out.write_text("mine")
    status, _ = one_line("inspect", "attention_wise_b", "--out", out)
    assert (status, out.read_text()) == (2, "mine")
    assert cli.main(["inspect", "attention_wise_b", "--out", str(out), "--overwrite"]) == 0
    assert out.read_bytes().startswith(b"\x89PNG")


# --- attention over positions -----------------------------------------------------------------------------------------


@pytest.fixture
def drawn(monkeypatch):
    """What is drawn: layers, image, path, title, head."""
    seen, original = [], draw_attention.draw
    monkeypatch.setattr(draw_attention, "draw", lambda *args: seen.append(args) or original(*args))
    return seen


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A network of which an attention layer has been made to look at the left, and its weights in a file."""
    model = create_model("aa_wrn_10_1", in_chans=1, image_size=32).eval()
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, RelPosAttention2d):
                module.rel_w.mul_(5)
    file = tmp_path_factory.mktemp("weights") / "weights.safetensors"
    write_weights(file, model.state_dict())
    return model, file


def test_the_rows_of_the_point_in_the_trained_network_are_drawn(trained, drawn, tmp_path):
    model, file = trained
    out = tmp_path / "a.png"
    arguments = ["aa_wrn_10_1", "--checkpoint", str(file), "--point", "0.3", "0.6", "--image", "5", "--out", str(out)]
    assert cli.main(["inspect", *arguments]) == 0
    assert out.stat().st_size > 20_000
    ((layers, image, path, title, head),) = drawn
    config = TrainConfig("aa_wrn_10_1", "digits", out=tmp_path)
    normalize = augment.build(config, data.of_run(config))[1]
    with torch.no_grad(), attention_maps(model, points=[(0.3, 0.6)]) as expected:
        logits = model(normalize(image))
    assert (path, head, len(layers)) == (out, None, 3)
    for layer, same in zip(layers, expected, strict=True):
        assert torch.equal(layer.weights, same.weights)
        size = layer.weights.shape[-1]
        assert layer.queries.tolist() == [[int(0.3 * size), int(0.6 * size)]]
    assert title.startswith("aa_wrn_10_1, digits, test image 5, point 0.3 0.6: class ")
    assert title.endswith(f"predicted {int(logits.argmax())}")


@pytest.mark.parametrize(("mode", "size"), [("RGB", (50, 40)), ("L", (32, 32)), ("RGBA", (20, 60))])
def test_an_image_file_is_drawn(drawn, tmp_path, mode, size):
    """A white cross in its middle, which is still there after cutting and resizing, on black."""
    picture = Image.new(mode, size, "black")
    middle = size[0] // 2, size[1] // 2
    picture.paste(Image.new(mode, (8, 8), "white"), (middle[0] - 4, middle[1] - 4))
    picture.save(tmp_path / "in.png")
    arguments = ["aa_wrn_10_1", "--file", str(tmp_path / "in.png"), "--head", "2", "--out", str(tmp_path / "a.png")]
    assert cli.main(["inspect", *arguments]) == 0
    ((_, image, _, title, head),) = drawn
    assert image.shape == (1, 1, 32, 32)
    assert (float(image[0, 0, 16, 16]), float(image[0, 0, 1, 1])) == (1.0, 0.0)
    assert head == 2
    assert title.startswith("aa_wrn_10_1, in.png, point 0.5 0.5: predicted ")
    assert "class" not in title


def test_a_run_of_a_windowed_network_is_drawn(drawn, tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.json").write_text(json.dumps(TrainConfig("swin_cifar", "digits", out=run).as_json()))
    write_weights(run / "model.safetensors", create_model("swin_cifar", in_chans=1, image_size=32).state_dict())
    assert cli.main(["inspect", str(run), "--point", "1", "0"]) == 0
    assert (run / "inspect.png").stat().st_size > 20_000
    ((layers, image, *_),) = drawn
    assert 0 <= image.min() < image.max() <= 1  # as it is seen, not normalised
    assert [layer.queries.tolist()[0] for layer in layers][:1] == [[layers[0].weights.shape[3] - 1, 0]]
    torch.testing.assert_close(layers[0].weights.sum((-2, -1)), torch.ones(1, 2, 1))


def test_panels_show_the_weights_over_the_image_and_the_position(tmp_path, monkeypatch):
    figures = []
    monkeypatch.setattr(Figure, "savefig", lambda self, path, **options: figures.append(self))
    weights = torch.rand(1, 2, 1, 2, 4)
    layer = AttentionMap("one", "rel_attention_2d", torch.tensor([[1, 3]]), weights, None)
    draw_attention.draw([layer], torch.rand(1, 3, 8, 16), tmp_path / "a.png", "title")
    shown, first, second = figures[0].subfigs[0].axes
    assert len(shown.images) == 1
    for axes, values in ((first, weights[0, 0, 0]), (second, weights[0, 1, 0])):
        assert torch.equal(torch.from_numpy(axes.images[1].get_array().data), values)
        assert axes.images[1].get_extent() == axes.images[0].get_extent() == [0, 16, 8, 0]
        assert axes.images[1].get_clim() == (0, float(values.max()))
        assert axes.patches[0].get_bbox().bounds == (12, 4, 4, 4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["runs/none"], "source must be the folder of a run or the name of a model, got 'runs/none': no such folder"),
        (["attention_wise_z"], "model attention_wise_z: name must be a registered model"),
        (
            ["wrn_10_1"],
            "model wrn_10_1: there must be attention over positions in it, .* or element-wise attention layers",
        ),
        (["attention_wise_b", "--head", "8"], "head must be from 0 to 7, got 8"),
        (["attention_wise_b", "--image", "360"], "image must be from 0 to 359, .* got 360"),
        (["attention_wise_b", "--image", "-1"], "image must be from 0 to 359, .* got -1"),
        (["attention_wise_b", "--out", "none/a.png"], "out must be a file in a folder that exists, got none/a.png"),
        (["attention_wise_b", "--out", "there"], "out must be a new file, got there, which --overwrite replaces"),
        (["aa_wrn_10_1", "--head", "8"], "model aa_wrn_10_1: head must be from 0 to 7, got 8"),
        (["aa_wrn_10_1", "--point", "0.5"], r"point must be two numbers, y and x, got \(0.5,\)"),
        (["aa_wrn_10_1", "--point", "0.5", "1.5"], r"point must be in \[0, 1\] each, got \(0.5, 1.5\)"),
        (
            ["aa_wrn_10_1", "--image", "1", "--file", "a.png"],
            "image is of the test set and must not be given with file",
        ),
        (["aa_wrn_10_1", "--file", "none.png"], "the image none.png could not be read"),
        (["aa_wrn_10_1", "--file", "there"], "the image there could not be read"),
        (["aa_wrn_10_1", "--checkpoint", "there"], "checkpoint must be a .safetensors file or the folder of a run"),
        (
            ["aa_wrn_10_1", "--checkpoint", "{run}"],
            "checkpoint must be a .safetensors file, got the folder .* a source",
        ),
        (["aa_wrn_10_1", "--checkpoint", "{run}/model.safetensors"], "checkpoint: the weights in .* not be loaded"),
        (["{run}", "--checkpoint", "{run}"], "checkpoint belongs to a model without a run"),
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
    (tmp_path / "there").write_text("a file")
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
    assert (tmp_path / "there").read_text() == "a file"
    assert not list(tmp_path.glob("*.png"))
