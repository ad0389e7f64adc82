"""``convert`` and ``restore`` of a model that holds several hosts: what they change, and what they leave."""

import copy
import functools
import importlib
import io
import sys
import types

import pytest
import torch
from equality import assert_same, outputs_and_gradients, randomise, with_parameters
from host_checks import OPS
from torch import nn
from torch._dynamo.backends.debugging import aot_eager
from torch.utils.checkpoint import checkpoint

import fused_attn
from fused_attn import integrations
from fused_attn.integrations.convert import HOSTS

PATHS = ["attention", "excite", "windows.attn"]


class Net(nn.Module):
    """Bottleneck attention, squeeze-excite and a shifted Swin block on maps (B, 8, 8, 8)."""

    def __init__(self):
        from timm.layers import SEModule
        from timm.layers.bottleneck_attn import BottleneckAttn
        from timm.models.swin_transformer import SwinTransformerBlock

        super().__init__()
        self.attention = BottleneckAttn(8, feat_size=(8, 8))
        self.excite = SEModule(8)
        self.windows = SwinTransformerBlock(8, (8, 8), 2, window_size=4, shift_size=2)

    def forward(self, x):
        x = self.excite(x + self.attention(x))
        return self.windows(x.permute(0, 2, 3, 1))


@pytest.fixture
def net(timm):
    return randomise(Net())


@pytest.fixture
def images():
    return torch.randn(2, 8, 8, 8, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def expected(net, images):
    return outputs_and_gradients(lambda: net(images), with_parameters(net))


def check(model, images, expected, call=None):
    found = outputs_and_gradients(call or (lambda: model(images)), with_parameters(model))
    assert_same(found, expected, dict(zip(found[1], expected[1], strict=True)))


def outcomes(report):
    return {candidate.path: candidate.outcome for candidate in report}


def test_neither_host_is_imported(monkeypatch):
    packages = ("timm", "transformers", "fused_attn.integrations")
    for name in [name for name in sys.modules if name.startswith(packages)]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(fused_attn, "integrations", None)
    again = importlib.import_module("fused_attn.integrations")
    assert again is not integrations
    again.restore(nn.Linear(1, 1))
    assert len(again.convert(nn.Linear(1, 1))) == 0
    assert not {"timm", "transformers"} & sys.modules.keys()


def test_report(net, images, expected):
    modules, keys = dict(net.named_modules()), [*net.state_dict()]
    report = integrations.convert(net, ops=OPS)
    assert [candidate.path for candidate in report] == PATHS
    assert [candidate.op for candidate in report] == ["rel_attention_2d", "squeeze_excite", "bias_attention_2d"]
    assert [candidate.outcome for candidate in report] == ["replaced"] * 3
    assert report.replaced == report.fused == len(report) == 3
    lines = str(report).splitlines()
    assert [line.split() for line in lines[1:-1]] == [
        [each.path, each.host.split(":")[1], each.op, "replaced"] for each in report
    ]
    assert lines[-1] == "3 of 3 run a fused op, 3 replaced now"
    assert dict(net.named_modules()) == modules
    assert [*net.state_dict()] == keys
    check(net, images, expected)


def test_a_second_call_changes_nothing(net):
    integrations.convert(net, ops=OPS)
    bound = net.attention.forward
    report = integrations.convert(net, strict=True)
    assert [candidate.outcome for candidate in report] == ["already"] * 3
    assert (report.replaced, report.fused) == (0, 3)
    assert net.attention.forward is bound


def test_restore(net, images, expected):
    state = [{**module.__dict__} for module in net.modules()]
    integrations.convert(net, ops=OPS)
    assert integrations.restore(net) == 3
    assert [{**module.__dict__} for module in net.modules()] == state
    assert torch.equal(net(images), expected[0])
    assert integrations.restore(net) == 0


def test_ops_not_named_are_left_alone(net):
    report = integrations.convert(net, ops=["bias_attention_2d"], strict=True)
    assert outcomes(report) == {
        "attention": "rel_attention_2d is not among ops",
        "excite": "squeeze_excite is not among ops",
        "windows.attn": "replaced",
    }


def test_what_gains_nothing_on_the_cpu_is_left_alone_until_named(net):
    slow = {host.op for host in HOSTS.values() if not host.faster_on_cpu}
    assert "squeeze_excite" in slow
    assert outcomes(integrations.convert(net))["excite"] == "no faster on the CPU; ops=['squeeze_excite'] replaces it"
    assert outcomes(integrations.convert(net, ["squeeze_excite"]))["excite"] == "replaced"
    meta = Net().to("meta")
    assert integrations.convert(meta, strict=True).replaced == 3


def test_strict_raises_before_anything_is_changed(net):
    net.excite.gate = nn.Hardtanh()
    with pytest.raises(
        ValueError,
        match=r"^1 of 3 .*: excite \(SEModule\): gate Hardtanh\(min_val=-1.0, max_val=1.0\) is not computed$",
    ):
        integrations.convert(net, OPS, strict=True)
    assert integrations.restore(net) == 0


def test_bad_arguments(net):
    with pytest.raises(TypeError, match=r"^model must be a torch.nn.Module, got function$"):
        integrations.convert(lambda x: x)
    with pytest.raises(TypeError, match=r"^model must be a torch.nn.Module, got dict$"):
        integrations.restore({})
    with pytest.raises(ValueError, match=r"^ops must be among rel_attention_2d, .*, got 'swin'$"):
        integrations.convert(net, ["swin"])
    with pytest.raises(TypeError, match=r"^ops must be a collection of names, got 'squeeze_excite'$"):
        integrations.convert(net, "squeeze_excite")
    report = integrations.convert(nn.Linear(1, 1), strict=True)
    assert (len(report), str(report)) == (0, "no module of a class that fused-attn knows")


# --- what else is done with a model -----------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_copies(net, images, expected, how):
    """A copy runs on its own parameters, and is restored without the model that it was copied from."""
    integrations.convert(net, ops=OPS)
    if how == "deepcopy":
        other = copy.deepcopy(net)
    else:
        torch.save(net, file := io.BytesIO())
        file.seek(0)
        other = torch.load(file, weights_only=False)
    assert integrations.convert(other).fused == 3
    check(other, images, expected)
    nn.init.zeros_(net.attention.qkv.weight)
    check(other, images, expected)
    assert integrations.restore(other) == 3
    assert integrations.convert(net).fused == 3


def test_state_dicts(net, images, expected):
    integrations.convert(net, ops=OPS)
    other = randomise(Net(), std=0.1)
    other.load_state_dict(net.state_dict())
    check(other, images, expected)
    net.load_state_dict(randomise(Net(), std=0.1).state_dict())
    net.load_state_dict(other.state_dict(), assign=True)
    check(net, images, expected)


def test_compiled(net, images, expected):
    """Converted inside, a compiled model is compiled anew; restored, it runs what it ran before."""
    ran = []

    def backend(graph, example):
        targets = {str(node.target) for node in graph.graph.nodes}
        kind = "fused" if any(target.startswith("fused_attn.") for target in targets) else "plain"
        traced = aot_eager(graph, example)

        def run(*arguments):
            ran.append(kind)
            return traced(*arguments)

        return run

    compiled = torch.compile(net, backend=backend, fullgraph=True)
    check(compiled, images, expected)
    report = integrations.convert(compiled, ops=OPS)
    assert [candidate.path for candidate in report] == [f"_orig_mod.{path}" for path in PATHS]
    check(compiled, images, expected)
    assert integrations.restore(compiled) == 3
    check(compiled, images, expected)
    assert ran == ["plain", "fused", "plain"]


def test_compiled_by_inductor(net, images):
    layer = net.attention
    expected = outputs_and_gradients(lambda: layer(images), with_parameters(layer))
    assert integrations.convert(layer, ops=OPS).replaced == 1
    layer.compile(fullgraph=True)
    check(layer, images, expected)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing(net, images, expected, use_reentrant):
    integrations.convert(net, ops=OPS)
    out = checkpoint(net, images.requires_grad_(), use_reentrant=use_reentrant)
    out.backward(torch.randn(out.shape, generator=torch.Generator().manual_seed(0)))
    assert_same((out.detach(), {name: parameter.grad for name, parameter in net.named_parameters()}), expected)


def test_export(net, images, expected):
    integrations.convert(net.eval(), ops=OPS)
    program = torch.export.export(net, (images,))
    targets = [str(node.target) for node in program.graph.nodes]
    assert sum(target.startswith("fused_attn.") for target in targets) == 3
    torch.testing.assert_close(program.module()(images), expected[0], rtol=1e-5, atol=1e-5)


@pytest.fixture
def one_process(tmp_path):
    """Outlives what holds it: the last owner's destructor waits for a thread that may wait for Python."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def test_distributed(one_process, net, images, expected):
    wrapped = nn.parallel.DistributedDataParallel(net)
    assert outcomes(integrations.convert(wrapped, ops=OPS)) == {f"module.{path}": "replaced" for path in PATHS}
    out = wrapped(images)
    out.backward(torch.randn(out.shape, generator=torch.Generator().manual_seed(0)))
    gradients = {name: parameter.grad for name, parameter in net.named_parameters()}
    assert_same((out.detach(), gradients), expected)
    assert integrations.restore(net) == 3


def test_meta(net, images, expected):
    """Converted without memory, then filled."""
    with torch.device("meta"):
        other = Net()
    assert integrations.convert(other, ops=OPS).replaced == 3
    assert other(images.to("meta")).shape == expected[0].shape
    other = other.to_empty(device="cpu")
    other.windows.attn.init_non_persistent_buffers()
    other.windows._init_buffers()
    other.load_state_dict(net.state_dict())
    check(other, images, expected)


@pytest.mark.parametrize("autocast", [False, True])
def test_half_precision(net, images, expected, autocast):
    if not autocast:
        net, images = net.bfloat16(), images.bfloat16()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        before = net(images)
        integrations.convert(net, ops=OPS)
        found = net(images)
    assert found.dtype == before.dtype
    error, own = ((out - expected[0]).norm() for out in (found, before))
    assert error < 2 * own


@pytest.mark.parametrize("fused", [False, True])
def test_dropout_is_that_of_the_mode(net, images, fused):
    """Of the layer where timm calls SDPA, and of its dropout where it does not."""
    attention = net.windows.attn
    attention.attn_drop.p, attention.fused_attn = 0.5, fused
    integrations.convert(net, ops=OPS)
    assert not torch.equal(net.train()(images), net(images))
    assert torch.equal(net.eval()(images), net(images))
    attention.attn_drop.train()
    assert torch.equal(net(images), net(images)) == fused


# --- what is left alone -----------------------------------------------------------------------------------------------


def reason(net):
    return outcomes(integrations.convert(net, ops=OPS))["attention"]


def subclass(net, **members):
    kind = type(net.attention)
    net.attention.__class__ = type("Own", (kind,), members)


def test_subclasses(net, images, expected):
    subclass(net, __init__=lambda self: None, extra_repr=lambda self: "", more=lambda self: None)
    assert reason(net) == "replaced"
    check(net, images, expected)
    integrations.restore(net)
    subclass(net, reset_parameters=lambda self: None)
    assert reason(net) == "Own overrides reset_parameters of BottleneckAttn"
    subclass(net, forward=lambda self, x: x)
    assert "attention" not in outcomes(integrations.convert(net))


def test_a_forward_that_is_not_the_class(net, monkeypatch):
    net.attention.forward = functools.partial(type(net.attention).forward, net.attention)
    assert reason(net) == "something else has replaced its forward"
    assert integrations.restore(net) == 2
    assert "forward" in net.attention.__dict__
    del net.attention.forward
    monkeypatch.setattr(type(net.attention), "forward", lambda self, x: x)
    assert reason(net) == "the forward of BottleneckAttn was replaced"


def test_another_signature(net, monkeypatch):
    kind = type(net.attention)
    forward = types.FunctionType((lambda self, x, mask=None: x).__code__, {})
    forward.__module__, forward.__qualname__ = kind.__module__, "BottleneckAttn.forward"
    monkeypatch.setattr(kind, "forward", forward)
    assert reason(net) == "the forward of BottleneckAttn takes other arguments than it is known to"


@pytest.mark.parametrize("version", ["0.9.16", "2.0.0.dev0"])
def test_other_versions(net, monkeypatch, version):
    monkeypatch.setattr("timm.__version__", version)
    assert reason(net).startswith(f"timm {version} is not from ")


def test_a_module_built_otherwise(net):
    del net.attention.scale_pos_embed, net.attention.pos_embed
    assert reason(net).startswith("it is not built as its class is known: ")


def test_hooks_on_what_is_passed_over(net):
    handle = net.attention.pos_embed.register_forward_hook(lambda *_: None)
    assert reason(net) == "pos_embed has hooks, which would not run"
    handle.remove()
    called = []
    net.attention.qkv.register_forward_hook(lambda *_: called.append("qkv"))
    net.attention.register_forward_hook(lambda *_: called.append("attention"))
    assert reason(net) == "replaced"
    net(torch.randn(1, 8, 8, 8))
    assert called == ["qkv", "attention"]


# --- the registry -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "layer", dict.fromkeys(host.layer for host in HOSTS.values()), ids=lambda layer: layer.__name__
)
def test_layers_keep_the_conventions_of_the_kernels_library(layer):
    own = {name for name in layer.__dict__ if not name.startswith("__")}
    assert layer.__bases__ == (nn.Module,)
    assert own == {"forward", "can_torch_compile", "has_backward"}
    assert "__init__" not in layer.__dict__
    assert layer.can_torch_compile is layer.has_backward is True


def test_methods_of_an_instance(net):
    """Its own, and those of what is passed over."""
    net.excite.fc1.forward = lambda x: 2 * nn.Conv2d.forward(net.excite.fc1, x)
    net.windows.attn._get_rel_pos_bias = lambda: 0.0
    attention, excite, windows = integrations.convert(net, OPS)
    assert attention.fused
    assert excite.outcome == "forward of fc1 was replaced"
    assert windows.outcome == "something else has replaced its _get_rel_pos_bias"


def test_a_forward_that_hides_behind_the_names_of_another(net, monkeypatch):
    kind = type(net.excite)
    theirs = kind.forward
    monkeypatch.setattr(kind, "forward", functools.wraps(theirs)(lambda self, x: theirs(self, x) + 1))
    assert integrations.convert(net, OPS).candidates[1].outcome == "the forward of SEModule was replaced"


def test_what_was_changed_after_the_first_call_is_restored_by_the_second(net):
    integrations.convert(net, OPS)
    net.excite.bn = nn.BatchNorm2d(2)
    (excite,) = (each for each in integrations.convert(net, OPS) if each.path == "excite")
    assert excite.outcome == "bn is a torch.nn.modules.batchnorm:BatchNorm2d"
    assert "forward" not in vars(net.excite)


def test_a_softmax_along_another_dimension(net):
    net.windows.attn.softmax = nn.Softmax(dim=-2)
    (windows,) = (each for each in integrations.convert(net, OPS) if each.path == "windows.attn")
    assert windows.outcome == "a softmax along dimension -2 is not computed"
