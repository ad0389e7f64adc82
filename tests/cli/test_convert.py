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


def converted(*arguments):
    """A model and what it computes, before and after."""
    subject = convert_model.Subject(convert_model.ConvertConfig(*arguments))
    expected = subject.results()
    report = subject.switch("after")
    assert report.replaced == len(report) > 0
    found = subject.results()
    return subject, {name: convert_model.difference(found[name], expected[name]) for name in expected}


def options(**values):
    return tuple(f"{name}={value!r}" for name, value in values.items())


def test_prompts(transformers):
    """SegGPT takes two images and a mask, of which two lie one below the other."""
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": [64, 32]}
    sizes |= {"patch_size": 8, "mlp_dim": 16, "merge_index": 0, "intermediate_hidden_state_indices": [0, 1]}
    subject, differences = converted("transformers:SegGptConfig", options(**sizes, decoder_hidden_size=8))
    assert [tuple(each.shape) for each in subject.arguments] == 3 * [(1, 3, 32, 32)]
    assert all(0 < value < 1e-5 for value in differences.values())


def test_pairs_of_images(transformers):
    """Matches have no gradient; where their scores are 0 throughout, nothing would be compared."""
    sizes = {"stage_num_blocks": [1, 1, 1, 1], "out_features": [8, 8, 16, 32], "hidden_size": 32}
    sizes |= {"num_attention_layers": 1, "fine_matching_slice_dim": 4, "coarse_matching_threshold": 0.0}
    sizes["coarse_matching_border_removal"] = 0
    subject, differences = converted("transformers:EfficientLoFTRConfig", options(**sizes), ("row_col_softmax",), 64)
    assert subject.images.shape == (1, 2, 3, 64, 64)
    assert all(0 < value < 1e-4 for value in differences.values())


def test_spectrograms(transformers):
    """Of a model that no automatic class builds."""
    sizes = {"patch_embeds_hidden_size": 12, "depths": [1, 1], "num_attention_heads": [3, 6], "spec_size": 64}
    sizes |= {"num_mel_bins": 16, "hidden_size": 24, "window_size": 4}
    subject, differences = converted("transformers:ClapAudioConfig", options(**sizes))
    assert subject.images.shape == (1, 1, 256, 16)
    assert all(0 < value < 1e-4 for value in differences.values())


def test_gates_are_not_all_closed(transformers):
    """Statistics of batch norm fit the images, or every gate of a hard sigmoid would be 0 or 1."""
    subject, differences = converted("transformers:PPLCNetV3Config", options(scale=0.25), ("squeeze_excite",), 64)
    assert all(0 < value < 1e-3 for value in differences.values())
    assert 0.1 < subject.forward()[0].std() < 100


def test_kornia():
    """LoFTR, whose matches have no gradient: with the confidences that it is trained by."""
    pytest.importorskip("kornia.feature.loftr", exc_type=ImportError)
    subject, differences = converted("kornia:LoFTR", (), (), 32)
    assert all(0 < value < 1e-3 for value in differences.values())
    assert not subject.model.model.coarse_matching._forward_hooks


def test_lucidrains(host_packages):
    pytest.importorskip("bottleneck_transformer_pytorch")
    sizes = {"dim": 16, "fmap_size": 8, "dim_out": 32, "heads": 2, "dim_head": 8, "rel_pos_emb": True}
    subject, differences = converted("bottleneck_transformer_pytorch:BottleStack", options(**sizes))
    assert subject.images.shape == (1, 16, 8, 8)
    assert all(0 < value < 1e-5 for value in differences.values())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "botnet26t_256"], "model must be timm:NAME, transformers:CLASS, kornia:"),
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
