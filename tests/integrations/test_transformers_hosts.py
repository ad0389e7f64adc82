"""Every class of transformers that the registry serves: outputs and all gradients as before."""

import importlib

import pytest
import torch
from equality import assert_same, outputs_and_gradients, randomise, with_parameters
from host_checks import OPS, VANISHING, check, check_registered

from fused_attn import integrations
from fused_attn.integrations.transformers_hosts import HOSTS
from fused_attn.modules import RelPosAttention2d, resize_state_dict


def class_of(path):
    module, name = path.split(":")
    return getattr(importlib.import_module(module), name)


# --- SAM, ViTDet, SegGPT ----------------------------------------------------------------------------------------------

SAM = [name for name, host in HOSTS.items() if "SamVision" in host.layer.__name__]


@pytest.fixture
def sam_config(transformers):
    return transformers.SamVisionConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, image_size=64, patch_size=8, window_size=3,
        global_attn_indexes=[1], mlp_dim=16, output_channels=8, attn_implementation="eager",
    )  # fmt: skip


@pytest.mark.parametrize("size", [(8, 8), (5, 7)])  # the second resizes the tables
@pytest.mark.parametrize("path", SAM)
def test_sam_attention(sam_config, path, size):
    layer = randomise(class_of(path)(sam_config, 0)).eval()
    x = torch.randn(2, *size, 32, requires_grad=True)
    check(layer, lambda: layer(x)[0], x=x)


@pytest.mark.parametrize(("old", "new"), [(4, 7), (7, 4), (1, 5), (14, 64)])
def test_sam_resizes_tables_as_modules_do(transformers, old, new):
    """The row of every pair of positions of a map, in a state dict for ``new`` that was one for ``old``."""
    module, source = (RelPosAttention2d(6, 8, 4, 2, (size, size)) for size in (new, old))
    table = resize_state_dict(module, source.state_dict())[0]["rel_h"]
    # SAM counts query - key, this package key - query.
    row = torch.arange(new) - torch.arange(new)[:, None] + new - 1
    flipped = source.rel_h.detach().flip(0)
    expected = class_of("transformers.models.sam.modeling_sam:SamVisionAttention").get_rel_pos(None, new, new, flipped)
    assert (table[row] - expected).abs().max() <= 1e-6 * expected.abs().max()


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_sam(transformers, sam_config, attention):
    """The vision encoder, with windows that are padded."""
    sam_config._attn_implementation = attention
    model = randomise(transformers.SamVisionModel(sam_config)).eval()
    images = torch.randn(2, 3, 64, 64)
    check(model, lambda: model(images).last_hidden_state, tolerance=5e-5)


@pytest.mark.parametrize("size", [(64, 64), (48, 32)])
def test_vitdet(transformers, size):
    config = transformers.VitDetConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, image_size=64, pretrain_image_size=64,
        patch_size=8, window_block_indices=[0], window_size=3, use_relative_position_embeddings=True,
    )  # fmt: skip
    model = randomise(transformers.VitDetModel(config)).eval()
    images = torch.randn(2, 3, *size)
    check(model, lambda: model(images).last_hidden_state, tolerance=5e-5)


def test_seggpt(transformers):
    config = transformers.SegGptConfig(
        hidden_size=32, num_attention_heads=4, image_size=(64, 32), patch_size=8, use_relative_position_embeddings=True
    )
    layer = randomise(class_of("transformers.models.seggpt.modeling_seggpt:SegGptAttention")(config))
    x = torch.randn(2, 8, 4, 32, requires_grad=True)
    check(layer, lambda: layer(x)[0], x=x)


def test_without_relative_positions_sam_is_left_alone(transformers, sam_config):
    sam_config.use_rel_pos = False
    report = integrations.convert(transformers.SamVisionModel(sam_config))
    assert [each.outcome for each in report] == 2 * [
        "without relative positions it is plain attention, which PyTorch has"
    ]


# --- Swin -------------------------------------------------------------------------------------------------------------

SWIN = {
    "image_size": 32, "patch_size": 2, "embed_dim": 12, "depths": [2, 2], "num_heads": [3, 6], "window_size": 4,
    "drop_path_rate": 0.0,
}  # fmt: skip


@pytest.mark.parametrize("size", [(32, 32), (38, 27)])
@pytest.mark.parametrize(
    "name", ["swin.Swin", "donut.DonutSwin", "maskformer.MaskFormerSwin", "swinv2.Swinv2", "swin2sr.Swin2SR"]
)
def test_swin(transformers, name, size):
    """With shifts, and the second size with padding."""
    folder, name = name.split(".")
    models = importlib.import_module(f"transformers.models.{folder}")
    config = getattr(models, f"{name}Config")
    sizes = dict(SWIN)
    if name == "Swin2SR":
        sizes |= {"num_channels": 3, "image_size": 16, "patch_size": 1, "depths": [2], "num_heads": [3], "upscale": 1}
        size = (16, 12)
    model = randomise(getattr(models, f"{name}Model")(config(**sizes))).eval()
    images = torch.randn(2, 3, *size)
    check(model, lambda: model(images).last_hidden_state, tolerance=1e-4)


@pytest.mark.parametrize("shift", [0, 2])
def test_clap(transformers, shift):
    from transformers.models.clap.modeling_clap import ClapAudioLayer

    config = transformers.ClapAudioConfig(window_size=4)
    layer = randomise(ClapAudioLayer(config, 12, (8, 12), 3, shift_size=shift)).eval()
    x = torch.randn(2, 96, 12, requires_grad=True)
    check(layer, lambda: layer(x, (8, 12))[0], x=x)


@pytest.fixture
def swin_attention(transformers):
    from transformers.models.swin.modeling_swin import SwinAttention

    layer = randomise(SwinAttention(transformers.SwinConfig(attn_implementation="eager"), 12, 3, 4)).eval()
    return layer


@pytest.mark.parametrize("mask", ["soft", "one-sided", "not transitive"])
def test_a_mask_that_is_no_segments_runs_the_original(swin_attention, mask):
    masks = {
        "soft": torch.full((2, 16, 16), -3.0).tril(-1),
        "one-sided": torch.full((2, 16, 16), -100.0).tril(-1),
        "not transitive": torch.full((2, 16, 16), -100.0) * ((torch.arange(16)[:, None] - torch.arange(16)).abs() > 1),
    }
    x = torch.randn(4, 16, 12)
    expected = swin_attention(x, masks[mask])[0]
    assert integrations.convert(swin_attention).replaced == 1
    assert torch.equal(swin_attention(x, masks[mask])[0], expected)


def test_a_compiled_graph_refuses_a_mask_that_is_no_segments(swin_attention):
    """It cannot look at the mask before it chooses."""
    assert integrations.convert(swin_attention, ops=OPS).replaced == 1
    compiled = torch.compile(swin_attention, backend="aot_eager", fullgraph=True)
    mask = torch.zeros(2, 16, 16)
    mask[:, 8:, :8] = mask[:, :8, 8:] = -100.0
    x = torch.randn(4, 16, 12)
    torch.testing.assert_close(compiled(x, mask)[0], type(swin_attention).forward(swin_attention, x, mask)[0])
    with pytest.raises(RuntimeError, match="attention_mask must be 0 within parts of a window"):
        compiled(x, mask.tril())


def test_an_index_of_another_order_is_left_alone(swin_attention):
    bias = swin_attention.relative_position_bias
    bias.relative_position_index.copy_(bias.relative_position_index.flip(0))
    (candidate,) = integrations.convert(swin_attention)
    assert candidate.outcome == "relative_position_index is not that of a window in row-major order"


# --- attention weights ------------------------------------------------------------------------------------------------


def test_attention_weights_come_from_the_original(transformers, sam_config):
    images = torch.randn(1, 3, 64, 64)
    vitdet = transformers.VitDetConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=64, patch_size=8,
        use_relative_position_embeddings=True, window_block_indices=[],
    )  # fmt: skip
    for model in (
        transformers.SamVisionModel(sam_config),
        transformers.SwinModel(transformers.SwinConfig(**SWIN, attn_implementation="eager")),
        transformers.DonutSwinModel(transformers.DonutSwinConfig(**SWIN)),
        transformers.VitDetModel(vitdet),
    ):
        model = randomise(model).eval()
        expected = model(images, output_attentions=True)
        assert integrations.convert(model).replaced > 0
        found = model(images, output_attentions=True)
        assert len(found.attentions) == len(expected.attentions) > 0
        for weights, others in zip(found.attentions, expected.attentions, strict=True):
            assert torch.equal(weights, others)
        assert torch.equal(found.last_hidden_state, expected.last_hidden_state)
        assert not torch.equal(model(images).last_hidden_state, expected.last_hidden_state)


# --- squeeze-excite ---------------------------------------------------------------------------------------------------


def test_regnet(transformers):
    from transformers.models.regnet.modeling_regnet import RegNetSELayer

    layer = randomise(RegNetSELayer(12, 3))
    x = torch.randn(2, 12, 5, 4, requires_grad=True)
    check(layer, lambda: layer(x), x=x)


@pytest.mark.parametrize("name", ["efficientnet:EfficientNet", "align:AlignVision"])
def test_efficientnet(transformers, name):
    folder, name = name.split(":")
    kind = class_of(f"transformers.models.{folder}.modeling_{folder}:{name}SqueezeExciteLayer")
    config = getattr(transformers, f"{name}Config")
    x = torch.randn(2, 32, 5, 4, requires_grad=True)
    for activation in ("relu", "swish", "gelu_new"):
        layer = randomise(kind(config(hidden_act=activation), 32, 32, True))
        if activation == "gelu_new":
            (candidate,) = integrations.convert(layer, ops=OPS)
            assert candidate.outcome == "hidden activation NewGELUActivation() is not computed"
        else:
            check(layer, lambda layer=layer: layer(x), x=x)


@pytest.mark.parametrize("name", ["pp_lcnet:PPLCNet", "pp_lcnet_v3:PPLCNetV3", "pp_lcnet_v4:PPLCNetV4"])
def test_pp_lcnet(transformers, name):
    folder, name = name.split(":")
    kind = class_of(f"transformers.models.{folder}.modeling_{folder}:{name}SqueezeExcitationModule")
    layer = kind(16)
    x = torch.randn(2, 16, 5, 4, requires_grad=True)
    check(randomise(layer), lambda: layer(x), x=x)


@pytest.mark.parametrize("path", [name for name in HOSTS if "PPOCR" in name])
def test_pp_ocr(transformers, path):
    """With gates of which some are clamped."""
    layer = randomise(class_of(path)(16, 2))
    x = torch.randn(2, 16, 5, 4, requires_grad=True)
    with torch.no_grad():
        x += torch.linspace(-8, 8, 16)[:, None, None]
    gates = layer(x) / x
    assert 0 < (gates == 0).sum() < gates.numel() / 2
    check(layer, lambda: layer(x), x=x)


# --- matching ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def matcher(transformers):
    config = transformers.EfficientLoFTRConfig(
        stage_num_blocks=[1, 1, 1, 1], out_features=[8, 8, 16, 32], hidden_size=32, num_attention_layers=1,
        fine_matching_slice_dim=4, coarse_matching_threshold=0.0, coarse_matching_border_removal=1,
    )  # fmt: skip
    return randomise(transformers.EfficientLoFTRForKeypointMatching(config)).eval()


def test_efficientloftr(matcher):
    """Scores, key points and gradients, and the same matches."""
    images = torch.randn(2, 2, 3, 64, 96)

    def run():
        found = matcher(images)
        matches.append(found.matches)
        return torch.cat((found.matching_scores.flatten(), found.keypoints.flatten()))

    matches = []
    check(matcher, run)
    assert (matches[0] >= 0).sum() > 4
    assert all(torch.equal(each, matches[0]) for each in matches)


def test_matching_that_is_left_alone(matcher, monkeypatch):
    def reason():
        (candidate,) = integrations.convert(matcher, ops=OPS)
        return candidate.outcome

    assert reason() == "replaced"
    matcher.config.coarse_matching_skip_softmax = True
    assert reason() == "matching without softmax is not computed"
    assert "_coarse_matching" not in vars(matcher)
    monkeypatch.setattr(type(matcher), "_coarse_matching", lambda self, coarse_features, coarse_scale: None)
    assert reason() == "the _coarse_matching of EfficientLoFTRForKeypointMatching was replaced"


@pytest.mark.parametrize("masked", [False, True])
def test_lightglue(transformers, masked):
    """Two pairs of images; scores of what is masked are finite, though close to the end of float32."""
    from transformers.models.lightglue.modeling_lightglue import LightGlueMatchAssignmentLayer

    layer = randomise(LightGlueMatchAssignmentLayer(transformers.LightGlueConfig(descriptor_dim=16)))
    x = torch.randn(4, 9, 16, requires_grad=True)
    mask = (torch.arange(9) < torch.tensor([[9], [7], [6], [8]])).int() if masked else None
    check(layer, lambda: layer(x, mask).clamp(min=-50), x=x)
    expected = layer(x, mask)
    assert integrations.convert(layer, ops=OPS).replaced == 1
    torch.testing.assert_close(layer(x, mask), expected, rtol=1e-5, atol=1e-5)


# --- compiled ---------------------------------------------------------------------------------------------------------


def compiled_layers(transformers, sam_config):
    """Name -> a layer of every way of calling an op, and its arguments."""
    windows, maps = torch.randn(4, 16, 12), torch.randn(2, 16, 5, 4)
    mask = torch.zeros(2, 16, 16)
    mask[:, 8:, :8] = mask[:, :8, 8:] = -100.0
    seggpt = transformers.SegGptConfig(hidden_size=32, num_attention_heads=4, image_size=(64, 32), patch_size=8)
    lightglue = transformers.LightGlueConfig(descriptor_dim=16)
    found = {
        "sam.modeling_sam:SamVisionSdpaAttention": ((sam_config, 0), torch.randn(2, 8, 8, 32)),
        "seggpt.modeling_seggpt:SegGptAttention": ((seggpt,), torch.randn(2, 8, 4, 32)),
        "regnet.modeling_regnet:RegNetSELayer": ((16, 3), maps),
        "pp_lcnet_v4.modeling_pp_lcnet_v4:PPLCNetV4SqueezeExcitationModule": ((16,), maps),
        "lightglue.modeling_lightglue:LightGlueMatchAssignmentLayer": ((lightglue,), torch.randn(4, 9, 16), None),
    }
    for name in ("donut.modeling_donut_swin:DonutSwinSelfAttention", "swinv2.modeling_swinv2:Swinv2SelfAttention"):
        config = getattr(transformers, name.split(":")[1].removesuffix("SelfAttention") + "Config")()
        found[name] = ((config, 12, 3, 4 if "Donut" in name else (4, 4)), windows, mask)
    return found


def test_compiled(transformers, sam_config):
    """As one graph: outputs and all gradients."""
    for path, (settings, x, *more) in compiled_layers(transformers, sam_config).items():
        layer = randomise(class_of(f"transformers.models.{path}")(*settings)).eval()
        tensors = with_parameters(layer, x=x.requires_grad_())

        def run(layer=layer, x=x, more=more):
            out = layer(x, *more)
            return (out[0] if isinstance(out, tuple) else out).clamp(min=-50)

        for name in [name for name in tensors if name.endswith(VANISHING)]:
            tensors[name].requires_grad_(False)
        expected = outputs_and_gradients(run, tensors)
        assert integrations.convert(layer, OPS).replaced == 1, path
        layer.compile(backend="aot_eager", fullgraph=True)
        assert_same(outputs_and_gradients(run, tensors), expected)


def test_registered_classes_are_there(transformers):
    check_registered(HOSTS)
