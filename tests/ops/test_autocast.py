"""What every op does under autocast, against what PyTorch's autocast does to the plain formula."""

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode

from fused_attn import _extension
from fused_attn.modules import DualSoftmax
from fused_attn.ops import (
    attention_residual,
    decomposed_bias_attention,
    elementwise_attention,
    layer_attention,
    rel_attention_2d,
    row_col_softmax,
    squeeze_excite,
    weighted_layer_sum,
)
from fused_attn.ops._floor import dispatch
from fused_attn.ops.layer_attention.peers import ATTENTION_PEERS, SUM_PEERS

DTYPES = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["float16", "bfloat16"])
IMPLS = pytest.mark.parametrize(
    "impl",
    [
        "reference",
        pytest.param("cpu", marks=pytest.mark.skipif(not _extension.available(), reason=str(_extension.reason()))),
    ],
)


def _peer(peers, name):
    return next(peer for peer in peers if peer.name == name).build({})


def _weighted(x, weight_row, weight_col):
    x = x.unsqueeze(1)
    return (x * weight_row).softmax(4) * (x * weight_col).softmax(3)


def _elementwise(x, weight_row, weight_col):
    product = _weighted(x, weight_row, weight_col)
    normalised = F.batch_norm(product.flatten(1, 2), None, None, training=True)
    return (normalised.view(product.shape) * x.unsqueeze(1)).flatten(1, 2)


def _excite(x, w1, b1, w2, b2, residual):
    s = torch.sigmoid(F.linear(F.relu(F.linear(x.mean((2, 3)), w1, b1)), w2, b2))
    return x * s[:, :, None, None] + residual


def _sdpa(query, key, value, bias_h, bias_w):
    """With the mask that a user would add up."""
    mask = (bias_h[..., :, None] + bias_w[..., None, :]).flatten(-2).flatten(2, 3)
    out = F.scaled_dot_product_attention(*(t.flatten(2, 3) for t in (query, key, value)), attn_mask=mask)
    return out.view(value.shape)


def _layers(function):
    return lambda query, bias, key0, key1, value0, value1: function(
        query, [key0, key1], [value0, value1], bias=bias, scale=0.5
    )


#: name -> (op, plain formula, shapes of the activations, shapes of the parameters); the call takes both in this order
CASES = {
    "dual softmax": (
        lambda x, impl: row_col_softmax(x, impl=impl),
        lambda x: x.softmax(3) * x.softmax(2),
        [(2, 3, 4, 5)],
        [],
    ),
    "row_col_softmax": (row_col_softmax, _weighted, [(2, 3, 4, 5)], [(2, 3, 4, 5)] * 2),
    "elementwise_attention": (
        lambda *tensors, impl: elementwise_attention(*tensors, None, None, training=True, impl=impl),
        _elementwise,
        [(2, 3, 4, 5)],
        [(2, 3, 4, 5)] * 2,
    ),
    "squeeze_excite": (
        lambda x, residual, w1, b1, w2, b2, impl: squeeze_excite(x, w1, b1, w2, b2, residual=residual, impl=impl),
        lambda x, residual, w1, b1, w2, b2: _excite(x, w1, b1, w2, b2, residual),
        [(2, 8, 4, 5)] * 2,
        [(4, 8), (4,), (8, 4), (8,)],
    ),
    "decomposed_bias_attention": (
        decomposed_bias_attention,
        _sdpa,
        [(2, 2, 3, 4, 8)] * 3,
        [(2, 2, 3, 4, 3), (2, 2, 3, 4, 4)],
    ),
    "rel_attention_2d": (
        lambda query, key, value, impl: rel_attention_2d(query, key, value, impl=impl),
        lambda query, key, value: _sdpa(query, key, value, *(query.new_zeros(2, 2, 3, 4, n) for n in (3, 4))),
        [(2, 2, 3, 4, 8)] * 3,
        [],
    ),
    "layer_attention": (
        lambda key0, key1, value0, value1, query, bias, impl: _layers(
            lambda *args, **options: layer_attention(*args, **options, impl=impl)
        )(query, bias, key0, key1, value0, value1),
        lambda key0, key1, value0, value1, query, bias: _layers(_peer(ATTENTION_PEERS, "published (cat, einsum)"))(
            query, bias, key0, key1, value0, value1
        ),
        [(2, 3, 4)] * 2 + [(2, 6, 5)] * 2,
        [(3, 4), (2, 3)],
    ),
    "weighted_layer_sum": (
        lambda value0, value1, weights, impl: weighted_layer_sum(weights, [value0, value1], impl=impl),
        lambda value0, value1, weights: _peer(SUM_PEERS, "stack, einsum")(weights, [value0, value1]),
        [(2, 6, 5)] * 2,
        [(2, 3, 2)],
    ),
    "attention_residual": (
        lambda value0, value1, query, norm_weight, impl: attention_residual(
            [value0, value1], query, norm_weight=norm_weight, impl=impl
        ),
        lambda value0, value1, query, norm_weight: _products([value0, value1], query, norm_weight),
        [(4, 16)] * 2,
        [(16,)] * 2,
    ),
}


def _products(values, query, norm_weight):
    """Attention residuals with the sums as matrix products."""
    stacked = torch.stack(values)
    rms = (stacked.float().square().mean(-1) + 1e-6).rsqrt()
    weights = ((stacked @ (query * norm_weight)) * rms).softmax(0)
    return torch.einsum("lt,ltd->td", weights, stacked)


def draw(shapes, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator) for shape in shapes]


def differentiated(function, tensors):
    """Output and gradients; under the autocast that is on for the forward pass only."""
    leaves = [tensor.clone().requires_grad_() for tensor in tensors]
    out = function(*leaves)
    with torch.autocast("cpu", enabled=False):
        return [out.detach(), *torch.autograd.grad(out.float().square().sum(), leaves)]


@DTYPES
@IMPLS
@pytest.mark.parametrize("lower", ["nothing", "activations", "everything"])
@pytest.mark.parametrize("name", CASES)
def test_dtype_and_values_of_the_plain_formula(name, lower, impl, dtype):
    """Inputs as they are in a network: in float32; activations in lower precision, parameters in float32; all lower."""
    op, plain, activations, parameters = CASES[name]
    tensors = draw([*activations, *parameters])
    count = {"nothing": 0, "activations": len(activations), "everything": len(tensors)}[lower]
    tensors = [tensor.to(dtype) if i < count else tensor for i, tensor in enumerate(tensors)]
    with torch.autocast("cpu", dtype=dtype):
        actual = differentiated(lambda *leaves: op(*leaves, impl=impl), tensors)
        expected = differentiated(plain, tensors)
    oracle = differentiated(lambda *leaves: plain(*(leaf.float() for leaf in leaves)), tensors)
    for place, (a, b, exact) in enumerate(zip(actual, expected, oracle, strict=True)):
        assert a.dtype == b.dtype, f"{'gradient' if place else 'out'} {a.dtype}, the plain formula's {b.dtype}"
        error, plain_error = ((x.float() - exact.float()).abs().max() for x in (a, b))
        bound = (
            4 * plain_error
            + (1e-5 if expected[0].dtype == torch.float32 else torch.finfo(dtype).eps) * exact.abs().max()
        )
        assert error <= bound, f"place {place}: error {error}, the plain formula's {plain_error}"


@DTYPES
@pytest.mark.parametrize("impl", ["auto", "reference"])
@pytest.mark.parametrize("name", CASES)
def test_compiled(name, impl, dtype):
    """In one graph, with autocast on inside it; the bits of the eager call."""
    op, _, activations, parameters = CASES[name]
    tensors = draw([*activations, *parameters])

    def function(*leaves):
        with torch.autocast("cpu", dtype=dtype):
            return op(*leaves, impl=impl)

    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    for a, b in zip(differentiated(compiled, tensors), differentiated(function, tensors), strict=True):
        assert a.dtype == b.dtype
        torch.testing.assert_close(a, b)
    torch._dynamo.reset()


# --- numbers that lower precision does not have -------------------------------------------------------------------


def _masked():
    """A masked row, a masked column, and masked elements."""
    (x,) = draw([(1, 1, 6, 7)])
    x[0, 0, 2], x[0, 0, :, 3], x[0, 0, 4, 5] = -1e9, -1e9, -1e9
    return x


@DTYPES
@IMPLS
@pytest.mark.parametrize("mask", [-1e4, -1e9, torch.finfo(torch.float32).min / 4])
def test_dual_softmax_of_masked_similarities(impl, dtype, mask):
    x = _masked()
    x = torch.where(x == -1e9, mask, x)
    with torch.autocast("cpu", dtype=dtype):
        actual = differentiated(DualSoftmax(impl=impl), [x])
        expected = differentiated(lambda x: x.softmax(3) * x.softmax(2), [x])
    for a, b in zip(actual, expected, strict=True):
        assert a.dtype == torch.float32
        assert bool(a.isfinite().all())
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)


@DTYPES
@IMPLS
def test_dual_softmax_tells_close_logits_apart(impl, dtype):
    x = torch.tensor([[50.0, 50.1], [0.0, 0.0]])[None, None]
    with torch.autocast("cpu", dtype=dtype):
        out = row_col_softmax(x, impl=impl)
    expected = (x.double().softmax(3) * x.double().softmax(2)).float()
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-30)
    assert float(out[0, 0, 0, 1]) > 1.09 * float(out[0, 0, 0, 0])


@DTYPES
@IMPLS
def test_weights_of_large_logits(impl, dtype):
    """Logits that are products of an activation in lower precision and a weight in float32."""
    x, row, col = draw([(2, 1, 4, 5), (2, 1, 4, 5), (2, 1, 4, 5)])
    x, row, col = x.to(dtype), 40 * row, 40 * col
    with torch.autocast("cpu", dtype=dtype):
        for op, plain in ((row_col_softmax, _weighted), (CASES["elementwise_attention"][0], _elementwise)):
            torch.testing.assert_close(op(x, row, col, impl=impl), plain(x, row, col), rtol=1e-4, atol=1e-5)


@DTYPES
@IMPLS
def test_layer_biases_keep_their_precision(impl, dtype):
    values = [torch.full((1, 2, 3), float(i)) for i in range(2)]
    query, keys = torch.zeros(1, 1, 4), [torch.zeros(1, 1, 4)] * 2
    for bias in ([[-1e9], [-1e9]], [[0.0], [-1e9]], [[50.0], [50.1]]):
        bias = torch.tensor(bias)
        with torch.autocast("cpu", dtype=dtype):
            out = layer_attention(query, keys, values, bias=bias, impl=impl)
        expected = bias.double().softmax(0)[1]
        torch.testing.assert_close(out, expected.to(out).expand_as(out), rtol=2e-3, atol=2e-3)


@IMPLS
def test_squeeze_excite_of_maps_beyond_float16(impl):
    x, w1, b1, w2, b2 = draw([(2, 8, 4, 5), (4, 8), (4,), (8, 4), (8,)])
    x = 1e5 * x.abs()
    with torch.autocast("cpu", dtype=torch.float16):
        out = squeeze_excite(x, w1, b1, w2, b2, impl=impl)
    assert out.dtype == torch.float32
    torch.testing.assert_close(out, squeeze_excite(x, w1, b1, w2, b2, impl="reference"))


@IMPLS
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["float16", "bfloat16"])
@pytest.mark.parametrize("mask", [-1e4, -1e9, float("-inf")])
def test_masked_queries_of_attention_are_as_in_scaled_dot_product_attention(impl, dtype, mask):
    """A mask that the lower precision does not have becomes -inf there, and its queries zeros; PyTorch's rule."""
    query, key, value, bias_h, bias_w = draw([(1, 1, 3, 4, 8)] * 3 + [(1, 1, 3, 4, 3), (1, 1, 3, 4, 4)])
    bias_h[0, 0, 0, 0, 1], bias_w[0, 0, 2, 1, :2] = mask, mask
    if mask < -1e4:  # the sum of -1e4 and another term is a different number in lower precision
        bias_h[0, 0, 1, 2] = mask
    with torch.autocast("cpu", dtype=dtype):
        out = decomposed_bias_attention(query, key, value, bias_h, bias_w, impl=impl)
        expected = _sdpa(query, key, value, bias_h, bias_w)
    assert out.dtype == expected.dtype == dtype
    assert bool(expected.isfinite().all())
    torch.testing.assert_close(out, expected, rtol=0.03, atol=0.03)


def test_float64_is_left_alone():
    (x,) = draw([(1, 2, 3, 4)])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert row_col_softmax(x.double(), impl="reference").dtype == torch.float64


def test_softmaxes_on_gpus_are_in_float32():
    """There PyTorch's autocast has softmax on its float32 list, for whatever comes in; on the CPU it has not."""
    with FakeTensorMode():
        x, weight = torch.empty(2, dtype=torch.float16, device="cuda"), torch.empty(2, device="cuda")
        double = weight.double()
        assert dispatch.autocast_softmax(x)[0] is x
        torch.set_autocast_enabled("cuda", True)
        try:
            assert [tensor.dtype for tensor in dispatch.autocast_softmax(x, weight, double)] == [
                torch.float32,
                torch.float32,
                torch.float64,
            ]
            assert dispatch.autocast(weight)[0].dtype == torch.float16
        finally:
            torch.set_autocast_enabled("cuda", False)
