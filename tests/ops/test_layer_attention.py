"""layer_attention and LayerCache: the equation, gradients, and bad input."""

import pytest
import torch

from fused_attn.ops.layer_attention import LayerCache, layer_attention


def inputs(layers=3, batch=2, groups=3, depth=4, per_group=2, spatial=(3, 2), dtype=torch.float64):
    torch.manual_seed(0)
    query = torch.randn(batch, groups, depth, dtype=dtype)
    keys = [torch.randn(batch, groups, depth, dtype=dtype) for _ in range(layers)]
    values = [torch.randn(batch, groups * per_group, *spatial, dtype=dtype) for _ in range(layers)]
    return query, keys, values, torch.randn(layers, groups, dtype=dtype)


@pytest.mark.parametrize("activation", ["softmax", "sigmoid"])
@pytest.mark.parametrize(("layers", "spatial"), [(1, (3, 2)), (3, ()), (5, (4,))])
@pytest.mark.parametrize("with_bias", [False, True])
def test_equation_and_gradients(activation, layers, spatial, with_bias):
    query, keys, values, bias = inputs(layers, spatial=spatial)
    leaves = [tensor.requires_grad_() for tensor in (query, *keys, *values, bias)]
    logits = 0.3 * torch.einsum("bgd,lbgd->bgl", query, torch.stack(keys))
    if with_bias:
        logits = logits + bias.T
    weights = logits.softmax(-1) if activation == "softmax" else 1 / (1 + (-logits).exp())
    grouped = torch.stack(values).unflatten(2, (3, 2))
    expected = torch.einsum("bgl,lbgp...->bgp...", weights, grouped).flatten(1, 2)
    out = layer_attention(
        query, keys, values, scale=0.3, bias=bias if with_bias else None, activation=activation, impl="reference"
    )
    torch.testing.assert_close(out, expected)
    direction = torch.randn_like(out)
    torch.testing.assert_close(
        torch.autograd.grad(out, leaves, direction, materialize_grads=True),
        torch.autograd.grad(expected, leaves, direction, materialize_grads=True),
    )


def test_query_for_all_samples_and_default_scale():
    query, keys, values, _ = inputs()
    expected = layer_attention(query[:1].expand(2, -1, -1), keys, values, scale=0.5)
    torch.testing.assert_close(layer_attention(query[0], keys, values), expected)


def test_cache_attends_to_what_was_appended_so_far():
    query, keys, values, _ = inputs()
    cache = LayerCache()
    for index, (key, value) in enumerate(zip(keys, values, strict=True)):
        cache.append(key, value)
        expected = layer_attention(query, keys[: index + 1], values[: index + 1])
        torch.testing.assert_close(cache.attend(query), expected)


def test_value_changed_in_place_after_it_was_cached():
    query, keys, values, _ = inputs()
    cache = LayerCache()
    for key, value in zip(keys, values, strict=True):
        cache.append(key, value)
    values[1].mul_(2)
    with pytest.raises(RuntimeError, match="in place"):
        cache.attend(query)


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        (lambda a: a.update(keys=[], values=[]), ValueError, "at least one, got 0 and 0"),
        (lambda a: a["keys"].pop(), ValueError, "got 2 and 3"),
        (
            lambda a: a.update(activation="relu"),
            ValueError,
            "activation must be one of 'softmax', 'sigmoid', got 'relu'",
        ),
        (lambda a: a.update(impl="cuda"), ValueError, r"impl must be one of 'auto', .* got 'cuda'"),
        (lambda a: a.update(query=1.0), TypeError, "query must be a tensor, got float"),
        (lambda a: a["values"].__setitem__(1, torch.ones(2, 6, 3, 2).long()), TypeError, r"values\[1\] .* floating"),
        (lambda a: a.update(query=torch.ones(2, 4, 4).double()), ValueError, r"G"),
        (lambda a: a.update(query=torch.ones(3, 3, 4).double()), ValueError, r"query must have the batch"),
        (
            lambda a: a.update(query=torch.ones(4).double()),
            ValueError,
            r"query must have shape \(B, G, d\) or \(G, d\)",
        ),
        (lambda a: a["keys"].__setitem__(2, torch.ones(2, 3, 5).double()), ValueError, r"keys\[2\] .* got \(2, 3, 5\)"),
        (
            lambda a: a["values"].__setitem__(2, torch.ones(2, 6, 3, 3).double()),
            ValueError,
            r"values\[2\] .*\(2, 6, 3, 3\)",
        ),
        (lambda a: a["values"].__setitem__(0, torch.ones(2, 6, 3, 2)), ValueError, r"values\[0\] must have the dtype"),
        (lambda a: a.update(bias=torch.ones(3, 2).double()), ValueError, r"bias must have shape \(L, G\)=\(3, 3\)"),
        (lambda a: a.update(bias=torch.ones(3, 3).double().to("meta")), ValueError, "bias must be on the device"),
    ],
)
def test_bad_input(change, error, match):
    query, keys, values, bias = inputs()
    arguments = {"query": query, "keys": keys, "values": values, "bias": bias}
    change(arguments)
    with pytest.raises(error, match=match):
        layer_attention(**arguments)
