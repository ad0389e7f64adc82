"""Weights of other implementations, loaded by their names."""

import re
import sys

import pytest
import torch
from safetensors.torch import save_file

from fused_attn import create_model
from fused_attn.models.weights import load_weights

_MRLA = (
    (r"mrla\.(query|key|value)\.", lambda m: f"mrla.mrla.W{m[1][0]}."),
    ("mrla.shortcut_weight", "mrla.lambda_t"),
)
_RESNET = ((r"^stem", "conv1"), (r"^bn\.", "bn1."), (r"shortcut\.", "downsample."), *_MRLA)
_STAGES = (r"stages\.(\d)\.", lambda m: f"layer{int(m[1]) + 1}.")
_DEIT = (
    ("norm_mrla", "mrla.normx"), ("norm_shortcut", "mrla.normo"), (r"^patches", "patch_embed.proj"),
    ("class_token", "cls_token"), ("positions", "pos_embed"), ("attention", "attn"), (r"mlp\.0", "mlp.fc1"),
    (r"mlp\.2", "mlp.fc2"), *_MRLA,
)  # fmt: skip
#: Model -> its options, and our names -> those in the file, as the authors' code gives them.
PUBLISHED = {
    "mrla_light_resnet50": ({}, (_STAGES, *_RESNET)),
    "mrla_base_resnet50": ({}, _RESNET),
    "mrla_light_deit_tiny": ({"image_size": 32}, _DEIT),
    "mrla_base_deit_tiny": ({"image_size": 32}, _DEIT),
    "wrn_16_1": (
        {},
        (
            (r"^stem", "conv1"), (r"^bn\.", "bn1."), ("shortcut", "convShortcut"),
            (r"stages\.(\d)\.", lambda m: f"block{int(m[1]) + 1}.layer."),
        ),
    ),
}  # fmt: skip


def file_of(model, rules, path, container="state_dict"):
    """What the authors' training would save of a network with these numbers."""
    state = {}
    for name, tensor in model.state_dict().items():
        for pattern, replacement in rules:
            name = re.sub(pattern, replacement, name)
        state["module." + name] = tensor[:, None, None] if name.endswith("lambda_t") else tensor
    torch.save({container: state, "epoch": 300}, path)
    return state


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_names(name, tmp_path):
    options, rules = PUBLISHED[name]
    torch.manual_seed(1)
    model = create_model(name, num_classes=7, **options)
    names = file_of(model, rules, tmp_path / "authors.pth")
    assert not {each.removeprefix("module.") for each in names} <= model.state_dict().keys()
    torch.manual_seed(2)
    loaded = create_model(name, num_classes=7, checkpoint=tmp_path / "authors.pth", **options)
    for each, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[each], tensor), each


def test_names_in_the_authors_files():
    """Spelled out: a rule that is wrong in the same way here and there would pass the test above."""
    from fused_attn.models.weights import SCHEMES, _renamed

    expected = {
        "layer2.3.mrla.mrla.Wq.weight": "stages.1.3.mrla.query.weight",
        "layer1.0.mrla.lambda_t": "stages.0.0.mrla.shortcut_weight",
        "layer4.0.downsample.1.running_mean": "stages.3.0.shortcut.1.running_mean",
        "conv1.3.weight": "stem.3.weight",
        "blocks.5.mrla.mrla.Wv.weight": "blocks.5.mrla.value.weight",
        "blocks.5.mrla.normo.bias": "blocks.5.norm_shortcut.bias",
        "block3.layer.1.bn2.weight": "stages.2.1.bn2.weight",
        "layers.0.downsample.norm.weight": "layers.1.downsample.norm.weight",
    }
    for theirs, ours in expected.items():
        assert any(ours in _renamed({theirs: torch.ones(1)}, rules) for rules in SCHEMES.values()), theirs


@pytest.mark.parametrize(
    ("ours", "theirs", "options"),
    [
        ("resnet34", "resnet34", {"stem": "imagenet"}),
        ("deit_tiny", "deit_tiny_patch16_224", {"image_size": 32}),
        ("swin_tiny", "swin_tiny_patch4_window7_224", {}),
    ],
)
def test_networks_of_timm(timm, tmp_path, ours, theirs, options):
    size = {} if ours == "resnet34" else {"img_size": 32 if ours == "deit_tiny" else 224}
    host = timm.create_model(theirs, num_classes=7, **size).eval()
    save_file(host.state_dict(), tmp_path / "timm.safetensors")
    model = create_model(ours, num_classes=7, checkpoint=tmp_path / "timm.safetensors", **options).eval()
    x = torch.randn(1, 3, *[size.get("img_size", 32)] * 2)
    with torch.no_grad():
        torch.testing.assert_close(model(x), host(x), rtol=1e-4, atol=1e-4)


def test_a_backbone_takes_the_file_of_the_whole_network(tmp_path):
    whole = create_model("mrla_light_resnet50", num_classes=7)
    torch.save(whole.state_dict(), tmp_path / "whole.pt")
    maps = create_model(
        "mrla_light_resnet50", features_only=True, out_indices=(1, 2), num_classes=7, checkpoint=tmp_path / "whole.pt"
    )
    assert all(torch.equal(tensor, whole.state_dict()[name]) for name, tensor in maps.state_dict().items())


def change(**changes):
    state = create_model("wrn_10_1").state_dict()
    return {name: each for name, each in {**state, **changes}.items() if each is not None}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (change(**{"bn.bias": None}), "weights of this WideResNet: bn.bias is missing"),
        (change(extra=torch.ones(2)), "extra is not in the model"),
        (change(**{"fc.bias": torch.zeros(1000)}), r"fc.bias has shape \(1000,\), \(10,\) expected"),
        (change(**{"fc.bias": torch.zeros(10, dtype=torch.int64)}), "fc.bias has dtype torch.int64, torch.float32"),
        (change(**{"fc.bias": torch.full((10,), float("nan"))}), "fc.bias holds inf or nan"),
        (change(**{"conv1.weight": torch.ones(16, 3, 3, 3)}), "conv1.weight is not in the model"),
        (change(**{"fc.bias": torch.full((10,), 1e300, dtype=torch.float64)}), "fc.bias holds inf or nan, or numbers"),
        (change(**{"fc.bias": torch.ones(10).to_sparse()}), "must hold dense tensors by their names, .* 'fc.bias'"),
        ({0: torch.ones(1)}, "must hold dense tensors by their names, got another kind under 0"),
        ({"state_dict": {"fc.bias": "text"}}, "must hold a state dict, got str under 'fc.bias'"),
        ([torch.ones(2)], "must hold a state dict, got list"),
    ],
)
def test_what_does_not_fit_is_named_and_nothing_is_loaded(content, message, tmp_path):
    torch.save(content, tmp_path / "weights.pth")
    model = create_model("wrn_10_1")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        load_weights(model, tmp_path / "weights.pth")
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


class Malicious:
    def __reduce__(self):
        return (open, ("executed", "w"))


@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
def test_a_pickle_is_not_executed(suffix, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"fc.bias": Malicious()}, f"weights.{suffix}")
    with pytest.raises(ValueError, match=rf"weights.{suffix} must hold weights and nothing else"):
        create_model("wrn_10_1", checkpoint=f"weights.{suffix}")
    assert not (tmp_path / "executed").exists()


def test_two_names_of_one_tensor(tmp_path):
    model = create_model("resnet34", stem="imagenet")
    state = {**file_of(model, (_STAGES, *_RESNET), tmp_path / "x"), "module.stem.weight": model.stem.weight * 0}
    torch.save(state, tmp_path / "weights.pth")
    with pytest.raises(ValueError, match=r"stem.weight, a second stem.weight, is not in the model"):
        load_weights(model, tmp_path / "weights.pth")


def test_a_missing_file_and_a_model_on_meta(tmp_path):
    with pytest.raises(FileNotFoundError, match="checkpoint must be a file, found none at"):
        create_model("wrn_10_1", checkpoint=tmp_path / "none.pth")
    torch.save(change(), tmp_path / "weights.pth")
    with torch.device("meta"), pytest.raises(ValueError, match="model must hold memory to load weights into"):
        create_model("wrn_10_1", checkpoint=tmp_path / "weights.pth")


def test_a_first_stride_that_the_shapes_do_not_show(tmp_path):
    file = tmp_path / "weights.pth"
    file_of(create_model("resnet34", stem="imagenet"), (_STAGES, *_RESNET), file)
    create_model("resnet34", stem="imagenet", checkpoint=file)
    with pytest.raises(ValueError, match="whose first convolution has stride 2: stem='imagenet'"):
        create_model("resnet34", checkpoint=file)


def test_a_safetensors_file_without_the_package(tmp_path, monkeypatch):
    save_file(change(), tmp_path / "weights.safetensors")
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    with pytest.raises(ImportError, match=r"weights.safetensors needs safetensors to be read: pip install safetensors"):
        create_model("wrn_10_1", checkpoint=tmp_path / "weights.safetensors")
