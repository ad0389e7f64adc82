"""Wide ResNet and ResNet-34, plain and attention-augmented: exact sizes, coverage, numerics, training."""

import pytest
import torch
import torch.nn.functional as F
from model_checks import check_trains, count, normed, on_meta
from torch import nn

from fused_attn import create_model, list_models
from fused_attn.modules import AttentionAugmentedConv2d


def augmented(model):
    return {name: module for name, module in model.named_modules() if isinstance(module, AttentionAugmentedConv2d)}


@pytest.mark.parametrize(
    ("name", "options", "parameters"),
    [
        # published
        ("wrn_28_10", {"num_classes": 10}, 36_479_194),
        ("wrn_28_10", {"num_classes": 100}, 36_536_884),
        ("wrn_16_4", {}, 2_748_890),
        ("resnet34", {"num_classes": 1000}, 21_797_672),
        # "about 36.31 M" is every block of every stage
        ("aa_wrn_28_10", {"num_classes": 100}, 36_312_660),
        ("aa_wrn_28_10", {"num_classes": 100, "relative": False}, 36_312_660 - 4 * 40 * (63 + 31 + 15)),
        ("aa_wrn_28_10", {"num_classes": 100, "attention_blocks": "first"}, 36_498_492),
        ("aa_wrn_28_10_replication", {"num_classes": 100}, 36_480_140),
        ("aa_wrn_28_10", {"num_classes": 100, "attention_stages": ()}, 36_536_884),
    ],
)
def test_parameter_counts(name, options, parameters):
    assert count(on_meta(name, **options)) == parameters


@pytest.mark.parametrize("name", ["wrn_16_2", "wrn_28_10"])
@pytest.mark.parametrize("stages", [(1,), (2, 3), (1, 2, 3)])
@pytest.mark.parametrize("blocks", ["first", "last", "all"])
def test_each_augmented_convolution_changes_the_count_by_its_own_parameters(name, stages, blocks):
    """From the paper's formula: 9 d_v c_in fewer, c_in (2 d_k + d_v) + d_v^2 + the tables more."""
    plain, model = on_meta(name), on_meta(f"aa_{name}", attention_stages=stages, attention_blocks=blocks)
    width, num_blocks = int(name.split("_")[2]), len(plain.stages[0])
    expected = count(plain)
    for stage in stages:
        channels = 16 * width * 2 ** (stage - 1)
        grid = 32 // 2 ** (stage - 1)
        for block in {"first": [0], "last": [num_blocks - 1], "all": range(num_blocks)}[blocks]:
            c_in = channels if block else 16 if stage == 1 else channels // 2
            d_k, d_v = 8 * 20, 8 * max(channels // 80, 1)
            expected += -9 * c_in * d_v + c_in * (2 * d_k + d_v) + d_v**2 + 2 * (2 * grid - 1) * 20
    assert count(model) == expected


@pytest.mark.parametrize(
    ("name", "options", "expected"),
    [
        ("aa_wrn_16_2", {}, [f"stages.{s}.{b}.conv1" for s in range(3) for b in range(2)]),
        ("aa_wrn_16_2", {"attention_stages": [2]}, ["stages.1.0.conv1", "stages.1.1.conv1"]),
        ("aa_wrn_16_2", {"attention_blocks": "first"}, [f"stages.{s}.0.conv1" for s in range(3)]),
        (
            "aa_wrn_16_2",
            {"attention_stages": (1, 3), "attention_blocks": "last"},
            ["stages.0.1.conv1", "stages.2.1.conv1"],
        ),
        ("aa_wrn_28_10_replication", {}, ["stages.2.0.conv1"]),
        ("wrn_16_2", {}, []),
        ("resnet34", {}, []),
        ("aa_resnet34", {}, ["stages.3.2.conv2"]),
        (
            "aa_resnet34",
            {"attention_convs": (1, 2), "attention_blocks": "first"},
            ["stages.3.0.conv1", "stages.3.0.conv2"],
        ),
        (
            "aa_resnet34",
            {"attention_stages": (2, 4), "attention_blocks": "all", "attention_convs": (1,)},
            [f"stages.1.{b}.conv1" for b in range(4)] + [f"stages.3.{b}.conv1" for b in range(3)],
        ),
    ],
)
def test_coverage_decides_which_convolutions_are_augmented(name, options, expected):
    model = on_meta(name, **options)
    assert list(augmented(model)) == expected
    plain = on_meta(name, **{**options, "attention_stages": ()})
    shapes = {name: parameter.shape for name, parameter in plain.named_parameters()}
    for parameter_name, parameter in model.named_parameters():
        if not any(parameter_name.startswith(conv) for conv in expected):
            assert shapes[parameter_name] == parameter.shape


def test_attention_of_wrn_28_10_is_the_papers():
    """8 heads, d_k 20, d_v 2, 4, 8 per head on 32 x 32, 16 x 16, 8 x 8."""
    found = {
        (inner.size, inner.heads, inner.key_channels // inner.heads, inner.value_channels // inner.heads)
        for inner in (module.attention for module in augmented(on_meta("aa_wrn_28_10")).values())
    }
    assert found == {((32, 32), 8, 20, 2), ((16, 16), 8, 20, 4), ((8, 8), 8, 20, 8)}


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("aa_wrn_10_1", {"image_size": 16}),
        ("aa_wrn_10_1", {"image_size": (9, 14)}),
        ("aa_resnet34", {"attention_stages": (1, 2, 3, 4), "attention_blocks": "first", "attention_convs": (1, 2)}),
        ("aa_resnet34", {"stem": "cifar", "image_size": (20, 12), "attention_stages": (1, 4)}),
        ("aa_resnet34", {"stem": "imagenet", "image_size": 33, "attention_stages": (2, 4)}),
    ],
)
def test_tables_fit_the_grids_exactly(name, options):
    """The largest input is image_size, and one pixel more along either axis is refused in the first attention."""
    model = create_model(name, impl="reference", **options).eval()
    grids = {}
    for module in augmented(model).values():
        module.attention.register_forward_hook(lambda m, args, out: grids.update({m: tuple(out.shape[2:])}))
    size = options.get("image_size", 32)
    size = (size, size) if isinstance(size, int) else size
    with torch.no_grad():
        model(torch.randn(1, 3, *size))
        assert grids == {module.attention: module.attention.size for module in augmented(model).values()}
        model(torch.randn(1, 3, size[0] - 5, size[1] - 4))
        for extra in ((8, 0), (0, 8)):
            with pytest.raises(ValueError, match="for which the relative position tables"):
                model(torch.randn(1, 3, size[0] + extra[0], size[1] + extra[1]))


def test_the_replications_resnet_ends_in_2x2_maps():
    """Section 5.2 of the report, 32 x 32 images."""
    (module,) = augmented(on_meta("aa_resnet34")).values()
    assert module.attention.size == (2, 2)


@pytest.mark.parametrize("name", [*list_models("*wrn_*"), "resnet34", "aa_resnet34"])
def test_every_model_trains(name):
    size = 32 if "resnet" in name else 8
    model = create_model(name, num_classes=3, in_chans=2, image_size=size, impl="reference")
    check_trains(model, torch.randn(4, 2, size, size), torch.tensor([0, 1, 2, 1]))


def test_blocks_compute_what_the_papers_draw():
    x = torch.randn(2, 16, 6, 6)
    wide = create_model("wrn_10_1").eval()

    for block, stride in ((wide.stages[0][0], 1), (wide.stages[1][0], 2)):
        for bn in (block.bn1, block.bn2):
            nn.init.normal_(bn.weight)
            nn.init.normal_(bn.bias)
        activated = normed(block.bn1, x).relu()
        inner = normed(block.bn2, F.conv2d(activated, block.conv1.weight, stride=stride, padding=1)).relu()
        shortcut = x if stride == 1 else F.conv2d(activated, block.shortcut.weight, stride=2)
        expected = shortcut + F.conv2d(inner, block.conv2.weight, padding=1)
        torch.testing.assert_close(block(x.clone()), expected)

    basic = create_model("resnet34").eval().stages[1][0]
    x = torch.randn(2, 64, 6, 6)
    for bn in (basic.bn1, basic.bn2, basic.shortcut[1]):
        nn.init.normal_(bn.weight)
        nn.init.normal_(bn.bias)
    inner = normed(basic.bn1, F.conv2d(x, basic.conv1.weight, stride=2, padding=1)).relu()
    residual = normed(basic.bn2, F.conv2d(inner, basic.conv2.weight, padding=1))
    shortcut = normed(basic.shortcut[1], F.conv2d(x, basic.shortcut[0].weight, stride=2))
    torch.testing.assert_close(basic(x.clone()), (residual + shortcut).relu())


@pytest.mark.parametrize("name", ["aa_wrn_10_2", "aa_resnet34"])
def test_weights_load_across_implementations(name):
    source = create_model(name, impl="reference").eval()
    target = create_model(name, impl="auto").eval()
    target.load_state_dict(source.state_dict())
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        expected = source(x)
        torch.testing.assert_close(target(x), expected, rtol=1e-3, atol=1e-4)
        last = target.to(memory_format=torch.channels_last)(x.to(memory_format=torch.channels_last))
    torch.testing.assert_close(last, expected, rtol=1e-3, atol=1e-4)


def test_plain_weights_start_an_augmented_model_where_it_has_no_attention():
    plain = create_model("wrn_10_1")
    model = create_model("aa_wrn_10_1", attention_stages=(3,))
    report = model.load_state_dict(
        {k: v for k, v in plain.state_dict().items() if not k.startswith("stages.2.0.conv1")}, strict=False
    )
    assert report.unexpected_keys == []
    assert all(key.startswith("stages.2.0.conv1.") for key in report.missing_keys)


def test_initialisation_is_hes():
    model = create_model("aa_wrn_10_2")
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d) and module.weight.numel() > 2000:
            fan_out = module.out_channels * module.kernel_size[0] ** 2
            assert module.weight.std().item() == pytest.approx((2 / fan_out) ** 0.5, rel=0.1), name
    for module in augmented(model).values():
        assert module.attention.rel_h.std().item() == pytest.approx(20**-0.5, rel=0.2)


@pytest.mark.parametrize("option", ["dropout", "attention_dropout"])
def test_dropout_options_act_in_training_only(option):
    model = create_model("aa_wrn_10_1", image_size=8, **{option: 0.5})
    x = torch.randn(4, 3, 8, 8)
    with torch.no_grad():
        assert not torch.equal(model(x), model(x))
        model.eval()
        assert torch.equal(model(x), model(x))


def test_a_whole_model_compiles_to_one_graph():
    model = create_model("aa_wrn_10_1", image_size=8).eval()
    x = torch.randn(2, 3, 8, 8)
    torch.testing.assert_close(torch.compile(model, fullgraph=True, backend="aot_eager")(x), model(x))
    torch._dynamo.reset()
