"""ResNet-50/101 and MRLA: exact sizes, initialisation, the blocks beside the published formulation, training."""

import pytest
import torch
import torch.nn.functional as F
from model_checks import check_trains, count, on_meta, randomise_norms
from torch import nn

from fused_attn import create_model
from fused_attn.models.bottleneck_resnet import Bottleneck, MRLABaseBottleneck, MRLABaseStage, MRLALightBottleneck


@pytest.mark.parametrize(
    ("name", "options", "parameters"),
    [
        ("resnet50", {}, 25_557_032),
        ("resnet101", {}, 44_549_160),
        ("mrla_light_resnet50", {}, 25_738_452),
        ("mrla_light_resnet101", {}, 44_939_646),
        ("mrla_base_resnet50", {}, 25_742_580),
        ("mrla_base_resnet101", {}, 44_926_366),
        ("mrla_base_resnet50", {"stem": "imagenet"}, 25_723_348),
    ],
)
def test_published_parameter_counts(name, options, parameters):
    assert count(on_meta(name, num_classes=1000, **options)) == parameters


def test_initialisation_is_the_authors():
    model = create_model("mrla_light_resnet50")
    blocks = [module for module in model.modules() if isinstance(module, MRLALightBottleneck)]
    assert len(blocks) == 16
    for block in blocks:
        assert (block.bn3.weight == 0).all()
        assert (block.bn_mrla.weight == 1).all()
        channels = block.bn3.num_features
        assert block.mrla.value.weight.std().item() == pytest.approx((2 / (9 * channels)) ** 0.5, rel=0.1)
        assert block.mrla.heads == channels // 32
    weights = torch.cat([block.mrla.shortcut_weight for block in blocks])
    assert weights.mean().item() == pytest.approx(0, abs=0.03)
    assert weights.std().item() == pytest.approx(1, abs=0.03)
    base = on_meta("mrla_base_resnet50")
    assert {m.mrla.heads * 16 == m.bn3.num_features for m in base.modules() if isinstance(m, MRLABaseBottleneck)} == {
        True
    }
    assert (create_model("resnet50", zero_init=False).stages[0][0].bn3.weight == 1).all()


def norm(bn, x):
    return F.batch_norm(x, None, None, bn.weight, bn.bias, training=True)


def bottleneck(block, x):
    """(output, shortcut) of a bottleneck, from its weights."""
    stride = block.conv2.stride[0]
    shortcut = x
    if block.shortcut is not None:
        shortcut = norm(block.shortcut[1], F.conv2d(x, block.shortcut[0].weight, stride=stride))
    x = norm(block.bn1, F.conv2d(x, block.conv1.weight)).relu()
    x = norm(block.bn2, F.conv2d(x, block.conv2.weight, stride=stride, padding=1)).relu()
    return (norm(block.bn3, F.conv2d(x, block.conv3.weight)) + shortcut).relu(), shortcut


def query_key_value(mrla, x):
    batch, channels = x.shape[:2]
    pooled = F.adaptive_avg_pool2d(x, 1).flatten(1)[:, None]
    query, key = (
        F.conv1d(pooled, conv.weight, padding=conv.weight.shape[-1] // 2).view(batch, mrla.heads, -1)
        for conv in (mrla.query, mrla.key)
    )
    value = F.conv2d(x, mrla.value.weight, padding=1, groups=channels)
    return query, key, value.view(batch, mrla.heads, channels // mrla.heads, *x.shape[2:])


def published_base_stage(stage, x):
    """MRLA-base over a stage, with the keys and values of all its layers concatenated at every layer."""
    keys, values = [], []
    for block in stage:
        x, _ = bottleneck(block, x)
        query, key, value = query_key_value(block.mrla, x)
        keys.append(key)
        values.append(value)
        logits = torch.einsum("bgd,btgd->bgt", query, torch.stack(keys, 1)) / query.shape[-1] ** 0.5
        out = torch.einsum("bgt,btgdhw->bgdhw", logits.softmax(-1), torch.stack(values, 1)).reshape(x.shape)
        x = x + norm(block.bn_mrla, out).relu()
    return x


def published_light_stage(stage, x):
    for block in stage:
        x, shortcut = bottleneck(block, x)
        query, key, value = query_key_value(block.mrla, x)
        gate = torch.sigmoid((query * key).sum(-1) / query.shape[-1] ** 0.5)
        out = (gate[..., None, None, None] * value).reshape(x.shape)
        out = out + block.mrla.shortcut_weight[:, None, None].expand_as(shortcut) * shortcut
        x = x + norm(block.bn_mrla, out)
    return x


@pytest.mark.parametrize("kind", ["plain", "base", "light"])
def test_stages_compute_what_was_published(kind):
    """Three blocks, the first of which changes the shape: the output and the gradient of everything."""
    options = {"dim_per_head": 8, "drop_path": 0.0, "impl": "reference"}
    block_type, stage_type, published = {
        "plain": (Bottleneck, nn.Sequential, lambda stage, x: [x := bottleneck(block, x)[0] for block in stage][-1]),
        "base": (MRLABaseBottleneck, MRLABaseStage, published_base_stage),
        "light": (MRLALightBottleneck, nn.Sequential, published_light_stage),
    }[kind]
    options = {} if kind == "plain" else options
    stage = stage_type(
        block_type(16, 8, 2, **options), block_type(32, 8, 1, **options), block_type(32, 8, 1, **options)
    )
    stage = randomise_norms(stage).double()
    x = torch.randn(3, 16, 6, 8, dtype=torch.float64, requires_grad=True)
    out, expected = stage(x), published(stage, x)
    torch.testing.assert_close(out, expected, rtol=1e-9, atol=1e-9)
    inputs, direction = [x, *stage.parameters()], torch.randn_like(out)
    # Of a softmax over one layer the logits have no gradient; the published form returns zeros for them, too.
    torch.testing.assert_close(
        torch.autograd.grad(out, inputs, direction),
        torch.autograd.grad(expected, inputs, direction),
        rtol=1e-8,
        atol=1e-8,
    )


def test_attention_does_not_reach_into_another_stage():
    """A stage run twice gives the same: nothing of the first run is left in its cache."""
    model = create_model("mrla_base_resnet50", stem="cifar", zero_init=False).eval()
    x = torch.randn(1, 64, 4, 4)
    with torch.no_grad():
        assert torch.equal(model.stages[0](x), model.stages[0](x))


@pytest.mark.parametrize(
    ("name", "options", "without_gradient"),
    [
        ("resnet50", {}, []),
        ("mrla_light_resnet50", {}, []),
        # The query of the first layer of a stage chooses among one layer.
        ("mrla_base_resnet50", {}, [f"stages.{stage}.0.mrla.query.weight" for stage in range(4)]),
    ],
)
def test_training(name, options, without_gradient):
    model = create_model(name, num_classes=3, in_chans=2, stem="cifar", zero_init=False, impl="reference", **options)
    check_trains(model, torch.randn(4, 2, 8, 8), torch.tensor([0, 1, 2, 1]), without_gradient)


def test_stems():
    """Strides 2 and 4 before the first stage, with 7x7 or with three 3x3 convolutions; none for small images."""
    x = torch.randn(1, 3, 33, 20)
    for stem, grids in {
        "imagenet": [(17, 10), (9, 5)],
        "deep": [(17, 10), (9, 5)],
        "cifar": [(33, 20), (33, 20)],
    }.items():
        model = create_model("resnet50", stem=stem, features_only=True, out_indices=(0, 1)).eval()
        with torch.no_grad():
            assert [tuple(feature.shape[2:]) for feature in model(x)] == grids, stem
    deep = [module for module in create_model("mrla_base_resnet50").stem if isinstance(module, nn.Conv2d)]
    assert [(conv.in_channels, conv.out_channels, conv.stride[0]) for conv in deep] == [
        (3, 32, 2),
        (32, 32, 1),
        (32, 64, 1),
    ]


@pytest.mark.parametrize("name", ["mrla_base_resnet50", "mrla_light_resnet50"])
def test_drop_path_acts_in_training_only_and_only_on_the_attention(name):
    model = create_model(name, stem="cifar", drop_path=0.5, impl="reference")
    x = torch.randn(8, 3, 8, 8)
    with torch.no_grad():
        assert not torch.equal(model(x), model(x))
        plain = create_model("resnet50", stem="cifar")
        plain.load_state_dict(model.state_dict(), strict=False)
        for module in model.modules():
            if isinstance(module, (MRLABaseBottleneck, MRLALightBottleneck)):
                module.drop_path.p = 1 - 1e-9  # drops every sample's attention
        torch.testing.assert_close(model(x), plain(x))
        model.eval()
        assert torch.equal(model(x), model(x))
