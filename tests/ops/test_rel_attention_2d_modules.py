"""RelPosAttention2d and AttentionAugmentedConv2d: what they compute, in which memory, and how they load."""

import pytest
import torch
import torch.nn.functional as F

from fused_attn.modules import AttentionAugmentedConv2d, RelPosAttention2d
from fused_attn.ops._floor.layout import empty_like_heads
from fused_attn.ops.rel_attention_2d import module as module_under_test


def attention(in_channels=6, key_channels=8, value_channels=4, heads=2, size=(5, 4), *, dtype=torch.float64, **options):
    torch.manual_seed(0)
    options = {"impl": "reference", **options}
    return RelPosAttention2d(in_channels, key_channels, value_channels, heads, size, dtype=dtype, **options)


def dense_attention(module, x):
    """The module's function from its parameters, with an explicit N x N bias and PyTorch's own attention."""
    batch, _, height, width = x.shape
    heads = module.heads
    qkv = F.conv2d(x, module.qkv.weight, module.qkv.bias).flatten(2)
    depths = (module.key_channels, module.key_channels, module.value_channels)
    query, key, value = (t.reshape(batch, heads, -1, height * width).mT for t in qkv.split(depths, dim=1))
    bias = torch.zeros(batch, heads, height * width, height * width, dtype=x.dtype)
    if module.rel_h is not None:
        scaled = query * query.shape[-1] ** -0.5
        for head in range(heads):
            table_h, table_w = (t[head] if t.dim() == 3 else t for t in (module.rel_h, module.rel_w))
            for q in range(height * width):
                for k in range(height * width):
                    dy, dx = k // width - q // width, k % width - q % width
                    embedding = table_h[dy + module.size[0] - 1] + table_w[dx + module.size[1] - 1]
                    bias[:, head, q, k] = scaled[:, head, q] @ embedding
    out = F.scaled_dot_product_attention(query, key, value, attn_mask=bias)
    out = out.mT.reshape(batch, module.value_channels, height, width)
    return F.conv2d(out, module.proj.weight, module.proj.bias)


@pytest.mark.parametrize(
    "options",
    [{}, {"relative": False}, {"per_head_tables": True}, {"bias": True}, {"out_channels": 3}],
    ids=lambda options: next(iter(options), "default"),
)
@pytest.mark.parametrize("grid", [(5, 4), (3, 2), (1, 1), (1, 4)])
def test_attention_is_dense_attention_with_the_tables_central_rows(options, grid):
    module = attention(**options)
    x = torch.randn(2, 6, *grid, dtype=torch.float64)
    torch.testing.assert_close(module(x), dense_attention(module, x))


def test_translation_equivariance():
    """A patch gives the same wherever it lies, and alone, once the background gets no attention."""
    module = attention(bias=True, size=(8, 9))
    depth = module.key_channels // module.heads
    with torch.no_grad():
        # Channel 0 marks the background.  Depth 0 of every head turns it into a logit of -1e4 * scale.
        for head in range(module.heads):
            query0, key0 = head * depth, module.key_channels + head * depth
            module.qkv.weight[[query0, key0]] = 0.0
            module.qkv.bias[query0], module.qkv.bias[key0] = 1.0, 0.0
            module.qkv.weight[key0, 0] = -1e4
        module.rel_h[:, 0] = module.rel_w[:, 0] = 0.0
    patch = torch.randn(1, 6, 4, 5, dtype=torch.float64)
    patch[:, 0] = 0.0
    alone = module(patch)
    for y, x in ((0, 0), (4, 4), (1, 3), (4, 0)):
        canvas = torch.zeros(1, 6, 8, 9, dtype=torch.float64)
        canvas[:, 0] = 1.0
        canvas[:, :, y : y + 4, x : x + 5] = patch
        torch.testing.assert_close(module(canvas)[:, :, y : y + 4, x : x + 5], alone)


def test_position_matters_only_through_the_tables():
    x = torch.randn(1, 6, 5, 4, dtype=torch.float64)
    permutation = torch.randperm(20, generator=torch.Generator().manual_seed(0))

    def permute(t):
        return t.flatten(2)[..., permutation].view_as(t)

    blind = attention(relative=False)
    torch.testing.assert_close(blind(permute(x)), permute(blind(x)))
    sighted = attention()
    assert (sighted(permute(x)) - permute(sighted(x))).abs().max() > 1e-3


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("relative", [True, False])
def test_augmented_convolution_is_convolution_and_attention_side_by_side(stride, relative):
    module = AttentionAugmentedConv2d(
        5,
        24,
        3,
        stride,
        (6, 4),
        heads=2,
        value_ratio=0.2,
        min_key_depth=3,
        relative=relative,
        dtype=torch.float64,
        impl="reference",
    )
    x = torch.randn(2, 5, 6, 4, dtype=torch.float64)
    pooled = x
    if stride == 2:  # mean over the up to nine inputs around every second position
        total = F.conv2d(x.flatten(0, 1)[:, None], torch.ones(1, 1, 3, 3, dtype=x.dtype), stride=2, padding=1)
        count = F.conv2d(torch.ones_like(x[:1, :1]), torch.ones(1, 1, 3, 3, dtype=x.dtype), stride=2, padding=1)
        pooled = (total / count).view(2, 5, 3, 2)
    out = module(x)
    torch.testing.assert_close(out[:, :-4], F.conv2d(x, module.conv.weight, stride=stride, padding=1))
    torch.testing.assert_close(out[:, -4:], dense_attention(module.attention, pooled))


@pytest.mark.parametrize("stride", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("kernel_size", [1, 3, 5])
def test_attention_and_convolution_meet_on_one_grid_for_any_input_size(stride, kernel_size):
    """And the pooling leaves no input position out: each has a gradient through the attention's values."""
    for height, width in ((1, 1), (2, 3), (7, 8), (10, 13)):
        module = AttentionAugmentedConv2d(
            2, 20, kernel_size, stride, (10, 13), heads=2, min_key_depth=2, dtype=torch.float64, impl="reference"
        )
        x = torch.randn(1, 2, height, width, dtype=torch.float64, requires_grad=True)
        out = module(x)
        assert out.shape == (1, 20, -(-height // stride), -(-width // stride))
        (grad,) = torch.autograd.grad(out[:, -2:].sum(), x)
        assert bool((grad != 0).all())


@pytest.mark.parametrize(
    ("out_channels", "options", "depths"),
    [
        (160, {}, (20, 2)),
        (320, {}, (20, 4)),
        (640, {}, (20, 8)),
        (1600, {}, (40, 20)),  # kappa decides once it gives more than 20
        (512, {}, (20, 6)),  # 6.4, rounded down
        (64, {}, (20, 1)),  # 0.8: a head keeps one value
        (16, {}, (20, 1)),
        (200, {"heads": 2, "key_ratio": 0.29}, (29, 10)),  # 28.999999999999996 in binary
        (64, {"heads": 2, "key_ratio": 0.5, "value_ratio": 0.25, "min_key_depth": 4}, (16, 8)),
    ],
)
def test_depths_per_head(out_channels, options, depths):
    with torch.device("meta"):
        module = AttentionAugmentedConv2d(8, out_channels, 3, 1, (4, 4), **options)
    inner = module.attention
    assert (inner.key_channels // inner.heads, inner.value_channels // inner.heads) == depths
    assert module.conv.out_channels + inner.proj.out_channels == out_channels
    assert inner.qkv.out_channels == inner.heads * (2 * depths[0] + depths[1])
    assert inner.rel_h.shape == inner.rel_w.shape == (7, depths[0])


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_no_copies_between_the_convolutions_and_the_op(memory_format, monkeypatch):
    module = attention(dtype=torch.float32).to(memory_format=memory_format)
    seen = {}

    def op(query, key, value, *tables, **options):
        seen["op_in"] = [t.untyped_storage().data_ptr() for t in (query, key, value)]
        # A kernel answers in the memory order of the query; the reference does not.
        out = empty_like_heads(query, value.shape[-1])
        out.copy_(original(query, key, value, *tables, **options))
        seen["op_out"] = out.untyped_storage().data_ptr()
        return out

    original = module_under_test.rel_attention_2d
    monkeypatch.setattr(module_under_test, "rel_attention_2d", op)
    module.qkv.register_forward_hook(lambda m, args, out: seen.update(qkv_out=out))
    module.proj.register_forward_pre_hook(lambda m, args: seen.update(proj_in=args[0]))
    x = torch.randn(2, 6, 5, 4).to(memory_format=memory_format)
    with torch.no_grad():
        out = module(x)
    assert seen["op_in"] == 3 * [seen["qkv_out"].untyped_storage().data_ptr()]
    assert seen["op_out"] == seen["proj_in"].untyped_storage().data_ptr()
    assert seen["proj_in"].is_contiguous(memory_format=memory_format)
    assert out.is_contiguous(memory_format=memory_format)
    torch.testing.assert_close(out, attention(dtype=torch.float32)(x.contiguous()))


@pytest.mark.parametrize("impl", ["reference", "auto"])
def test_channels_last_gives_the_same_values_and_gradients(impl):
    module = AttentionAugmentedConv2d(4, 24, 3, 2, (4, 3), heads=2, impl=impl)
    results = []
    for memory_format in (torch.contiguous_format, torch.channels_last):
        x = torch.randn(2, 4, 8, 6, generator=torch.Generator().manual_seed(1)).to(memory_format=memory_format)
        x.requires_grad_()
        module.to(memory_format=memory_format)
        out = module(x)
        assert out.is_contiguous(memory_format=memory_format)
        results.append((out, *torch.autograd.grad(out.square().sum(), (x, *module.parameters()))))
    for contiguous, channels_last in zip(*results, strict=True):
        torch.testing.assert_close(channels_last, contiguous, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("impl", ["reference", "auto"])
def test_gradients_reach_everything(impl):
    module = AttentionAugmentedConv2d(4, 24, 3, 2, (4, 3), heads=2, bias=True, impl=impl)
    x = torch.randn(2, 4, 8, 6, requires_grad=True)
    module(x).square().sum().backward()
    # A constant added to every key shifts all logits of a query alike: softmax does not see it.
    unused = module.attention.qkv.bias.grad[module.attention.key_channels : 2 * module.attention.key_channels]
    for name, tensor in (("x", x), *module.named_parameters()):
        live = tensor.grad != 0
        if name == "attention.qkv.bias":
            assert unused.abs().max() < 1e-3 * tensor.grad.abs().max()
            live[module.attention.key_channels : 2 * module.attention.key_channels] = True
        assert bool(live.all()), name


def test_dropout_acts_in_training_only():
    module = attention(dropout_p=0.5)
    x = torch.randn(2, 6, 5, 4, dtype=torch.float64)
    plain = attention()(x)
    torch.testing.assert_close(module.eval()(x), plain)
    module.train()
    torch.manual_seed(1)
    first = module(x)
    assert (first - plain).abs().max() > 1e-2
    torch.manual_seed(1)
    torch.testing.assert_close(module(x), first, rtol=0, atol=0)
    mean = torch.stack([module(x) for _ in range(800)]).mean(0)
    assert (mean - plain).abs().max() < 0.1 * (first - plain).abs().max()


def test_state_dict_loads_across_implementations():
    source = AttentionAugmentedConv2d(4, 24, 3, 1, (4, 3), heads=2, impl="reference")
    target = AttentionAugmentedConv2d(4, 24, 3, 1, (4, 3), heads=2, impl="auto")
    target.load_state_dict(source.state_dict())
    x = torch.randn(2, 4, 4, 3)
    torch.testing.assert_close(target(x), source(x), rtol=1e-4, atol=1e-5)


def test_state_dict_loads_with_and_without_tables():
    relative, blind = attention(), attention(relative=False)
    report = blind.load_state_dict(relative.state_dict(), strict=False)
    assert report.missing_keys == []
    assert report.unexpected_keys == ["rel_h", "rel_w"]
    report = relative.load_state_dict(blind.state_dict(), strict=False)
    assert report.missing_keys == ["rel_h", "rel_w"]
    assert report.unexpected_keys == []
    with pytest.raises(RuntimeError, match="rel_h"):
        relative.load_state_dict(blind.state_dict())


@pytest.mark.parametrize(
    ("impl", "backend", "heights"),
    # 6: another shape, smaller than the tables
    [("auto", "inductor", [8]), ("auto", "aot_eager", [8, 6]), ("reference", "aot_eager", [8, 6])],
)
def test_compiles_to_one_graph(impl, backend, heights):
    module = AttentionAugmentedConv2d(4, 24, 3, 2, (4, 4), heads=2, impl=impl)
    compiled = torch.compile(module, fullgraph=True, backend=backend)
    for height in heights:
        x = torch.randn(2, 4, height, 8).to(memory_format=torch.channels_last)
        eager = module(x)
        torch.testing.assert_close(compiled(x), eager, rtol=1e-4, atol=1e-5)
        expected = torch.autograd.grad(eager.square().sum(), list(module.parameters()))
        actual = torch.autograd.grad(compiled(x).square().sum(), list(module.parameters()))
        for a, e in zip(actual, expected, strict=True):
            torch.testing.assert_close(a, e, rtol=1e-3, atol=1e-4)
    torch._dynamo.reset()


def test_autocast_computes_in_the_lower_precision():
    module = attention(dtype=torch.float32, impl="auto")
    x = torch.randn(2, 6, 5, 4)
    expected = module(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = module(x)
    assert out.dtype == torch.bfloat16
    assert 0 < (out.float() - expected).abs().max() < 0.05 * expected.abs().max()


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"heads": 0}, "heads must be at least 1, got 0"),
        ({"key_channels": 9}, "key_channels must be a positive multiple of heads=2, got 9"),
        ({"value_channels": 0}, "value_channels must be a positive multiple of heads=2, got 0"),
        ({"size": (4, 0)}, r"size must be two positive numbers \(H, W\), got \(4, 0\)"),
        ({"dropout_p": 1.0}, r"dropout_p must be in \[0, 1\), got 1.0"),
        ({"impl": "fast"}, "impl must be one of 'auto', .*'reference', got 'fast'"),
    ],
)
def test_bad_arguments_of_attention(options, match):
    with pytest.raises(ValueError, match=match):
        attention(**options)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"kernel_size": 2}, "kernel_size must be a positive odd number, got 2"),
        ({"stride": 0}, "stride must be at least 1, got 0"),
        ({"heads": 0}, "heads must be at least 1, got 0"),
        ({"out_channels": 8}, "must leave some of out_channels=8 to the convolution"),
        ({"value_ratio": 1.0}, "must leave some of out_channels=16 to the convolution"),
    ],
)
def test_bad_arguments_of_augmented_convolution(options, match):
    arguments = {"in_channels": 4, "out_channels": 16, "kernel_size": 3, "stride": 1, "size": (4, 4), **options}
    with pytest.raises(ValueError, match=match):
        AttentionAugmentedConv2d(**arguments)


def test_bad_inputs():
    module = attention()
    with pytest.raises(ValueError, match=r"x must have shape \(B, 6, H, W\), got \(2, 5, 5, 4\)"):
        module(torch.randn(2, 5, 5, 4, dtype=torch.float64))
    with pytest.raises(ValueError, match=r"x must have shape \(B, 6, H, W\), got \(6, 5, 4\)"):
        module(torch.randn(6, 5, 4, dtype=torch.float64))
    with pytest.raises(ValueError, match=r"at most size=\(5, 4\), .* got \(5, 6\)"):
        module(torch.randn(2, 6, 5, 6, dtype=torch.float64))
    blind = attention(relative=False)
    x = torch.randn(2, 6, 7, 6, dtype=torch.float64)
    torch.testing.assert_close(blind(x), dense_attention(blind, x))
