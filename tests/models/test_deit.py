"""DeiT and MRLA: exact sizes, the blocks beside the published formulation, training."""

import pytest
import torch
import torch.nn.functional as F
from model_checks import check_trains, count, maps_and_outputs, on_meta, randomise_norms

from fused_attn import create_model

SMALL = {"dim": 32, "heads": 2, "depth": 3, "image_size": (16, 24), "patch_size": 4, "impl": "reference"}


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("deit_tiny", 5_717_416),
        ("deit_small", 22_050_664),
        ("deit_base", 86_567_656),
        ("mrla_light_deit_tiny", 5_749_792),
        ("mrla_light_deit_small", 22_115_296),
        ("mrla_light_deit_base", 86_696_800),
        ("mrla_base_deit_tiny", 5_742_880),
        ("mrla_base_deit_small", 22_101_472),
        ("mrla_base_deit_base", 86_669_152),
    ],
)
def test_published_parameter_counts(name, parameters):
    assert count(on_meta(name, num_classes=1000)) == parameters


def transformer_block(block, x):
    dim = x.shape[-1]
    normed = F.layer_norm(x, (dim,), block.norm1.weight, block.norm1.bias, 1e-6)
    query, key, value = (normed @ block.attention.qkv.weight.T + block.attention.qkv.bias).chunk(3, dim=-1)
    outputs = []
    for head in range(block.attention.heads):
        part = slice(head * dim // block.attention.heads, (head + 1) * dim // block.attention.heads)
        weights = query[..., part] @ key[..., part].transpose(1, 2) / (dim // block.attention.heads) ** 0.5
        outputs.append(weights.softmax(-1) @ value[..., part])
    x = x + torch.cat(outputs, -1) @ block.attention.proj.weight.T + block.attention.proj.bias
    normed = F.layer_norm(x, (dim,), block.norm2.weight, block.norm2.bias, 1e-6)
    first, _, second = block.mlp
    return x + F.gelu(normed @ first.weight.T + first.bias) @ second.weight.T + second.bias


def published(model, images):
    """The network written out: maps of contiguous tokens, keys and values of a stage concatenated."""
    height, width = model.size
    x = F.conv2d(images, model.patches.weight, model.patches.bias, stride=model.patches.stride).flatten(2).mT
    x = torch.cat((model.class_token.repeat(len(x), 1, 1), x), 1) + model.positions
    for index, block in enumerate(model.blocks):
        before, x = x, transformer_block(block, x)
        if model.layer_attention is None:
            continue
        mrla, dim = block.mrla, x.shape[-1]
        normed = F.layer_norm(x, (dim,), block.norm_mrla.weight, block.norm_mrla.bias, 1e-6)
        tokens = normed[:, 1:]
        image = tokens.reshape(len(x), height, width, dim).permute(0, 3, 1, 2).contiguous()
        value = F.conv2d(image, mrla.value.weight, padding=1, groups=dim)
        pooled = tokens.mean(1)[:, None]
        query, key = (
            F.conv1d(pooled, conv.weight, padding=conv.weight.shape[-1] // 2).view(len(x), mrla.heads, -1)
            for conv in (mrla.query, mrla.key)
        )
        if model.layer_attention == "light":
            gate = torch.sigmoid((query * key).sum(-1) / query.shape[-1] ** 0.5)
            gate = gate[:, :, None].expand(-1, -1, query.shape[-1]).reshape(len(x), dim, 1, 1)
            shortcut = F.layer_norm(before, (dim,), block.norm_shortcut.weight, block.norm_shortcut.bias, 1e-6)[:, 1:]
            out = (gate * F.gelu(value)).flatten(2).mT + mrla.shortcut_weight * shortcut
        else:
            if index % model.stage_depth == 0:
                keys, values = [], []
            keys.append(key)
            values.append(value.view(len(x), mrla.heads, -1, height, width))
            logits = torch.einsum("bgd,btgd->bgt", query, torch.stack(keys, 1)) / query.shape[-1] ** 0.5
            out = torch.einsum("bgt,btgdhw->bgdhw", logits.softmax(-1), torch.stack(values, 1))
            out = out.reshape(len(x), dim, -1).mT
        x = x + torch.cat((normed[:, :1], out), 1)
    return model.head(F.layer_norm(x, x.shape[-1:], model.norm.weight, model.norm.bias, 1e-6)[:, 0])


@pytest.mark.parametrize("name", ["deit_tiny", "mrla_base_deit_tiny", "mrla_light_deit_tiny"])
def test_logits_and_gradients_are_the_published_ones(name):
    options = {} if name == "deit_tiny" else {"dim_per_head": 8, "stage_depth": 2}
    model = randomise_norms(create_model(name, **SMALL, **options)).double()
    for parameter in model.parameters():
        parameter.data *= 3  # far from the small initial weights
    images = torch.randn(2, 3, 16, 24, dtype=torch.float64)
    logits, expected = model(images), published(model, images)
    torch.testing.assert_close(logits, expected, rtol=1e-9, atol=1e-9)
    parameters, direction = list(model.parameters()), torch.randn_like(logits)
    torch.testing.assert_close(
        torch.autograd.grad(logits, parameters, direction),
        torch.autograd.grad(expected, parameters, direction),
        rtol=1e-8,
        atol=1e-8,
    )


@pytest.mark.parametrize("name", ["deit_tiny", "mrla_base_deit_tiny", "mrla_light_deit_tiny"])
def test_training(name):
    model = create_model(name, num_classes=3, in_chans=2, **SMALL)
    # The attention of the last block is for the patch tokens, and the classifier reads the class token; likewise the
    # query of the first layer of a stage chooses among one layer.
    without = {
        "deit_tiny": [],
        "mrla_base_deit_tiny": ["blocks.0.mrla.query.weight"]
        + [f"blocks.2.mrla.{part}.weight" for part in ("query", "key", "value")],
        "mrla_light_deit_tiny": [f"blocks.2.mrla.{part}.weight" for part in ("query", "key", "value")]
        + ["blocks.2.mrla.shortcut_weight", "blocks.2.norm_shortcut.weight", "blocks.2.norm_shortcut.bias"],
    }[name]
    check_trains(model, torch.randn(4, 2, 16, 24), torch.tensor([0, 1, 2, 1]), without)


def test_drop_path_schedules():
    linear = on_meta("mrla_light_deit_tiny", drop_path=0.22)
    assert [block.drop_path.p for block in linear.blocks] == pytest.approx([0.02 * index for index in range(12)])
    constant = on_meta("mrla_base_deit_tiny", drop_path=0.1)
    assert {block.drop_path.p for block in constant.blocks} == {0.1}


def test_maps_of_the_backbone_are_those_of_its_blocks():
    options = {**SMALL, "depth": 5}
    model = create_model("mrla_base_deit_tiny", **options).eval()
    backbone = create_model("mrla_base_deit_tiny", features_only=True, out_indices=(0, 3), **options).eval()
    assert len(backbone.blocks) == 4
    blocks, unused = (model.blocks[0], model.blocks[3]), ("blocks.4.", "norm.", "head.")
    pairs = maps_and_outputs(model, backbone, blocks, torch.randn(2, 3, 16, 24), unused)
    assert (backbone.feature_info.channels(), backbone.feature_info.reduction()) == ([32, 32], [4, 4])
    for feature, tokens in pairs:
        torch.testing.assert_close(feature, tokens[:, 1:].mT.reshape(2, 32, 4, 6))
    assert on_meta("deit_tiny", features_only=True).out_indices == (3, 7, 11)


def test_images_of_another_size():
    with pytest.raises(ValueError, match=r"images must have the size \(H, W\)=\(16, 24\), got shape \(1, 3, 16, 16\)"):
        create_model("deit_tiny", **SMALL)(torch.randn(1, 3, 16, 16))
