"""Derivatives of gradients, and tangents: in blocks, of bfloat16, of third order, through a LayerCache."""

import pytest
import torch
import transforms
from torch.utils._python_dispatch import TorchDispatchMode

from fused_attn.ops import SPECS
from fused_attn.ops._floor.declarations import differentiable, with_tensors
from fused_attn.ops.layer_attention import LayerCache, layer_attention
from fused_attn.ops.rel_attention_2d import op as rel_op
from fused_attn.ops.rel_attention_2d import rel_attention_2d
from fused_attn.ops.squeeze_excite import squeeze_excite

IN_BLOCKS = ("rel_attention_2d", "decomposed_bias_attention", "bias_attention_2d")
CASES = [
    pytest.param(spec, sample, id=f"{spec.name}: {sample.name}")
    for spec in SPECS
    for sample in spec.samples
    if sample.small and not sample.inputs(torch.float32).get("dropout_p")
]


WAYS = ["torch.func.jvp", "double backward", "jvp of grad"]


@pytest.mark.parametrize("name", WAYS)
@pytest.mark.parametrize(("spec", "sample"), CASES)
def test_every_small_sample(spec, sample, name):
    """To 1e-5 of the largest: a second derivative takes on the errors of the first, which met the bar."""
    found = transforms.TRANSFORMS[name](*transforms.call_of(spec, "cpu", sample, torch.float32, 0))
    expected = transforms.TRANSFORMS[name](*transforms.call_of(spec, "reference", sample, torch.float64, 0))
    for key, tensor in expected.items():
        torch.testing.assert_close(found[key].double(), tensor, rtol=0, atol=1e-5 * tensor.abs().max().item() + 1e-7)


@pytest.mark.parametrize("name", WAYS)
@pytest.mark.parametrize(("spec", "sample"), [case for case in CASES if case.values[0].name in IN_BLOCKS])
def test_blocks_make_up_the_whole(spec, sample, name, monkeypatch):
    function, values = transforms.call_of(spec, "cpu", sample, torch.float32, 0)
    whole = transforms.TRANSFORMS[name](function, values)
    monkeypatch.setattr(rel_op, "_BLOCK", 1)  # one row of queries at a time
    for key, tensor in transforms.TRANSFORMS[name](function, values).items():
        torch.testing.assert_close(tensor, whole[key], rtol=0, atol=1e-5 * whole[key].abs().max().item())


def test_blocks_are_rows_of_queries(monkeypatch):
    monkeypatch.setattr(rel_op, "_BLOCK", 1)
    spec = next(spec for spec in SPECS if spec.name == "rel_attention_2d")
    call = spec.samples[0].inputs(torch.float32)
    values = {**call, "row_term": call["rel_h"], "bias_table": None, "dropout_p": 0.0, "key_minus_query": False}
    values["col_term"] = call["rel_w"]
    blocks = rel_op._query_rows(values)
    assert len(blocks) == call["query"].shape[2] > 1
    assert all(stop - start == 1 for _, start, stop in (block["query"] for block in blocks))


class _Largest(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        result = operator(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.untyped_storage().nbytes() // tensor.element_size())
        return result


@pytest.mark.parametrize("way", ["double backward", "jvp", "jvp of grad"])
def test_no_map_of_all_pairs(way, monkeypatch):
    monkeypatch.setattr(rel_op, "_BLOCK", 2**16)
    queries = 24 * 24
    tensors = *(torch.randn(1, 2, 24, 24, 4) for _ in range(3)), torch.randn(47, 4), torch.randn(47, 4)

    def attend(*args):
        return rel_attention_2d(*args, impl="cpu").square().sum()

    with _Largest() as seen:
        if way == "double backward":
            leaves = [tensor.requires_grad_() for tensor in tensors]
            grads = torch.autograd.grad(attend(*leaves), leaves, create_graph=True)
            sum(grad.square().sum() for grad in grads).backward()
        elif way == "jvp":
            torch.func.jvp(attend, tensors, tensors)
        else:
            torch.func.jvp(torch.func.grad(attend), tensors, tensors)
    assert 0 < seen.elements < 2 * queries * queries / 4


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gradient_penalty_in_half(dtype):
    spec = next(spec for spec in SPECS if spec.name == "rel_attention_2d")
    call = {**spec.samples[0].inputs(torch.float32), "impl": "cpu"}

    def penalty(dtype, impl):
        leaves = {name: tensor.detach().to(dtype).requires_grad_() for name, tensor in differentiable(call).items()}
        out = spec.function(**{**with_tensors(call, leaves), "impl": impl})
        grads = torch.autograd.grad(out.square().sum(), [*leaves.values()], create_graph=True)
        return torch.autograd.grad(sum(grad.float().square().sum() for grad in grads), [*leaves.values()])

    for grad, expected in zip(penalty(dtype, "cpu"), penalty(torch.float64, "reference"), strict=True):
        assert grad.dtype == dtype
        error = (grad.double() - expected).abs().max() / expected.abs().max()
        assert error < 16 * torch.finfo(dtype).eps


def test_one_tensor_as_several_arguments():
    x = torch.randn(1, 2, 3, 3, 4, dtype=torch.float32, requires_grad=True)

    def penalty(x, impl):
        (grad,) = torch.autograd.grad(
            rel_attention_2d(x, x, x, None, None, impl=impl).sin().sum(), x, create_graph=True
        )
        return torch.autograd.grad(grad.square().sum(), x)[0]

    expected = penalty(x.detach().double().requires_grad_(), "reference")
    torch.testing.assert_close(penalty(x, "cpu").double(), expected, rtol=1e-4, atol=1e-4)


def test_dropout():
    """The weights that were dropped are dropped in the second derivative."""
    tensors = [torch.randn(2, 2, 3, 4, 4) for _ in range(3)] + [torch.randn(5, 4), torch.randn(7, 4)]

    def penalty(dtype, impl):
        leaves = [tensor.to(dtype).requires_grad_() for tensor in tensors]
        torch.manual_seed(3)
        out = rel_attention_2d(*leaves, dropout_p=0.4, impl=impl)
        grads = torch.autograd.grad(out.square().sum(), leaves, create_graph=True)
        return torch.autograd.grad(sum(grad.square().sum() for grad in grads), leaves)

    for grad, expected in zip(penalty(torch.float32, "cpu"), penalty(torch.float64, "reference"), strict=True):
        torch.testing.assert_close(grad.double(), expected, rtol=0, atol=1e-5 * expected.abs().max().item())


def test_third_order():
    x, w1, w2 = torch.randn(2, 4, 3, 3), torch.randn(2, 4), torch.randn(4, 2)

    def third(x, impl):
        def loss(x):
            return squeeze_excite(x, w1.to(x), None, w2.to(x), None, hidden_activation="silu", impl=impl).sin().sum()

        def norm(x):
            return torch.func.grad(loss)(x).square().sum()

        return torch.func.grad(lambda x: torch.func.grad(norm)(x).sin().sum())(x)

    torch.testing.assert_close(third(x, "cpu").double(), third(x.double(), "reference"), rtol=1e-3, atol=1e-3)


def test_only_what_is_asked_for():
    """A penalty on one gradient; the others are not part of it."""
    query, key, value = (torch.randn(1, 2, 3, 3, 4, requires_grad=True) for _ in range(3))
    out = rel_attention_2d(query, key.detach(), value, None, None, impl="cpu")
    (grad,) = torch.autograd.grad(out.square().sum(), value, create_graph=True)
    results = torch.autograd.grad(grad.square().sum(), (query, value))
    double = [tensor.detach().double().requires_grad_() for tensor in (query, key, value)]
    out = rel_attention_2d(*double, None, None, impl="reference")
    (grad,) = torch.autograd.grad(out.square().sum(), double[2], create_graph=True)
    expected = torch.autograd.grad(grad.square().sum(), (double[0], double[2]))
    torch.testing.assert_close([result.double() for result in results], [*expected], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("activation", ["softmax", "sigmoid"])
def test_through_a_layer_cache(activation):
    torch.manual_seed(0)
    query, *keys = torch.randn(4, 2, 2, 3)
    values = torch.randn(3, 2, 4, 2, 2)
    bias = torch.randn(3, 2)

    def penalty(cached, dtype, impl):
        leaves = [tensor.to(dtype).requires_grad_() for tensor in (query, *keys, *values, bias)]
        q, ks, vs, b = leaves[0], leaves[1:4], leaves[4:7], leaves[7]
        cache, total = LayerCache(), 0
        for layer, (key, value) in enumerate(zip(ks, vs, strict=True), start=1):
            options = {"bias": b[:layer], "activation": activation, "impl": impl}
            if cached:
                cache.append(key, value)
                out = cache.attend(q, **options)
            else:
                out = layer_attention(q, ks[:layer], vs[:layer], **options)
            total = total + out.sin().sum()
        grads = torch.autograd.grad(total, leaves, create_graph=True)
        return grads, torch.autograd.grad(sum(grad.square().sum() for grad in grads), leaves)

    for found, expected in zip(
        penalty(True, torch.float32, "cpu"), penalty(False, torch.float64, "reference"), strict=True
    ):
        for grad, right in zip(found, expected, strict=True):
            torch.testing.assert_close(grad.double(), right, rtol=1e-4, atol=1e-4)


def _fresh(seed=0):
    """A call of a signature of its own."""
    size = 2 + seed
    query = torch.randn(1, 1, size, 3, 4, requires_grad=True)
    return query, rel_attention_2d(query, query, query, impl="cpu")


def test_a_plain_graph_in_forward_mode():
    """The gradient's tangent is that of the cotangent."""
    query, out = _fresh(5)
    cotangent, direction = torch.randn_like(out), torch.randn_like(out)
    (expected,) = torch.autograd.grad(out, query, direction, retain_graph=True)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(cotangent, direction)
        (grad,) = torch.autograd.grad(out, query, dual, retain_graph=True)
        torch.testing.assert_close(torch.autograd.forward_ad.unpack_dual(grad).tangent, expected)

    def pull(cotangent):
        return torch.autograd.grad(out, query, cotangent, retain_graph=True)[0]

    torch.testing.assert_close(torch.func.jvp(pull, (cotangent,), (direction,))[1], expected)


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_a_plain_graph_under_vmap_and_calls_after_it():
    for seed, batched in ((7, False), (8, True)):
        query, out = _fresh(seed)
        cotangents = torch.randn(3, *out.shape)

        def pull(cotangent, query=query, out=out):
            return torch.autograd.grad(out, query, cotangent, retain_graph=True)[0]

        if batched:
            (grads,) = torch.autograd.grad(out, query, cotangents, is_grads_batched=True, retain_graph=True)
        else:
            grads = torch.vmap(pull)(cotangents)
        expected = torch.stack([*map(pull, cotangents)])
        torch.testing.assert_close(grads, expected)
        for _ in range(3):
            query, out = _fresh(seed)
            (grad,) = torch.autograd.grad(out, query, cotangents[0])
            assert torch.isfinite(grad).all()


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.name)
def test_reverse_over_reverse_under_vmap(spec):
    """Pullbacks of gradients, mapped: what ``jacrev`` of ``grad`` and of ``jacrev`` are made of."""

    def curvature(impl, dtype):
        function, values = transforms.call_of(spec, impl, transforms.sample_of(spec), dtype, 0)
        of_first = torch.func.grad(lambda first: function(first, *values[1:]).square().sum())
        _, pull = torch.func.vjp(of_first, values[0])
        cotangents = torch.linspace(-1, 1, 3, dtype=dtype).view(3, *(1 for _ in values[0].shape)) * values[0]
        return torch.vmap(pull)(cotangents)[0]

    expected = curvature("reference", torch.float64)
    atol = 1e-5 * expected.abs().max().item()
    torch.testing.assert_close(curvature("cpu", torch.float32).double(), expected, rtol=0, atol=atol)


def test_autocast_leaves_it_alone():
    """As it does the gradients: inputs have been cast before."""

    def penalty(dtype, impl):
        x = torch.randn(1, 4, 4, 3, generator=torch.Generator().manual_seed(1)).to(dtype).requires_grad_()
        query = x.view(1, 2, 4, 2, 3)
        out = rel_attention_2d(query, query, query, impl=impl)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            (grad,) = torch.autograd.grad(out.square().sum(), x, create_graph=True)
            return torch.autograd.grad(grad.square().sum(), x)[0]

    torch.testing.assert_close(
        penalty(torch.float32, "cpu").double(), penalty(torch.float64, "reference"), rtol=1e-4, atol=1e-4
    )
