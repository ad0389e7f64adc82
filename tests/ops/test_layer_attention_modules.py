"""MRLABase, MRLALight and LayerAttention beside direct implementations of their papers' equations."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fused_attn.modules import LayerAttention, LayerCache, MRLABase, MRLALight


def published_mrla_base(module, x, previous_keys, previous_values):
    """Eq. 6 of the paper with all keys and values concatenated, channel by channel."""
    (batch, channels, height, width), heads = x.shape, module.heads
    pooled = F.adaptive_avg_pool2d(x, 1).flatten(1)[:, None]
    padding = module.query.weight.shape[-1] // 2
    query = F.conv1d(pooled, module.query.weight, padding=padding)
    key = F.conv1d(pooled, module.key.weight, padding=padding)
    value = F.conv2d(x, module.value.weight, padding=1, groups=channels)[:, None]
    keys = key if previous_keys is None else torch.cat((previous_keys, key), dim=1)
    values = value if previous_values is None else torch.cat((previous_values, value), dim=1)
    per_head = channels // heads
    logits = (
        torch.einsum("bgd,btgd->bgt", query.view(batch, heads, per_head), keys.view(batch, -1, heads, per_head))
        / per_head**0.5
    )
    out = torch.einsum("bgt,btgdhw->bgdhw", logits.softmax(-1), values.view(batch, -1, heads, per_head, height, width))
    return out.reshape(x.shape), keys, values


@pytest.mark.parametrize(("channels", "dim_per_head"), [(32, 16), (24, 8), (6, 1)])
def test_mrla_base_is_the_published_formulation(channels, dim_per_head):
    """Outputs of a stage of four layers, each fed by the one before, and the gradients of everything."""
    modules = nn.ModuleList(MRLABase(channels, dim_per_head=dim_per_head, impl="reference") for _ in range(4)).double()
    for module in modules:
        module.query.weight.data *= 5  # weights far from uniform
    x = torch.randn(2, channels, 5, 3, dtype=torch.float64)

    def stage(attend):
        start = x.clone().requires_grad_()
        outputs, current = [], start
        for module in modules:
            outputs.append(attend(module, current))
            current = current + outputs[-1].tanh()
        torch.manual_seed(1)
        loss = sum((out * torch.randn_like(out)).sum() for out in outputs)
        return outputs, torch.autograd.grad(loss, [start, *modules.parameters()])

    cache, packed = LayerCache(), [None, None]

    def published(module, current):
        out, *packed[:] = published_mrla_base(module, current, *packed)
        return out

    outputs, gradients = stage(lambda module, current: module(current, cache))
    expected_outputs, expected_gradients = stage(published)
    torch.testing.assert_close(outputs, expected_outputs, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(gradients, expected_gradients, rtol=1e-9, atol=1e-9)


def saved_maps(layers, published=False):
    """What a stage of so many layers keeps for its backward pass, in maps: storages smaller than one do not count."""
    torch.manual_seed(0)
    modules = [MRLABase(16) for _ in range(layers)]
    storages = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    x, cache, packed, held = torch.randn(1, 16, 24, 24), LayerCache(), [None, None], []
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        for module in modules:
            if published:
                out, *packed = published_mrla_base(module, x, *packed)
            else:
                out = module(x, cache)
            held.append(out)  # no storage's address is used again
            x = x + out
    size_of_map = 4 * x.numel()
    return sum(size for size in storages.values() if size >= size_of_map) / size_of_map


@pytest.mark.parametrize("layers", [4, 8, 16, 32])
def test_a_stage_saves_memory_linear_in_its_layers(layers):
    """Two maps a layer: the value, and the input of the convolution that made it.  The published form keeps the
    concatenated values of every layer."""
    assert saved_maps(layers) <= 2 * layers
    assert saved_maps(layers, published=True) >= layers + layers * (layers + 1) / 2


@pytest.mark.parametrize("gelu", [False, True])
@pytest.mark.parametrize(("channels", "dim_per_head"), [(64, 32), (24, 8), (5, 1)])
def test_mrla_light_is_the_published_formulation(channels, dim_per_head, gelu):
    module = MRLALight(channels, dim_per_head=dim_per_head, gelu=gelu).double()
    x, shortcut = (torch.randn(2, channels, 4, 5, dtype=torch.float64, requires_grad=True) for _ in range(2))

    heads, padding = channels // dim_per_head, module.query.weight.shape[-1] // 2
    pooled = F.adaptive_avg_pool2d(x, 1).flatten(1)[:, None]
    query, key = (F.conv1d(pooled, conv.weight, padding=padding) for conv in (module.query, module.key))
    logits = torch.einsum("bgd,bgd->bg", query.view(2, heads, -1), key.view(2, heads, -1)) / dim_per_head**0.5
    value = F.conv2d(x, module.value.weight, padding=1, groups=channels)
    value = (F.gelu(value) if gelu else value).view(2, heads, dim_per_head, 4, 5)
    gated = torch.einsum("bg,bgdhw->bgdhw", 1 / (1 + (-logits).exp()), value).reshape(x.shape)
    expected = gated + torch.einsum("c,bchw->bchw", module.shortcut_weight, shortcut)

    out = module(x, shortcut)
    torch.testing.assert_close(out, expected, rtol=1e-10, atol=1e-10)
    inputs, direction = [x, shortcut, *module.parameters()], torch.randn_like(out)
    torch.testing.assert_close(
        torch.autograd.grad(out, inputs, direction),
        torch.autograd.grad(expected, inputs, direction),
        rtol=1e-9,
        atol=1e-9,
    )


@pytest.mark.parametrize(("channels", "kernel"), [(2, 1), (16, 3), (192, 5), (256, 5), (512, 5), (1024, 5), (2048, 7)])
def test_kernel_size_of_query_and_key(channels, kernel):
    """int((log2(C) + 1) / 2), made odd: 5 for 256 = 2^8, whose 4 is even."""
    module = MRLALight(channels, dim_per_head=1, device="meta")
    assert module.query.weight.shape == module.key.weight.shape == (1, 1, kernel)


@pytest.mark.parametrize("values", ["pad", "project"])
def test_layer_attention_on_maps_is_the_papers_equation(values):
    module = LayerAttention([2, 4, 4], key_dim=3, values=values, impl="reference").double()
    shapes = [(2, 8, 8), (4, 4, 4), (4, 4, 4)]
    layers = [torch.randn(2, *shape, dtype=torch.float64, requires_grad=True) for shape in shapes]
    widened = [F.avg_pool2d(layers[0], 2), *layers[1:]]
    if values == "pad":
        widened[0] = torch.cat((widened[0], torch.zeros_like(widened[0])), dim=1)
    else:
        widened[0] = torch.einsum("oc,bchw->bohw", module.projections[0].weight, widened[0])
    keys = torch.stack([F.linear(x.mean((2, 3)), k.weight, k.bias) for x, k in zip(widened, module.keys, strict=True)])
    weights = (torch.einsum("bd,lbd->bl", keys[-1], keys) / 3**0.5).softmax(-1)
    expected = torch.einsum("bl,lbchw->bchw", weights, torch.stack(widened))
    out = module(layers)
    torch.testing.assert_close(out, expected, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(module([x.mean((2, 3)) for x in layers]), expected.mean((2, 3)), rtol=1e-10, atol=1e-10)
    inputs, direction = [*layers, *module.parameters()], torch.randn_like(out)
    torch.testing.assert_close(
        torch.autograd.grad(out, inputs, direction),
        torch.autograd.grad(expected, inputs, direction),
        rtol=1e-9,
        atol=1e-9,
    )


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: MRLABase(24), "channels must be a positive multiple of dim_per_head=16, got 24"),
        (lambda: MRLALight(0), "channels must be a positive multiple of dim_per_head=32, got 0"),
        (lambda: MRLALight(32, dim_per_head=0), "channels must be a positive multiple of dim_per_head=0"),
        (lambda: MRLABase(16, impl="fast"), "impl must be one of 'auto', .* got 'fast'"),
        (lambda: MRLABase(16)(torch.randn(1, 8, 2, 2), LayerCache()), r"x must have shape \(B, 16, H, W\), got \(1, 8"),
        (lambda: LayerAttention([]), r"channels must be at least one positive number, got \(\)"),
        (lambda: LayerAttention([8, 4]), "must not exceed those of the last layer with values='pad'"),
        (lambda: LayerAttention([4], key_dim=0), "key_dim must be at least 1, got 0"),
        (lambda: LayerAttention([4], values="repeat"), "values must be one of 'pad', 'project', got 'repeat'"),
        (lambda: LayerAttention([4], key_grid=(2, 0)), "key_grid must be a positive number or two of them"),
        (lambda: LayerAttention([4], impl="fast"), "impl must be one of 'auto', .* got 'fast'"),
        (lambda: LayerAttention([4, 4])([torch.randn(1, 4)]), "layers must be 2 tensors, got 1"),
        (
            lambda: LayerAttention([4, 4])([torch.randn(1, 4), torch.randn(1, 4, 2, 2)]),
            r"layers must all have 2 dimensions \(B, C\), or all 4 \(B, C, H, W\), got \[2, 4\]",
        ),
        (
            lambda: LayerAttention([4], key_grid=2)([torch.randn(1, 4)]),
            r"layers must be maps \(B, C, H, W\) for key_grid=\(2, 2\)",
        ),
        (
            lambda: LayerAttention([4, 4])([torch.randn(1, 4), torch.randn(1, 3)]),
            r"layers\[1\] must have 4 channels, got shape \(1, 3\)",
        ),
    ],
)
def test_bad_input(make, match):
    with pytest.raises(ValueError, match=match):
        make()


def test_impl_is_not_in_the_state_dict_and_reaches_the_op():
    for make in (
        lambda impl: MRLABase(16, impl=impl),
        lambda impl: MRLALight(32, impl=impl),
        lambda impl: LayerAttention([4], impl=impl),
    ):
        assert make("reference").state_dict().keys() == make("triton").state_dict().keys()
    for call in (
        lambda: MRLABase(16, impl="cuda")(torch.randn(1, 16, 2, 2), LayerCache()),
        lambda: LayerAttention([4], impl="cuda")([torch.randn(1, 4)]),
        lambda: MRLALight(32, impl="cuda")(*torch.randn(2, 1, 32, 2, 2)),
    ):
        with pytest.raises(ValueError, match=r"impl must be one of 'auto', .* got 'cuda'"):
            call()


def test_the_modules_follow_device_and_dtype():
    for module in (
        MRLABase(16, dtype=torch.float64),
        MRLALight(32, dtype=torch.float64),
        LayerAttention([4], dtype=torch.float64),
    ):
        assert {parameter.dtype for parameter in module.parameters()} == {torch.float64}
