"""Plain calls go straight to the kernel, all others through PyTorch's dispatcher; both give the same bits."""

import commands
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from fused_attn import _extension, rel_attention_2d, squeeze_excite
from fused_attn.ops import SPECS
from fused_attn.ops._floor.declarations import leaves, with_tensors
from fused_attn.ops._floor.operators import Public
from fused_attn.ops._floor.plain_calls import Guard, signature
from fused_attn.ops.squeeze_excite import api, op
from fused_attn.testing.numerics import draw_grad_out, evaluate

needs_cpu = pytest.mark.skipif(not _extension.available(), reason=str(_extension.reason()))


class PassThrough(TorchDispatchMode):
    """Changes nothing; keeps the names of the operators it sees."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(str(function))
        return function(*args, **(kwargs or {}))


class Wrapped(torch.Tensor):
    pass


def is_plain(args):
    return signature(args) is not None


def test_what_is_plain():
    x, parameter = torch.randn(2, 3), torch.nn.Parameter(torch.randn(3))
    assert is_plain((x, parameter, None, 0.5, 3, True, [x, parameter], (x,)))
    assert is_plain((x.requires_grad_(), x[:, ::2], x.to(torch.bfloat16)))
    with torch.no_grad():
        assert is_plain((x, parameter))
    with torch.inference_mode():
        assert is_plain((x, torch.randn(2)))


@pytest.mark.parametrize(
    "make",
    [
        lambda x: x.as_subclass(Wrapped),
        lambda x: x.to("meta"),
        lambda x: x.to_sparse(),
        lambda x: torch.complex(x, x).conj(),
        lambda x: torch._to_functional_tensor(x),
        lambda x: [x, x.as_subclass(Wrapped)],
        lambda x: object(),
    ],
    ids=["subclass", "meta", "sparse", "conjugate", "functional", "in a list", "neither tensor nor option"],
)
def test_what_is_not(make):
    x = torch.randn(2, 3)
    assert not is_plain((x, make(x)))


def test_no_call_is_plain_within_modes_and_transforms():
    x, seen = torch.randn(2, 3), []
    guard = Guard((x,))
    assert guard((x,))

    def look(tensor):
        seen.append(is_plain((x,)) or is_plain((tensor,)) or guard((x,)) or guard((tensor,)))
        return tensor.sum()

    torch.func.vmap(look)(x)
    torch.func.grad(look)(x)
    torch.func.jvp(look, (x,), (x,))
    torch.func.functionalize(look)(x)
    make_fx(look)(x)
    make_fx(look, pre_dispatch=True)(x)
    torch.jit.trace(look, x, check_trace=False)
    for mode in (PassThrough(), FakeTensorMode(allow_non_fake_inputs=True), FlopCounterMode(display=False)):
        with mode:
            look(x)
    with forward_ad.dual_level():
        look(x)
    with torch._C._AutoDispatchBelowAutograd():
        look(x)
    assert len(seen) >= 10
    assert not any(seen)


def test_a_guard_tells_signatures_apart():
    x, weight, one = torch.randn(2, 3), torch.nn.Parameter(torch.randn(3)), 1.0
    call = ("auto", x, weight, None, one)
    guard = Guard(call)
    assert guard(call)
    assert guard(("auto", torch.randn(2, 3), torch.nn.Parameter(torch.randn(3)), None, one))
    for place, other in [
        (0, "cpu"), (1, None), (1, x.double()), (1, x[:, :2]), (1, x.t().contiguous().t()), (1, x[None]),
        (1, x.clone().requires_grad_()), (1, x.to("meta")), (1, x.as_subclass(Wrapped)), (2, weight.detach()),
        (3, x), (3, [x]), (4, 1), (4, True), (4, None), (4, x),
    ]:  # fmt: skip
        assert not guard((*call[:place], other, *call[place + 1 :])), (place, other)
    modes = (torch.no_grad(), torch.inference_mode(), torch.autocast("cpu", torch.bfloat16), forward_ad.dual_level())
    for mode in modes:
        with mode:
            assert not guard(call), mode
    assert guard(call)
    assert not Guard.serves(("auto", [x], weight))
    assert not Guard.serves(("auto", None))


@needs_cpu
@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.name)
def test_both_ways_give_the_same_bits(spec):
    def function(**call):
        return spec.function(**call, impl="cpu")

    for sample in (sample for sample in spec.samples if sample.small):
        inputs = sample.inputs(torch.float32)
        grad_out = draw_grad_out(spec, inputs)
        first, _, plain = (evaluate(function, inputs, grad_out) for _ in range(3))
        for name, tensor in plain.items():  # what is kept of the first calls gives the third one the same layouts
            assert torch.equal(tensor.nan_to_num(), first[name].nan_to_num()), (sample.name, name)
            assert tensor.stride() == first[name].stride(), (sample.name, name)
        with PassThrough() as mode:
            dispatched = evaluate(function, inputs, grad_out)
        assert any("_backward" in name and name.startswith("fused_attn.") for name in mode.names)
        for name, tensor in plain.items():
            assert torch.equal(tensor.nan_to_num(), dispatched[name].nan_to_num()), (sample.name, name)
            assert tensor.stride() == dispatched[name].stride(), (sample.name, name)


@needs_cpu
def test_what_is_kept_of_a_call_is_not_of_its_tensors():
    query, key, value = (torch.randn(1, 2, 3, 4, 8) for _ in range(3))
    scale = torch.tensor(0.1)

    def check(*tensors, **options):
        out = rel_attention_2d(*tensors, **options, impl="cpu")
        reference = rel_attention_2d(*tensors, **options, impl="reference")
        torch.testing.assert_close(out, reference, rtol=1e-4, atol=1e-5)

    check(query, query, query)
    check(query, key, value)
    check(query, key, value, scale=scale)
    check(query, key, value, scale=scale.fill_(3.0))
    check(query, key, value, dropout_p=0.0)
    with pytest.raises(TypeError, match="dropout_p must be a number, got bool"):
        rel_attention_2d(query, key, value, dropout_p=False)
    for segments in (torch.zeros(3, 1, 4), torch.arange(12.0).reshape(3, 1, 4)):  # of the same strides: copied
        segments = segments.to(torch.int32).transpose(0, 1)
        check(query, key, value, query_segments=segments, key_segments=segments)
    with torch.inference_mode():
        check(query, key, value[..., :7])
    check(query, key, value[..., :7])
    assert not rel_attention_2d(query, key, value[..., :7], impl="cpu").is_inference()


@needs_cpu
def test_what_is_kept_of_calls_is_bounded(monkeypatch):
    monkeypatch.setattr(Public, "_MOST", 4)
    run = op.squeeze_excite.public(api._check)
    for size in range(1, 10):
        x, weight = torch.randn(1, 4, 1, size), torch.randn(4, 4)
        out = [
            run("cpu", x, weight, None, weight, None, None, None, None, None, "relu", "sigmoid")[0] for _ in range(3)
        ]
        assert torch.equal(out[0], out[2])
        assert 1 <= len(run._plans) <= 4
        assert 1 <= len(run._latest) <= Public._GUARDED


IMPORTED_WITHIN = """
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

x = torch.randn(2)
with torch.inference_mode(), FakeTensorMode(allow_non_fake_inputs=True):
    from fused_attn.ops._floor.plain_calls import signature
    assert signature((x,)) is None
with torch.inference_mode():
    assert signature((x, torch.randn(2)))
assert signature((x,))
"""


def test_what_is_plain_does_not_depend_on_where_the_package_is_imported():
    result = commands.python("-c", IMPORTED_WITHIN)
    assert result.returncode == 0, result.stderr


@needs_cpu
@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.name)
def test_plain_calls_run_the_kernels_of_their_implementation(spec):
    """Of what the other way runs, the contract test knows."""
    inputs = spec.samples[0].inputs(torch.float32)
    grad_out = draw_grad_out(spec, inputs)
    ran = {}
    for impl in ("cpu", "reference"):
        with profile(activities=[ProfilerActivity.CPU]) as events:
            evaluate(lambda **call: spec.function(**call, impl=impl), inputs, grad_out)  # noqa: B023 - called at once
        names = {event.key for event in events.key_averages()}
        ran[impl] = {name for name in names if name.startswith(("fused_attn::", "fused_attn_cpu::"))}
    assert {name.partition("::")[0] for name in ran["cpu"]} == {"fused_attn_cpu"}  # no operator: the call was plain
    assert {name.rpartition("_")[2] for name in ran["cpu"]} == {"forward", "backward"}
    assert not ran["reference"]


@needs_cpu
def test_gradients_that_nobody_asks_for():
    x, residual, weights = torch.randn(2, 4, 3, 3), torch.randn(2, 4, 3, 3), (torch.randn(2, 4), torch.randn(4, 2))
    for which in range(2):
        call = [x.clone(), residual.clone()]
        call[which].requires_grad_()
        squeeze_excite(
            call[0], weights[0], None, weights[1], None, residual=call[1], activation="relu", impl="cpu"
        ).sum().backward()
        assert call[which].grad is not None
        assert call[1 - which].grad is None


class Silent(torch.autograd.Function):
    """Passes its input on, and no gradient back."""

    @staticmethod
    def forward(ctx, x):
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        return None


def both_ways(function):
    """What ``function`` gives for plain calls and for those through PyTorch's dispatcher."""
    plain = function()
    with PassThrough():
        return plain, function()


@needs_cpu
@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.name)
def test_what_is_saved_is_the_same_and_guarded(spec):
    inputs = spec.samples[0].inputs(torch.float32)

    def recorded():
        saved, variables = [], leaves(inputs)
        with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
            spec.function(**with_tensors(inputs, variables), impl="cpu")
        return [(tuple(tensor.shape), tensor.dtype) for tensor in saved]

    plain, dispatched = both_ways(recorded)
    assert plain == dispatched
    assert plain

    for name in leaves(inputs):
        plain, dispatched = both_ways(lambda: error_after_changing(spec, inputs, name))  # noqa: B023 - called at once
        assert plain == dispatched
    assert "modified by an inplace operation" in error_after_changing(spec, inputs, next(iter(leaves(inputs))))


def error_after_changing(spec, inputs, name):
    """What the backward pass says when an argument was changed after the call; None: it was not saved."""
    variables = {other: leaf * 1 for other, leaf in leaves(inputs).items()}
    out = spec.function(**with_tensors(inputs, variables), impl="cpu")
    with torch.no_grad():
        variables[name].add_(1)
    try:
        out.sum().backward()
    except RuntimeError as error:
        return str(error)
    return None


@needs_cpu
@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.name)
def test_a_gradient_that_nobody_gives_is_zeros(spec):
    inputs = spec.samples[0].inputs(torch.float32)

    def gradients():
        variables = leaves(inputs)
        Silent.apply(spec.function(**with_tensors(inputs, variables), impl="cpu")).sum().backward()
        return {name: leaf.grad for name, leaf in variables.items()}

    plain, dispatched = both_ways(gradients)
    for name, grad in plain.items():
        assert (grad is None) == (dispatched[name] is None)
        assert grad is None or (torch.equal(grad, dispatched[name]) and not grad.any())


@needs_cpu
def test_operators_are_named_in_the_graph():
    spec = next(spec for spec in SPECS if spec.name == "squeeze_excite")
    inputs = spec.samples[0].inputs(torch.float32)
    names = both_ways(lambda: spec.function(**with_tensors(inputs, leaves(inputs)), impl="cpu").grad_fn.name())
    assert set(names) == {"squeeze_excite_cpuBackward"}
