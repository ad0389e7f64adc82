"""What the two attention functions compute, against loops over positions and against PyTorch's own attention."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from torch.profiler import ProfilerActivity, profile

from fused_attn import _extension, decomposed_bias_attention, rel_attention_2d
from fused_attn.ops._floor.dropout import keep_mask
from fused_attn.ops.rel_attention_2d import reference

IMPLEMENTATIONS = [
    "reference",
    pytest.param("cpu", marks=pytest.mark.skipif(not _extension.available(), reason=str(_extension.reason()))),
]
implementations = pytest.mark.parametrize("impl", IMPLEMENTATIONS)


def draw(*shapes, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]


def by_loops(query, key, value, rel_h, rel_w, scale, rel_scale, row):
    """The definition, one number at a time; ``row(q, k, queries, keys)`` is the row of a table."""
    batch, heads, height, width, _ = query.shape
    key_height, key_width = key.shape[2:4]
    out = query.new_zeros(batch, heads, height, width, value.shape[-1])
    for b, h, y, x in itertools.product(range(batch), range(heads), range(height), range(width)):
        q = query[b, h, y, x]
        logits = []
        for j, i in itertools.product(range(key_height), range(key_width)):
            table_h = rel_h if rel_h.dim() == 2 else rel_h[h]
            table_w = rel_w if rel_w.dim() == 2 else rel_w[h]
            relative = q @ table_h[row(y, j, height, key_height)] + q @ table_w[row(x, i, width, key_width)]
            logits.append(scale * (q @ key[b, h, j, i]) + rel_scale * relative)
        out[b, h, y, x] = torch.stack(logits).softmax(0) @ value[b, h].flatten(0, 1)
    return out


@implementations
@pytest.mark.parametrize("per_head", [False, True])
@pytest.mark.parametrize("key_grid", [(3, 4), (2, 5)])
@pytest.mark.parametrize(
    ("index", "row"),
    [
        ("key_minus_query", lambda q, k, queries, keys: k - q + queries - 1),
        ("query_minus_key", lambda q, k, queries, keys: q - k + keys - 1),
    ],
)
def test_definition(impl, per_head, key_grid, index, row):
    lead = (2,) if per_head else ()
    query, key, value, rel_h, rel_w = draw(
        (1, 2, 3, 4, 5),
        (1, 2, *key_grid, 5),
        (1, 2, *key_grid, 3),
        (*lead, 3 + key_grid[0] - 1, 5),
        (*lead, 4 + key_grid[1] - 1, 5),
    )
    out = rel_attention_2d(query, key, value, rel_h, rel_w, scale=0.3, rel_scale=0.8, index=index, impl=impl)
    expected = by_loops(*(x.double() for x in (query, key, value, rel_h, rel_w)), 0.3, 0.8, row)
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-6)


@implementations
def test_scales_default_to_the_depth(impl):
    query, key, value, rel_h, rel_w = draw(*[(2, 2, 3, 4, 16)] * 3, (5, 16), (7, 16))
    out = rel_attention_2d(query, key, value, rel_h, rel_w, impl=impl)
    assert torch.equal(out, rel_attention_2d(query, key, value, rel_h, rel_w, scale=0.25, rel_scale=0.25, impl=impl))
    scaled = rel_attention_2d(query, key, value, rel_h, rel_w, scale=0.5, impl=impl)
    assert torch.equal(scaled, rel_attention_2d(query, key, value, rel_h, rel_w, scale=0.5, rel_scale=0.5, impl=impl))
    assert not torch.allclose(out, scaled)


@implementations
@pytest.mark.parametrize("terms", ["hw", "h", "w", ""])
def test_pytorch_attention_with_the_dense_bias(impl, terms):
    """Output and gradients, against ``scaled_dot_product_attention`` in float64."""
    query, key, value, bias_h, bias_w, grad_out = draw(
        *[(2, 3, 4, 5, 8)] * 2, (2, 3, 4, 5, 6), (2, 3, 4, 5, 4), (2, 3, 4, 5, 5), (2, 3, 4, 5, 6)
    )
    tensors = {"query": query, "key": key, "value": value}
    tensors |= {"bias_h": bias_h} if "h" in terms else {}
    tensors |= {"bias_w": bias_w} if "w" in terms else {}

    def gradients(function, dtype):
        leaves = {name: tensor.to(dtype).requires_grad_() for name, tensor in tensors.items()}
        out = function(**leaves)
        return [out, *torch.autograd.grad(out, list(leaves.values()), grad_out.to(dtype))]

    def dense(query, key, value, bias_h=None, bias_w=None):
        bias = torch.zeros(2, 3, 4, 5, 4, 5, dtype=query.dtype)
        bias = bias if bias_h is None else bias + bias_h[..., :, None]
        bias = bias if bias_w is None else bias + bias_w[..., None, :]
        flat = (tensor.flatten(2, 3) for tensor in (query, key, value))
        mask = bias.flatten(4).flatten(2, 3)
        return F.scaled_dot_product_attention(*flat, attn_mask=mask, scale=0.4).unflatten(2, (4, 5))

    actual = gradients(lambda **leaves: decomposed_bias_attention(**leaves, scale=0.4, impl=impl), torch.float32)
    for got, expected in zip(actual, gradients(dense, torch.float64), strict=True):
        torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=2e-6)


@implementations
def test_tables_are_a_decomposed_bias(impl):
    query, key, value, rel_h, rel_w = draw((2, 2, 4, 6, 8), (2, 2, 3, 5, 8), (2, 2, 3, 5, 8), (2, 6, 8), (10, 8))
    for index in ("key_minus_query", "query_minus_key"):
        bias_h, bias_w = reference.relative_logits(query, rel_h, rel_w, (3, 5), 0.7, index)
        expected = decomposed_bias_attention(query, key, value, bias_h, bias_w, impl=impl)
        out = rel_attention_2d(query, key, value, rel_h, rel_w, rel_scale=0.7, index=index, impl=impl)
        torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)


@implementations
def test_conventions_mirror_each_other(impl):
    """On equal grids the two indices read the table from opposite ends."""
    query, key, value, rel_h, rel_w = draw(*[(1, 2, 4, 5, 8)] * 3, (7, 8), (9, 8))
    out = rel_attention_2d(query, key, value, rel_h, rel_w, impl=impl)
    mirrored = rel_attention_2d(query, key, value, rel_h.flip(0), rel_w.flip(0), index="query_minus_key", impl=impl)
    torch.testing.assert_close(out, mirrored, rtol=1e-6, atol=1e-6)


@implementations
def test_mirrored_image(impl):
    """Mirroring image and table along an axis mirrors the output: a query sees distances, not positions."""
    query, key, value, rel_h, rel_w = draw(*[(1, 2, 4, 6, 8)] * 3, (7, 8), (11, 8))
    out = rel_attention_2d(query, key, value, rel_h, rel_w, impl=impl)
    for axis, tables in ((2, (rel_h.flip(0), rel_w)), (3, (rel_h, rel_w.flip(0)))):
        mirrored = rel_attention_2d(*(x.flip(axis) for x in (query, key, value)), *tables, impl=impl)
        torch.testing.assert_close(mirrored.flip(axis), out, rtol=1e-5, atol=1e-6)


@implementations
def test_masked_queries_and_missing_keys_give_zeros(impl):
    query, key, value, bias_h = draw((1, 2, 3, 4, 8), (1, 2, 3, 4, 8), (1, 2, 3, 4, 8), (1, 2, 3, 4, 3))
    bias_h[:, :, 1, 2] = -math.inf
    leaves = [tensor.requires_grad_() for tensor in (query, key, value, bias_h)]
    out = decomposed_bias_attention(*leaves, impl=impl)
    grads = torch.autograd.grad(out.sum(), leaves)
    assert bool((out[:, :, 1, 2] == 0).all())
    assert bool((grads[0][:, :, 1, 2] == 0).all())
    assert bool((grads[3][:, :, 1, 2] == 0).all())
    assert all(bool(grad.isfinite().all()) for grad in grads)
    kept = out.detach().clone()
    kept[:, :, 1, 2] = 1.0
    assert bool((kept != 0).any(-1).all())

    nothing = decomposed_bias_attention(query, key[:, :, :0], value[:, :, :0], impl=impl)
    assert nothing.shape == (1, 2, 3, 4, 8)
    assert bool((nothing == 0).all())


@implementations
def test_mask_removes_keys(impl):
    """A row at -inf is a row that is not there."""
    query, key, value, bias_h = draw((1, 2, 3, 4, 8), (1, 2, 5, 4, 8), (1, 2, 5, 4, 8), (1, 2, 3, 4, 5))
    bias_h[..., 3:] = -math.inf
    out = decomposed_bias_attention(query, key, value, bias_h, impl=impl)
    cut = decomposed_bias_attention(query, key[:, :, :3], value[:, :, :3], bias_h[..., :3], impl=impl)
    torch.testing.assert_close(out, cut, rtol=1e-6, atol=1e-6)


# --- dropout ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dropout_p", [0.1, 0.5, 0.9])
def test_keep_mask_keeps_the_right_share_everywhere(dropout_p):
    rows, columns = 512, 509
    keep = keep_mask(torch.tensor([123456789]), rows, columns, dropout_p).double()
    deviation = math.sqrt(dropout_p * (1 - dropout_p))
    assert abs(keep.mean() - (1 - dropout_p)) < 5 * deviation / math.sqrt(keep.numel())
    assert (keep.mean(0) - (1 - dropout_p)).abs().max() < 5.5 * deviation / math.sqrt(rows)
    assert (keep.mean(1) - (1 - dropout_p)).abs().max() < 5.5 * deviation / math.sqrt(columns)


def test_keep_mask_is_uncorrelated():
    """Between neighbouring rows, neighbouring columns, and neighbouring seeds."""
    first, second = (keep_mask(torch.tensor([seed]), 400, 401, 0.5).double() - 0.5 for seed in (7, 8))
    bound = 5 / math.sqrt(400 * 400) * 0.25
    for a, b in ((first[1:], first[:-1]), (first[:, 1:], first[:, :-1]), (first, second)):
        assert abs((a * b).mean()) < bound


@implementations
def test_dropout_follows_pytorchs_generator(impl):
    query, key, value = draw(*[(1, 2, 4, 5, 8)] * 3)

    def call(seed):
        torch.manual_seed(seed)
        return rel_attention_2d(query, key, value, dropout_p=0.5, impl=impl)

    assert torch.equal(call(0), call(0))
    assert not torch.equal(call(0), call(1))
    torch.manual_seed(0)
    state = torch.get_rng_state()
    rel_attention_2d(query, key, value, dropout_p=0.0, impl=impl)
    assert torch.equal(torch.get_rng_state(), state)


@implementations
def test_dropout_drops_single_weights_and_keeps_the_mean(impl):
    """With one-hot values the output is the dropped weights themselves."""
    query, key = draw((4, 4, 4, 4, 8), (4, 4, 4, 4, 8))
    value = torch.eye(16).view(4, 4, 16).expand(4, 4, 4, 4, 16)
    weights = rel_attention_2d(query, key, value, impl=impl)
    torch.manual_seed(3)
    total, kept, calls = torch.zeros_like(weights), 0.0, 60
    for _ in range(calls):
        dropped = rel_attention_2d(query, key, value, dropout_p=0.25, impl=impl)
        keep = dropped != 0
        torch.testing.assert_close(dropped[keep], (weights / 0.75)[keep], rtol=1e-5, atol=1e-7)
        total += dropped
        kept += float(keep.double().mean())
    assert abs(kept / calls - 0.75) < 0.005
    torch.testing.assert_close((total / calls).mean((0, 1, 2, 3)), weights.mean((0, 1, 2, 3)), rtol=0.05, atol=0.0)


# --- choice, layout, size ---------------------------------------------------------------------------------------


@pytest.mark.skipif(not _extension.available(), reason=str(_extension.reason()))
def test_auto_takes_the_kernel_where_it_can():
    query, key, value = draw(*[(1, 1, 2, 3, 4)] * 3)
    for double in (False, True, False):
        with profile(activities=[ProfilerActivity.CPU]) as events:
            out = rel_attention_2d(*(x.double() if double else x for x in (query, key, value)))
        kernels = [event.key for event in events.key_averages() if event.key.startswith("fused_attn")]
        assert kernels == ([] if double else ["fused_attn_cpu::rel_attention_2d_forward"])
        assert out.dtype == (torch.float64 if double else torch.float32)


@pytest.mark.skipif(not _extension.available(), reason=str(_extension.reason()))
def test_output_and_gradients_keep_the_memory_order_of_convolutions():
    """Heads split off a channels_last (or contiguous) map merge into one again without a copy."""
    heads, d_k, d_v = 4, 8, 6
    for memory_format in (torch.channels_last, torch.contiguous_format):
        maps = [x.to(memory_format=memory_format) for x in draw(*[(2, heads * d, 5, 7) for d in (d_k, d_k, d_v)])]
        split = [x.unflatten(1, (heads, -1)).permute(0, 1, 3, 4, 2).requires_grad_() for x in maps]
        out = rel_attention_2d(*split, impl="cpu")
        for tensor in (out, *torch.autograd.grad(out, split, torch.ones_like(out))):
            merged = tensor.permute(0, 1, 4, 2, 3).flatten(1, 2)
            assert merged.is_contiguous(memory_format=memory_format)
            assert merged.data_ptr() == tensor.data_ptr()


@implementations
def test_offsets_past_two_to_the_31(impl):
    """Batches that lie more than 2^31 elements apart; only the pages touched are ever backed by memory."""
    distance = 2**31 + 4096
    try:
        memory = torch.empty(distance + 4096, dtype=torch.bfloat16)
    except (RuntimeError, MemoryError) as error:
        pytest.skip(f"4 GiB of address space are not to be had: {error}")
    memory[:4096] = draw((4096,), dtype=torch.bfloat16)[0]
    memory[distance:] = draw((2, 4096), dtype=torch.bfloat16)[0][1]
    shape, strides = (2, 1, 3, 4, 8), (distance, 96, 32, 8, 1)
    far = [memory.as_strided(shape, strides, offset).requires_grad_() for offset in (0, 100, 200)]
    near = [tensor.detach().clone().requires_grad_() for tensor in far]
    results = []
    for tensors in (far, near):
        out = rel_attention_2d(*tensors, impl=impl)
        results.append([out, *torch.autograd.grad(out.float().square().sum(), tensors)])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=0.0, atol=0.0)
