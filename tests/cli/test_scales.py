"""``fused-attn scales``: deviations are those of the gates, and the command's files hold every layer of every run."""

import json
import re

import pytest
import torch
import torch.nn.functional as F
from commands import TRAIN
from PIL import Image

from fused_attn import cli, create_model
from fused_attn.cli.draw_scales import deviations


@pytest.mark.parametrize("name", ["se_resnet34", "se_r_resnet34"])
def test_deviations_are_those_of_the_gates(name):
    model, images = create_model(name, num_classes=5, width=8).eval(), torch.randn(35, 3, 8, 8)
    found = deviations(model, images)
    assert len(found) == 16
    layer, seen = model.stages[2][1].se, []
    layer.register_forward_pre_hook(lambda module, args, kwargs: seen.append((*args, kwargs)), with_kwargs=True)
    with torch.no_grad():
        model(images)
        x, options = seen[0]
        assert (options["result_share"] is None) == (layer.result_features == 0)
        hidden = F.linear(x.mean((2, 3)), layer.fc1.weight[:, layer.result_features :], layer.fc1.bias)
        if layer.result_features:
            hidden = hidden + options["result_share"]
        gates = layer.fc2(hidden.relu()).sigmoid()
    torch.testing.assert_close(found["stages.2.1.se"], gates.var(1, correction=0).sqrt(), rtol=1e-3, atol=1e-6)


def test_deviations_of_a_model_without_gates():
    with pytest.raises(ValueError, match="model must have squeeze-excite layers, got none"):
        deviations(create_model("resnet20"), torch.randn(1, 3, 8, 8))


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    options = ["--max-steps", "1", "--model-options", "width=8"]
    assert cli.main([*TRAIN, *options, "--model", "se_resnet34", "--out", str(folder / "plain")]) == 0
    auxiliary = ["--model", "se_r_resnet34", "--aux-weights", "0.4", "0.4"]
    assert cli.main([*TRAIN, *options, *auxiliary, "--out", str(folder / "fed")]) == 0
    return folder


def test_command(runs, tmp_path, capsys):
    out = tmp_path / "scales"
    assert cli.main(["scales", str(runs / "plain"), str(runs / "fed"), "--images", "6", "--out", str(out)]) == 0
    rows = json.loads((out / "scales.json").read_text())["rows"]
    assert [row["run"] for row in rows] == ["plain"] * 16 + ["fed"] * 16
    assert all(len(row["deviations"]) == 6 and min(row["deviations"]) > 0 for row in rows)
    table = (out / "scales.md").read_text()
    assert f"| fed | stages.3.2.se | {rows[-1]['mean']:.4f} |" in table
    assert table in capsys.readouterr().out
    assert (out / "scales.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere"], "runs must be folders of finished runs, got .*nowhere"),
        (["plain", "--images", "0"], "images must be at least 1, got 0"),
        (["plain", "--images", "100000"], "images must be at most the .* of the test set, got 100000"),
        (["plain", "plain"], "runs must have different names, got plain, plain"),
    ],
)
def test_what_cannot_be_is_said_in_one_line(runs, tmp_path, one_line, arguments, message):
    folders = [str(runs / argument) if argument in ("plain", "nowhere") else argument for argument in arguments]
    status, error = one_line("scales", *folders, "--out", tmp_path / "out")
    assert status == 2
    assert re.search(message, error)


def test_images_that_the_run_passed_over(tmp_path):
    for split, count in (("train", 3), ("val", 2)):
        for name in ("cat", "dog"):
            (tmp_path / "set" / split / name).mkdir(parents=True)
            for number in range(count):
                color = (80 * number, 9, 100 if name == "cat" else 0)
                Image.new("RGB", (9, 9), color).save(tmp_path / "set" / split / name / f"{number}.png")
    (tmp_path / "set/val/cat/1.png").write_bytes(b"damaged")
    data = ["--dataset", "imagefolder", "--data-dir", str(tmp_path / "set"), "--image-size", "8", "--skip-unreadable"]
    options = ["--batch-size", "4", "--max-steps", "1", "--threads", "1", "--model-options", "width=8"]
    run, out = tmp_path / "run", tmp_path / "scales"
    assert cli.main(["train", "--model", "se_resnet34", *data, *options, "--out", str(run)]) == 0
    assert cli.main(["scales", str(run), "--images", "4", "--out", str(out)]) == 0
    assert {len(row["deviations"]) for row in json.loads((out / "scales.json").read_text())["rows"]} == {3}
