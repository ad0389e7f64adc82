"""WindowAttention2d and GridAttention2d beside the published formulations, which are written out here."""

import math

import pytest
import torch
import torch.nn.functional as F
from equality import assert_same, outputs_and_gradients, randomise
from swin_v2 import SwinV2Attention, coordinates

from fused_attn import bias_attention_2d
from fused_attn.modules import GridAttention2d, WindowAttention2d

IMPLS = ("reference", "auto")


def index_of(h, w):
    """Row of a table of (2h-1)*(2w-1) positions for every query and key of a window: (h*w, h*w)."""
    y, x = torch.arange(h).repeat_interleave(w), torch.arange(w).repeat(h)
    return (y[:, None] - y + h - 1) * (2 * w - 1) + x[:, None] - x + w - 1


def plain_attention(windows, module, window, mask=None):
    """Attention of windows (N, h*w, dim) with a gathered bias; mask (windows of an image, h*w, h*w)."""
    number, positions, _ = windows.shape
    query, key, value = (
        part.view(number, positions, module.heads, -1).transpose(1, 2) for part in module.qkv(windows).chunk(3, -1)
    )
    full_h, full_w = module.window
    h, w = window
    table = module.relative_position_bias_table.view(2 * full_h - 1, 2 * full_w - 1, -1)
    table = table[full_h - h : full_h + h - 1, full_w - w : full_w + w - 1].flatten(0, 1)
    logits = query * query.shape[-1] ** -0.5 @ key.mT + table[index_of(h, w)].permute(2, 0, 1)
    if mask is not None:
        logits = (logits.unflatten(0, (-1, len(mask))) + mask[:, None]).flatten(0, 1)
    return module.proj((logits.softmax(-1) @ value).transpose(1, 2).flatten(2))


def cut(x, h, w):
    batch, height, width, dim = x.shape
    return x.view(batch, height // h, h, width // w, w, dim).transpose(2, 3).reshape(-1, h * w, dim)


def join(windows, h, w, height, width):
    x = windows.view(-1, height // h, width // w, h, w, windows.shape[-1])
    return x.transpose(2, 3).reshape(-1, height, width, windows.shape[-1])


def plain_windows(module, x):
    """Swin as published: pad, roll, cut, a mask of -100 between what the roll brought together, join, roll back."""
    x = x.permute(0, 2, 3, 1)
    height, width = x.shape[1:3]
    window = [min(pair) for pair in zip((height, width), module.window, strict=True)]
    shift = [s if length > size else 0 for s, length, size in zip(module.shift, (height, width), window, strict=True)]
    x = F.pad(x, (0, 0, 0, -width % window[1], 0, -height % window[0]))
    padded = x.shape[1:3]
    mask = None
    if any(shift):
        regions = torch.zeros(1, *padded, 1)
        for axis in (1, 2):
            region = torch.zeros(padded[axis - 1])
            region[padded[axis - 1] - window[axis - 1] :] = 1
            region[padded[axis - 1] - shift[axis - 1] :] = 2
            regions = regions * 3 + region.view([-1 if other == axis else 1 for other in range(4)])
        regions = cut(regions, *window)[..., 0]
        mask = (regions[:, :, None] != regions[:, None]).float() * -100.0
        x = torch.roll(x, [-s for s in shift], (1, 2))
    out = join(plain_attention(cut(x, *window), module, window, mask), *window, *padded)
    return torch.roll(out, shift, (1, 2))[:, :height, :width].permute(0, 3, 1, 2)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(
    ("grid", "window", "shift"),
    [
        ((8, 12), 4, 0),
        ((8, 12), 4, 2),
        ((14, 14), 7, 3),
        ((6, 6), (2, 3), (1, 0)),
        ((6, 6), (2, 3), (0, 2)),
        ((7, 10), 4, 0),
        ((7, 10), 4, 2),
        ((4, 4), 4, 2),  # one window: no shift
        ((4, 9), 4, 2),  # a shift along one axis
        ((3, 10), 4, 2),  # smaller than a window along one axis
        ((1, 1), 3, 1),
    ],
)
@pytest.mark.parametrize("channels_last", [False, True])
def test_windows_as_published(impl, grid, window, shift, channels_last):
    module = randomise(WindowAttention2d(12, 3, window, shift, impl=impl))
    x = torch.randn(2, 12, *grid)
    if channels_last:
        x = x.contiguous(memory_format=torch.channels_last)
    x.requires_grad_()
    tensors = {"x": x, **dict(module.named_parameters())}
    found = outputs_and_gradients(lambda: module(x), tensors)
    expected = outputs_and_gradients(lambda: plain_windows(module, x), tensors)
    if grid == (1, 1):  # one key has all the weight, whatever the logits
        assert found[1].pop("relative_position_bias_table").abs().max() < 1e-6
        expected[1].pop("relative_position_bias_table")
    assert_same(found, expected)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("grid", [(6, 8), (3, 2), (9, 2)])
def test_grids_as_published(impl, grid):
    """MaxViT: position (y, x) of the window of cell (i, j) is position (i, j) of cell (y, x)."""
    module = randomise(GridAttention2d(12, 3, (3, 2), out_dim=8, impl=impl))
    x = torch.randn(2, 12, *grid, requires_grad=True)

    def published():
        out = torch.empty(2, 8, *grid)
        steps = grid[0] // 3, grid[1] // 2
        for i in range(steps[0]):
            for j in range(steps[1]):
                part = x[:, :, i :: steps[0], j :: steps[1]].flatten(2).mT
                attended = plain_attention(part, module, (3, 2)).mT.unflatten(2, (3, 2))
                out[:, :, i :: steps[0], j :: steps[1]] = attended
        return out

    tensors = {"x": x, **dict(module.named_parameters())}
    assert_same(outputs_and_gradients(lambda: module(x), tensors), outputs_and_gradients(published, tensors))


@pytest.mark.parametrize("impl", IMPLS)
def test_levit_as_published(impl):
    """A bias for the absolute differences: (heads, H, W), mirrored into a table."""
    height, width, heads, d_k, d_v = 4, 5, 3, 4, 8
    query, key = torch.randn(2, 2, heads, height, width, d_k, requires_grad=True).unbind()
    value = torch.randn(2, heads, height, width, d_v, requires_grad=True)
    biases = torch.randn(heads, height * width, requires_grad=True)
    tensors = {"query": query, "key": key, "value": value, "biases": biases}

    def mirrored():
        rows = torch.arange(-height + 1, height).abs()
        columns = torch.arange(-width + 1, width).abs()
        table = biases.unflatten(1, (height, width))[:, rows[:, None], columns]
        return bias_attention_2d(query, key, value, table, impl=impl)

    def published():
        y, x = torch.arange(height).repeat_interleave(width), torch.arange(width).repeat(height)
        index = (y[:, None] - y).abs() * width + (x[:, None] - x).abs()
        logits = query.flatten(2, 3) @ key.flatten(2, 3).mT * d_k**-0.5 + biases[:, index]
        return (logits.softmax(-1) @ value.flatten(2, 3)).unflatten(2, (height, width))

    assert_same(outputs_and_gradients(mirrored, tensors), outputs_and_gradients(published, tensors))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("shifted", [False, True])
def test_swin_v2_as_published(impl, shifted):
    heads, h, w = 2, 4, 3
    module = SwinV2Attention(8, heads, (h, w), impl)
    x = torch.randn(6, h, w, 8, requires_grad=True)
    segments = torch.randint(0, 2, (3, h, w), dtype=torch.int32) if shifted else None

    def published():
        query, key, value = (
            part.reshape(6, h * w, heads, -1).transpose(1, 2) for part in module.qkv(x).flatten(1, 2).chunk(3, -1)
        )
        cosine = F.normalize(query, dim=-1) @ F.normalize(key, dim=-1).mT
        logits = cosine * module.logit_scale.view(heads, 1, 1).clamp(max=math.log(100.0)).exp()
        table = 16 * torch.sigmoid(module.mlp(coordinates((h, w))).flatten(0, 1)[index_of(h, w)])
        logits = logits + table.permute(2, 0, 1)
        if shifted:
            mask = (segments.flatten(1)[:, :, None] != segments.flatten(1)[:, None]) * -100.0
            logits = logits + mask.repeat(2, 1, 1)[:, None]
        return (logits.softmax(-1) @ value).transpose(1, 2).flatten(2).view(6, h, w, -1)

    tensors = {"x": x, **dict(module.named_parameters())}
    assert_same(outputs_and_gradients(lambda: module(x, segments), tensors), outputs_and_gradients(published, tensors))


def test_one_window_in_channels_last_memory_is_not_copied():
    module = WindowAttention2d(8, 2, 4)
    seen = []
    module.qkv.register_forward_pre_hook(lambda layer, args: seen.append(args[0]))
    x = torch.randn(3, 8, 4, 4).contiguous(memory_format=torch.channels_last)
    out = module(x)
    assert seen[0].data_ptr() == x.data_ptr()
    assert out.is_contiguous(memory_format=torch.channels_last)


def test_dropout_acts_in_training_only():
    module = WindowAttention2d(8, 2, 4, 2, dropout_p=0.5)
    x = torch.randn(1, 8, 8, 8)
    assert not torch.equal(module(x), module(x))
    module.eval()
    torch.testing.assert_close(module(x), plain_windows(module, x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: WindowAttention2d(8, 0, 4), "heads must be at least 1, got 0"),
        (lambda: WindowAttention2d(8, 3, 4), "dim must be a positive multiple of heads=3, got 8"),
        (lambda: WindowAttention2d(8, 2, 0), "window must be a positive number or two of them .*, got 0"),
        (lambda: WindowAttention2d(8, 2, (4, 4, 4)), r"window must be .*, got \(4, 4, 4\)"),
        (lambda: WindowAttention2d(8, 2, 4, 4), r"shift must be from 0 to less than window=\(4, 4\) .*, got 4"),
        (lambda: WindowAttention2d(8, 2, 4, (0, -1)), r"shift must be from 0 .*, got \(0, -1\)"),
        (lambda: WindowAttention2d(8, 2, 4, (1,)), r"shift must be from 0 .*, got \(1,\)"),
        (lambda: WindowAttention2d(8, 2, 4, dropout_p=1.0), r"dropout_p must be in \[0, 1\), got 1.0"),
        (lambda: WindowAttention2d(8, 2, 4, impl="fast"), "impl must be one of 'auto', .*, got 'fast'"),
        (lambda: WindowAttention2d(8, 2, 4)(torch.randn(2, 4, 4, 8)), r"x must have shape \(B, 8, H, W\), got \(2, 4"),
        (lambda: WindowAttention2d(8, 2, 4)(torch.randn(2, 8, 0, 4)), r"x must have a height .*, got \(2, 8, 0, 4\)"),
        (
            lambda: WindowAttention2d(8, 2, 4).bias_table((4, 5)),
            r"windows must be at most \(4, 4\) large, got \(4, 5\)",
        ),
        (lambda: GridAttention2d(8, 2, 4)(torch.randn(2, 8, 4, 0)), r"x must have a height .*, got \(2, 8, 4, 0\)"),
        (lambda: GridAttention2d(8, 2, (4, 0)), r"grid must be a positive number .*, got \(4, 0\)"),
        (
            lambda: GridAttention2d(8, 2, (2, 3))(torch.randn(1, 8, 4, 4)),
            r"x must have multiples of grid=\(2, 3\) as height and width, got \(1, 8, 4, 4\)",
        ),
    ],
)
def test_bad_input(make, match):
    with pytest.raises(ValueError, match=match):
        make()
