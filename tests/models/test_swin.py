"""Swin: published sizes, stages, maps of the backbone, images of any size, training."""

import pytest
import torch
import torch.nn.functional as F
from equality import randomise
from model_checks import SWIN, check_trains, count, maps_and_outputs, on_meta

from fused_attn import create_model
from fused_attn.modules import WindowAttention2d


@pytest.mark.parametrize(
    ("name", "parameters"), [("swin_tiny", 28_288_354), ("swin_small", 49_606_258), ("swin_base", 87_768_224)]
)
def test_published_parameter_counts(name, parameters):
    assert count(on_meta(name, num_classes=1000)) == parameters


def test_every_second_block_is_shifted_by_half_a_window():
    model = on_meta("swin_small")
    shifts = [[block.attn.shift for block in stage.blocks] for stage in model.layers]
    assert shifts == [[(0, 0), (3, 3)] * (depth // 2) for depth in (2, 2, 18, 2)]
    heads = [module.heads for module in model.modules() if isinstance(module, WindowAttention2d)]
    assert heads == [3] * 2 + [6] * 2 + [12] * 18 + [24] * 2


def test_drop_path_grows_from_the_first_block_to_the_last():
    model = on_meta("swin_tiny", drop_path=0.2)
    rates = [block.drop_path.p for stage in model.layers for block in stage.blocks]
    assert rates == pytest.approx([0.2 * index / 11 for index in range(12)])


def test_merging_takes_four_neighbours_column_by_column():
    """The order of the published weights: (0, 0), (1, 0), (0, 1), (1, 1)."""
    merge = randomise(create_model("swin_tiny", **SWIN)).layers[1].downsample
    x = torch.randn(2, 4, 6, 16)
    four = torch.cat((x[:, ::2, ::2], x[:, 1::2, ::2], x[:, ::2, 1::2], x[:, 1::2, 1::2]), -1)
    expected = F.layer_norm(four, (64,), merge.norm.weight, merge.norm.bias) @ merge.reduction.weight.T
    torch.testing.assert_close(merge(x), expected)


@pytest.mark.parametrize("size", [(16, 16), (17, 30), (5, 64), (1, 1)])
def test_images_of_any_size(size):
    model = create_model("swin_tiny", features_only=True, **SWIN)
    maps = model(torch.randn(2, 3, *size))
    first = [-(-length // 2) for length in size]
    grids = [first, [-(-length // 2) for length in first]]
    assert [x.shape for x in maps] == [(2, c, *grid) for c, grid in zip((16, 32), grids, strict=True)]
    assert all(x.is_contiguous(memory_format=torch.channels_last) for x in maps)
    assert all(x.isfinite().all() for x in maps)


def test_zeros_beyond_the_image_change_nothing_but_through_their_padding():
    """Padding an image with whole patches of zeros by hand is what the network does with what is missing of a patch."""
    model = randomise(create_model("swin_tiny", **SWIN)).eval()
    x = torch.randn(1, 3, 15, 16)
    with torch.no_grad():
        torch.testing.assert_close(model(x), model(F.pad(x, (0, 0, 0, 1))))


def test_maps_are_the_classifiers_own():
    model = randomise(create_model("swin_tiny", **SWIN)).eval()
    backbone = create_model("swin_tiny", features_only=True, out_indices=(0,), **SWIN).eval()
    unused = ("norm.", "head.", "layers.1.")
    ((found, output),) = maps_and_outputs(model, backbone, [model.layers[0]], torch.randn(2, 3, 18, 20), unused)
    torch.testing.assert_close(found, output.permute(0, 3, 1, 2))


@pytest.mark.parametrize("channels_last", [False, True])
def test_trains(channels_last):
    model = create_model("swin_tiny", num_classes=5, **SWIN)
    x = torch.randn(4, 3, 16, 16)
    if channels_last:
        model, x = model.to(memory_format=torch.channels_last), x.contiguous(memory_format=torch.channels_last)
    check_trains(model, x, torch.arange(4))
