"""``fused-attn convert``: a model of a host beside itself."""

import json

import pytest
import torch

from fused_attn import cli
from fused_attn.bench import measure
from fused_attn.cli import convert_model

SAM = ["hidden_size=32", "num_hidden_layers=2", "num_attention_heads=4", "image_size=64", "patch_size=8", "mlp_dim=16"]
SAM += ["window_size=3", "global_attn_indexes=[1]", "output_channels=8"]


@pytest.fixture
def in_this_process(monkeypatch, capsys):
    """Memory without another process, which would import the host anew."""

    def run(module, arguments, what):
        assert module == "fused_attn.cli.convert_model"
        capsys.readouterr()
        convert_model.main(arguments)
        return json.loads(capsys.readouterr().out)

    monkeypatch.setattr(measure, "run_child", run)


def test_a_model_of_transformers(transformers, in_this_process, tmp_path, capsys):
    arguments = ["--model", "transformers:SamVisionConfig", "--options", *SAM, "--seconds", "0", "--threads", "1"]
    assert cli.main(["convert", *arguments, "--out", str(tmp_path)]) == 0
    result = json.loads((tmp_path / "convert_transformers_SamVisionConfig.json").read_text())
    assert [each["path"] for each in result["candidates"]] == [f"vision_encoder.layers.{i}.attn" for i in range(2)]
    assert {each["outcome"] for each in result["candidates"]} == {"replaced"}
    assert 0 < result["difference"]["outputs"] < 1e-5
    assert 0 < result["difference"]["gradients"] < 1e-5
    assert result["images"] == [1, 3, 64, 64]
    for kind in ("seconds", "peak_bytes"):
        assert [*result[kind]] == ["before", "after"]
        assert all([*passes] == ["forward", "forward + backward"] for passes in result[kind].values())
    assert "time of forward + backward, ms" in capsys.readouterr().out


def test_a_model_that_comes_out_otherwise(transformers, monkeypatch, capsys):
    from fused_attn.integrations import host

    monkeypatch.setattr(host, "joined_heads", lambda out: 1.01 * out.permute(0, 2, 3, 1, 4).flatten(3))
    arguments = ["convert", "--model", "transformers:SamVisionConfig", "--options", *SAM, "--seconds", "0"]
    assert cli.main([*arguments, "--no-memory"]) == 1
    assert "does not compute the same" in capsys.readouterr().err


def test_difference_sees_every_tensor():
    tensors = [torch.full((4,), 3.0), torch.full((9,), 1.0)]
    assert convert_model.difference(tensors, tensors) == 0
    assert convert_model.difference([tensors[0], torch.full((9,), 1.5)], tensors) == pytest.approx(0.5)
    small = [tensors[0], torch.full((9,), 1e-6)]
    assert convert_model.difference([tensors[0], -small[1]], small) == pytest.approx(6e-6 / 6e-3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "botnet26t_256"], "model must be timm:NAME or transformers:CLASS, got 'botnet26t_256'"),
        (["--model", "transformers:NoConfig"], "model transformers:NoConfig cannot be built (AttributeError: "),
        (["--model", "transformers:RegNetConfig"], "image_size must be given for model transformers:RegNetConfig"),
        (["--model", "transformers:SamVisionConfig", "--options", "x"], "options must be KEY=VALUE, got 'x'"),
        (["--model", "timm:x", "--ops", "swin"], "ops must be some of rel_attention_2d, "),
        (["--model", "transformers:SamVisionConfig", "--options", *SAM, "--image-size", "48"], "does not take images"),
    ],
)
def test_what_cannot_be_compared(transformers, one_line, arguments, message):
    status, error = one_line("convert", *arguments)
    assert status == 2
    assert message in error


def test_a_host_that_is_not_installed(monkeypatch, one_line):
    monkeypatch.setitem(__import__("sys").modules, "timm", None)
    status, error = one_line("convert", "--model", "timm:botnet26t_256")
    assert status == 2
    assert "needs timm, which cannot be imported (ModuleNotFoundError: " in error
    assert error.endswith("pip install timm\n")


def test_a_model_of_timm(timm, capsys):
    """Of which nothing is replaced unless the op is named."""
    arguments = ["convert", "--model", "timm:test_efficientnet", "--seconds", "0", "--no-memory", "--batch-size", "2"]
    assert cli.main(arguments) == 0
    out = capsys.readouterr().out
    assert "ms" not in out
    assert "0 replaced now" in out
