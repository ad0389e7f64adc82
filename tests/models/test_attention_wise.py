"""Attention-Wise networks and their control: exact sizes, what they compute, initialisation, training."""

import pytest
import torch
import torch.nn.functional as F
from model_checks import check_trains, count, on_meta, randomise_norms
from torch import nn

from fused_attn import create_model
from fused_attn.modules import ElementwiseAttentionBlock

FASHION = {"in_chans": 1, "image_size": 28}
#: heads, layers, batch normalisation: section 2.2 of the paper
CONFIGURATIONS = {
    "attention_wise_a": (8, 2, True),
    "attention_wise_b": (8, 2, False),
    "attention_wise_c": (16, 2, True),
    "attention_wise_d": (16, 2, False),
    "attention_wise_e": (8, 4, True),
    "attention_wise_f": (8, 4, False),
    "attention_wise_g": (16, 4, True),
    "attention_wise_h": (16, 4, False),
    "attention_wise_one_head": (1, 2, True),
    "attention_wise_cifar": (8, 4, False),
}


@pytest.mark.parametrize(
    ("name", "options", "parameters"),
    [
        # published
        ("vgg_control", FASHION, 929_510),
        ("vgg_control", {"in_chans": 3, "image_size": 32}, 961_310),
        ("attention_wise_b", FASHION, 33_084),
        ("attention_wise_f", FASHION, 58_318),
        # those of the design
        ("attention_wise", {**FASHION, "heads": 8, "layers": 2}, 33_084),
        ("attention_wise_cifar", {"in_chans": 3}, 229_942),
    ],
)
def test_parameter_counts(name, options, parameters):
    assert count(on_meta(name, **options)) == parameters


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_count_is_the_papers_formula(name):
    """Eq. 8, with the biases and norms that it leaves out: 2 C H W heads and a 3x3 convolution in every layer."""
    heads, layers, norm = CONFIGURATIONS[name]
    channels, size = (3, 32) if name.endswith("cifar") else (1, 28)
    attention = 2 * channels * size**2 * heads
    convolution = channels * (9 * heads * channels + 1)
    classifier = 10 * (channels * size**2 + 1)
    model = on_meta(name, in_chans=channels)
    assert count(model) == layers * (attention + convolution + 2 * channels * norm) + classifier
    blocks = [module for module in model.modules() if isinstance(module, ElementwiseAttentionBlock)]
    assert [block.attention.heads for block in blocks] == [heads] * layers


def layer(block, x):
    """The paper's section 2.2 and eq. 4 to 7, in evaluation."""
    attention, channels = block.attention, x.shape[1]
    heads = []
    for head in range(attention.heads):
        rows = (x * attention.weight_row[head]).softmax(3)
        columns = (x * attention.weight_col[head]).softmax(2)
        own = slice(head * channels, (head + 1) * channels)
        normed = F.batch_norm(
            rows * columns, attention.norm.running_mean[own], attention.norm.running_var[own], eps=1e-5
        )
        heads.append(normed * x)
    return block.norm(F.conv2d(torch.cat(heads, 1), block.conv.weight, block.conv.bias, padding=1) + x).relu()


@pytest.mark.parametrize(("name", "channels"), [("attention_wise_a", 2), ("attention_wise_h", 1)])
def test_logits_are_those_of_the_papers_equations(name, channels):
    model = randomise_norms(create_model(name, in_chans=channels, image_size=(5, 6), impl="reference")).double().eval()
    for module in model.modules():
        if isinstance(module, ElementwiseAttentionBlock):
            nn.init.normal_(module.attention.weight_row)
            nn.init.normal_(module.attention.weight_col)
            nn.init.normal_(module.attention.norm.running_mean, std=0.1)
            nn.init.uniform_(module.attention.norm.running_var, 0.001, 0.01)
            nn.init.normal_(module.conv.weight, std=0.3)
    images = torch.randn(3, channels, 5, 6, dtype=torch.float64)
    with torch.no_grad():
        x = images
        for block in model.layers:
            x = layer(block, x)
        expected = x.flatten(1) @ model.fc.weight.T + model.fc.bias
        torch.testing.assert_close(model(images), expected, rtol=1e-10, atol=1e-12)
        assert (x > 0).float().mean() > 0.2


def test_a_layer_without_skip_and_other_starts():
    model = create_model(
        "attention_wise_b", in_chans=1, skip=False, std=1.0, attention_std=0.5, impl="reference"
    ).eval()
    assert model.fc.weight.std().item() == pytest.approx(1.0, abs=0.05)
    assert model.layers[0].attention.weight_row.std().item() == pytest.approx(0.5, abs=0.02)
    assert not model.fc.bias.any()
    block, images = model.layers[0], torch.rand(2, 1, 28, 28)
    with torch.no_grad():
        torch.testing.assert_close(block(images), block.conv(block.attention(images)).relu())
    for name, value in (("std", -1.0), ("attention_std", float("nan"))):
        with pytest.raises(ValueError, match=f"{name} must be at least 0 and finite, got {value}"):
            create_model("attention_wise_b", in_chans=1, **{name: value})


def test_control_halves_the_maps_twice():
    model = create_model("vgg_control", in_chans=1).eval()
    shapes = []
    for module in model.features:
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(lambda m, args, out: shapes.append(tuple(out.shape[1:])))
    with torch.no_grad():
        assert model(torch.randn(2, 1, 28, 28)).shape == (2, 10)
    assert shapes == [(100, 28, 28)] * 2 + [(100, 14, 14)] + [(200, 14, 14)] * 2 + [(200, 7, 7)]


@pytest.mark.parametrize("name", ["attention_wise_c", "vgg_control"])
def test_weights_start_at_a_deviation_of_002_and_biases_at_0(name):
    model = create_model(name, **FASHION)
    for parameter_name, parameter in model.named_parameters():
        if ".norm." in parameter_name:
            continue
        if parameter_name.endswith("bias"):
            assert not parameter.any(), parameter_name
        else:
            tolerance = 4 * 0.02 / (2 * parameter.numel()) ** 0.5
            assert parameter.std().item() == pytest.approx(0.02, abs=tolerance), parameter_name


@pytest.mark.parametrize("name", ["attention_wise", "attention_wise_a", "vgg_control"])
def test_training(name):
    model = create_model(name, num_classes=3, in_chans=2, image_size=8, impl="reference")
    for parameter in model.parameters():  # the paper's start has gradients of 1e-9
        nn.init.normal_(parameter, mean=0.02, std=0.2)
    check_trains(model, torch.randn(4, 2, 8, 8), torch.tensor([0, 1, 2, 1]))


def test_images_of_another_size_are_refused():
    for name in ("attention_wise_b", "vgg_control"):
        with pytest.raises(
            ValueError, match=r"images must have the size \(H, W\)=\(28, 28\), got shape \(1, 1, 32, 28\)"
        ):
            create_model(name, in_chans=1)(torch.zeros(1, 1, 32, 28))
