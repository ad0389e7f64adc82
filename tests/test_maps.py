"""Weights of attention on request: those that the float64 reference sums its values with, and a model left as it is."""

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from fused_attn import attention_maps, attention_weights, create_model, ops
from fused_attn.integrations import convert
from fused_attn.modules import (
    AttentionAugmentedConv1d,
    AttentionAugmentedConv2d,
    GridAttention2d,
    LayerCache,
    MRLABase,
    RelPosAttention2d,
    SqueezeExcite,
    WindowAttention2d,
)
from fused_attn.ops import SPECS
from fused_attn.ops._floor import recording

GRID = {
    spec.name: spec
    for spec in SPECS
    if spec.name in ("rel_attention_2d", "decomposed_bias_attention", "bias_attention_2d")
}
SAMPLES = [
    pytest.param(name, sample, id=f"{name}, {sample.name}")
    for name, spec in GRID.items()
    for sample in spec.samples
    if sample.small
    or any(word in sample.name for word in ("segments", "padded", "halves", "empty", "prefix", "unequal", "no keys"))
]


def whole_matrix(function, inputs):
    """(B, heads, Hq, Wq, Nk + P): the reference's output where the values are the rows of a unit matrix."""
    batch, heads, height, width = inputs["key"].shape[:4]
    keys, prefix = height * width, inputs["prefix_key"].shape[2] if "prefix_key" in inputs else 0
    unit = torch.eye(keys + prefix, dtype=torch.float64).expand(batch, heads, -1, -1)
    values = {"value": unit[:, :, :keys].unflatten(2, (height, width))}
    if prefix:
        values["prefix_value"] = unit[:, :, keys:]
    return function(**{**inputs, **values, "dropout_p": 0.0, "impl": "reference"})


@pytest.mark.parametrize(("name", "sample"), SAMPLES)
def test_rows_are_those_of_the_reference(name, sample):
    spec = GRID[name]
    torch.manual_seed(0)
    inputs = sample.inputs(torch.float64)
    expected = whole_matrix(spec.function, inputs).flatten(2, 3)
    height, width = inputs["query"].shape[2:4]
    key_grid = inputs["key"].shape[2:4]
    keys = key_grid[0] * key_grid[1]
    queries = sorted({0, height * width // 2, height * width - 1})
    for chosen in (queries, [(q // width, q % width) for q in queries], torch.tensor(queries)):
        weights, prefix = attention_weights(spec.function, queries=chosen, **inputs)
        assert weights.dtype == torch.float64
        torch.testing.assert_close(weights, expected[:, :, queries, :keys].unflatten(-1, key_grid))
        assert (prefix is None) == ("prefix_key" not in inputs)
        if prefix is not None:
            torch.testing.assert_close(prefix, expected[:, :, queries, keys:])
    weights, _ = attention_weights(spec.function, queries="all", **inputs)
    torch.testing.assert_close(weights, expected[..., :keys].unflatten(-1, key_grid))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_weights_of_rounded_inputs_are_float32(dtype):
    inputs = GRID["rel_attention_2d"].samples[0].inputs(dtype)
    weights, _ = attention_weights(ops.rel_attention_2d, queries=[0], **inputs)
    exact = {name: value.double() if isinstance(value, torch.Tensor) else value for name, value in inputs.items()}
    assert weights.dtype == torch.float32
    torch.testing.assert_close(weights.double(), attention_weights(ops.rel_attention_2d, queries=[0], **exact).weights)


def test_autocast_rounds_the_inputs_as_in_the_op():
    inputs = GRID["rel_attention_2d"].samples[0].inputs(torch.float32)
    rounded = {name: value.bfloat16() if isinstance(value, torch.Tensor) else value for name, value in inputs.items()}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        weights = attention_weights(ops.rel_attention_2d, queries=[0], **inputs).weights
    assert torch.equal(weights, attention_weights(ops.rel_attention_2d, queries=[0], **rounded).weights)


def test_weights_are_differentiable():
    query, key = torch.randn(2, 1, 2, 3, 4, 5, dtype=torch.float64, requires_grad=True).unbind()
    table = torch.randn(2, 5, 7, dtype=torch.float64, requires_grad=True)
    prefix = torch.randn(1, 2, 2, 5, dtype=torch.float64, requires_grad=True)

    def rows(*tensors):
        query, key, table, prefix = tensors
        return tuple(
            attention_weights(
                ops.bias_attention_2d, query, key, key, table, prefix_key=prefix, prefix_value=prefix, queries=[(1, 2)]
            )
        )

    inputs = [each.detach().requires_grad_() for each in (query, key, table, prefix)]
    assert torch.autograd.gradcheck(rows, inputs)


def test_memory_is_of_the_rows(monkeypatch):
    """Nothing with a number for every pair is made."""
    query, key, value = torch.randn(3, 1, 1, 64, 64, 4).unbind()
    rel = torch.randn(127, 4)
    largest = []

    class Sizes(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            largest.extend(each.numel() for each in [out] if isinstance(each, torch.Tensor))
            return out

    with Sizes():
        weights, _ = attention_weights(ops.rel_attention_2d, query, key, value, rel, rel, queries=[0, 5])
    assert weights.shape == (1, 1, 2, 64, 64)
    assert max(largest) <= 64 * 64 * 4


def test_sequences():
    query, key, value = torch.randn(3, 2, 2, 9, 5, dtype=torch.float64).unbind()
    table, hidden = torch.randn(17, 5, dtype=torch.float64), torch.arange(9) >= torch.tensor([[9], [4]])
    unit = torch.eye(9, dtype=torch.float64).expand(2, 2, 9, 9)
    expected = ops.rel_attention_1d(query, key, unit, table, key_padding=hidden)
    weights, prefix = attention_weights(
        ops.rel_attention_1d, query, key, value, table, key_padding=hidden, queries=[3, 8]
    )
    torch.testing.assert_close(weights, expected[:, :, [3, 8]])
    assert prefix is None
    with pytest.raises(ValueError, match=r"queries must be from 0 to 8, got \[9\]"):
        attention_weights(ops.rel_attention_1d, query, key, value, table, queries=[9])
    with pytest.raises(ValueError, match=r"queries must have shape \(Q,\) with at least one, got \(1, 2\)"):
        attention_weights(ops.rel_attention_1d, query, key, value, table, queries=[(0, 1)])


@pytest.mark.parametrize("activation", ["softmax", "sigmoid"])
def test_layers(activation):
    """The output of an op whose values are the unit vectors is its weights."""
    query, *keys = torch.randn(4, 2, 3, 5, dtype=torch.float64).unbind()
    values = [torch.eye(3, dtype=torch.float64)[layer].expand(2, 3, 3) for layer in range(3)]
    options = {"bias": torch.randn(3, 3, dtype=torch.float64), "scale": 0.7, "activation": activation}
    weights, _ = attention_weights(ops.layer_attention, query, keys, values, **options)
    torch.testing.assert_close(weights, ops.layer_attention(query, keys, values, impl="reference", **options))


@pytest.mark.parametrize("options", [{}, {"gate": "hardsigmoid", "hidden_activation": "silu"}])
def test_gates(options):
    module = SqueezeExcite(6, 2, result_features=2, **options).double()
    x, result = torch.randn(2, 6, 3, 4, dtype=torch.float64), torch.randn(2, 2, dtype=torch.float64)
    parameters = module.fc1.weight, module.fc1.bias, module.fc2.weight, module.fc2.bias
    weights, _ = attention_weights(ops.squeeze_excite, x, *parameters, result=result, **options)
    torch.testing.assert_close(module(x, result), x * weights[..., None, None])


def rel(**options):
    query, key, value = torch.randn(3, 1, 2, 3, 4, 5).unbind()
    return {"query": query, "key": key, "value": value, **options}


@pytest.mark.parametrize(
    ("queries", "error", "message"),
    [
        (None, ValueError, "queries must be positions, or 'all', for rel_attention_2d, got None"),
        ((1, 2), ValueError, r"got \(1, 2\): \[\(1, 2\)\] is one position, \[1, 2\] are two"),
        ([(1, 4)], ValueError, r"on the grid of queries \(H, W\)=\(3, 4\), .* got \[\[1, 4\]\]"),
        ([-1], ValueError, r"y \* W \+ x from 0 to 11, got \[-1\]"),
        ([12], ValueError, "from 0 to 11"),
        ([], ValueError, r"queries must have shape \(Q, 2\) or \(Q,\) with at least one, got \(0,\)"),
        ([(0, 1, 2)], ValueError, r"queries must have shape .* got \(1, 3\)"),
        (5, ValueError, r"queries must have shape .* got \(\)"),
        ([0.5], TypeError, "queries must be integers, got torch.float32"),
        ([True], TypeError, "queries must be integers, got torch.bool"),
        ({}, TypeError, "queries must be a list or a tensor of positions, got {}"),
        ("every", ValueError, "queries must be positions or 'all', got 'every'"),
    ],
)
def test_queries_that_are_none(queries, error, message):
    with pytest.raises(error, match=message):
        attention_weights(ops.rel_attention_2d, **rel(), queries=queries)


def test_other_arguments_that_do_not_fit():
    with pytest.raises(ValueError, match=r"op must be one of rel_attention_2d, .* got row_col_softmax"):
        attention_weights(ops.row_col_softmax, torch.ones(2, 2))
    with pytest.raises(ValueError, match=r"op must be one of .* got 'rel'"):
        attention_weights("rel", torch.ones(2, 2))
    with pytest.raises(ValueError, match=r"rel_h must have shape"):
        attention_weights(ops.rel_attention_2d, **rel(rel_h=torch.ones(4, 5)), queries=[0])
    with pytest.raises(ValueError, match="rel_h must have the dtype of query"):
        attention_weights(ops.rel_attention_2d, **rel(rel_h=torch.ones(5, 5).double()), queries=[0])
    with pytest.raises(TypeError, match="rel_x"):
        attention_weights(ops.rel_attention_2d, **rel(rel_x=1), queries=[0])
    with pytest.raises(ValueError, match="queries must be None for layer_attention, which has none"):
        attention_weights(
            ops.layer_attention, torch.ones(1, 1, 1), [torch.ones(1, 1, 1)], [torch.ones(1, 1)], queries=[0]
        )


# --- models -----------------------------------------------------------------------------------------------------------


def recorded(model, *inputs, **options):
    """The maps; the outputs with and without are the same bits."""
    with torch.no_grad():
        expected = model(*inputs)
        with attention_maps(model, **options) as maps:
            out = model(*inputs)
        again = model(*inputs)
    assert torch.equal(out, expected)
    assert torch.equal(again, expected)
    assert not recording.LISTENERS
    return maps


def test_a_network_of_several_resolutions():
    model = create_model("aa_wrn_10_1").eval()
    maps = recorded(model, torch.randn(2, 3, 32, 32), points=[(0.0, 1.0), (0.3, 0.5)])
    assert [each.name for each in maps] == [f"stages.{stage}.0.conv1.attention" for stage in range(3)]
    for each, size in zip(maps, (32, 16, 8), strict=True):
        assert each.op == "rel_attention_2d"
        assert each.queries.tolist() == [[0, size - 1], [int(0.3 * size), size // 2]]
        assert each.weights.shape == (2, 8, 2, size, size)
        assert not each.weights.requires_grad
        torch.testing.assert_close(each.weights.sum((-2, -1)), torch.ones(2, 8, 2))


def test_recorded_rows_sum_the_values_of_the_module():
    module = RelPosAttention2d(6, 8, 4, 2, (5, 4), bias=True)
    x = torch.randn(2, 6, 5, 3)
    (each,) = recorded(nn.Sequential(nn.Identity(), module), x, queries=[(4, 1), (0, 0)])
    assert (each.name, each.queries.tolist()) == ("1", [[4, 1], [0, 0]])
    value = module.qkv(x)[:, 16:].unflatten(1, (2, -1))
    out = module.proj(torch.einsum("bhqyx,bhdyx->bhdq", each.weights, value).flatten(1, 2).unsqueeze(-1))
    torch.testing.assert_close(out.squeeze(-1), module(x)[:, :, [4, 0], [1, 0]])


@pytest.mark.parametrize(
    ("module", "grid"),
    [
        (WindowAttention2d(8, 2, 4), (8, 12)),
        (WindowAttention2d(8, 2, (4, 3), (1, 2)), (8, 9)),
        (WindowAttention2d(8, 2, 4, 2), (3, 8)),
        (WindowAttention2d(8, 2, 9, 2), (5, 6)),
        (GridAttention2d(8, 2, (2, 3)), (6, 9)),
    ],
    ids=["windows", "shifted", "one row of windows", "one window", "grid"],
)
def test_windows_give_rows_of_their_map(module, grid):
    """The rows sum the values of the whole map to the module's output: no wrong key, no key left out."""
    x = torch.randn(3, 8, *grid)
    queries = [0, grid[0] * grid[1] // 2 + 1, grid[0] * grid[1] - 1]
    (each,) = recorded(module, x, queries=queries)
    assert each.weights.shape == (3, 2, 3, *grid)
    value = module.qkv(x.permute(0, 2, 3, 1))[..., 16:].unflatten(-1, (2, -1))
    out = module.proj(torch.einsum("bhqyx,byxhd->bqhd", each.weights, value).flatten(2))
    torch.testing.assert_close(out, module(x).flatten(2)[:, :, queries].mT)


def test_weights_of_padded_windows_are_left_out():
    module = WindowAttention2d(8, 2, 4, 1)
    (each,) = recorded(module, torch.randn(2, 8, 6, 5), queries=[(5, 4), (0, 0)])
    sums = each.weights.sum((-2, -1))
    assert (sums <= 1.0001).all()
    assert (sums < 0.9999).any()
    positions = module.positions((6, 5))
    assert positions.shape == (4, 4, 4)
    assert sorted(positions[positions >= 0].tolist()) == list(range(30))


def test_layers_and_gates_of_models():
    maps = recorded(create_model("se_resnet34", image_size=32).eval(), torch.randn(1, 3, 32, 32))
    assert {each.op for each in maps} == {"squeeze_excite"}
    assert all(each.queries is None and ((each.weights > 0) & (each.weights < 1)).all() for each in maps)

    class Stage(nn.Module):
        def __init__(self):
            super().__init__()
            self.attentions = nn.ModuleList([MRLABase(32) for _ in range(3)])

        def forward(self, x):
            cache = LayerCache()
            for attention in self.attentions:
                x = x + attention(x, cache)
            return x

    maps = recorded(Stage(), torch.randn(2, 32, 4, 4))
    assert [each.name for each in maps] == ["attentions.0", "attentions.1", "attentions.2"]
    assert [each.weights.shape for each in maps] == [(2, 2, 1), (2, 2, 2), (2, 2, 3)]
    for each in maps:
        torch.testing.assert_close(each.weights.sum(-1), torch.ones(2, 2))


def test_a_gate_whose_layers_must_be_called():
    module = SqueezeExcite(8, 2)
    module.fc1.register_forward_hook(lambda *_: None)
    x = torch.randn(2, 8, 3, 3)
    (each,) = recorded(module, x)
    assert each.op == "weighted_layer_sum"
    torch.testing.assert_close(each.weights[..., 0], module.scales(x))


def test_sequences_of_a_model():
    module = AttentionAugmentedConv1d(4, 10, 3, 1, 11, heads=2)
    (each,) = recorded(module, torch.randn(2, 4, 11), points=[(0.0, 0.99)])
    assert (each.name, each.op, each.queries.tolist()) == ("attention", "rel_attention_1d", [[0, 10]])
    assert each.weights.shape == (2, 2, 1, 11)


def test_training_records_once_and_leaves_gradients_and_dropout_alone():
    module = AttentionAugmentedConv2d(4, 16, 3, 1, (4, 4), heads=2, dropout_p=0.4)

    def step(record):
        torch.manual_seed(1)
        x = torch.ones(2, 4, 4, 4, requires_grad=True)
        maps = []
        if record:
            with attention_maps(module) as maps:
                checkpoint(module, x, use_reentrant=False).square().sum().backward()
        else:
            checkpoint(module, x, use_reentrant=False).square().sum().backward()
        return x.grad, maps

    plain, _ = step(False)
    grad, maps = step(True)
    assert torch.equal(grad, plain)
    assert len(maps) == 1
    torch.testing.assert_close(maps[0].weights.sum((-2, -1)), torch.ones(2, 2, 1))


def test_a_compiled_model():
    """Compiled before and while it is recorded."""
    model = nn.Sequential(WindowAttention2d(8, 2, 4, 2)).eval()
    compiled, x = torch.compile(model, backend="eager"), torch.randn(1, 8, 5, 9)
    with torch.no_grad():
        expected = compiled(x)
        with attention_maps(model, queries=[3]) as maps:
            compiled(x)
            model(x)
        assert torch.equal(compiled(x), expected)
    assert [each.name for each in maps] == ["0", "0"]
    assert torch.equal(maps[0].weights, maps[1].weights)
    torch._dynamo.reset()


def test_a_converted_model(timm):
    """The rows sum the layer's values to what it gave before it was converted."""
    from timm.layers.bottleneck_attn import BottleneckAttn

    model = nn.Sequential(BottleneckAttn(16, dim_out=8, feat_size=(4, 5), num_heads=2)).eval()
    x = torch.randn(2, 16, 4, 5)
    expected = model(x)
    assert convert(model, ops=["rel_attention_2d"]).replaced == 1
    (each,) = recorded(model, x, points=[(0.3, 0.9)])
    assert (each.name, each.op, each.queries.tolist()) == ("0", "rel_attention_2d", [[1, 4]])
    value = model[0].qkv(x)[:, -8:].unflatten(1, (2, -1))
    out = torch.einsum("bhqyx,bhdyx->bhdq", each.weights, value).flatten(1)
    torch.testing.assert_close(out, expected[:, :, 1, 4])


def test_a_windowed_module_called_by_its_method_gives_rows_of_windows():
    module = WindowAttention2d(8, 2, 4)
    with attention_maps(module) as maps:
        module(torch.randn(1, 8, 8, 8))
        module.attend(torch.randn(3, 4, 4, 8))
    assert [tuple(each.weights.shape) for each in maps] == [(1, 2, 1, 8, 8), (3, 2, 1, 4, 4)]


def test_models_that_call_no_op_and_calls_outside_of_the_model():
    assert recorded(nn.Linear(2, 2), torch.ones(1, 2)) == []
    module = RelPosAttention2d(6, 8, 4, 2, (5, 4))
    with attention_maps(nn.Linear(2, 2)) as maps:
        module(torch.ones(1, 6, 5, 4))
    assert maps == []


def test_recording_ends_with_an_error():
    module = WindowAttention2d(8, 2, 4)
    with pytest.raises(ValueError, match=r"^the model: queries must be on the grid of queries \(H, W\)=\(4, 4\)"):
        recorded(module, torch.ones(1, 8, 4, 4), queries=[16])
    assert not recording.LISTENERS
    assert not module._forward_pre_hooks


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"points": []}, ValueError, "points must be at least one pair"),
        ({"points": [(0.5, 1.5)]}, ValueError, "points must be at least one pair .* from 0 to 1, got"),
        ({"points": [(0.5, float("nan"))]}, ValueError, "points must be at least one pair"),
        ({"points": (0.5, 0.5)}, TypeError, "points must be a list of pairs"),
        ({"points": None}, TypeError, "points must be a list of pairs"),
    ],
)
def test_points_that_are_none(options, error, message):
    with pytest.raises(error, match=message), attention_maps(nn.Identity(), **options):
        pass


def test_what_is_no_model():
    with pytest.raises(TypeError, match="model must be a module, got function"), attention_maps(recorded):
        pass


def test_transforms_are_refused():
    module = RelPosAttention2d(6, 8, 4, 2, (5, 4))
    with attention_maps(module), pytest.raises(RuntimeError, match=r"must not be used .* transforms of torch\.func"):
        torch.func.vmap(module)(torch.ones(2, 1, 6, 5, 4))


def test_a_windowed_module_called_by_keywords():
    module = WindowAttention2d(8, 2, 4, 1, resize_tables=True)
    x = torch.randn(1, 8, 8, 8)
    with attention_maps(module, points=[(0.3, 0.9)]) as positional:
        module(x, 3)
    with attention_maps(module, points=[(0.3, 0.9)]) as maps:
        module(window=3, x=x)
    torch.testing.assert_close(maps[0].weights, positional[0].weights)
