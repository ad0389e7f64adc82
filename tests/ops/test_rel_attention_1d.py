"""rel_attention_1d and its modules, against PyTorch's own attention in float64 with the dense bias and mask."""

import itertools

import pytest
import torch
import torch.nn.functional as F

from fused_attn import _extension, rel_attention_1d
from fused_attn.modules import AttentionAugmentedConv1d, RelPosAttention1d

IMPLEMENTATIONS = [
    "reference",
    pytest.param("cpu", marks=pytest.mark.skipif(not _extension.available(), reason=str(_extension.reason()))),
]
implementations = pytest.mark.parametrize("impl", IMPLEMENTATIONS)


def draw(length=7, keys=7, *, batch=4, heads=2, d_k=5, d_v=3, per_head=False, prefix=0):
    generator = torch.Generator().manual_seed(0)
    shapes = {
        "query": (batch, heads, length, d_k),
        "key": (batch, heads, keys, d_k),
        "value": (batch, heads, keys, d_v),
        "rel_table": ((heads,) if per_head else ()) + (length + keys - 1, d_k),
    }
    if prefix:
        shapes |= {"prefix_key": (batch, heads, prefix, d_k), "prefix_value": (batch, heads, prefix, d_v)}
    return {name: torch.randn(shape, generator=generator, dtype=torch.float64) for name, shape in shapes.items()}


def dense(
    query, key, value, rel_table=None, *, scale=None, rel_scale=None, index="key_minus_query", key_padding=None,
    query_segments=None, key_segments=None, prefix_key=None, prefix_value=None,
):  # fmt: skip
    """With a bias and a mask for every pair."""
    batch, heads, length, depth = query.shape
    keys = key.shape[2]
    scale = depth**-0.5 if scale is None else scale
    rel_scale = scale if rel_scale is None else rel_scale
    bias = torch.zeros(batch, heads, length, keys, dtype=query.dtype)
    if rel_table is not None:
        tables = rel_table.expand(heads, *rel_table.shape[-2:])
        places = [
            [k - q + length - 1 if index == "key_minus_query" else q - k + keys - 1 for k in range(keys)]
            for q in range(length)
        ]
        bias = rel_scale * torch.einsum("bhqd,hqkd->bhqk", query, tables[:, torch.tensor(places)])
    hidden = torch.zeros(batch, 1, length, keys, dtype=torch.bool)
    pairs = itertools.product(range(batch), range(length), range(keys))
    for b, q, k in pairs if key_padding is not None or query_segments is not None else ():
        if key_padding is not None and key_padding[b, k]:
            hidden[b, 0, q, k] = True
        if query_segments is not None:
            one, other = (int(each[b % len(each), place]) for each, place in ((query_segments, q), (key_segments, k)))
            hidden[b, 0, q, k] |= one != other or other < 0
    bias = bias.masked_fill(hidden, float("-inf"))
    if prefix_key is not None:
        bias = F.pad(bias, (0, prefix_key.shape[2]))
        key, value = torch.cat((key, prefix_key), 2), torch.cat((value, prefix_value), 2)
    alone = (bias == float("-inf")).all(-1, keepdim=True)
    out = F.scaled_dot_product_attention(query, key, value, bias.masked_fill(alone, 0.0), scale=scale)
    return out.masked_fill(alone, 0.0)


def segments(length, keys, sets):
    queries, of_keys = (
        torch.arange(each, dtype=torch.int32).mul(2).div(each, rounding_mode="floor") for each in (length, keys)
    )
    queries, of_keys = (each.int().repeat(sets, 1) for each in (queries, of_keys))
    of_keys[0, -1] = -1
    return {"query_segments": queries, "key_segments": of_keys}


def padding(batch, keys):
    return torch.arange(keys)[None, :] >= torch.tensor([keys, keys - 2, 1, 0])[:batch, None]


CASES = {
    "one table": {},
    "a table per head": {"draw": {"per_head": True}},
    "more keys": {"draw": {"length": 3, "keys": 11}},
    "more queries, query_minus_key": {"draw": {"length": 11, "keys": 3}, "index": "query_minus_key"},
    "scales": {"scale": 0.3, "rel_scale": 0.8},
    "padding": {"padding": True},
    "segments": {"segments": 2},
    "segments, padding, prefix": {"draw": {"length": 5, "keys": 9, "prefix": 3}, "segments": 2, "padding": True},
    "several tiles": {"draw": {"length": 67, "keys": 70, "batch": 1, "d_k": 16}},
    "one position": {"draw": {"length": 1, "keys": 1}},
}


@implementations
@pytest.mark.parametrize("case", CASES)
def test_outputs_and_gradients(impl, case):
    options = dict(CASES[case])
    inputs = draw(**options.pop("draw", {}))
    length, keys = inputs["query"].shape[2], inputs["key"].shape[2]
    if sets := options.pop("segments", 0):
        options |= segments(length, keys, sets)
    if options.pop("padding", False):
        options["key_padding"] = padding(len(inputs["query"]), keys)
    expected, found = [], []
    for results, function, dtype in ((expected, dense, torch.float64), (found, rel_attention_1d, torch.float32)):
        leaves = {name: tensor.to(dtype).requires_grad_() for name, tensor in inputs.items()}
        out = function(**leaves, **options, **({"impl": impl} if function is rel_attention_1d else {}))
        results += [out, *torch.autograd.grad(out.square().sum(), list(leaves.values()))]
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one.double(), other, rtol=2e-4, atol=2e-5)


@implementations
def test_without_a_table_it_is_plain_attention(impl):
    inputs = {name: tensor.float() for name, tensor in draw().items() if name != "rel_table"}
    torch.testing.assert_close(rel_attention_1d(**inputs, impl=impl), F.scaled_dot_product_attention(**inputs))


def test_the_same_call_twice_takes_the_values_of_each():
    """What is concluded of one call is kept for the next: not the padding."""
    inputs = {name: tensor.float() for name, tensor in draw().items()}
    for hidden in (padding(4, 7), ~padding(4, 7), padding(4, 7)):
        for _ in range(3):
            out = rel_attention_1d(**inputs, key_padding=hidden)
            torch.testing.assert_close(out, dense(**inputs, key_padding=hidden))


def test_dropout_keeps_the_mean_and_can_be_repeated():
    inputs = {name: tensor.float() for name, tensor in draw(40, 40).items()}
    inputs["value"] = torch.ones_like(inputs["value"])
    torch.manual_seed(0)
    out = rel_attention_1d(**inputs, dropout_p=0.3)
    assert out.std() > 0.05
    torch.testing.assert_close(out.mean(), torch.tensor(1.0), rtol=0.05, atol=0.0)
    torch.manual_seed(0)
    assert torch.equal(out, rel_attention_1d(**inputs, dropout_p=0.3))


def test_transforms_and_autocast():
    inputs = {name: tensor.float() for name, tensor in draw().items()}
    out = rel_attention_1d(**inputs)
    each = torch.func.vmap(lambda query: rel_attention_1d(**{**inputs, "query": query}))(
        torch.stack([inputs["query"], -inputs["query"]])
    )
    torch.testing.assert_close(each[0], out)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert rel_attention_1d(**inputs).dtype == torch.bfloat16


BAD = {
    "query of two dimensions": (
        {"query": torch.ones(2, 3)},
        ValueError,
        r"query must have 4 dimensions \(B, heads, Lq, d_k\), got",
    ),
    "value of another length": (
        {"value": torch.ones(4, 2, 6, 3)},
        ValueError,
        "value must have the length of key, Lk=7, got 6",
    ),
    "table of another length": (
        {"rel_table": torch.ones(12, 5)},
        ValueError,
        r"rel_table must have shape \(Lq\+Lk-1, d_k\)=\(13, 5\) or \(heads, .*=\(2, 13, 5\), got \(12, 5\)",
    ),
    "table of another dtype": (
        {"rel_table": torch.ones(13, 5).double()},
        ValueError,
        "rel_table must have the dtype of query",
    ),
    "table that is none": (
        {"rel_table": [1.0]},
        TypeError,
        "rel_table must be a tensor, got list",
    ),
    "padding of numbers": (
        {"key_padding": torch.ones(4, 7)},
        TypeError,
        "key_padding must have dtype torch.bool, got",
    ),
    "padding of one sequence": (
        {"key_padding": torch.ones(1, 7, dtype=torch.bool)},
        ValueError,
        r"key_padding must have shape \(B, L\)=\(4, 7\), got",
    ),
    "padding as a list": (
        {"key_padding": [True]},
        TypeError,
        "key_padding must be a tensor, got list",
    ),
    "one segments": (
        {"key_segments": torch.zeros(1, 7).int()},
        ValueError,
        "query_segments must be given where key_segments is",
    ),
    "segments of a grid": (
        {"query_segments": torch.zeros(1, 1, 7).int(), "key_segments": torch.zeros(1, 7).int()},
        ValueError,
        r"query_segments must have shape \(S, Lq\)=\(S, 7\), got \(1, 1, 7\)",
    ),
    "segments that do not divide": (
        {"query_segments": torch.zeros(3, 7).int(), "key_segments": torch.zeros(3, 7).int()},
        ValueError,
        "divides the batch of 4",
    ),
    "segments as a list": (
        {"query_segments": [0], "key_segments": [0]},
        TypeError,
        "query_segments must be a tensor, got list",
    ),
    "key of another depth": (
        {"key": torch.ones(4, 2, 7, 6)},
        ValueError,
        "key must have the depth of query, d_k=5, got 6",
    ),
    "index": (
        {"index": "q-k"},
        ValueError,
        "index must be one of 'key_minus_query', 'query_minus_key', got 'q-k'",
    ),
    "impl": (
        {"impl": "cuda"},
        ValueError,
        "rel_attention_1d: impl must be one of",
    ),
    "prefix of one": (
        {"prefix_key": torch.ones(4, 2, 1, 5)},
        ValueError,
        "prefix_value must be given where prefix_key is",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_what_does_not_fit_is_refused(name):
    changes, error, message = BAD[name]
    inputs = {key: tensor.float() for key, tensor in draw().items()}
    with pytest.raises(error, match=message):
        rel_attention_1d(**{**inputs, **changes})


# --- modules ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [9, 6, 1])
@pytest.mark.parametrize(
    "options", [{}, {"per_head_tables": True, "bias": True}, {"relative": False}, {"out_channels": 3}]
)
def test_module_is_attention_with_the_tables_central_rows(options, length):
    module = RelPosAttention1d(6, 8, 4, 2, 9, dtype=torch.float64, **options)
    x, hidden = torch.randn(3, 6, length, dtype=torch.float64), torch.zeros(3, length, dtype=torch.bool)
    hidden[1, length // 2 :] = True
    query, key, value = (each.unflatten(1, (2, -1)).mT for each in module.qkv(x).split((8, 8, 4), 1))
    table = None if module.rel_table is None else module.rel_table[..., 9 - length : 8 + length, :]
    expected = module.proj(dense(query, key, value, table, key_padding=hidden).mT.flatten(1, 2))
    torch.testing.assert_close(module(x, hidden), expected)


def test_padding_changes_nothing():
    """A sequence gives the same alone and padded in a batch."""
    module = RelPosAttention1d(6, 8, 4, 2, 9)
    x = torch.randn(2, 6, 9)
    hidden = torch.arange(9)[None, :] >= torch.tensor([[9], [5]])
    torch.testing.assert_close(module(x, hidden)[1:, :, :5], module(x[1:, :, :5]))


@pytest.mark.parametrize("stride", [1, 2, 3])
def test_augmented_convolution(stride):
    module = AttentionAugmentedConv1d(4, 10, 3, stride, 11, heads=2, value_ratio=0.4)
    x = torch.randn(2, 4, 11)
    out = module(x)
    assert out.shape == (2, 10, -(-11 // stride))
    torch.testing.assert_close(out[:, :6], module.conv(x))
    torch.testing.assert_close(out[:, 6:], module.attention(module.pool(x)))
    hidden = torch.zeros(2, out.shape[2], dtype=torch.bool)
    hidden[:, -1] = True
    assert not torch.allclose(module(x, hidden)[:, 6:], out[:, 6:])
    module(x).sum().backward()
    assert all(parameter.grad is not None for parameter in module.parameters())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: RelPosAttention1d(6, 7, 4, 2, 9), "key_channels must be a positive multiple of heads=2, got 7"),
        (lambda: RelPosAttention1d(6, 8, 4, 2, 0), "length must be at least 1, got 0"),
        (lambda: RelPosAttention1d(6, 8, 4, 2, 9)(torch.ones(1, 6, 10)), "x must have a length of at most 9"),
        (lambda: RelPosAttention1d(6, 8, 4, 2, 9)(torch.ones(1, 6, 0)), "x must have a length of at least 1"),
        (lambda: RelPosAttention1d(6, 8, 4, 2, 9)(torch.ones(6, 9)), r"x must have shape \(B, 6, L\), got \(6, 9\)"),
        (
            lambda: RelPosAttention1d(6, 8, 4, 2, 9)(torch.ones(2, 6, 9), torch.ones(2, 8, dtype=torch.bool)),
            r"padding must have shape \(B, L\)=\(2, 9\), got \(2, 8\)",
        ),
        (lambda: AttentionAugmentedConv1d(4, 8, 2, 1, 9, heads=2), "kernel_size must be a positive odd number, got 2"),
        (lambda: AttentionAugmentedConv1d(4, 2, 3, 1, 9, heads=2), "must leave some of out_channels=2"),
    ],
)
def test_arguments_of_modules(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.filterwarnings("ignore")
def test_a_jit_trace_takes_no_other_length():
    query, table = torch.randn(1, 1, 6, 4), torch.randn(11, 4)
    traced = torch.jit.trace(lambda query, table: rel_attention_1d(query, query, query, table), (query, table))
    torch.testing.assert_close(traced(query, table), rel_attention_1d(query, query, query, table))
    with pytest.raises(RuntimeError, match="multiply up"):
        traced(torch.randn(1, 1, 64, 4), table)


def test_fx_traces():
    augmented = AttentionAugmentedConv1d(8, 16, 3, 1, 5, heads=2, key_ratio=0.5, value_ratio=0.5, min_key_depth=1)
    for module in (RelPosAttention1d(8, 4, 4, heads=2, length=8), augmented):
        x = torch.randn(2, 8, 5)
        assert torch.equal(torch.fx.symbolic_trace(module.eval())(x), module(x))
