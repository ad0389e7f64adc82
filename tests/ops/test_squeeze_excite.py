"""What squeeze_excite computes, against loops over channels, and what the contract does not know about it."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from fused_attn import _extension, squeeze_excite
from fused_attn.modules import SqueezeExcite, result_shares
from fused_attn.ops.squeeze_excite import op, spec
from fused_attn.testing import checks
from fused_attn.testing.numerics import evaluate

IMPLEMENTATIONS = [
    "reference",
    pytest.param("cpu", marks=pytest.mark.skipif(not _extension.available(), reason=str(_extension.reason()))),
]
implementations = pytest.mark.parametrize("impl", IMPLEMENTATIONS)
needs_extension = pytest.mark.skipif(not _extension.available(), reason=str(_extension.reason()))


def call(dtype=torch.float32, **settings):
    torch.manual_seed(0)
    return spec.make_inputs(dtype, torch.device("cpu"), **settings)


def by_loops(x, w1, b1, w2, b2, result, residual):
    """The definition, one number at a time."""
    out = torch.empty_like(x)
    for b in range(x.shape[0]):
        inputs = result[b].tolist() + [float(channel.sum()) / channel.numel() for channel in x[b]]
        units = [
            max(0.0, sum(w * z for w, z in zip(row, inputs, strict=True)) + bias)
            for row, bias in zip(w1, b1, strict=True)
        ]
        for c in range(x.shape[1]):
            logit = sum(w * unit for w, unit in zip(w2[c], units, strict=True)) + b2[c]
            out[b, c] = (x[b, c] / (1.0 + math.exp(-logit)) + residual[b, c]).clamp(min=0.0)
    return out


@implementations
def test_definition(impl):
    inputs = call(size=(2, 5, 3, 4), hidden=3, features=4, residual=True, relu=True)
    expected = by_loops(
        *(inputs[name].double() for name in ("x", "fc1_weight", "fc1_bias", "fc2_weight", "fc2_bias")),
        inputs["result"].double(),
        inputs["residual"].double(),
    )
    torch.testing.assert_close(squeeze_excite(**inputs, impl=impl).double(), expected, rtol=1e-5, atol=1e-6)


@implementations
def test_share_of_the_result_is_the_result(impl):
    inputs = call(size=(3, 8, 4, 5), hidden=4, features=6, residual=True, relu=True)
    expected = squeeze_excite(**inputs, impl=impl)
    result, weight = inputs.pop("result"), inputs["fc1_weight"]
    inputs |= {"fc1_weight": weight[:, 6:], "result_share": F.linear(result, weight[:, :6])}
    torch.testing.assert_close(squeeze_excite(**inputs, impl=impl), expected)


@implementations
@pytest.mark.parametrize("channels_last", [False, True])
def test_out_and_gradients_keep_the_memory_format(impl, channels_last):
    form = torch.channels_last if channels_last else torch.contiguous_format
    inputs = call(size=(2, 8, 4, 5), hidden=4, residual=True, relu=True)
    x = inputs.pop("x").contiguous(memory_format=form).requires_grad_()
    inputs["residual"] = inputs["residual"].contiguous(memory_format=form).requires_grad_()
    out = squeeze_excite(x, **inputs, impl=impl)
    assert out.is_contiguous(memory_format=form)
    for grad in torch.autograd.grad(out.square().sum(), (x, inputs["residual"])):
        assert grad.is_contiguous(memory_format=form)


@needs_extension
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("size", [(21, 24, 5, 5), (3, 2000, 20, 20)])
def test_a_sample_does_not_depend_on_the_others(size, channels_last):
    """Chunks hold one to eight samples: the same bits in whatever company."""
    form = torch.channels_last if channels_last else torch.contiguous_format
    inputs = call(size=size, hidden=5, features=3, residual=True, relu=True)
    inputs["x"] = inputs["x"].contiguous(memory_format=form)
    whole = squeeze_excite(**inputs, impl="cpu")
    for b in range(size[0]):
        alone = {
            name: value[b : b + 1] if name in ("x", "result", "residual") else value for name, value in inputs.items()
        }
        assert torch.equal(squeeze_excite(**alone, impl="cpu"), whole[b : b + 1])


@needs_extension
@pytest.mark.parametrize(
    ("settings", "numbers"),
    [({}, 16 + 4 + 16), ({"hidden_activation": "silu"}, 16 + 4 + 16), ({"one_layer": True}, 16 + 16)],
    ids=str,
)
def test_what_is_saved_for_backward(settings, numbers):
    inputs = call(size=(4, 16, 6, 6), hidden=4, features=3, residual=True, relu=True, **settings)
    leaves = {name: value.requires_grad_() for name, value in inputs.items() if isinstance(value, torch.Tensor)}
    saved = []

    def pack(tensor):
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = squeeze_excite(**{**inputs, **leaves}, impl="cpu")
    own = {out.data_ptr(), *(leaf.data_ptr() for leaf in leaves.values())}
    extra = [tensor for tensor in saved if tensor.data_ptr() not in own]
    assert sum(tensor.numel() for tensor in extra) == 4 * numbers
    assert inputs["residual"].data_ptr() not in {tensor.data_ptr() for tensor in saved}


@needs_extension
@pytest.mark.parametrize("settings", [{"features": 3}, {"one_layer": True, "convolutions": True}], ids=str)
def test_flops(settings):
    inputs = call(size=(4, 16, 6, 6), hidden=5, **settings)
    inputs["x"].requires_grad_()
    with FlopCounterMode(display=False) as counter:
        squeeze_excite(**inputs, impl="cpu").sum().backward()
    products = 5 * (3 + 16) + 16 * 5 if "features" in settings else 16 * 16
    assert counter.get_total_flops() == 3 * 2 * 4 * products


@needs_extension
def test_gradient_of_the_residual_is_not_copied_without_an_activation():
    inputs = call(size=(2, 8, 4, 4), hidden=4, residual=True)
    residual = inputs.pop("residual").requires_grad_()
    out = squeeze_excite(**inputs, residual=residual, impl="cpu")
    grad_out = torch.randn_like(out)
    (grad,) = torch.autograd.grad(out, residual, grad_out)
    assert grad.data_ptr() == grad_out.data_ptr()


@implementations
def test_nothing_is_masked_where_out_is_nan(impl):
    inputs = call(size=(2, 4, 2, 2), hidden=2, residual=True, relu=True)
    inputs["x"][0, 0, 0, 0] = math.nan
    results = evaluate(lambda **kwargs: squeeze_excite(**kwargs, impl=impl), inputs, torch.ones(2, 4, 2, 2))
    assert results["out"][0].isnan().all()
    assert torch.equal(results["grad_residual"][0], torch.ones(4, 2, 2))
    assert results["out"][1].isfinite().all()


def test_nearest_format_of_strided_maps():
    x = torch.empty(2, 3, 4, 5)
    assert op.memory_format(x) == torch.contiguous_format
    assert op.memory_format(x[:, :, :, ::2]) == torch.contiguous_format
    last = x.contiguous(memory_format=torch.channels_last)
    assert op.memory_format(last) == torch.channels_last
    assert op.memory_format(last[:, 1:]) == torch.channels_last


# --- the module -----------------------------------------------------------------------------------------------------


class ConvolutionForm(nn.Module):
    """Squeeze-excite as torchvision and timm build it."""

    def __init__(self, channels, hidden):
        super().__init__()
        self.fc1 = nn.Conv2d(channels, hidden, 1)
        self.fc2 = nn.Conv2d(hidden, channels, 1)

    def forward(self, x):
        return x * self.fc2(F.relu(self.fc1(F.adaptive_avg_pool2d(x, 1)))).sigmoid()


def test_state_dict_of_the_convolution_form_loads():
    theirs, ours = ConvolutionForm(16, 4), SqueezeExcite(16, 4)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(2, 16, 5, 6)
    torch.testing.assert_close(ours(x), theirs(x))
    again = SqueezeExcite(16, 4)
    again.load_state_dict(ours.state_dict())
    assert torch.equal(again(x), ours(x))


@pytest.mark.parametrize("layers", [2, 1])
def test_module_is_the_op_of_its_options(layers):
    options = {"hidden_activation": "gelu" if layers == 2 else "relu", "gate": "hardsigmoid"}
    module = SqueezeExcite(8, result_features=3, layers=layers, hidden=5 if layers == 2 else None, **options)
    sizes = {"fc1": (5, 11), "fc2": (8, 5)} if layers == 2 else {"fc1": (8, 11)}
    assert {
        name.removesuffix(".weight"): tensor.shape
        for name, tensor in module.state_dict().items()
        if name.endswith("weight")
    } == sizes
    x, result = torch.randn(2, 8, 4, 4), torch.randn(2, 3)
    expected = squeeze_excite(x, *module.parameters(), result=result, **options)
    assert torch.equal(module(x, result), expected)
    torch.testing.assert_close(module.scales(x, result)[:, :, None, None] * x, expected)
    torch.testing.assert_close(module(x, result_share=result_shares([module], result)[0]), expected)
    module.fc1.register_forward_hook(lambda m, args, out: None)  # the layers are called
    torch.testing.assert_close(module(x, result), expected)


def test_larger_kernels_do_not_load():
    state = ConvolutionForm(16, 4).state_dict()
    state["fc1.weight"] = torch.zeros(4, 16, 3, 3)
    with pytest.raises(RuntimeError, match=r"size mismatch for fc1\.weight"):
        SqueezeExcite(16, 4).load_state_dict(state)


def test_shares_of_a_stage_in_one_product():
    modules = [SqueezeExcite(channels, 4, result_features=10) for channels in (16, 16, 32)]
    result = torch.randn(3, 10, requires_grad=True)
    shares = result_shares(modules, result)
    for module, share in zip(modules, shares, strict=True):
        x = torch.randn(3, module.channels, 4, 4)
        alone, shared = module(x, result), module(x, result_share=share)
        torch.testing.assert_close(shared, alone)
        variables = [result, *module.parameters()]
        for got, want in zip(
            torch.autograd.grad(shared.square().sum(), variables, retain_graph=True),
            torch.autograd.grad(alone.square().sum(), variables, retain_graph=True),
            strict=True,
        ):
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match=r"result must have shape \(B, 10\), as every module expects, got \(3, 9\)"):
        result_shares(modules, result[:, 1:])


def test_scales_are_those_of_the_op():
    module, x, result = SqueezeExcite(8, 2, result_features=3), torch.randn(2, 8, 4, 4), torch.randn(2, 3)
    expected = module(x, result)
    torch.testing.assert_close(module.scales(x, result)[:, :, None, None] * x, expected)
    (share,) = result_shares([module], result)
    torch.testing.assert_close(module.scales(x, result_share=share)[:, :, None, None] * x, expected)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"channels": 0}, "channels must be at least 1, got 0"),
        ({"channels": 8, "reduction": 0}, "reduction must be at least 1, got 0"),
        ({"channels": 8, "reduction": 9}, "reduction must leave a hidden channel of channels=8, got 9"),
        ({"channels": 8, "reduction": 2, "result_features": -1}, "result_features must be at least 0, got -1"),
        ({"channels": 8, "reduction": 2, "impl": "fast"}, "impl must be one of 'auto', .* got 'fast'"),
        ({"channels": 8, "hidden": 0}, "hidden must be at least 1, got 0"),
        ({"channels": 8, "layers": 3}, "layers must be 1 or 2, got 3"),
        ({"channels": 8, "layers": 1, "hidden": 2}, "hidden must be None where layers=1: .* got 2"),
        ({"channels": 8, "layers": 1, "hidden_activation": "silu"}, "hidden_activation must be left at 'relu' where l"),
        ({"channels": 8, "hidden": 2, "hidden_activation": "elu"}, "hidden_activation must be one of 'relu', .* 'elu'"),
        ({"channels": 8, "hidden": 2, "gate": "relu"}, "gate must be one of 'sigmoid', 'hardsigmoid', got 'relu'"),
    ],
)
def test_bad_modules(arguments, message):
    with pytest.raises(ValueError, match=message):
        SqueezeExcite(**arguments)


def test_bad_results():
    x, result = torch.randn(2, 8, 3, 3), torch.randn(2, 5)
    plain, fed = SqueezeExcite(8, 2), SqueezeExcite(8, 2, result_features=5)
    for module, arguments, message in (
        (fed, (x,), r"result must be given, \(B, 5\)"),
        (plain, (x, result), "result must be None: the module was built with result_features=0"),
        (fed, (x, result[:, 1:]), r"result must have shape \(B, 5\), got \(2, 4\)"),
        (fed, (x, result[:1]), "result must have the batch of x, 2, got 1"),
        (fed, (x[:, 1:], result), r"x must have shape \(B, 8, H, W\), got \(2, 7, 3, 3\)"),
    ):
        with pytest.raises(ValueError, match=message):
            module(*arguments)


@needs_extension
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=["first", "last"])
@pytest.mark.parametrize("size", [(2, 64, 128, 130), (84, 128, 14, 14), (43, 1025, 7, 7)], ids=str)
def test_maps_too_large_for_the_caches(size, memory_format):
    """They are streamed: whole rows where they are aligned, else all but their ends; rows of 49 values not at all."""
    channels = size[1]
    x, residual, grad_out = (torch.randn(size).to(memory_format=memory_format) for _ in range(3))
    assert x.numel() * 4 >= 8 << 20
    weights = [
        torch.randn(8, channels) / channels**0.5,
        torch.randn(8),
        torch.randn(channels, 8),
        torch.randn(channels),
    ]
    tensors = [tensor.requires_grad_() for tensor in (x, *weights, residual)]
    for activation in (None, "relu"):
        results = []
        for impl in ("cpu", "reference"):
            out = squeeze_excite(*tensors[:-1], residual=residual, activation=activation, impl=impl)
            results.append((out, *torch.autograd.grad(out, tensors, grad_out)))
        for found, expected in zip(*results, strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5 * float(expected.detach().abs().max()))


@pytest.mark.usefixtures("capability")
@pytest.mark.parametrize("capability", ["generic", "avx2", "avx512"], indirect=True)
def test_bits_of_few_samples_at_any_number_of_threads():
    """Fewer chunks of samples than threads: the channels of a sample, long rows and short ones, are split instead."""
    settings = (
        {"size": (1, 70, 31, 31), "hidden": 7, "features": 5, "residual": True, "relu": True},
        {"size": (1, 70, 31, 31), "hidden": 7, "relu": True, "hidden_activation": "silu", "dtype": torch.bfloat16},
        {"size": (3, 450, 7, 7), "one_layer": True, "share": True, "residual": True, "gate": "hardsigmoid"},
        {"size": (3, 450, 7, 7), "hidden": 9, "residual": True, "relu": True, "dtype": torch.float16},
        {"size": (1, 73, 170, 170), "hidden": 3, "relu": True},  # streamed
    )
    for setting in settings:
        for layout in (spec._contiguous, spec._channels_last):
            inputs = call(**setting, layout=layout)
            checks.check_deterministic(spec.SPECS[0], "cpu", inputs, runs=1, threads=(1, 2, 3))


@pytest.mark.parametrize("gate", ["sigmoid", "hardsigmoid"])
@pytest.mark.parametrize("hidden_activation", ["relu", "silu", "gelu", "hardswish"])
def test_peers_of_every_activation(hidden_activation, gate):
    """Of which the reference's own have derivatives that PyTorch's lack, and other signatures."""
    inputs = {**call(torch.float64, **spec.SMALL), "hidden_activation": hidden_activation, "gate": gate}
    expected = squeeze_excite(**inputs, impl="reference")
    for peer in spec.SPECS[0].peers[:2]:
        torch.testing.assert_close(peer.build(inputs)(**inputs), expected)
