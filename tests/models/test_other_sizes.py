"""Networks at another size than their tables were made for: weights that are resized on load, and images in a call."""

import re
import warnings

import pytest
import torch
from equality import assert_same, outputs_and_gradients, randomise
from model_checks import COATNET, DEIT, SWIN
from safetensors.torch import save_file

from fused_attn import create_model
from fused_attn.models import load_weights
from fused_attn.modules import resize_state_dict

#: Label -> (model, options, the size of the file, the model's, how many tables are resized).
RESIZED = {
    "aa_wrn": ("aa_wrn_10_1", {}, {"image_size": 8}, {"image_size": 12}, 6),
    "aa_resnet34": ("aa_resnet34", {"stem": "cifar"}, {"image_size": 16}, {"image_size": 32}, 2),
    "deit": ("deit_tiny", DEIT, {"image_size": 16}, {"image_size": 24}, 1),
    "mrla_base_deit": ("mrla_base_deit_tiny", DEIT, {"image_size": 16}, {"image_size": 24}, 1),
    "mrla_light_deit": ("mrla_light_deit_tiny", DEIT, {"image_size": 16}, {"image_size": (24, 16)}, 1),
    "coatnet": ("coatnet_0_rw", COATNET, {"image_size": 32}, {"image_size": 48}, 3),
    "smaller": ("coatnet_0_rw", COATNET, {"image_size": 96}, {"image_size": 64}, 3),
}


def said(record):
    """What the one warning says of each table."""
    (warning,) = [each for each in record if "resized" in str(each.message)]
    return str(warning.message).split(" resized: ")[1].split("; ")


@pytest.mark.parametrize("label", RESIZED)
def test_weights_of_another_size_are_resized_and_it_is_said(label, tmp_path):
    """The model is then the one of the file's size that interpolates in every call."""
    name, options, old, new, number = RESIZED[label]
    whole = randomise(create_model(name, **options, **old, resize_tables=True)).eval()
    torch.save(whole.state_dict(), tmp_path / "weights.pt")
    with pytest.warns(UserWarning, match="weights.pt resized: ") as record:
        model = create_model(name, **options, **new, checkpoint=tmp_path / "weights.pt").eval()
    changed = [key for key, each in model.state_dict().items() if each.shape != whole.state_dict()[key].shape]
    lines = said(record)
    assert [line.split(" from ")[0] for line in lines] == changed
    assert len(changed) == number
    assert all(re.search(r" from \d+(x\d+)? to \d+(x\d+)?, (linear|bicubic)", line) for line in lines)
    size = (new["image_size"],) * 2 if isinstance(new["image_size"], int) else new["image_size"]
    x = torch.randn(2, 3, *size)
    with torch.no_grad():
        torch.testing.assert_close(model(x), whole(x), rtol=1e-4, atol=1e-5)
    # Gradients reach the stored tables.
    whole(x).square().sum().backward()
    assert all(whole.get_parameter(key).grad.abs().max() > 0 for key in changed)


@pytest.mark.parametrize(("name", "options"), [("resnet20", {}), ("swin_tiny", SWIN)])
def test_models_of_any_size_are_left_alone(name, options, tmp_path):
    torch.save(create_model(name, image_size=16, **options).state_dict(), tmp_path / "weights.pt")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        create_model(name, image_size=24, checkpoint_size=16, checkpoint=tmp_path / "weights.pt", **options)
        create_model(name, image_size=24, checkpoint=tmp_path / "weights.pt", **options)


def swin_of_timm(timm, window, size):
    return randomise(
        timm.models.swin_transformer.SwinTransformer(
            img_size=size,
            patch_size=2,
            window_size=window,
            embed_dim=16,
            depths=(2, 2),
            num_heads=(2, 4),
            num_classes=7,
        )
    ).eval()


def test_a_swin_of_timm_with_another_window(timm, tmp_path):
    """Bicubic as Swin's authors resize, or as timm itself does; logits and gradients are those of timm's network."""
    from timm.layers.pos_embed_rel import resize_rel_pos_bias_table_simple
    from timm.models.swin_transformer import checkpoint_filter_fn

    state = swin_of_timm(timm, 3, 24).state_dict()
    save_file(state, tmp_path / "timm.safetensors")
    options = {"num_classes": 7, **SWIN, "window": 6}
    with pytest.warns(UserWarning, match="from 3x3 to 6x6, bicubic") as record:
        bicubic = create_model("swin_tiny", checkpoint=tmp_path / "timm.safetensors", **options).eval()
    assert len(said(record)) == 4
    ours = {name.replace("head.fc.", "head."): each for name, each in state.items()}
    geometric = create_model("swin_tiny", **options).eval()
    geometric.load_state_dict(resize_state_dict(geometric, ours, bias_method="geometric")[0])

    host = swin_of_timm(timm, 6, 48)
    tables = {name: each for name, each in state.items() if name.endswith("bias_table")}
    simple = {
        name: resize_rel_pos_bias_table_simple(each, (6, 6), (121, each.shape[1])) for name, each in tables.items()
    }
    x = torch.randn(2, 3, 48, 48)
    for model, published in ((bicubic, {**state, **simple}), (geometric, checkpoint_filter_fn(state, host))):
        host.load_state_dict(published)
        tensors = dict(model.named_parameters())
        found = outputs_and_gradients(lambda model=model: model(x), tensors)
        theirs = {name.replace("head.fc.", "head."): each for name, each in host.named_parameters()}
        assert_same(found, outputs_and_gradients(lambda: host(x), {name: theirs[name] for name in tensors}))


def test_a_deit_of_timm_at_another_size(timm, tmp_path):
    """On load, and in a call with ``dynamic_img_size``; gradients reach the positions."""
    shape = {"patch_size": 4, "embed_dim": 32, "depth": 3, "num_heads": 2, "num_classes": 7}
    kind = timm.models.vision_transformer.VisionTransformer
    host = randomise(kind(img_size=16, dynamic_img_size=True, **shape)).eval()
    save_file(host.state_dict(), tmp_path / "timm.safetensors")
    options = {"num_classes": 7, "checkpoint": tmp_path / "timm.safetensors", **DEIT}
    model = create_model("deit_tiny", image_size=16, resize_tables=True, **options).eval()
    x = torch.randn(2, 3, 24, 40)
    names = {"positions": "pos_embed", "class_token": "cls_token", "patches.weight": "patch_embed.proj.weight"}
    ours = {name: model.get_parameter(name) for name in names}
    theirs = {name: host.get_parameter(name) for name in names.values()}
    expected = outputs_and_gradients(lambda: host(x), theirs)
    assert_same(outputs_and_gradients(lambda: model(x), ours), expected, names)
    with pytest.warns(UserWarning, match=r"resized: positions from 4x4 to 6x10, bicubic with antialiasing"):
        loaded = create_model("deit_tiny", image_size=(24, 40), **options).eval()
    torch.testing.assert_close(loaded(x), host(x), rtol=1e-4, atol=1e-5)


def test_weights_for_images_that_are_not_square(tmp_path):
    """Also of as many positions: 16 of 4x4 and of 2x8."""
    wide = randomise(create_model("deit_tiny", image_size=(16, 32), resize_tables=True, **DEIT)).eval()
    file = tmp_path / "weights.pt"
    torch.save(wide.state_dict(), file)
    with pytest.raises(
        ValueError, match=r"positions must hold 1 \+ H\*\*2 entries, .* \(1, 33, 32\); .* checkpoint_size"
    ):
        create_model("deit_tiny", image_size=24, checkpoint=file, **DEIT)
    with pytest.warns(UserWarning, match="positions from 4x8 to 6x6"):
        model = create_model("deit_tiny", image_size=24, checkpoint=file, checkpoint_size=(16, 32), **DEIT).eval()
    x = torch.randn(1, 3, 24, 24)
    torch.testing.assert_close(model(x), wide(x))
    torch.save(create_model("deit_tiny", image_size=16, **DEIT).state_dict(), file)
    with pytest.warns(UserWarning, match="positions from 4x4 to 2x8"):
        create_model("deit_tiny", image_size=(8, 32), checkpoint=file, checkpoint_size=16, **DEIT)


def test_a_backbone_takes_resized_weights(tmp_path):
    torch.save(create_model("coatnet_0_rw", image_size=32, **COATNET).state_dict(), tmp_path / "weights.pt")
    options = {"features_only": True, "out_indices": (1, 3), "image_size": 48, "checkpoint": tmp_path / "weights.pt"}
    with pytest.warns(UserWarning, match=r"resized: stages.2.0.attn.relative_position_bias_table from 2x2 to 3x3"):
        create_model("coatnet_0_rw", **options, **COATNET)


def test_nothing_is_resized_unasked(tmp_path):
    file = tmp_path / "weights.pt"
    torch.save(create_model("aa_wrn_10_1", image_size=8).state_dict(), file)
    model = create_model("aa_wrn_10_1", image_size=16)
    before = {name: each.clone() for name, each in model.state_dict().items()}
    with pytest.raises(
        ValueError, match=r"resize=True would interpolate .*rel_h, .*rel_w, .*rel_h, \.\.\.; .* has shape"
    ):
        load_weights(model, file)
    assert all(torch.equal(each, before[name]) for name, each in model.state_dict().items())
    with pytest.raises(RuntimeError, match=r"fused_attn.modules.resize_state_dict\(module, state_dict\)"):
        model.load_state_dict(torch.load(file))
    with pytest.warns(UserWarning, match="resized"):
        load_weights(model, file, resize=True)


def test_what_is_no_table_of_positions_is_refused(tmp_path):
    """A weight for every pixel has no published way to be resized."""
    torch.save(create_model("attention_wise", image_size=12).state_dict(), tmp_path / "weights.pt")
    with pytest.raises(ValueError, match=r"weight_row has shape .* expected"):
        create_model("attention_wise", image_size=16, checkpoint=tmp_path / "weights.pt")


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (
            lambda: create_model("deit_tiny", checkpoint_size=16),
            "checkpoint_size must be None without checkpoint, got 16",
        ),
        (
            lambda: load_weights(torch.nn.ReLU(), "x.pt", source=torch.nn.ReLU()),
            "source must be None without resize=True, got a model",
        ),
        (
            lambda: create_model("deit_tiny", image_size=16, **DEIT)(torch.randn(1, 3, 24, 24)),
            r"images must have the size \(H, W\)=\(16, 16\), .*; with resize_tables=True",
        ),
        (
            lambda: create_model("deit_tiny", image_size=16, resize_tables=True, **DEIT)(torch.randn(1, 3, 24, 22)),
            r"images must have multiples of patch_size=4 as height and width, got \(1, 3, 24, 22\)",
        ),
        (
            lambda: create_model("deit_tiny", image_size=16, resize_tables=True, **DEIT)(torch.randn(3, 24, 24)),
            r"images must have multiples of patch_size=4 .* got \(3, 24, 24\)",
        ),
        (
            lambda: create_model("coatnet_0_rw", image_size=32, **COATNET)(torch.randn(1, 3, 32, 48)),
            r"of at most \(32, 32\), .*; with resize_tables=True",
        ),
        (
            lambda: create_model("aa_wrn_10_1", image_size=8)(torch.randn(1, 3, 16, 8)),
            r"at most size=\(8, 8\), .*; with resize_tables=True",
        ),
    ],
)
def test_bad_input(call, match):
    with pytest.raises(ValueError, match=match):
        call()
