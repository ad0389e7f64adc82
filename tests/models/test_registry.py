"""Names, options and errors of create_model and list_models."""

import re

import pytest
import torch
from torch import nn

from fused_attn import create_model, list_models
from fused_attn.models import register_model, registry


def test_listed_names_are_what_a_user_finds():
    names = list_models()
    assert len(set(names)) == len(names)
    assert {"wrn_28_10", "aa_wrn_28_10", "aa_wrn_28_10_replication", "resnet34", "aa_resnet34"} <= set(names)
    assert {"resnet20", "sa_resnet110", "mrla_base_resnet101", "mrla_light_deit_small", "deit_base"} <= set(names)
    assert {"attention_wise", "attention_wise_a", "attention_wise_h", "attention_wise_cifar", "vgg_control"} <= set(
        names
    )
    assert {"swin_tiny", "swin_small", "swin_base", "swin_cifar", "coatnet_0_rw"} <= set(names)
    assert list_models("aa_*") == [name for name in names if name.startswith("aa_")]
    # numbers in order of size, not of spelling
    assert names.index("wrn_28_2") < names.index("wrn_28_10") < names.index("wrn_40_2")


def test_families_have_members_that_are_not_listed():
    assert "wrn_22_3" not in list_models()
    model = create_model("wrn_22_3", num_classes=7, in_chans=2)
    assert [len(stage) for stage in model.stages] == [3, 3, 3]
    assert (model.stem.in_channels, model.fc.in_features, model.fc.out_features) == (2, 64 * 3, 7)


@pytest.mark.parametrize(
    ("name", "options", "match"),
    [
        ("wrn_28_1O", {}, "must be a registered model, got 'wrn_28_1O': did you mean .*wrn_28_10"),
        ("aa_resnet_34", {}, "did you mean .*aa_resnet34"),
        ("vit", {}, r"got 'vit': list_models\(\) names them all"),
        ("wrn_28_10_extra", {}, "must be a registered model"),
        ("wrn_27_2", {}, r"depth of a Wide ResNet must be 6n\+4 .* got 27"),
        ("wrn_4_2", {}, r"depth of a Wide ResNet must be 6n\+4 .* got 4"),
        ("wrn_10_0", {}, "width of a Wide ResNet must be at least 1, got 0"),
        ("wrn_10_1", {"dropout": 1.0}, r"dropout must be in \[0, 1\), got 1.0"),
        ("wrn_10_1", {"num_classes": 0}, "num_classes must be at least 1, got 0"),
        ("wrn_10_1", {"in_chans": 0}, "in_chans must be at least 1, got 0"),
        ("wrn_10_1", {"impl": "fast"}, "impl must be one of 'auto', .* got 'fast'"),
        ("wrn_10_1", {"image_size": 0}, "image_size must be a positive number or two of them"),
        ("aa_wrn_10_1", {"attention_stages": (0, 1)}, r"attention_stages must be numbers from 1 to 3, got \("),
        ("aa_wrn_10_1", {"attention_stages": (4,)}, "attention_stages must be numbers from 1 to 3"),
        ("aa_wrn_10_1", {"attention_blocks": "some"}, "attention_blocks must be one of 'all', 'first', 'last'"),
        ("aa_wrn_10_1", {"heads": 16}, "must leave some of out_channels=16 to the convolution"),
        ("resnet34", {"stem": "none"}, "stem must be one of 'imagenet', 'replication', 'cifar', got 'none'"),
        ("aa_resnet34", {"attention_convs": (3,)}, r"attention_convs must be numbers from 1 to 2, got \(3,\)"),
        ("aa_resnet34", {"attention_stages": (5,)}, "attention_stages must be numbers from 1 to 4"),
        ("sa_resnet21", {}, "did you mean .*sa_resnet20"),
        ("sa_resnet20", {"layers": "stages"}, "layers must be one of 'blocks', 'convolutions', got 'stages'"),
        ("sa_resnet20", {"values": "sum"}, "values must be one of 'pad', 'project', got 'sum'"),
        ("resnet50", {"stem": "replication"}, "stem must be one of 'imagenet', 'deep', 'cifar', got"),
        ("resnet50", {"layer_attention": "full"}, "layer_attention must be one of None, 'base', 'light', got"),
        ("resnet50", {"drop_path": 0.1}, "drop_path belongs to the layer attention, .* got 0.1"),
        ("resnet50", {"dim_per_head": 8}, "dim_per_head belongs to the layer attention, .* got 8"),
        ("mrla_base_resnet50", {"drop_path": 1.0}, r"drop_path must be in \[0, 1\), got 1.0"),
        ("mrla_light_resnet50", {"dim_per_head": 48}, "multiple of dim_per_head=48, got 256"),
        ("mrla_light_resnet50", {"dim_per_head": 0}, "multiple of dim_per_head=0, got 256"),
        ("deit_tiny", {"layer_attention": "full"}, "layer_attention must be one of None, 'base', 'light', got"),
        ("deit_tiny", {"depth": 0}, "depth must be at least 1, got 0"),
        ("deit_tiny", {"heads": 7}, "dim must be a positive multiple of heads=7, got 192"),
        ("deit_tiny", {"image_size": 100}, "image_size must be a multiple of patch_size=16, got 100"),
        ("deit_tiny", {"drop_path_schedule": "cosine"}, "must be one of 'linear', 'constant', got 'cosine'"),
        ("attention_wise_b", {"heads": 0}, "heads must be at least 1, got 0"),
        ("attention_wise_b", {"layers": 0}, "layers must be at least 1, got 0"),
        ("attention_wise_b", {"image_size": (28, 0)}, "image_size must be a positive number or two of them"),
        ("vgg_control", {"image_size": 3}, "image_size must be at least 4, got 3"),
        ("mrla_base_deit_tiny", {"stage_depth": 0}, "stage_depth must be at least 1, got 0"),
        ("swin_tiny", {"window": 0}, "window must be at least 1, got 0"),
        ("swin_tiny", {"depths": (2, 0)}, r"depths must be positive numbers, at least one, got \(2, 0\)"),
        ("swin_tiny", {"depths": (2, 2)}, r"a number for each of the 2 stages, got \(3, 6, 12, 24\)"),
        ("swin_tiny", {"heads": (5, 6, 12, 24)}, "dim must be a positive multiple of heads=5, got 96"),
        ("swin_tiny", {"drop_path": 1.0}, r"drop_path must be in \[0, 1\), got 1.0"),
        ("coatnet_0_rw", {"dims": (96, 192)}, r"dims must be four positive numbers, got \(96, 192\)"),
        ("coatnet_0_rw", {"head_dim": 40}, r"head_dim must be .* \(192, 384, 768\), got 40"),
    ],
)
def test_bad_input(name, options, match):
    with pytest.raises(ValueError, match=match):
        create_model(name, **options)


@pytest.mark.parametrize(
    ("name", "options", "match"),
    [
        ("wrn_10_1", {"droput": 0.1}, "wrn_10_1 has no option 'droput'; its options are .*dropout"),
        ("resnet20", {"layers": "blocks"}, "resnet20 has no option 'layers'; its options are features_only"),
    ],
)
def test_unknown_options(name, options, match):
    with pytest.raises(TypeError, match=match):
        create_model(name, **options)


def test_impl_reaches_the_op_and_cannot_be_quietly_ignored():
    model = create_model("aa_wrn_10_1", impl="triton", image_size=8).eval()
    with pytest.raises(RuntimeError, match="impl='triton' cannot run"):
        model(torch.randn(1, 3, 8, 8))


def test_image_size_has_no_influence_on_models_of_any_size():
    """The trainer gives it to every model."""
    sizes = [create_model("resnet20", image_size=size).state_dict() for size in (8, (40, 30))]
    assert [{name: tensor.shape for name, tensor in state.items()} for state in sizes[:1]] == [
        {name: tensor.shape for name, tensor in state.items()} for state in sizes[1:]
    ]


def test_new_families_register_themselves(monkeypatch):
    class Toy(nn.Module):
        def __init__(self, depth, *, num_classes, in_chans, bias=True):
            super().__init__()
            self.arguments = (depth, num_classes, in_chans, bias)

    monkeypatch.setattr(registry, "_FAMILIES", list(registry._FAMILIES))
    register_model(r"toy(\d+)", Toy, names=["toy1", "toy12"])
    register_model(r"toy(\d+)_free", Toy, names=["toy3_free"], bias=False)
    assert list_models("toy*") == ["toy1", "toy3_free", "toy12"]
    assert create_model("toy7").arguments == (7, 10, 3, True)
    assert create_model("toy3_free", num_classes=2, in_chans=1).arguments == (3, 2, 1, False)
    assert create_model("toy3_free", bias=True).arguments == (3, 10, 3, True)
    with pytest.raises(ValueError, match="'toy1' is already registered"):
        register_model("toy1", Toy)
    with pytest.raises(ValueError, match=re.escape(r"names must match pattern 'toe(\\d+)', got 'toy99'")):
        register_model(r"toe(\d+)", Toy, names=["toy99"])
