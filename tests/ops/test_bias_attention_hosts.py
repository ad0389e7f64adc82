"""Swin, Swin V2, MaxViT, CoAtNet and LeViT as transformers and timm compute them; skipped where those are not."""

import re

import pytest
import torch
from equality import assert_same, outputs_and_gradients, randomise, with_parameters
from swin_v2 import SwinV2Attention

from fused_attn import bias_attention_2d, create_model
from fused_attn.models.coatnet import CoAtNet
from fused_attn.models.swin import Swin
from fused_attn.modules import GridAttention2d, WindowAttention2d

SMALL = {"dim": 12, "depths": (2, 2), "heads": (3, 6), "window": 4, "patch_size": 2, "num_classes": 5}


def check_model(model, host, rename, size, logits=lambda out: out, tolerance=5e-5):
    """``rename``: name in the host -> name in ours, or (name, part of three), or None."""
    parts = {}
    for name, parameter in host.named_parameters():
        target = rename(name)
        target, part = target if isinstance(target, tuple) else (target, None)
        parts.setdefault(target, {})[part] = (name, parameter)
    state = model.state_dict()
    for target, found in parts.items():
        values = [found[part][1].detach() for part in sorted(found, key=lambda part: part or 0)]
        state[target] = torch.cat(values).view(state[target].shape)
    assert set(parts) == dict(model.named_parameters()).keys()
    for name, buffer in host.named_buffers():
        if (target := rename(name)) in state and name in host.state_dict():
            state[target] = buffer
    model.load_state_dict(state)
    x = torch.randn(2, 3, *size)
    names = {
        target: lambda gradients, found=found, like=state[target]: torch.cat(
            [gradients[found[part][0]] for part in sorted(found, key=lambda part: part or 0)]
        ).view(like.shape)
        for target, found in parts.items()
    }
    ours = outputs_and_gradients(lambda: model(x), with_parameters(model))
    theirs = outputs_and_gradients(lambda: logits(host(x)), with_parameters(host))
    assert_same(ours, theirs, names, tolerance)


# --- transformers ---------------------------------------------------------------------------------------------------


def hugging_face_config(config, **options):
    return config(
        image_size=32, patch_size=2, embed_dim=12, depths=[2, 2], num_heads=[3, 6], window_size=4, num_labels=5,
        drop_path_rate=0.0, attn_implementation="eager", **options,
    )  # fmt: skip


def from_hugging_face(name):
    name = name.removeprefix("swin.").replace("classifier.", "head.").replace("layernorm.", "norm.")
    name = name.replace("embeddings.patch_embeddings.projection", "patch_embed.proj")
    name = name.replace("embeddings.norm", "patch_embed.norm").replace("encoder.layers.", "layers.")
    name = re.sub(r"layers\.(\d+)\.downsample", lambda m: f"layers.{int(m[1]) + 1}.downsample", name)
    name = name.replace("layernorm_before", "norm1").replace("layernorm_after", "norm2")
    name = name.replace("attention.relative_position_bias.", "attn.").replace("attention.o_proj", "attn.proj")
    if match := re.fullmatch(r"(.*)attention\.([qkv])_proj\.(weight|bias)", name):
        return f"{match[1]}attn.qkv.{match[3]}", "qkv".index(match[2])
    return name


@pytest.mark.parametrize("impl", ["reference", "auto"])
@pytest.mark.parametrize("size", [(32, 32), (32, 48), (38, 27)])
def test_swin_of_transformers(transformers, impl, size):
    """A whole network: patches, windows, shifts and, with the last size, every kind of padding."""
    host = transformers.SwinForImageClassification(hugging_face_config(transformers.SwinConfig))
    model = Swin(**SMALL, impl=impl)
    check_model(model, randomise(host).train(), from_hugging_face, size, lambda out: out.logits)


@pytest.mark.parametrize("impl", ["reference", "auto"])
@pytest.mark.parametrize("size", [(32, 32), (38, 28)])
def test_swin_v2_of_transformers(transformers, monkeypatch, impl, size):
    """Its whole network, with the attention composed of the op."""
    from transformers.models.swinv2 import modeling_swinv2

    host = transformers.Swinv2ForImageClassification(hugging_face_config(transformers.Swinv2Config))
    randomise(host).train()
    x = torch.randn(2, 3, *size)
    expected = outputs_and_gradients(lambda: host(x).logits, with_parameters(host))

    def forward(self, hidden_states, attention_mask=None, *args, **kwargs):
        h, w = self.window_size
        attention = SwinV2Attention(self.all_head_size, self.num_attention_heads, (h, w), impl)
        layers = (self.query, self.key, self.value)
        segments = None
        if attention_mask is not None:  # as its number, the first position that a position sees
            segments = (attention_mask == 0).int().argmax(-1).int().unflatten(1, (h, w))
        windows = hidden_states.unflatten(1, (h, w))
        projected = [layer(windows) for layer in layers]
        scale = self.logit_scale[..., None]
        return (attention.attend(*projected, scale, self.continuous_position_bias_mlp, segments).flatten(1, 2),)

    monkeypatch.setattr(modeling_swinv2.Swinv2SelfAttention, "forward", forward)
    assert_same(outputs_and_gradients(lambda: host(x).logits, with_parameters(host)), expected, tolerance=5e-5)


# --- timm -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("impl", ["reference", "auto"])
@pytest.mark.parametrize("size", [(32, 32), (32, 48)])
def test_swin_of_timm(timm, impl, size):
    from timm.models.swin_transformer import SwinTransformer

    host = SwinTransformer(
        img_size=size,
        patch_size=2,
        embed_dim=12,
        depths=(2, 2),
        num_heads=(3, 6),
        window_size=4,
        num_classes=5,
        drop_path_rate=0.0,
    )
    model = Swin(**SMALL, impl=impl)
    check_model(model, randomise(host), lambda name: name.replace("head.fc", "head"), size)


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ("swin_tiny", "swin_tiny_patch4_window7_224"),
        ("swin_small", "swin_small_patch4_window7_224"),
        ("swin_base", "swin_base_patch4_window7_224"),
        ("coatnet_0_rw", "coatnet_0_rw_224"),
    ],
)
def test_sizes_of_timm(timm, ours, theirs):
    """Parameters of the same shapes in the same order, but for leading ones and the head's order of rows."""
    with torch.device("meta"):
        host, model = timm.create_model(theirs), create_model(ours, num_classes=1000)
    assert sum(p.numel() for p in host.parameters()) == sum(p.numel() for p in model.parameters())
    assert sorted(p.numel() for p in host.parameters()) == sorted(p.numel() for p in model.parameters())


@pytest.mark.parametrize("impl", ["reference", "auto"])
@pytest.mark.parametrize("shift", [0, 2])
def test_window_attention_of_timm(timm, impl, shift):
    """The layer alone, by the names of its parameters."""
    from timm.models.swin_transformer import SwinTransformerBlock

    host = randomise(SwinTransformerBlock(12, (8, 12), 3, window_size=4, shift_size=shift))
    module = WindowAttention2d(12, 3, 4, shift, impl=impl)
    module.load_state_dict(host.attn.state_dict())
    x = torch.randn(2, 8, 12, 12, requires_grad=True)
    expected = outputs_and_gradients(lambda: host._attn(x), with_parameters(host.attn, x=x))
    found = outputs_and_gradients(
        lambda: module(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1), with_parameters(module, x=x)
    )
    assert_same(found, expected)


def heads_first(rows, heads):
    """Rows of a linear layer in the order (heads, three, depth) -> those in the order (three, heads, depth)."""
    return rows.unflatten(0, (heads, 3, -1)).transpose(0, 1).flatten(0, 2)


@pytest.mark.parametrize("impl", ["reference", "auto"])
@pytest.mark.parametrize("partition", ["block", "grid"])
def test_maxvit_of_timm(timm, impl, partition):
    from timm.models.maxxvit import MaxxVitTransformerCfg, PartitionAttentionCl

    config = MaxxVitTransformerCfg(dim_head=4, window_size=(4, 2), grid_size=(4, 2), rel_pos_type="bias")
    host = randomise(PartitionAttentionCl(12, partition, config))
    module = (WindowAttention2d if partition == "block" else GridAttention2d)(12, 3, (4, 2), impl=impl)
    state = {name.replace("rel_pos.", ""): tensor for name, tensor in host.attn.state_dict().items()}
    module.load_state_dict({name: heads_first(x, 3) if "qkv" in name else x for name, x in state.items()})
    x = torch.randn(2, 8, 12, 12, requires_grad=True)
    expected = outputs_and_gradients(lambda: host._partition_attn(x), with_parameters(host.attn, x=x))
    found = outputs_and_gradients(
        lambda: module(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1), with_parameters(module, x=x)
    )
    table = "relative_position_bias_table"
    names = {name: name for name in found[1]} | {table: f"rel_pos.{table}"}
    for name in ("qkv.weight", "qkv.bias"):
        names[name] = lambda gradients, name=name: heads_first(gradients[name], 3)
    assert_same(found, expected, names)


def test_tables_of_tensorflows_maxvit(timm):
    """``RelPosBiasTf`` keeps (heads, 2h-1, 2w-1) and counts the other way."""
    from timm.layers import RelPosBiasTf

    h, w, heads = 4, 3, 2
    host = RelPosBiasTf((h, w), heads)
    torch.nn.init.normal_(host.relative_position_bias_table)
    query, key, value = torch.randn(3, 2, heads, h, w, 8).unbind()
    found = bias_attention_2d(query, key, value, host.relative_position_bias_table, index="key_minus_query")
    logits = query.flatten(2, 3) @ key.flatten(2, 3).mT * 8**-0.5 + host.get_bias()
    torch.testing.assert_close(found, (logits.softmax(-1) @ value.flatten(2, 3)).unflatten(2, (h, w)))


@pytest.mark.parametrize("impl", ["reference", "auto"])
def test_coatnet_of_timm(timm, impl):
    """A whole network, in evaluation: batch norms with statistics at random."""
    from timm.models.maxxvit import MaxxVit, MaxxVitCfg, _rw_coat_cfg

    torch.manual_seed(0)
    dims, depths, stem = (24, 32, 48, 64), (1, 2, 2, 2), (8, 16)
    config = MaxxVitCfg(
        embed_dim=dims, depths=depths, stem_width=stem,
        **_rw_coat_cfg(conv_attn_early=True, transformer_shortcut_bias=False),
    )  # fmt: skip
    host = randomise(MaxxVit(config, img_size=(64, 96), num_classes=5, transformer_dim_head=8)).eval()
    for name, buffer in host.named_buffers():
        if name.endswith(("running_mean", "running_var")):
            buffer.copy_(torch.rand(buffer.shape) + 0.5)
    options = {"stem": stem, "dims": dims, "depths": depths, "head_dim": 8, "image_size": (64, 96), "num_classes": 5}
    model = CoAtNet(**options, impl=impl).eval()
    heads = {}
    for stage, block in ((stage, block) for stage in (2, 3) for block in range(2)):
        attention = host.stages[stage].blocks[block].attn
        heads[f"stages.{stage}.{block}.attn"] = attention.num_heads
        with torch.no_grad():  # to the order of ours, there and back in its forward
            for tensor in (attention.qkv.weight, attention.qkv.bias):
                tensor.copy_(heads_first(tensor.clone(), attention.num_heads))
        attention.head_first = False

    def rename(name):
        name = name.replace(".blocks.", ".").replace("rel_pos.", "").replace("head.fc", "head")
        return re.sub(r"norm1\.norm\.", "norm1.", name)

    check_model(model, host, rename, (64, 96), tolerance=2e-4)


@pytest.mark.parametrize("impl", ["reference", "auto"])
def test_levit_of_timm(timm, impl):
    """Its attention with the op in the place of logits, softmax and product."""
    from timm.models.levit import Attention

    h, w, heads = 3, 4, 2
    host = randomise(Attention(8, 4, heads, attn_ratio=2.0, resolution=(h, w)))
    x = torch.randn(2, h * w, 8, requires_grad=True)
    expected = outputs_and_gradients(lambda: host(x), with_parameters(host, x=x))

    def ours():
        parts = host.qkv(x).unflatten(1, (h, w)).unflatten(3, (heads, -1)).permute(0, 3, 1, 2, 4)
        rows, columns = torch.arange(1 - h, h).abs(), torch.arange(1 - w, w).abs()
        table = host.attention_biases.unflatten(1, (h, w))[:, rows[:, None], columns]
        out = bias_attention_2d(*parts.split([4, 4, 8], -1), table, impl=impl)
        return host.proj(out.permute(0, 2, 3, 1, 4).flatten(3).flatten(1, 2))

    assert_same(outputs_and_gradients(ours, with_parameters(host, x=x)), expected, tolerance=1e-4)
