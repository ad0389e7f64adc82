"""Submodules that were changed from outside are called: hooks, pruning, parametrizations, adapters, quantisation."""

import copy
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations, prune

from fused_attn import LayerCache, _extension, row_col_softmax
from fused_attn.modules import (
    AttentionAugmentedConv2d,
    ElementwiseAttentionBlock,
    LayerAttention,
    MRLABase,
    MRLALight,
    RelPosAttention2d,
    SqueezeExcite,
    result_shares,
)

IMPLEMENTATIONS = ["auto", "reference"]
if _extension.available():
    IMPLEMENTATIONS.append("cpu")
implementations = pytest.mark.parametrize("impl", IMPLEMENTATIONS)


def draw(*size):
    return torch.randn(size, generator=torch.Generator().manual_seed(sum(size)))


def excite(module, **options):
    return module(draw(3, 8, 4, 5) + 1.0, residual=draw(3, 8, 4, 5) + 1.0, activation="relu", **options)


#: Public module -> (how it is built, how it is called); every one of them has submodules with parameters.
MODULES = {
    "SqueezeExcite": (lambda **o: SqueezeExcite(8, 2, **o), excite),
    "SqueezeExcite with a result": (
        lambda **o: SqueezeExcite(8, 2, result_features=3, **o),
        lambda m: excite(m, result=draw(3, 3)),
    ),
    "RelPosAttention2d": (
        lambda **o: RelPosAttention2d(4, 8, 4, 2, (4, 5), bias=True, **o),
        lambda m: m(draw(2, 4, 4, 5)),
    ),
    "AttentionAugmentedConv2d": (
        lambda **o: AttentionAugmentedConv2d(4, 8, 3, 2, (2, 3), heads=2, min_key_depth=4, bias=True, **o),
        lambda m: m(draw(2, 4, 4, 5)),
    ),
    "LayerAttention": (
        lambda **o: LayerAttention([4, 6, 6], key_dim=3, values="project", **o),
        lambda m: m([draw(3, 4), draw(3, 6), draw(3, 6) + 1.0]),
    ),
    "LayerAttention of maps": (
        lambda **o: LayerAttention([4, 6, 6], key_dim=3, values="project", key_grid=2, **o),
        lambda m: m([draw(3, 4, 8, 8), draw(3, 6, 4, 4), draw(3, 6, 4, 4) + 1.0]),
    ),
    "MRLABase": (
        lambda **o: MRLABase(8, dim_per_head=4, **o),
        lambda m: m(draw(2, 8, 4, 5), cache := LayerCache()) + m(draw(2, 8, 4, 5) + 1.0, cache),
    ),
    "MRLALight": (lambda **o: MRLALight(8, dim_per_head=4, **o), lambda m: m(draw(2, 8, 4, 5), draw(2, 8, 4, 5) + 1.0)),
    "ElementwiseAttentionBlock": (
        lambda **o: ElementwiseAttentionBlock(3, (4, 5), 2, batch_norm=True, **o),
        lambda m: m(draw(3, 3, 4, 5)),
    ),
}
modules = pytest.mark.parametrize("name", MODULES)


def build(name, impl="auto"):
    torch.manual_seed(0)
    make, call = MODULES[name]
    module = make(impl=impl)
    for parameter in module.parameters():  # far from where a layer makes no difference
        nn.init.normal_(parameter, std=0.5)
    return module, call


def layers(module):
    """Names of the linear layers and convolutions in it."""
    found = [name for name, part in module.named_modules() if isinstance(part, (nn.Linear, nn.Conv1d, nn.Conv2d))]
    assert found
    return found


class Adapter(nn.Module):
    """A layer plus one of low rank beside it, as LoRA builds them; not of the layer's class, without its attributes."""

    def __init__(self, base):
        super().__init__()
        self.base = base
        self.side = copy.deepcopy(base)
        self.side.bias = None
        nn.init.normal_(self.side.weight, std=0.3)

    def forward(self, x):
        return self.base(x) + self.side(x)


# Every change takes (parent, attribute) and returns the layer whose weights stand for it.
def _hook(parent, name):
    layer = getattr(parent, name)
    layer.register_forward_hook(lambda m, args, out: out * 0.5)
    plain = copy.deepcopy(layer)
    with torch.no_grad():
        for parameter in plain.parameters():
            parameter *= 0.5
    return plain


def _pre_hook(parent, name):
    layer = getattr(parent, name)
    layer.register_forward_pre_hook(lambda m, args: (args[0] * 0.5,))
    plain = copy.deepcopy(layer)
    with torch.no_grad():
        plain.weight *= 0.5
    return plain


def _forward_replaced(parent, name):
    layer = getattr(parent, name)
    plain = copy.deepcopy(layer)
    with torch.no_grad():
        for parameter in plain.parameters():
            parameter *= 0.5
    layer.forward = lambda x, forward=layer.forward: forward(x) * 0.5
    return plain


def _effective(layer, before):
    plain = copy.deepcopy(before)
    with torch.no_grad():
        plain.weight.copy_(layer.weight)
    return plain


def _prune(parent, name):
    before = copy.deepcopy(getattr(parent, name))
    return _effective(prune.l1_unstructured(getattr(parent, name), "weight", amount=0.5), before)


def _weight_norm(parent, name):
    before = copy.deepcopy(getattr(parent, name))
    layer = parametrizations.weight_norm(getattr(parent, name))
    with torch.no_grad():
        layer.parametrizations.weight.original0 *= 1.5
    return _effective(layer, before)


def _spectral_norm(parent, name):
    before = copy.deepcopy(getattr(parent, name))
    return _effective(parametrizations.spectral_norm(getattr(parent, name)).eval(), before)


def _old_weight_norm(parent, name):
    layer = getattr(parent, name)
    plain = copy.deepcopy(layer)
    with torch.no_grad():
        plain.weight *= 1.5
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.nn.utils.weight_norm(layer)
    with torch.no_grad():
        layer.weight_g *= 1.5
    return plain


def _adapter(parent, name):
    adapter = Adapter(getattr(parent, name))
    setattr(parent, name, adapter)
    plain = copy.deepcopy(adapter.base)
    with torch.no_grad():
        plain.weight += adapter.side.weight
    return plain


CHANGES = {
    change.__name__.strip("_"): change
    for change in (
        _hook, _pre_hook, _forward_replaced, _prune, _weight_norm, _spectral_norm, _old_weight_norm, _adapter,
    )
}  # fmt: skip


@modules
@pytest.mark.parametrize("change", CHANGES)
@implementations
def test_a_changed_layer_counts_as_the_weights_that_it_stands_for(name, change, impl):
    """One layer after the other; outputs, and gradients of all that is trained, in two steps."""
    for path in layers(build(name)[0]):
        module, call = build(name, impl)
        module.eval()
        before = call(module)
        parent, _, leaf = path.rpartition(".")
        expected = copy.deepcopy(module)
        plain = CHANGES[change](module.get_submodule(parent), leaf)
        plain._forward_hooks.clear(), plain._forward_pre_hooks.clear()
        setattr(expected.get_submodule(parent), leaf, plain)
        torch.testing.assert_close(
            call(module), call(expected), rtol=1e-4, atol=1e-5, msg=lambda m, p=path: f"{p}: {m}"
        )
        assert not torch.allclose(call(module), before, rtol=1e-4, atol=1e-5), path
        optimizer = torch.optim.SGD(module.parameters(), lr=1e-3)
        for _ in range(2):
            optimizer.zero_grad()
            call(module).square().sum().backward()
            missing = [n for n, parameter in module.named_parameters() if parameter.grad is None]
            assert not missing, path
            optimizer.step()


@modules
def test_every_hook_runs(name):
    module, call = build(name)
    watched = {path: part for path, part in module.named_modules() if [*part.buffers(), *part.parameters()]}
    watched = {path: part for path, part in watched.items() if not isinstance(part, nn.ModuleList)}
    seen = []
    for path, part in watched.items():
        part.register_forward_pre_hook(lambda m, args, p=path: seen.append(("forward pre", p)))
        part.register_forward_hook(lambda m, args, out, p=path: seen.append(("forward", p)))
        part.register_full_backward_pre_hook(lambda m, grad, p=path: seen.append(("backward pre", p)))
        part.register_full_backward_hook(lambda m, gi, go, p=path: seen.append(("backward", p)))
    call(module).square().sum().backward()
    ran = {
        kind: sorted(p for k, p in seen if k == kind) for kind in ("forward pre", "forward", "backward pre", "backward")
    }
    assert set(ran["forward"]) == set(watched)
    assert all(paths == ran["forward"] for paths in ran.values())


def test_hooks_of_layers_that_need_no_projection_run():
    module, seen = LayerAttention([4, 6], key_dim=3), []
    for projection in module.projections:
        projection.register_forward_hook(lambda m, args, out: seen.append(out.shape[1]))
    module([draw(3, 4), draw(3, 6)])
    assert seen == [4, 6]


@modules
def test_hooks_for_all_modules_run(name):
    module, call = build(name)
    seen = set()
    handle = nn.modules.module.register_module_forward_hook(lambda m, args, out: seen.add(m))
    try:
        out = call(module)
    finally:
        handle.remove()
    assert {part for part in module.modules() if list(part.parameters(recurse=False))} <= seen
    torch.testing.assert_close(out, call(build(name)[0]), rtol=1e-4, atol=1e-5)


@modules
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_a_copy_computes_the_same(name, impl):
    module, call = build(name, impl)
    assert torch.equal(call(copy.deepcopy(module)), call(module))


@modules
def test_dynamic_quantisation(name):
    module, call = build(name)
    module.eval()
    quantised = torch.ao.quantization.quantize_dynamic(copy.deepcopy(module), {nn.Linear}, torch.qint8)
    with torch.no_grad():
        out, expected = call(quantised), call(module)
    assert not any(type(part) is nn.Linear for part in quantised.modules())
    torch.testing.assert_close(out, expected, rtol=0.1, atol=0.1)
    if any(type(part) is nn.Linear for part in module.modules()):
        assert not torch.equal(out, expected)


@modules
def test_cpu_offload(name):
    accelerate = pytest.importorskip("accelerate")
    module, call = build(name)
    module.eval()
    with torch.no_grad():
        expected = call(module)
        offloaded = accelerate.cpu_offload(module, execution_device="cpu")
        assert all(parameter.is_meta for parameter in offloaded.parameters())
        torch.testing.assert_close(call(offloaded), expected, rtol=1e-4, atol=1e-5)


# --- squeeze-excite ---------------------------------------------------------------------------------------------------


@implementations
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("activation", [None, "relu"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_called_form_of_squeeze_excite_is_its_fused_form(impl, residual, activation, dtype):
    module = SqueezeExcite(8, 2, result_features=3, impl=impl, dtype=dtype)
    x, result = (tensor.to(dtype) for tensor in (draw(2, 8, 5, 3), draw(2, 3)))
    options = {"result": result, "residual": x.flip(0) if residual else None, "activation": activation}
    results = []
    for _ in range(2):
        out = module(x, **options)
        results.append(
            (out, module.scales(x, result), *torch.autograd.grad(out.square().sum(), [*module.parameters()]))
        )
        module.fc2.register_forward_hook(lambda m, args, out: None)
    tolerance = {"rtol": 1e-4, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 0.05, "atol": 0.05}
    for called, fused in zip(*reversed(results), strict=True):
        assert called.dtype == dtype
        torch.testing.assert_close(called, fused, **tolerance)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("of_x", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("residual", [False, True])
def test_autocast_leaves_the_maps_of_the_called_form_in_their_dtype(dtype, of_x, residual):
    module = SqueezeExcite(8, 2)
    x = (1e5 * draw(2, 8, 5, 3)).to(of_x)  # more than float16 has
    x = x - x.mean((2, 3), keepdim=True)
    options = {"residual": draw(2, 8, 5, 3) if residual else None}
    with torch.autocast("cpu", dtype):
        fused = module(x, **options)
        module.fc2.register_forward_hook(lambda m, args, out: None)
        called = module(x, **options)
    assert called.dtype == fused.dtype == (torch.float32 if residual else of_x)
    assert called.isfinite().all()
    torch.testing.assert_close(called, fused, rtol=0.1, atol=100.0)


def test_the_called_form_checks_what_the_operator_checks():
    module = SqueezeExcite(8, 2)
    module.fc1.register_forward_hook(lambda m, args, out: None)
    x = draw(2, 8, 4, 4)
    with pytest.raises(ValueError, match=r"residual must have shape \(B, C, H, W\)=\(2, 8, 4, 4\), got \(2, 8, 4, 3\)"):
        module(x, residual=x[..., 1:])
    with pytest.raises(ValueError, match="activation must be one of None, 'relu', got 'gelu'"):
        module(x, activation="gelu")
    if _extension.available():
        module.impl = "cpu"
        with pytest.raises(RuntimeError, match=r"impl='cpu' cannot run: .* got torch.float64"):
            module.double()(x.double())


class Keep:
    """A backend for torch.compile that keeps the graphs and runs them as they are."""

    def __init__(self):
        self.graphs = []

    def __call__(self, graph, inputs):
        self.graphs.append(graph)
        return graph

    def operators(self):
        return " ".join(str(node.target) for graph in self.graphs for node in graph.graph.nodes)


@pytest.mark.skipif(not _extension.available(), reason=str(_extension.reason()))
@pytest.mark.parametrize(
    ("name", "layer", "operator", "called"),
    [
        ("SqueezeExcite", "fc1", "squeeze_excite_cpu", "weighted_layer_sum_cpu"),
        ("ElementwiseAttentionBlock", "attention.norm", "elementwise_attention_cpu", "row_col_softmax_cpu"),
    ],
)
def test_plain_layers_keep_the_fused_operator(name, layer, operator, called):
    """In one graph, with or without hooks; also in the graph of torch.export."""
    module, call = build(name)
    call(module)
    for hooked, expected in ((False, operator), (True, called)):
        if hooked:
            module.get_submodule(layer).register_forward_hook(lambda m, args, out: out * 0.5)
        torch.compiler.reset()
        keep = Keep()
        out = call(torch.compile(module, backend=keep, fullgraph=True))
        torch.testing.assert_close(out, call(module), rtol=1e-4, atol=1e-5)
        assert expected in keep.operators()
        assert (operator in keep.operators()) != hooked
    copied, args = build(name)[0].eval(), (draw(3, 8, 4, 5) if name == "SqueezeExcite" else draw(3, 3, 4, 5),)
    exported = torch.export.export(copied, args)
    assert operator in str(exported.graph)


def test_shares_of_a_result_need_plain_layers():
    modules, result = [SqueezeExcite(8, 2, result_features=3) for _ in range(2)], draw(2, 3)
    shares = result_shares(modules, result)
    modules[1].fc1.register_forward_hook(lambda m, args, out: None)
    with pytest.raises(ValueError, match=r"modules\[1\]\.fc1 must be a plain nn.Linear.*: give it the result itself"):
        result_shares(modules, result)
    with pytest.raises(ValueError, match=r"result_share must be None: fc1 .*: give the result itself"):
        modules[1](draw(2, 8, 4, 4), result_share=shares[1])
    modules[0].fc2.register_forward_hook(lambda m, args, out: out * 0.5)  # the other layer takes no part in shares
    x = draw(2, 8, 4, 4)
    torch.testing.assert_close(modules[0](x, result_share=result_shares(modules[:1], result)[0]), modules[0](x, result))


# --- element-wise attention -------------------------------------------------------------------------------------------


@implementations
@pytest.mark.parametrize("norm", [nn.GroupNorm(2, 6), nn.BatchNorm2d(6), nn.Identity()], ids=lambda n: type(n).__name__)
def test_another_norm_in_element_wise_attention(impl, norm):
    attention = build("ElementwiseAttentionBlock", impl)[0].attention
    attention.norm = copy.deepcopy(norm)
    for parameter in attention.parameters():
        nn.init.normal_(parameter)
    x, reference = draw(4, 3, 4, 5), copy.deepcopy(attention.norm)
    product = row_col_softmax(x, attention.weight_row, attention.weight_col, impl="reference").flatten(1, 2)
    torch.testing.assert_close(attention(x), reference(product) * x.repeat(1, 2, 1, 1), rtol=1e-4, atol=1e-5)
    assert all(torch.allclose(a, b) for a, b in zip(attention.norm.buffers(), reference.buffers(), strict=True))


def test_gate_of_mrla_is_that_of_its_layers():
    """The functional form of the light attention, with hooks that change query, key and value."""
    module, _ = build("MRLALight")
    x, shortcut = draw(2, 8, 4, 5), draw(2, 8, 4, 5) + 1.0
    module.query.register_forward_hook(lambda m, args, out: out + 1.0)
    pooled = x.mean((2, 3)).unsqueeze(1)
    query, key = (layer(pooled).view(2, 2, 4) for layer in (module.query, module.key))
    gate = torch.sigmoid((query * key).sum(-1) / 2.0).repeat_interleave(4, 1)[..., None, None]
    expected = gate * F.conv2d(x, module.value.weight, padding=1, groups=8)
    expected = expected + module.shortcut_weight[:, None, None] * shortcut
    torch.testing.assert_close(module(x, shortcut), expected, rtol=1e-4, atol=1e-5)
