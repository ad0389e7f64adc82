"""SE-, SE-A- and SE-R-ResNets: the published counts, what feeds what, numerics across implementations."""

import pytest
import torch
import torch.nn.functional as F
from model_checks import count, on_meta
from torch import nn

from fused_attn import create_model, list_models
from fused_attn.models import se_resnet
from fused_attn.models.se_resnet import SEBlock

#: depth -> SE-ResNet, SE-R-ResNet at 100 classes and reduction 8; table 1 of the paper gives them in millions
COUNTS = {34: (21_655_420, 26_144_836), 50: (28_778_692, 33_530_764), 101: (52_272_964, 57_242_636)}
PUBLISHED = {34: (21.655, 26.145), 50: (28.779, 33.531), 101: (52.273, 57.243)}


def blocks(model):
    return {
        stage: [block for block in layers if isinstance(block, SEBlock)] for stage, layers in enumerate(model.stages, 1)
    }


def fed(model):
    """Stages whose squeeze-excite layers take a result."""
    return [stage for stage, layers in blocks(model).items() if all(block.se.result_features for block in layers)]


def test_names():
    names = {f"{prefix}_resnet{depth}" for prefix in ("se", "se_a", "se_r", "se_m") for depth in COUNTS}
    assert set(list_models("se_*resnet*")) == names


@pytest.mark.parametrize("depth", COUNTS)
def test_published_counts(depth):
    plain, with_result = COUNTS[depth]
    counts = {name: count(on_meta(f"{name}_resnet{depth}", num_classes=100)) for name in ("se", "se_a", "se_r")}
    assert (counts["se"], counts["se_r"]) == (plain, with_result)
    assert (round(plain / 1e6, 3), round(with_result / 1e6, 3)) == PUBLISHED[depth]
    # SE-A lacks the result's columns of the first layers in stages 3 and 4.
    model = on_meta(f"se_r_resnet{depth}", num_classes=100)
    columns = sum(block.se.fc1.weight[:, :100].numel() for stage in (3, 4) for block in blocks(model)[stage])
    assert counts["se_a"] == with_result - columns


@pytest.mark.parametrize(("reduction", "hidden"), [(8, 32), (12, 21), (16, 16)])
def test_reduction(reduction, hidden):
    model = on_meta("se_resnet50", reduction=reduction)
    assert blocks(model)[1][0].se.fc1.out_features == hidden


@pytest.mark.parametrize(
    ("options", "stages"),
    [
        ({}, [3, 4]),
        ({"aux_stages": (1,)}, [2]),
        ({"aux_stages": (2,)}, [3]),
        ({"aux_stages": (3,)}, [4]),
        ({"aux_stages": (1, 2)}, [2, 3]),
        ({"aux_stages": (2,), "result_reach": "later"}, [3, 4]),
        ({"aux_stages": (1, 3), "result_reach": "later"}, [2, 3, 4]),
        ({"aux_stages": (1, 3)}, [2, 4]),
        ({"feed_result": False}, []),
    ],
)
def test_which_stages_are_fed(options, stages):
    model = on_meta("se_r_resnet34", num_classes=7, **options)
    assert fed(model) == stages
    assert list(model.auxiliary) == [str(stage) for stage in options.get("aux_stages", (2, 3))]
    with torch.device("meta"):
        main, auxiliary = model.train()(torch.empty(2, 3, 32, 32))
    assert main.shape == (2, 7)
    assert [logits.shape for logits in auxiliary] == [(2, 7)] * len(model.auxiliary)


@pytest.mark.parametrize(("name", "auxiliary"), [("se_resnet34", 0), ("se_a_resnet34", 2), ("se_r_resnet34", 2)])
def test_training_returns_auxiliary_logits_and_evaluation_does_not(name, auxiliary):
    model, x = create_model(name, num_classes=5, aux_dropout=0.0), torch.randn(2, 3, 16, 16)
    out = model.train()(x)
    assert isinstance(out, torch.Tensor) if auxiliary == 0 else len(out[1]) == auxiliary
    calls = []
    for head in model.auxiliary.values():
        head.register_forward_hook(lambda *args: calls.append(args))
    assert model.eval()(x).shape == (2, 5)
    # Heads whose result nobody reads do not run.
    assert len(calls) == (auxiliary if name == "se_r_resnet34" else 0)


def share(block, result):
    """The result's part of the first squeeze-excite layer of a block."""
    return F.linear(result, block.se.fc1.weight[:, : result.shape[1]])


def test_stages_see_the_newest_result():
    model = create_model("se_r_resnet34", num_classes=5).eval()
    results, seen = {}, {}
    for stage, head in model.auxiliary.items():
        head.register_forward_hook(lambda module, args, out, stage=stage: results.__setitem__(int(stage), out))
    for stage, layers in blocks(model).items():
        for block in layers:
            block.register_forward_pre_hook(
                lambda module, args, stage=stage: seen.setdefault(stage, []).append((module, args[1])) and None
            )
    with torch.no_grad():
        model(torch.randn(2, 3, 16, 16))
    assert [given for stage in (1, 2) for _, given in seen[stage]] == [None] * 7
    for stage, source in ((3, 2), (4, 3)):
        for block, given in seen[stage]:
            torch.testing.assert_close(given, share(block, results[source]))


def test_the_result_joins_a_stage_in_one_product():
    model, products = create_model("se_r_resnet34", num_classes=5).eval(), []
    shares = se_resnet.result_shares
    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(
            se_resnet, "result_shares", lambda layers, result: products.append(layers) or shares(layers, result)
        )
        model(torch.randn(2, 3, 16, 16))
    assert products == [[block.se for block in blocks(model)[stage]] for stage in (3, 4)]


def test_form_and_detachment_of_the_result():
    x = torch.randn(2, 3, 16, 16)
    for form in ("logits", "probabilities"):
        for detach in (False, True):
            model = create_model(
                "se_r_resnet34", num_classes=5, result_form=form, detach_result=detach, aux_dropout=0.0
            )
            seen = []
            model.stages[2][0].register_forward_pre_hook(lambda module, args, seen=seen: seen.append(args[1]))
            main, auxiliary = model(x)
            expected = auxiliary[0].softmax(1) if form == "probabilities" else auxiliary[0]
            torch.testing.assert_close(seen[0], share(model.stages[2][0], expected))
            (grad,) = torch.autograd.grad(main.sum(), model.auxiliary["2"].fc2.weight, allow_unused=True)
            assert (grad is None) == detach


def test_block_is_the_papers():
    """ReLU(SE(branch) + shortcut), the branch ending in a ReLU, against the layers written out."""
    block = SEBlock(16, 8, 2, 4, reduction=8, result_features=3, impl="auto").eval()
    x, result = torch.randn(2, 16, 6, 6), torch.randn(2, 3)
    branch = block.residual(x)
    assert (branch >= 0).all()
    units = F.relu(F.linear(torch.cat((result, branch.mean((2, 3))), 1), block.se.fc1.weight, block.se.fc1.bias))
    gates = F.linear(units, block.se.fc2.weight, block.se.fc2.bias).sigmoid()
    torch.testing.assert_close(
        block(x, share(block, result)), F.relu(branch * gates[:, :, None, None] + block.shortcut(x))
    )


def test_implementations_agree():
    options = {"num_classes": 5, "aux_dropout": 0.0}
    model = create_model("se_r_resnet34", impl="auto", **options)
    other = create_model("se_r_resnet34", impl="reference", **options)
    other.load_state_dict(model.state_dict())
    x = torch.randn(3, 3, 16, 16).contiguous(memory_format=torch.channels_last)
    losses = []
    for network in (model, other):
        main, auxiliary = network.train()(x)
        losses.append(main.square().mean() + sum(logits.square().mean() for logits in auxiliary))
        losses[-1].backward()
    torch.testing.assert_close(losses[0], losses[1])
    for got, want in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(got.grad, want.grad, rtol=1e-2, atol=1e-4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"aux_stages": (4,)}, r"aux_stages must be different stages from 1 to 3, got \(4,\)"),
        ({"aux_stages": (2, 2)}, r"aux_stages must be different stages from 1 to 3, got \(2, 2\)"),
        ({"aux_stages": ()}, r"aux_stages must name a stage where feed_result is True, got \(\)"),
        ({"result_form": "labels"}, "result_form must be one of 'logits', 'probabilities', got 'labels'"),
        ({"result_reach": "all"}, "result_reach must be one of 'next', 'later', got 'all'"),
        ({"width": 0}, "width must be at least 1, got 0"),
        ({"aux_dropout": 1.5}, r"aux_dropout must be in \[0, 1\], got 1.5"),
        ({"reduction": 65}, "reduction must leave a hidden channel of channels=64, got 65"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        create_model("se_r_resnet34", **options)


# --- the auxiliary model ----------------------------------------------------------------------------------------------


def test_googlenet_is_the_published_one():
    """Widths and sizes of table 1 of "Going Deeper with Convolutions", and its parameters (thousands, with biases)."""
    model, shapes, parameters = on_meta("googlenet", num_classes=1000), {}, 0
    for name, inception in model.stages.named_children():
        inception.register_forward_hook(lambda module, args, out, name=name: shapes.update({name: out.shape[1:3]}))
        convolutions = [layer for layer in inception.modules() if isinstance(layer, nn.Conv2d)]
        parameters += sum(layer.weight.numel() + layer.out_channels for layer in convolutions)
    with torch.device("meta"):
        assert model(torch.empty(1, 3, 32, 32)).shape == (1, 1000)
    widths = {"3a": 256, "3b": 480, "4a": 512, "4b": 512, "4c": 512, "4d": 528, "4e": 832, "5a": 832, "5b": 1024}
    assert {name: shapes[name] for name in widths} == {
        name: (width, {"3": 32, "4": 16, "5": 8}[name[0]]) for name, width in widths.items()
    }
    assert parameters / 1024 == pytest.approx(159 + 380 + 364 + 437 + 463 + 580 + 840 + 1072 + 1388, rel=0.01)


def test_auxiliary_model_feeds_every_stage():
    model, x = create_model("se_m_resnet34", num_classes=5), torch.randn(2, 3, 16, 16)
    assert fed(model) == [1, 2, 3, 4]
    seen, results = [], []
    model.auxiliary["model"].register_forward_hook(lambda module, args, out: results.append(out))
    for layers in model.stages:
        layers[-1].register_forward_pre_hook(lambda module, args: seen.append((module, args[1])))
    main, (auxiliary,) = model(x)
    assert main.shape == auxiliary.shape == (2, 5)
    assert auxiliary is results[0]
    assert len(seen) == 4
    for block, given in seen:
        torch.testing.assert_close(given, share(block, results[0]))
    # The main loss reaches the auxiliary model through the gates.
    (grad,) = torch.autograd.grad(main.sum(), model.auxiliary["model"].fc.weight)
    assert grad.abs().sum() > 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"aux_stages": (2,)}, r"aux_stages must be \(\) with an aux_model, got \(2,\)"),
        (
            {"aux_model": "se_a_resnet34"},
            "aux_model must have no auxiliary classifiers of its own, got 'se_a_resnet34'",
        ),
        ({"aux_model": "googlenett"}, "name must be a registered model, got 'googlenett'"),
    ],
)
def test_bad_auxiliary_models(options, message):
    with pytest.raises(ValueError, match=message):
        on_meta("se_m_resnet34", **options)
