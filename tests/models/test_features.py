"""What holds for all families of layer attention: maps of backbones, implementations, memory formats, compilation."""

import pytest
import torch
from model_checks import COATNET, SWIN, maps_and_outputs, on_meta, randomise_norms

from fused_attn import create_model
from fused_attn.models.cifar_resnet import SAResNet
from fused_attn.models.drop_path import DropPath

TINY_DEIT = {"dim": 32, "heads": 2, "depth": 3, "image_size": 32, "patch_size": 8}
MODELS = [
    ("resnet20", {}),
    ("sa_resnet20", {}),
    ("resnet50", {}),
    ("mrla_base_resnet50", {}),
    ("mrla_light_resnet50", {}),
    ("mrla_base_deit_tiny", TINY_DEIT),
    ("mrla_light_deit_tiny", TINY_DEIT),
    ("swin_cifar", {}),
    ("coatnet_0_rw", {"image_size": 32}),
]


@pytest.mark.parametrize(
    ("name", "options", "channels", "strides"),
    [
        ("resnet20", {}, [16, 32, 64], [1, 2, 4]),
        ("sa_resnet20", {}, [16, 32, 64], [1, 2, 4]),
        ("sa_resnet32", {"out_indices": (0, -1)}, [16, 64], [1, 4]),
        ("resnet50", {}, [64, 256, 512, 1024, 2048], [2, 4, 8, 16, 32]),
        ("mrla_base_resnet50", {"out_indices": (1, 2, 3)}, [256, 512, 1024], [4, 8, 16]),
        ("mrla_light_resnet101", {"out_indices": (4,)}, [2048], [32]),
        ("mrla_light_resnet50", {"stem": "cifar"}, [64, 256, 512, 1024, 2048], [1, 1, 2, 4, 8]),
        ("swin_tiny", {}, [96, 192, 384, 768], [4, 8, 16, 32]),
        ("swin_small", {"out_indices": (1, 2)}, [192, 384], [8, 16]),
        ("coatnet_0_rw", {}, [64, 96, 192, 384, 768], [2, 4, 8, 16, 32]),
        ("coatnet_0_rw", {"out_indices": (0, 3)}, [64, 384], [2, 16]),
    ],
)
def test_maps_have_the_announced_channels_and_strides(name, options, channels, strides):
    with torch.device("meta"):
        model = create_model(name, features_only=True, impl="reference", **options)
        maps = model(torch.empty(2, 3, 64, 96))
    assert model.feature_info.channels() == channels
    assert model.feature_info.reduction() == strides
    assert [info["num_chs"] for info in model.feature_info] == channels
    assert [tuple(x.shape) for x in maps] == [(2, c, 64 // s, 96 // s) for c, s in zip(channels, strides, strict=True)]


@pytest.mark.parametrize("name", ["resnet20", "resnet50", "mrla_base_resnet50", "mrla_light_resnet50"])
def test_maps_are_the_classifiers_own(name):
    model = randomise_norms(create_model(name)).eval()
    indices = (0, 2) if name == "resnet20" else (1, 3)
    backbone = create_model(name, features_only=True, out_indices=indices).eval()
    stages = (model.stages[0], model.stages[2])
    for found, expected in maps_and_outputs(model, backbone, stages, torch.randn(1, 3, 32, 40), ("fc.", "stages.3.")):
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize(("name", "options"), MODELS)
def test_backbone_has_no_unused_parameters(name, options):
    """As data-parallel training wants it: each gets a gradient, at least a zero one."""
    model = create_model(name, features_only=True, impl="reference", **options)
    sum(feature.sum() for feature in model(torch.randn(2, 3, 32, 32))).backward()
    assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []


@pytest.mark.parametrize(
    ("name", "options", "match"),
    [
        ("resnet20", {"out_indices": (3,)}, r"out_indices must be numbers from 0 to 2, got \(3,\)"),
        ("resnet50", {"out_indices": (1, -6)}, r"out_indices must be numbers from 0 to 4, got \(1, -6\)"),
        ("resnet50", {"out_indices": ()}, r"out_indices must be at least one number, each once and in order, got \(\)"),
        ("resnet50", {"out_indices": (2, 1)}, r"each once and in order, got \(2, 1\)"),
        ("deit_tiny", {"out_indices": (4, -8)}, r"each once and in order, got \(4, -8\)"),
    ],
)
def test_bad_indices(name, options, match):
    with pytest.raises(ValueError, match=match):
        on_meta(name, features_only=True, **options)


@pytest.mark.parametrize(("name", "options"), MODELS)
def test_weights_load_across_implementations_and_memory_formats(name, options):
    source = randomise_norms(create_model(name, impl="reference", **options)).eval()
    target = create_model(name, impl="auto", **options).eval()
    target.load_state_dict(source.state_dict())
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        expected = source(x)
        scale = expected.abs().max().item()
        torch.testing.assert_close(target(x), expected, rtol=1e-3, atol=1e-4 * scale)
        last = target.to(memory_format=torch.channels_last)(x.to(memory_format=torch.channels_last))
    torch.testing.assert_close(last, expected, rtol=1e-3, atol=1e-4 * scale)


@pytest.mark.parametrize(
    "make",
    [
        lambda: SAResNet(8),
        lambda: create_model("mrla_base_resnet50", features_only=True, out_indices=(1,)),
        lambda: create_model("mrla_light_resnet50", features_only=True, out_indices=(1,)),
        lambda: create_model("mrla_base_deit_tiny", **TINY_DEIT),
        lambda: create_model("swin_tiny", **SWIN),
        lambda: create_model("coatnet_0_rw", image_size=32, **COATNET),
    ],
)
def test_models_compile_to_one_graph(make):
    """Forward and backward, in training."""
    model = make()
    x = torch.randn(2, 3, 32, 32)

    def step(network):
        out = network(x)
        out = out[0] if isinstance(out, list) else out
        return out, torch.autograd.grad(out.square().sum(), [p for p in model.parameters() if p.requires_grad])

    expected, expected_gradients = step(model)
    out, gradients = step(torch.compile(model, fullgraph=True, backend="aot_eager"))
    torch._dynamo.reset()
    torch.testing.assert_close(out, expected)
    for gradient, reference in zip(gradients, expected_gradients, strict=True):
        torch.testing.assert_close(gradient, reference, rtol=1e-3, atol=1e-4 * max(reference.abs().max().item(), 1e-3))


@pytest.mark.parametrize("name", ["sa_resnet20", "mrla_base_resnet50", "mrla_light_resnet50", "swin_cifar"])
def test_autocast(name):
    model = create_model(name)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = model(torch.randn(2, 3, 32, 32))
    assert logits.dtype == torch.bfloat16
    logits.float().sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


def test_drop_path_drops_whole_samples_and_keeps_the_mean():
    x = torch.rand(4000, 2, 3) + 1
    dropped = DropPath(0.25)(x)
    kept = dropped[:, 0, 0] != 0
    assert kept.float().mean().item() == pytest.approx(0.75, abs=0.03)
    torch.testing.assert_close(dropped[kept], x[kept] / 0.75)
    assert (dropped[~kept] == 0).all()
    assert DropPath(0.25).eval()(x) is x
    with pytest.raises(ValueError, match=r"drop_path must be in \[0, 1\), got 1.0"):
        DropPath(1.0)
