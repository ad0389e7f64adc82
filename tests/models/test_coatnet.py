"""CoAtNet: published size, tables of its maps, images of other sizes, training."""

import pytest
import torch
from equality import randomise
from model_checks import COATNET, check_trains, count, maps_and_outputs, on_meta

from fused_attn import create_model
from fused_attn.modules import WindowAttention2d


def test_published_parameter_count():
    """That of timm's coatnet_0_rw_224."""
    assert count(on_meta("coatnet_0_rw", num_classes=1000)) == 27_435_562


@pytest.mark.parametrize(
    ("size", "windows"), [(224, [(14, 14)] * 7 + [(7, 7)] * 2), ((100, 64), [(7, 4)] * 7 + [(4, 2)] * 2)]
)
def test_attention_covers_the_whole_map(size, windows):
    model = on_meta("coatnet_0_rw", image_size=size)
    assert [module.window for module in model.modules() if isinstance(module, WindowAttention2d)] == windows


def test_smaller_images_take_the_middle_of_the_tables():
    """As a network that was built for them, with those parts of the tables."""
    model = randomise(create_model("coatnet_0_rw", image_size=64, **COATNET)).eval()
    small = create_model("coatnet_0_rw", image_size=(48, 64), **COATNET).eval()
    state = model.state_dict()
    for name, module in model.named_modules():
        if isinstance(module, WindowAttention2d):
            window = small.get_submodule(name).window
            table = module.bias_table(window).permute(1, 2, 0).flatten(0, 1)
            state[f"{name}.relative_position_bias_table"] = table.detach()
    small.load_state_dict(state)
    x = torch.randn(2, 3, 48, 64)
    with torch.no_grad():
        torch.testing.assert_close(model(x), small(x))


def test_larger_images_are_refused():
    model = create_model("coatnet_0_rw", image_size=(32, 48), **COATNET)
    with pytest.raises(ValueError, match=r"size \(H, W\) of at most \(32, 48\), got shape \(1, 3, 48, 32\)"):
        model(torch.randn(1, 3, 48, 32))


def test_maps_are_the_classifiers_own():
    model = randomise(create_model("coatnet_0_rw", image_size=32, **COATNET)).eval()
    backbone = create_model("coatnet_0_rw", image_size=32, features_only=True, out_indices=(0, 3), **COATNET).eval()
    parts, unused = (model.stem, model.stages[2]), ("norm.", "head.", "stages.3.")
    for found, expected in maps_and_outputs(model, backbone, parts, torch.randn(2, 3, 32, 32), unused):
        torch.testing.assert_close(found, expected)


def test_trains():
    model = create_model("coatnet_0_rw", num_classes=5, image_size=64, **COATNET)
    check_trains(model, torch.randn(4, 3, 64, 64), torch.arange(4))
