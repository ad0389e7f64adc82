"""Arguments that are numbers: of any kind that is one, symbolic ones included, and nothing that loses a gradient."""

import inspect
import io
import re
from collections.abc import Mapping
from fractions import Fraction

import numpy as np
import pytest
import torch
import torch._dynamo.testing
from torch.export import Dim
from torch.fx.experimental.proxy_tensor import make_fx

import fused_attn.ops as ops
from fused_attn.ops import LayerCache
from fused_attn.ops._floor import checks


def _rel(n):
    grid = {name: torch.randn(2, 2, 4, n, 8) for name in ("query", "key", "value")}
    return {**grid, "rel_h": torch.randn(7, 8), "rel_w": torch.randn(2 * n - 1, 8)}


def _sequence(n):
    return {
        **{name: torch.randn(2, 2, n, 8) for name in ("query", "key", "value")},
        "rel_table": torch.randn(2 * n - 1, 8),
    }


def _bias(n):
    grid = {name: torch.randn(2, 2, 4, n, 8) for name in ("query", "key", "value")}
    return {**grid, "bias_h": torch.randn(2, 2, 4, n, 4), "bias_w": torch.randn(2, 2, 4, n, n)}


def _table(n):
    grid = {name: torch.randn(2, 2, 4, n, 8) for name in ("query", "key", "value")}
    return {**grid, "bias_table": torch.randn(2, 7, 2 * n - 1)}


def _layers(n):
    keys = {f"key{i}": torch.randn(2, 3, 4) for i in range(3)}
    return {"query": torch.randn(2, 3, 4), **keys, **{f"value{i}": torch.randn(2, 6, n) for i in range(3)}}


def _layer_attention(function):
    def call(query, key0, key1, key2, value0, value1, value2, **options):
        return function(query, [key0, key1, key2], [value0, value1, value2], **options)

    return call


def _attend(query, keys, values, **options):
    cache = LayerCache()
    for key, value in zip(keys, values, strict=True):
        cache.append(key, value)
    return cache.attend(query, **options)


def _values(n):
    return {"value0": torch.randn(n, 8), "value1": torch.randn(n, 8), "query": torch.randn(8)}


def _attention_residual(value0, value1, query, **options):
    return ops.attention_residual([value0, value1], query, **options)


def _similarities(n):
    return {"x": torch.randn(n, 1, 5, 6)}


def _planes(n):
    return {"x": torch.randn(n, 1, 4, 5), **{f"weight_{side}": torch.randn(2, 1, 4, 5) for side in ("row", "col")}}


def _elementwise_attention(x, weight_row, weight_col, **options):
    """The running statistics are part of the result."""
    mean, var = x.new_zeros(2), x.new_ones(2)
    out = ops.elementwise_attention(x, weight_row, weight_col, mean, var, training=True, **options)
    return out.mean(0, keepdim=True) + mean.sum() + var.sum()


#: public function -> (a call that takes tensors by name, its tensors at size n)
CALLS = {
    ops.rel_attention_1d: (ops.rel_attention_1d, _sequence),
    ops.rel_attention_2d: (ops.rel_attention_2d, _rel),
    ops.decomposed_bias_attention: (ops.decomposed_bias_attention, _bias),
    ops.bias_attention_2d: (ops.bias_attention_2d, _table),
    ops.layer_attention: (_layer_attention(ops.layer_attention), _layers),
    LayerCache.attend: (_layer_attention(_attend), _layers),
    ops.attention_residual: (_attention_residual, _values),
    ops.elementwise_attention: (_elementwise_attention, _planes),
    ops.row_col_softmax: (ops.row_col_softmax, _similarities),
}


def numbers_of(function):
    """Names of the parameters that are annotated as a float."""
    parameters = inspect.signature(function).parameters.values()
    return [parameter.name for parameter in parameters if re.search(r"\bfloat\b", str(parameter.annotation))]


ARGUMENTS = [
    pytest.param(*CALLS[function], name, id=f"{function.__qualname__}-{name}")
    for function in CALLS
    for name in numbers_of(function)
]
arguments = pytest.mark.parametrize(("call", "make", "name"), ARGUMENTS)


def evaluate(call, inputs: Mapping, **options):
    """Output and gradients."""
    leaves = {name: tensor.clone().requires_grad_() for name, tensor in inputs.items()}
    torch.manual_seed(0)
    out = call(**leaves, **options)
    return [out.detach(), *torch.autograd.grad(out.square().sum(), list(leaves.values()))]


def test_every_number_of_every_op_is_tested():
    functions = [getattr(ops, name) for name in ops.__all__ if name not in ("SPECS", "LayerCache")]
    assert {function for function in (*functions, LayerCache.attend) if numbers_of(function)} == set(CALLS)
    assert len(ARGUMENTS) == 16


@arguments
def test_kinds_of_number(call, make, name):
    inputs = make(4)
    expected = evaluate(call, inputs, **{name: 0.25})
    # A power of two is the same in every precision.
    kinds = [np.float32(0.25), np.float64(0.25), np.float16(0.25), Fraction(1, 4)]
    kinds += [torch.tensor(0.25, dtype=dtype) for dtype in (torch.float32, torch.float64, torch.bfloat16)]
    for number in kinds:
        for actual, wanted in zip(evaluate(call, inputs, **{name: number}), expected, strict=True):
            assert torch.equal(actual, wanted), type(number)


@arguments
def test_what_is_not_a_number(call, make, name):
    inputs = make(4)
    for value, words in (
        (True, "a number, got bool"),
        (np.bool_(True), "a number, got bool"),
        (torch.tensor(True), "a number, got a tensor of dtype torch.bool"),
        (torch.tensor(1j), "a number, got a tensor of dtype torch.complex64"),
        (torch.ones(1), r"a number or a tensor without dimensions, got one of shape \(1,\)"),
        (torch.ones((), device="meta"), "a number, got a tensor on the meta device"),
        (np.ones(1), "a number, got ndarray"),
        (1j, "a number, got complex"),
        ("1", "a number, got str"),
        (torch.tensor(0.25, requires_grad=True), "a number, got a tensor that requires grad, which .* would not reach"),
        (torch.nn.Parameter(torch.tensor(0.25)), "a number, got a tensor that requires grad"),
    ):
        with pytest.raises(TypeError, match=f"^{name} must be {words}"):
            call(**inputs, **{name: value})


def test_a_tensor_with_a_tangent_is_refused():
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(torch.tensor(0.5), torch.tensor(1.0))
        with pytest.raises(TypeError, match="scale must be a number, got a tensor with a forward-mode tangent"):
            checks.number("scale", dual)
    for transform in (torch.func.grad, lambda f: lambda x: torch.func.jvp(f, (x,), (x,))):
        with pytest.raises(TypeError, match="scale must be a number, got a tensor"):
            transform(lambda x: x * checks.number("scale", x))(torch.tensor(0.5))


@pytest.mark.parametrize(
    "inner",
    [
        torch.func.grad,
        lambda f: lambda x: torch.func.jvp(f, (x,), (x,))[1],
        lambda f: lambda x: torch.func.vmap(f)(torch.stack([x, x])).sum(),
    ],
)
def test_a_tangent_of_an_outer_transform_is_refused(inner):
    def function(scale):
        return inner(lambda x: x * x * checks.number("scale", scale))(torch.tensor(3.0))

    one = torch.tensor(1.0)
    with pytest.raises(TypeError, match="scale must be a number, got a tensor with a forward-mode tangent"):
        torch.func.jvp(function, (torch.tensor(0.5),), (one,))
    # A constant among the levels, and one that was taken out of the derivative, are numbers.
    tangent = torch.func.jvp(lambda x: x * function(torch.tensor(0.5)), (one,), (one,))[1]
    torch.testing.assert_close(tangent, function(torch.tensor(0.5)))
    assert torch.func.jvp(lambda scale: function(scale.detach()), (torch.tensor(0.5),), (one,))[1] == 0


#: values of n; no other dimension has one of them, or it would be taken for dynamic together with it
SIZES = (11, 13, 17)

#: what has the size n: a tensor of the call and its dimension
DYNAMIC = {
    _sequence: ("query", 2),
    _rel: ("query", 3),
    _bias: ("query", 3),
    _table: ("query", 3),
    _layers: ("value0", 2),
    _values: ("value0", 0),
    _planes: ("x", 0),
    _similarities: ("x", 0),
}


def _of_its_size(call, make, name):
    """``call`` over tensors in the order of ``make``, with the number computed from the size n."""
    names, (tensor, dimension) = tuple(make(4)), DYNAMIC[make]

    def function(*tensors):
        inputs = dict(zip(names, tensors, strict=True))
        return call(**inputs, **{name: 0.5 * inputs[tensor].shape[dimension] ** -0.5})

    return function


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@arguments
def test_number_of_a_dynamic_size_is_compiled_once(call, make, name, backend):
    if backend == "inductor" and (call, name) != (ops.rel_attention_2d, "scale"):
        pytest.skip("one number stands for all: TorchInductor takes long")
    function = _of_its_size(call, make, name)
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend(backend)
    compiled = torch.compile(function, backend=counter, fullgraph=True, dynamic=True)
    for n in SIZES:
        # The first call may trace twice, to put in the numbers that are constant after all.
        compilations = counter.frame_count
        inputs = make(n)
        actual = evaluate(lambda **tensors: compiled(*tensors.values()), inputs)
        for a, b in zip(actual, evaluate(lambda **tensors: function(*tensors.values()), inputs), strict=True):
            torch.testing.assert_close(a, b)
        assert n == SIZES[0] or counter.frame_count == compilations, f"compiled again for {n}"
    torch._dynamo.reset()


class _Call(torch.nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, *tensors):
        return self.function(*tensors)


@arguments
def test_number_of_a_dynamic_size_is_exported(call, make, name):
    if name == "dropout_p":
        pytest.skip("the seed of an exported graph is not drawn as in the eager call")
    function = _of_its_size(call, make, name)
    # A size that a tensor of twice n - 1 rows shows is derived from it; export infers which.
    dynamic = tuple(dict.fromkeys(range(tensor.dim()), Dim.AUTO) for tensor in make(SIZES[0]).values())
    for strict in (False, True):
        program = torch.export.export(
            _Call(function), tuple(make(SIZES[0]).values()), dynamic_shapes={"tensors": dynamic}, strict=strict
        )
        file = io.BytesIO()
        torch.export.save(program, file)
        file.seek(0)
        module = torch.export.load(file).module()
        for n in SIZES[1:]:
            tensors = tuple(make(n).values())
            torch.testing.assert_close(module(*tensors), function(*tensors))


@arguments
def test_number_of_a_dynamic_size_is_traced(call, make, name):
    if name == "dropout_p":
        pytest.skip("the seed of a traced graph is not drawn as in the eager call")
    function = _of_its_size(call, make, name)
    traced = make_fx(function, tracing_mode="symbolic")(*make(SIZES[0]).values())
    for n in SIZES[1:]:
        tensors = tuple(make(n).values())
        torch.testing.assert_close(traced(*tensors), function(*tensors))
