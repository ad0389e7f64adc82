"""Every class of timm that the registry serves: outputs and all gradients as before."""

from functools import partial

import pytest
import torch
from equality import assert_close, assert_same, outputs_and_gradients, randomise
from host_checks import OPS, check, check_registered
from torch import nn

from fused_attn import integrations
from fused_attn.integrations.timm_hosts import HOSTS


@pytest.mark.parametrize("fused", [False, True])
def test_samvit(timm, fused):
    """A whole network with windows, and another image size, which resizes the tables."""
    from timm.layers import set_fused_attn
    from timm.models.vision_transformer_sam import VisionTransformerSAM

    set_fused_attn(fused)
    model = VisionTransformerSAM(
        img_size=64, patch_size=8, embed_dim=32, depth=2, num_heads=4, window_size=3, global_attn_indexes=(1,),
        use_rel_pos=True, use_abs_pos=False, neck_chans=8, num_classes=5,
    )  # fmt: skip
    set_fused_attn(True)
    randomise(model)
    for size in ((64, 64), (40, 64)):
        images = torch.randn(2, 3, *size)
        check(model, lambda images=images: model(images), tolerance=5e-5)


def test_samvit_with_normalised_heads(timm):
    from timm.layers import LayerNorm2d
    from timm.models.vision_transformer_sam import Attention

    layer = randomise(Attention(16, 2, qk_norm=True, use_rel_pos=True, input_size=(3, 4)))
    x = torch.randn(2, 3, 4, 16, requires_grad=True)
    check(layer, lambda: layer(x), x=x)
    (candidate,) = integrations.convert(Attention(16, 2))
    assert candidate.outcome.startswith("without relative positions")
    layer.k_norm = LayerNorm2d(8)
    (candidate,) = integrations.convert(layer)
    assert candidate.outcome == "k_norm is a timm.layers.norm:LayerNorm2d"


@pytest.mark.parametrize(
    "options", [{}, {"scale_pos_embed": True, "stride": 2, "qkv_bias": True}, {"dim_head": 6, "dim_out": 24}]
)
def test_bottleneck(timm, options):
    from timm.layers.bottleneck_attn import BottleneckAttn

    layer = randomise(BottleneckAttn(16, feat_size=(6, 4), **options))
    x = torch.randn(2, 16, 6, 4, requires_grad=True)
    check(layer, lambda: layer(x), x=x)
    assert integrations.convert(layer, ops=OPS).replaced == 1
    with pytest.raises(AssertionError):  # of the original
        layer(x.mT)


@pytest.mark.parametrize(
    "options",
    [
        {"block_size": 2, "halo_size": 1},
        {"block_size": 4, "halo_size": 1, "stride": 2, "scale_pos_embed": True, "qkv_bias": True},
        {"block_size": 4, "halo_size": 3, "stride": 2, "avg_down": True, "dim_head": 6, "dim_out": 24},
    ],
)
def test_halo(timm, options):
    from timm.layers.halo_attn import HaloAttn

    layer = randomise(HaloAttn(16, num_heads=2, **options))
    x = torch.randn(2, 16, 8, 12, requires_grad=True)
    check(layer, lambda: layer(x), x=x)
    assert integrations.convert(layer, ops=OPS).replaced == 1
    with pytest.raises(AssertionError):  # of the original
        layer(x[:, :, :7])


def test_halo_transforms(timm):
    """Its windows have derivatives of their own, in both modes, and none within a compiled graph."""
    from timm.layers.halo_attn import HaloAttn

    layer = randomise(HaloAttn(16, num_heads=2, block_size=4, halo_size=3))
    x, tangent = torch.randn(2, 2, 16, 8, 12).unbind()
    weights = dict(layer.named_parameters())

    def transformed():
        forward = torch.func.jvp(layer, (x,), (tangent,))[1]
        gradients = torch.func.vmap(torch.func.grad(square), (None, 0))(weights, x)
        return {"jvp": forward, **gradients}

    def square(weights, image):
        return torch.func.functional_call(layer, weights, image[None]).square().sum()

    def run():
        return outputs_and_gradients(lambda: layer(x), weights)

    expected, expected_run = transformed(), run()
    assert integrations.convert(layer).replaced == 1
    for name, found in transformed().items():
        assert_close(found, expected[name], 1e-5, name)
    layer.compile(backend="aot_eager", fullgraph=True)
    assert_same(run(), expected_run)


@pytest.mark.parametrize("cls", [False, True])
@pytest.mark.parametrize(
    "options",
    [
        {"kernel_q": (3, 3), "kernel_kv": (3, 3), "stride_q": (2, 2), "stride_kv": (4, 4)},
        {"kernel_kv": (3, 3), "stride_kv": (2, 2), "residual_pooling": False},
        {"kernel_q": (3, 3), "stride_q": (2, 2), "mode": "max"},
    ],
)
def test_mvit(timm, cls, options):
    from timm.models.mvitv2 import MultiScaleAttention

    layer = randomise(MultiScaleAttention(16, 24, (8, 8), num_heads=2, has_cls_token=cls, **options))
    x = torch.randn(2, 64 + cls, 16, requires_grad=True)
    grid = layer(x, [8, 8])[1]
    check(layer, lambda: layer(x, [8, 8])[0], x=x)
    assert integrations.convert(layer, ops=OPS).replaced == 1
    assert layer(x, [8, 8])[1] == grid


def test_mvit_on_another_grid_runs_the_original(timm):
    from timm.models.mvitv2 import MultiScaleAttention

    layer = randomise(MultiScaleAttention(16, 16, (8, 8), num_heads=2, has_cls_token=False))
    x = torch.randn(2, 30, 16)
    expected = layer(x, [6, 5])[0]
    assert integrations.convert(layer, ops=OPS).replaced == 1
    assert torch.equal(layer(x, [6, 5])[0], expected)
    (candidate,) = integrations.convert(MultiScaleAttention(16, 16, (8, 8), num_heads=2, rel_pos_type="none"))
    assert candidate.outcome == "relative positions of type 'none' are not computed"


@pytest.mark.parametrize("size", [(32, 32), (32, 48)])
def test_swin(timm, size):
    from timm.models.swin_transformer import SwinTransformer

    model = SwinTransformer(
        img_size=size, patch_size=2, embed_dim=12, depths=(2, 2), num_heads=(3, 6), window_size=4, num_classes=5,
        drop_path_rate=0.0,
    )  # fmt: skip
    images = torch.randn(2, 3, *size)
    check(randomise(model), lambda: model(images), tolerance=5e-5)


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("head_first", [False, True])
@pytest.mark.parametrize("kind", ["bias", "bias_tf", "mlp"])
def test_maxvit_and_coatnet(timm, kind, head_first, channels_last):
    from timm.models.maxxvit import Attention2d, AttentionCl, MaxxVitTransformerCfg, get_rel_pos_cls

    rel_pos = get_rel_pos_cls(MaxxVitTransformerCfg(rel_pos_type=kind), (4, 3))
    layer = (AttentionCl if channels_last else Attention2d)(
        24, dim_head=6, head_first=head_first, rel_pos_cls=rel_pos, expand_first=False
    )
    randomise(layer).eval()
    shape = (2, 4, 3, 24) if channels_last else (2, 24, 4, 3)
    x = torch.randn(shape, requires_grad=True)
    check(layer, lambda: layer(x), x=x)


def test_maxvit_without_its_own_relative_positions_is_left_alone(timm):
    from timm.models.maxxvit import Attention2d

    (candidate,) = integrations.convert(Attention2d(24, dim_head=6))
    assert candidate.outcome.startswith("without relative positions of its own")


@pytest.mark.parametrize("use_conv", [False, True])
def test_levit(timm, use_conv):
    from timm.models.levit import Attention

    layer = randomise(Attention(8, 4, 2, attn_ratio=2.0, resolution=(3, 4), use_conv=use_conv))
    x = torch.randn((2, 8, 3, 4) if use_conv else (2, 12, 8), requires_grad=True)
    check(layer, lambda: layer(x), tolerance=1e-4, x=x)


def test_squeeze_excite(timm):
    from timm.layers import EffectiveSEModule, SEModule
    from timm.layers.activations import GELU, HardSigmoid, HardSwish, Swish
    from timm.models._efficientnet_blocks import SqueezeExcite
    from timm.models.senet import SEModule as SENetModule

    x = torch.randn(2, 16, 5, 4, requires_grad=True)
    layers = [SEModule(16), SEModule(16, rd_channels=5, bias=False), SqueezeExcite(16), SENetModule(16, 4)]
    layers += [SEModule(16, act_layer=act) for act in (nn.SiLU, nn.GELU, nn.Hardswish, Swish, GELU, HardSwish)]
    layers += [SEModule(16, gate_layer=gate) for gate in (nn.Hardsigmoid, HardSigmoid)]
    layers += [EffectiveSEModule(16), EffectiveSEModule(16, gate_layer="sigmoid")]
    for layer in layers:
        check(randomise(layer), lambda layer=layer: layer(x), x=x)
    layer.compile(backend="aot_eager", fullgraph=True)
    check(layer, lambda: layer(x), x=x)
    (candidate,) = integrations.convert(SEModule(16, act_layer=partial(nn.GELU, "tanh")), ops=OPS)
    assert candidate.outcome == "hidden activation GELU(approximate='tanh') is not computed"


@pytest.mark.parametrize(
    ("options", "outcome"),
    [
        ({"act_layer": nn.LeakyReLU}, "hidden activation LeakyReLU(negative_slope=0.01, inplace=True) is not computed"),
        ({"gate_layer": "relu"}, "gate ReLU() is not computed"),
        ({"norm_layer": nn.BatchNorm2d}, "bn is a torch.nn.modules.batchnorm:BatchNorm2d"),
        ({"add_maxpool": True}, "a maximum among what is squeezed is not computed"),
    ],
)
def test_squeeze_excite_that_is_left_alone(timm, options, outcome):
    from timm.layers import SEModule

    (candidate,) = integrations.convert(SEModule(16, **options), ops=OPS)
    assert candidate.outcome == outcome


def test_registered_classes_are_there(timm):
    check_registered(HOSTS)
