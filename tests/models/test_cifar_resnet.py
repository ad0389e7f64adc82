"""CIFAR ResNet and SA-ResNet: exact sizes, the equations of the papers, and the two forms of the aggregation."""

import pytest
import torch
import torch.nn.functional as F
from model_checks import check_trains, count, normed, on_meta, randomise_norms

from fused_attn import create_model

COUNTS = {20: (269_722, 18_720), 32: (464_154, 31_200), 44: (658_586, 43_680), 56: (853_018, 56_160)}


@pytest.mark.parametrize("depth", COUNTS)
def test_parameter_counts(depth):
    plain, keys = COUNTS[depth]
    assert count(on_meta(f"resnet{depth}")) == plain
    assert count(on_meta(f"sa_resnet{depth}")) == plain + keys


def test_resnet110_is_the_papers():
    """1.7 M parameters in He et al., table 6; 54 blocks, each with its key in SA-ResNet."""
    assert count(on_meta("resnet110")) == 1_727_962
    assert count(on_meta("sa_resnet110")) == 1_727_962 + 54 * (64 * 32 + 32)


@pytest.mark.parametrize(
    ("options", "added"),
    [
        ({"key_dim": 8}, 9 * (64 * 8 + 8)),
        ({"layers": "convolutions"}, 19 * (64 * 32 + 32)),
        ({"values": "project"}, 9 * (64 * 32 + 32) + 3 * (16 + 32) * 64),
        ({"key_grid": (4, 2)}, 9 * (64 * 8 * 32 + 32)),
    ],
)
def test_options_change_the_count_by_their_own_parameters(options, added):
    assert count(on_meta("sa_resnet20", **options)) == 269_722 + added


def test_blocks_compute_what_the_paper_draws():
    model = randomise_norms(create_model("resnet20")).eval()

    x = torch.randn(2, 16, 7, 6)
    for block, stride in ((model.stages[0][1], 1), (model.stages[1][0], 2)):
        inner = normed(block.bn1, F.conv2d(x, block.conv1.weight, stride=stride, padding=1)).relu()
        expected = normed(block.bn2, F.conv2d(inner, block.conv2.weight, padding=1))
        expected[:, :16] += x[:, :, ::stride, ::stride]  # the rest of a widened shortcut is zero
        torch.testing.assert_close(block(x.clone()), expected.relu())


def aggregate(model, layers):
    """Equations 1-4 of the paper on maps, with keys and values packed together: (output, weights)."""
    values = []
    for x, projection in zip(layers, model.attention.projections, strict=True):
        pooled = F.avg_pool2d(x, x.shape[-1] // layers[-1].shape[-1])
        if isinstance(projection, torch.nn.Linear):
            values.append(torch.einsum("oc,bchw->bohw", projection.weight, pooled))
        else:
            zeros = pooled.new_zeros(len(pooled), 64 - pooled.shape[1], *pooled.shape[2:])
            values.append(torch.cat((pooled, zeros), dim=1))
    keys = []
    for value, key in zip(values, model.attention.keys, strict=True):
        seen = F.avg_pool2d(value, value.shape[-1] // model.attention.key_grid[0])
        keys.append(seen.flatten(1) @ key.weight.T + key.bias)
    logits = torch.einsum("bd,bld->bl", keys[-1], torch.stack(keys, 1)) / keys[-1].shape[-1] ** 0.5
    weights = logits.softmax(-1)
    return torch.einsum("bl,blchw->bchw", weights, torch.stack(values, 1)), weights


@pytest.mark.parametrize(
    "options",
    [{}, {"layers": "convolutions"}, {"values": "project"}, {"key_grid": 2, "values": "project"}, {"key_dim": 5}],
)
def test_logits_are_those_of_the_papers_equations(options):
    """The network sums pooled vectors; the equations here sum maps, and pool the sum."""
    model = randomise_norms(create_model("sa_resnet20", impl="reference", **options)).double()
    activations = []
    for module in model.modules():
        if hasattr(module, "layers"):
            module.layers = lambda x, layers=module.layers: activations.append(layers(x)) or activations[-1]
    images = torch.randn(2, 3, 16, 16, dtype=torch.float64)
    with torch.no_grad():
        logits = model(images)
        if "layers" in options:
            layers = [F.relu(model.bn(model.stem(images)))] + [x for pair in activations for x in pair]
        else:
            layers = [outer for _, outer in activations]
        aggregated, weights = aggregate(model, layers)
    torch.testing.assert_close(logits, model.fc(aggregated.mean((2, 3))), rtol=1e-10, atol=1e-10)
    assert weights.std() > 0.02  # neither uniform
    assert weights.max() < 0.98  # nor one layer alone


@pytest.mark.parametrize("options", [{}, {"values": "project"}, {"layers": "convolutions"}])
def test_pooled_form_equals_map_form(options):
    """The classifier's vectors are the global average of the backbone's last map, in values and in gradients."""
    options = {"impl": "reference", **options}
    model = randomise_norms(create_model("sa_resnet20", **options)).double()
    backbone = create_model("sa_resnet20", features_only=True, **options).double()
    backbone.load_state_dict({k: v for k, v in model.state_dict().items() if not k.startswith("fc.")})
    images = torch.randn(3, 3, 16, 16, dtype=torch.float64)
    logits = model(images)
    from_map = F.linear(backbone(images)[-1].mean((2, 3)), model.fc.weight.detach(), model.fc.bias.detach())
    torch.testing.assert_close(logits, from_map, rtol=1e-12, atol=1e-12)
    direction = torch.randn_like(logits)
    (logits * direction).sum().backward()
    (from_map * direction).sum().backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    for name, parameter in backbone.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[name], rtol=1e-9, atol=1e-9, msg=name)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("resnet20", {}),
        ("sa_resnet20", {}),
        ("sa_resnet20", {"layers": "convolutions", "values": "project", "key_grid": 2}),
    ],
)
def test_training(name, options):
    model = create_model(name, num_classes=3, in_chans=2, impl="reference", **options)
    check_trains(model, torch.randn(4, 2, 16, 16), torch.tensor([0, 1, 2, 1]))


def test_images_of_any_size():
    for name in ("resnet20", "sa_resnet20"):
        model = create_model(name, image_size=99).eval()  # of no influence
        with torch.no_grad():
            assert model(torch.randn(1, 3, 9, 14)).shape == (1, 10)
