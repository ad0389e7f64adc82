"""``torch.vmap`` of every op equals a loop: whatever is mapped, nested, with gradients for each call."""

import warnings

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from fused_attn import create_model, integrations, modules, ops
from fused_attn.ops import SPECS
from fused_attn.ops._floor.declarations import differentiable, with_tensors
from fused_attn.ops.elementwise_attention import elementwise_attention
from fused_attn.ops.rel_attention_2d import rel_attention_2d

CASES = [
    pytest.param(spec, sample, id=f"{spec.name}: {sample.name}")
    for spec in SPECS
    for sample in spec.samples
    if sample.small and not sample.inputs(torch.float32).get("dropout_p")
]
#: Inputs that all samples of a batch share: mapped alone, and left alone.
SHARED = {
    "rel_h", "rel_w", "bias_table", "weight_row", "weight_col", "bias", "norm_weight", "fc1_weight", "fc1_bias",
    "fc2_weight", "fc2_bias",
}  # fmt: skip


@pytest.fixture(autouse=True)
def no_slow_fallback():
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*performance drop.*")
        yield


def _call(spec, sample):
    """The op as a function of its tensors by name, and them; without running statistics, which vmap cannot update."""
    call = sample.inputs(torch.float32)
    if spec.name == "elementwise_attention" and call.get("training", True):
        call |= {"running_mean": None, "running_var": None}
    tensors = {name: tensor for name, tensor in differentiable(call).items() if not name.startswith("running_")}
    return lambda given: spec.function(**with_tensors(call, given), impl="cpu"), tensors


def _stacked(tensors, names):
    return {
        name: torch.stack([tensor + 0.25 * i * torch.randn_like(tensor) for i in range(3)]) if name in names else tensor
        for name, tensor in tensors.items()
    }


def _of(i, tensors, names):
    return {name: tensor[i] if name in names else tensor for name, tensor in tensors.items()}


def _subsets(spec, tensors):
    query = {"query"} if spec.name == "attention_residual" else set()  # one for all tokens
    shared = {name for name in tensors if name in SHARED | query}
    first = next(iter(tensors))
    return [names for names in ({*tensors}, {first}, shared, {*tensors} - shared) if names]


@pytest.mark.parametrize(("spec", "sample"), CASES)
def test_it_is_a_loop(spec, sample):
    torch.manual_seed(0)
    function, tensors = _call(spec, sample)

    def loss(given):
        return function(given).sin().sum()

    for names in _subsets(spec, tensors):
        mapped = _stacked(tensors, names)
        dims = ({name: 0 if name in names else None for name in tensors},)
        of_each = [_of(i, mapped, names) for i in range(3)]
        torch.testing.assert_close(
            torch.vmap(function, dims)(mapped), torch.stack([*map(function, of_each)]), rtol=1e-5, atol=1e-6
        )
        grads = torch.vmap(torch.func.grad(loss), dims)(mapped)
        expected = [torch.func.grad(loss)(given) for given in of_each]
        for name in tensors:
            wanted = torch.stack([grad[name] for grad in expected])
            scale = wanted.abs().max().item()
            torch.testing.assert_close(grads[name], wanted, rtol=1e-4, atol=1e-5 * scale)


class _Counted(TorchDispatchMode):
    """The names of the package's operators, as they run on ordinary tensors."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        if operator.namespace == "fused_attn":
            self.names.append(operator._opname)
        return operator(*args, **(kwargs or {}))


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.name)
def test_mapped_calls_are_one(spec):
    """Once forward and once backward; but weights that a batch shares have one gradient for each call."""
    sample = next(param.values[1] for param in CASES if param.values[0] is spec)
    function, tensors = _call(spec, sample)
    mapped = _stacked(tensors, {*tensors})
    shared = {"squeeze_excite": 3, "attention_residual": 3}.get(spec.name, 1)
    with _Counted() as forward:
        torch.vmap(function)(mapped)
    assert len(forward.names) == shared
    with _Counted() as both:
        torch.vmap(torch.func.grad(lambda given: function(given).sum()))(mapped)
    assert len(both.names) == 2 * shared


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.name)
def test_other_dimensions_and_nesting(spec):
    sample = next(param.values[1] for param in CASES if param.values[0] is spec)
    function, tensors = _call(spec, sample)
    mapped = _stacked(tensors, {*tensors})
    expected = torch.vmap(function)(mapped)
    last = {name: tensor.movedim(0, -1) for name, tensor in mapped.items()}
    torch.testing.assert_close(torch.vmap(function, -1, 1)(last), expected.movedim(0, 1))
    first = next(iter(tensors))
    dims = ({name: None if name == first else 0 for name in tensors},)
    twice = {**mapped, first: torch.stack((mapped[first][0], mapped[first][1]))}
    outer = ({name: 0 if name == first else None for name in tensors},)
    nested = torch.vmap(torch.vmap(function, dims), outer)(twice)
    loop = [
        torch.stack([function({**_of(i, mapped, {*tensors}), first: value}) for i in range(3)])
        for value in twice[first]
    ]
    torch.testing.assert_close(nested, torch.stack(loop), rtol=1e-5, atol=1e-6)


def test_the_backward_pass_of_mapped_calls():
    """``vmap`` outside, the ordinary backward pass behind it: gradients of what was not mapped add up."""
    torch.manual_seed(0)
    query, key, value = (torch.randn(2, 2, 2, 3, 3, 4, requires_grad=True) for _ in range(3))
    table = torch.randn(5, 4, requires_grad=True)
    out = torch.vmap(lambda *qkv: rel_attention_2d(*qkv, table, None, impl="cpu"))(query, key, value)
    weights = torch.randn_like(out)
    grads = torch.autograd.grad((out * weights).sum(), (query, key, value, table))
    flat = rel_attention_2d(query.flatten(0, 1), key.flatten(0, 1), value.flatten(0, 1), table, None, impl="cpu")
    expected = torch.autograd.grad((flat * weights.flatten(0, 1)).sum(), (query, key, value, table))
    torch.testing.assert_close(grads, expected)


TABLE, QUERY, EXCITE = torch.randn(2, 5, 5), torch.randn(4), torch.randn(2, 4)


def _of_one_image():
    """Calls of a batch of one, of which a mapped dimension is a view where nothing is mapped."""
    draw = torch.randn
    query, keys, maps = draw(1, 2, 3), [draw(1, 2, 3) for _ in range(2)], [draw(1, 4, 2, 2) for _ in range(2)]
    values, weights = [draw(1, 5, 4) for _ in range(2)], [draw(2, 2, 3, 4) for _ in range(2)]
    yield lambda x: ops.rel_attention_2d(x, x, x, impl="cpu"), draw(1, 1, 3, 3, 4)
    yield lambda x: ops.bias_attention_2d(x, x, x, TABLE, impl="cpu"), draw(1, 2, 3, 3, 4)
    yield lambda x: ops.row_col_softmax(x, impl="cpu"), draw(1, 2, 3, 4)
    yield lambda x: ops.row_col_softmax(x, *weights, impl="cpu"), draw(1, 2, 3, 4)
    yield lambda x: ops.elementwise_attention(x, *weights, None, None, training=True, impl="cpu"), draw(1, 2, 3, 4)
    yield lambda x: ops.layer_attention(x, keys, maps, impl="cpu"), query
    yield lambda x: ops.weighted_layer_sum(x, maps, impl="cpu"), draw(1, 2, 2)
    yield lambda x: ops.attention_residual([x, *values], QUERY, impl="cpu"), draw(1, 5, 4)
    yield lambda x: ops.squeeze_excite(x, EXCITE, None, EXCITE.T, None, impl="cpu"), draw(1, 4, 3, 3)


@pytest.mark.parametrize("inside", [True, False])
def test_a_mapped_pullback_of_what_is_not_mapped(inside):
    torch.manual_seed(0)
    for function, x in _of_one_image():
        x.requires_grad_(not inside)
        out, pull = torch.func.vjp(function, x) if inside else (function(x), None)
        pull = pull or (lambda cotangent, out=out, x=x: torch.autograd.grad(out, x, cotangent, retain_graph=True))
        cotangents = torch.randn(3, *out.shape)
        (grads,) = torch.vmap(pull)(cotangents)
        expected = torch.stack([pull(cotangent)[0] for cotangent in cotangents])
        torch.testing.assert_close(grads, expected, rtol=1e-4, atol=1e-5)


def test_dropout_is_that_of_the_generator():
    query = torch.randn(3, 2, 2, 4, 4, 8)

    def attend(q):
        return rel_attention_2d(q, q, q, None, None, dropout_p=0.5, impl="cpu")

    with pytest.raises(RuntimeError, match="randomness"):
        torch.vmap(attend)(query)
    same = query[:1].expand(3, *query.shape[1:])
    torch.manual_seed(0)
    one, two, three = torch.vmap(attend, randomness="same")(same)
    assert torch.equal(one, two)
    assert torch.equal(one, three)
    one, two, three = torch.vmap(attend, randomness="different")(same)
    assert not torch.equal(one, two)
    assert not torch.equal(two, three)


def test_running_statistics_that_are_not_mapped():
    x, weight = torch.randn(2, 2, 3, 4, 4), torch.randn(2, 3, 4, 4)
    mean, var = torch.zeros(6), torch.ones(6)

    def attend(x, mean, var):
        return elementwise_attention(x, weight, weight, mean, var, training=True, impl="cpu")

    with pytest.raises(RuntimeError, match="cannot update running_mean and running_var"):
        torch.vmap(attend, (0, None, None))(x, mean, var)
    assert torch.equal(mean, torch.zeros(6))
    means, variances = mean.repeat(2, 1), var.repeat(2, 1)
    out = torch.vmap(attend)(x, means, variances)
    for i in range(2):
        mean, var = torch.zeros(6), torch.ones(6)
        torch.testing.assert_close(out[i], attend(x[i], mean, var))
        torch.testing.assert_close((means[i], variances[i]), (mean, var))


@pytest.mark.parametrize(("name", "options"), [("aa_wrn_10_1", {"attention_blocks": "all"}), ("se_resnet34", {})])
def test_gradients_per_sample_of_a_network(name, options):
    torch.manual_seed(0)
    network = create_model(name, num_classes=4, **options).eval()
    parameters = {key: value.detach() for key, value in network.named_parameters()}
    x, labels = torch.randn(3, 3, 16, 16), torch.tensor([0, 1, 2])

    def loss(parameters, image, label):
        logits = torch.func.functional_call(network, parameters, (image[None],))
        return nn.functional.cross_entropy(logits, label[None])

    grads = torch.vmap(torch.func.grad(loss), (None, 0, 0))(parameters, x, labels)
    expected = [torch.func.grad(loss)(parameters, image, label) for image, label in zip(x, labels, strict=True)]
    for key in parameters:
        wanted = torch.stack([grad[key] for grad in expected])
        assert (grads[key] - wanted).abs().max() <= 1e-4 * wanted.abs().max() + 1e-8, key


def _network_without_batch_norms():
    """Batch norms mix the samples."""
    from opacus.validators import ModuleValidator

    return ModuleValidator.fix(create_model("aa_wrn_10_1", num_classes=4, attention_blocks="all"))


class _Padded(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention, self.head = modules.RelPosAttention1d(4, 8, 8, 2, 9), nn.Linear(8, 3)

    def forward(self, x, padding):
        return self.head(self.attention(x, padding).mean(dim=2))


class _Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.mrla, self.head = nn.Conv2d(3, 8, 1), modules.MRLALight(8, dim_per_head=4), nn.Linear(8, 3)

    def forward(self, x):
        return self.head(self.mrla(self.conv(x), x[:, :1].expand(-1, 8, -1, -1)).mean(dim=(2, 3)))


@pytest.mark.filterwarnings("ignore:Full backward hook")
@pytest.mark.parametrize("make", [_network_without_batch_norms, _Padded, _Recurrent])
def test_opacus(host_packages, make):
    """Its GradSampleModule takes the modules: gradients per sample as a loop has them."""
    opacus = pytest.importorskip("opacus", reason="the package opacus is not installed")
    integrations.opacus.register()
    torch.manual_seed(0)
    network, labels = make(), torch.tensor([0, 1, 2])
    inputs = [torch.randn(3, 4, 9), torch.arange(9) > torch.tensor([[4], [9], [6]])]
    if make is not _Padded:
        inputs = [torch.randn(3, 3, 16, 16)]
    parameters = dict(network.named_parameters())
    expected = [
        torch.autograd.grad(
            nn.functional.cross_entropy(network(*(x[i : i + 1] for x in inputs)), labels[i : i + 1]),
            [*parameters.values()],
        )
        for i in range(3)
    ]
    nn.functional.cross_entropy(opacus.GradSampleModule(network)(*inputs), labels).backward()
    for (key, parameter), *grads in zip(parameters.items(), *expected, strict=True):
        wanted = torch.stack(grads)
        assert (parameter.grad_sample - wanted).abs().max() <= 1e-3 * wanted.abs().max() + 1e-6, key


def test_nested_pullbacks_of_one_image():
    """What forward saved is in the layout that kernels rely on, whatever dimensions were mapped around it."""
    torch.manual_seed(0)
    for function, x in _of_one_image():
        points = torch.stack([x + 0.1 * i * torch.randn_like(x) for i in range(2)])

        def pulled(point, function=function):
            out, pull = torch.func.vjp(function, point)
            cotangents = torch.linspace(-1, 1, 3).view(3, *(1 for _ in out.shape)) * (1 + out.detach())
            return torch.vmap(pull)(cotangents)[0]

        twice = torch.stack((points, 0.5 * points))
        expected = torch.stack([pulled(point) for point in twice.flatten(0, 1)]).unflatten(0, (2, 2))
        for found in (
            torch.vmap(torch.vmap(pulled))(twice),
            torch.vmap(torch.vmap(pulled, 1), 1)(twice.movedim((0, 1), (1, 2))),
        ):
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_mapped_segments():
    torch.manual_seed(0)
    query = torch.randn(3, 2, 2, 4, 4, 8)
    for sets in (1, 2):
        segments = torch.randint(-1, 2, (3, sets, 4, 4), dtype=torch.int32)

        def attend(query, segments):
            return ops.rel_attention_2d(query, query, query, query_segments=segments, key_segments=segments, impl="cpu")

        for dims in ((0, 0), (0, None), (None, 0)):
            parts = [each if dim == 0 else each[0] for each, dim in zip((query, segments), dims, strict=True)]
            calls = [[each[i] if dim == 0 else each for each, dim in zip(parts, dims, strict=True)] for i in range(3)]
            loop = [attend(*call) for call in calls]
            torch.testing.assert_close(torch.vmap(attend, dims)(*parts), torch.stack(loop))
