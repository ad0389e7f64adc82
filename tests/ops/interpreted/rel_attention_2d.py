"""Numerics of the Triton kernels in Triton's interpreter, run by tests/ops/test_interpreted.py."""

import itertools
import math

import numpy as np
import pytest
import torch

from fused_attn.ops.rel_attention_2d import op, reference, relative_logits, triton_launch, triton_tile_table
from fused_attn.ops.rel_attention_2d.spec import SPECS
from fused_attn.testing import checks
from fused_attn.testing.numerics import mismatches

pytestmark = pytest.mark.usefixtures("unwritten_memory_is_nan")
NAMES = ("out", "query", "key", "value", "row", "col")
F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16


def draw(*shape, dtype=F32):
    return torch.randn(*shape).to(dtype)


def inputs(dtype, heads, query_grid, key_grid, d_k, d_v, terms, batch=1):
    """query, key, value, row, col; ``terms``: "tables", "per-head tables", "logits", "row", "col" or "none"."""
    torch.manual_seed(0)
    query = draw(batch, heads, *query_grid, d_k, dtype=dtype)
    key = draw(batch, heads, *key_grid, d_k, dtype=dtype)
    value = draw(batch, heads, *key_grid, d_v, dtype=dtype)
    row = col = None
    if "tables" in terms:
        lead = (heads,) if terms == "per-head tables" else ()
        row, col = (draw(*lead, query_grid[i] + key_grid[i] - 1, d_k, dtype=dtype) for i in (0, 1))
    if terms in ("logits", "row"):
        row = draw(batch, heads, *query_grid, key_grid[0], dtype=dtype)
    if terms in ("logits", "col"):
        col = draw(batch, heads, *query_grid, key_grid[1], dtype=dtype)
    return query, key, value, row, col


def operator(query, key, value, row, col, *numbers):
    """The operator without free table, segments and prefix keys."""
    return op.rel_attention_2d.run("triton", query, key, value, row, col, *[None] * 5, *numbers)[0]


def run(function, tensors, dtype, grad_out):
    """[out, gradients...] of ``function`` over copies of ``tensors`` in ``dtype`` with the same strides."""
    leaves = []
    for tensor in tensors:
        if tensor is None:
            leaves.append(None)
        else:
            copy = tensor.detach() if dtype == tensor.dtype else tensor.detach().to(dtype)
            leaves.append(copy.requires_grad_())
    out = function(*leaves)
    grads = torch.autograd.grad(out, [leaf for leaf in leaves if leaf is not None], grad_out.to(dtype))
    return [out.detach(), *grads]


def check(tensors, *, rel_scale=0.7, key_minus_query=True, dropout_p=0.0, grad_out=None):
    """The kernels' output and gradients meet the bar of ``contract.mismatches``."""
    query, value = tensors[0], tensors[2]
    scale = query.shape[-1] ** -0.5
    seed = torch.tensor([7463847412093847561]) if dropout_p else None
    if grad_out is None:
        grad_out = draw(*query.shape[:4], value.shape[-1], dtype=query.dtype)

    def expected(q, k, v, row, col):
        if any(term is not None and term.dim() == 5 for term in (row, col)):
            return reference.decomposed_bias_attention(q, k, v, row, col, scale=scale, dropout_p=dropout_p, seed=seed)
        index = "key_minus_query" if key_minus_query else "query_minus_key"
        options = {"scale": scale, "rel_scale": rel_scale, "index": index, "dropout_p": dropout_p, "seed": seed}
        return reference.rel_attention_2d(q, k, v, row, col, **options)

    def actual(q, k, v, row, col):
        return operator(q, k, v, row, col, scale, rel_scale, key_minus_query, dropout_p, seed)

    got = run(actual, tensors, query.dtype, grad_out)
    exact = run(expected, tensors, torch.float64, grad_out)
    rounded = run(expected, tensors, query.dtype, grad_out)
    names = [name for name, present in zip(NAMES, (True, *(t is not None for t in tensors)), strict=True) if present]
    found = mismatches(*(dict(zip(names, results, strict=True)) for results in (got, rounded, exact)))
    assert not found, "; ".join(found)
    return got


@pytest.mark.parametrize("terms", ["tables", "per-head tables", "logits", "row", "col", "none"])
@pytest.mark.parametrize("dtype", [F32, F16, BF16])
def test_terms(dtype, terms):
    check(inputs(dtype, 2, (3, 5), (3, 5), 20, 2, terms))


@pytest.mark.parametrize(
    ("query_grid", "key_grid", "d_k", "d_v"),
    [
        ((1, 1), (1, 1), 2, 2),
        ((1, 1), (3, 7), 4, 8),
        ((4, 4), (4, 4), 80, 64),
        ((7, 11), (7, 11), 4, 4),
        ((2, 13), (5, 3), 8, 20),
        ((6, 2), (2, 9), 16, 16),
        ((40, 1), (37, 1), 4, 4),
        ((16, 16), (16, 16), 4, 4),
        ((3, 3), (33, 33), 4, 4),
    ],
)
def test_geometry(query_grid, key_grid, d_k, d_v):
    check(inputs(F32, 1, query_grid, key_grid, d_k, d_v, "tables"))
    check(inputs(BF16, 1, query_grid, key_grid, d_k, d_v, "logits"))


@pytest.mark.parametrize(("dtype", "d_k", "d_v"), [(F32, 128, 100), (F16, 160, 256)])
def test_deepest_tiles(dtype, d_k, d_v):
    check(inputs(dtype, 1, (2, 3), (2, 3), d_k, d_v, "logits"))


@pytest.mark.parametrize(
    ("arch", "old_triton", "dtype", "grid", "depth", "dropout_p"),
    [
        ("sm_80", False, BF16, (3, 14), 96, 0.1),
        ("sm_80", True, BF16, (3, 47), 20, 0.0),
        ("sm_90", True, BF16, (2, 56), 96, 0.1),
        ("sm_90", False, BF16, (3, 47), 64, 0.0),
        ("sm_100", True, BF16, (2, 56), 96, 0.0),
        ("sm_100", True, F32, (3, 14), 64, 0.0),
    ],
)
def test_tiles_of_other_parts_and_versions(monkeypatch, arch, old_triton, dtype, grid, depth, dropout_p):
    monkeypatch.setattr(triton_launch, "architecture", lambda tensor: arch)
    monkeypatch.setattr(triton_tile_table, "triton_before", lambda *version: old_triton)
    triton_tile_table.blocks.cache_clear()
    check(inputs(dtype, 1, grid, grid, depth, depth, "logits"), dropout_p=dropout_p)
    triton_tile_table.blocks.cache_clear()


@pytest.mark.parametrize("dtype", [F32, BF16])
def test_wide_image_is_walked_in_several_strips(dtype):
    tensors = inputs(dtype, 1, (2, 2), (3, 161), 4, 4, "logits")
    assert triton_launch.strips(triton_launch.Terms(*tensors), None, "sm_90") > 1
    check(tensors)


def test_query_minus_key():
    check(inputs(F32, 2, (3, 4), (5, 2), 4, 4, "per-head tables"), key_minus_query=False)
    check(inputs(F32, 2, (3, 4), (5, 2), 4, 4, "tables"), key_minus_query=False)


@pytest.mark.parametrize("dtype", [F32, BF16])
def test_dropout_draws_the_reference_mask(dtype):
    check(inputs(dtype, 2, (3, 5), (4, 3), 4, 2, "tables", batch=2), dropout_p=0.3)


def test_no_scale():
    tensors = inputs(BF16, 1, (3, 3), (3, 3), 4, 4, "logits")
    query, key, value, row, col = (t.double().requires_grad_() for t in tensors)
    exact = reference.decomposed_bias_attention(query, key, value, row, col, scale=0.0)
    grad_out = draw(*exact.shape, dtype=BF16)
    expected = torch.autograd.grad(exact, (value, row, col), grad_out.double())
    query, key, value, row, col = (t.detach().requires_grad_() for t in tensors)
    out = operator(query, key, value, row, col, 0.0, 1.0, True, 0.0, None)
    torch.testing.assert_close(out.double(), exact, atol=0.02, rtol=0.02)
    grads = torch.autograd.grad(out, (query, key, value, row, col), grad_out)
    assert not grads[0].any()
    assert not grads[1].any()
    for actual, reference_grad in zip(grads[2:], expected, strict=True):
        torch.testing.assert_close(actual.double(), reference_grad, atol=0.05, rtol=0.02)


@pytest.mark.parametrize("layout", ["channels first", "channels last", "sliced", "expanded"])
def test_strides(layout):
    query, key, value, row, col = inputs(F32, 2, (3, 5), (3, 5), 20, 2, "logits", batch=2)
    grad_out = draw(*query.shape[:4], 2)
    if layout == "channels first":
        query, key, value, grad_out = (
            t.permute(0, 1, 4, 2, 3).contiguous().permute(0, 1, 3, 4, 2) for t in (query, key, value, grad_out)
        )
    if layout == "channels last":
        query, key, value, grad_out = (
            t.permute(0, 2, 3, 1, 4).contiguous().permute(0, 3, 1, 2, 4) for t in (query, key, value, grad_out)
        )
    if layout == "sliced":
        query, key, value = torch.cat((query, key, value), -1).split((20, 20, 2), -1)
        assert query.data_ptr() % 16 == 0
        assert value.data_ptr() % 16 != 0 or value.stride(3) % 4 != 0
    if layout == "expanded":
        key, value = (t[:1, :, :, :1].expand(*u.shape) for t, u in ((key, key), (value, value)))
        row, col = row[:, :, :1, :1].expand_as(row), col[:1, :1].expand_as(col)
        grad_out = grad_out[..., :1].expand_as(grad_out)
    got = check((query, key, value, row, col), grad_out=grad_out)
    assert got[0].stride(4) == (15 if layout == "channels first" else 1)


def test_offsets_past_two_to_the_31():
    far = 2**31 + 16
    storage = torch.from_numpy(np.zeros(far + 4096, dtype=np.int16)).view(BF16)
    tensors = inputs(BF16, 1, (2, 3), (2, 3), 4, 4, "none", batch=2)
    moved = []
    for i, tensor in enumerate(tensors[:3]):
        view = storage.as_strided(tensor.shape, (far, 64, 32, 4, 1), 1024 * i)
        moved.append(view.copy_(tensor))
    check((*moved, None, None))


def test_masked_rows_columns_and_queries():
    query, key, value, row, col = inputs(F32, 1, (3, 4), (3, 4), 4, 4, "logits")
    row[..., 1] = -math.inf
    col[..., 2] = -math.inf
    row[0, 0, 1, 1] = -math.inf
    col[0, 0, 2, 3] = -math.inf
    got = check((query, key, value, row, col))
    for i in (0, 1, 4, 5):
        assert not got[i][0, 0, 1, 1].any(), NAMES[i]
        assert not got[i][0, 0, 2, 3].any(), NAMES[i]
    assert not got[2][0, 0, 1].any()
    assert not got[3][0, 0, :, 2].any()


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("which", [0, 1, 2])
def test_nan_and_inf_reach_what_they_reach_in_the_reference(which, bad):
    tensors = inputs(F32, 1, (3, 4), (3, 4), 4, 4, "logits")
    tensors[which][0, 0, 1, 2, 3] = bad
    exact = reference.decomposed_bias_attention(*tensors, scale=0.5)
    out = operator(*tensors, 0.5, 1.0, True, 0.0, None)
    assert torch.equal(out.isnan(), exact.isnan())
    assert torch.equal(out.isinf(), exact.isinf())
    finite = exact.isfinite()
    torch.testing.assert_close(out[finite], exact[finite])


@pytest.mark.parametrize(
    ("batch", "query_grid", "key_grid", "d_v"),
    [(1, (2, 3), (0, 3), 4), (1, (0, 3), (2, 3), 4), (0, (2, 3), (2, 3), 4), (1, (2, 3), (2, 3), 0)],
)
def test_empty(batch, query_grid, key_grid, d_v):
    tensors = [t.requires_grad_() for t in inputs(F32, 2, query_grid, key_grid, 4, d_v, "logits", batch=batch)]
    out = operator(*tensors, 0.5, 1.0, True, 0.0, None)
    assert torch.equal(out, torch.zeros(batch, 2, *query_grid, d_v))
    for tensor, grad in zip(tensors, torch.autograd.grad(out.sum(), tensors), strict=True):
        assert torch.equal(grad, torch.zeros_like(tensor))


def test_repeated_runs_are_bitwise_equal():
    tensors = inputs(BF16, 2, (5, 7), (5, 7), 20, 2, "tables", batch=2)
    grad_out = draw(2, 2, 5, 7, 2, dtype=BF16)
    for first, second in zip(*(check(tensors, grad_out=grad_out) for _ in range(2)), strict=True):
        assert torch.equal(first, second)


@pytest.mark.parametrize(("dtype", "depth"), [(F32, 129), (BF16, 257)])
def test_deeper_than_the_tile_table_is_refused(dtype, depth):
    query = torch.zeros(1, 1, 1, 1, depth, dtype=dtype)
    assert f"got {depth} in {dtype}" in op.can_run_triton(query, query, query)
    assert op.can_run_triton(query[..., 1:], query[..., 1:], query[..., 1:]) is None


def sample(spec, name):
    (found,) = (sample for sample in spec.samples if sample.name == name)
    return found.inputs(F32, "cpu")


@pytest.mark.parametrize("name", ["many pairs", "full vectors"])
def test_padding_makes_no_nan_of_an_infinity(name):
    decomposed = next(spec for spec in SPECS if spec.name == "decomposed_bias_attention")
    checks.check_numerics(decomposed, "triton", sample(decomposed, f"{name}, inf in a query that no key agrees with"))


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.name)
def test_nan_does_not_reach_the_gradients_of_hidden_keys(spec):
    checks.check_non_finite(spec, "triton", sample(spec, "segments, prefix, dropout"))


# --- products with tables -------------------------------------------------------------------------------------------


TABLES = ["both", "rows", "columns", "per head", "per head, columns shared"]
SMALL, LARGE = (2, 3, (4, 5), (7, 6), 6), (1, 2, (3, 70), (66, 2), 70)


@pytest.mark.parametrize(
    ("grid", "tables", "key_minus_query", "channels_first"),
    [
        *itertools.product([SMALL], TABLES, [True, False], [False, True]),
        *((LARGE, tables, i % 2 == 0, i % 2 == 1) for i, tables in enumerate(TABLES)),
    ],
)
def test_table_products_and_their_gradients(grid, tables, key_minus_query, channels_first):
    batch, heads, (height, width), key_size, depth = grid
    torch.manual_seed(0)
    query = draw(batch, heads, height, width, depth)
    if channels_first:
        query = query.permute(0, 1, 4, 2, 3).contiguous().permute(0, 1, 3, 4, 2)
    rows, columns = (
        draw(*((heads,) if "per head" in tables else ()), size + keys - 1, depth)
        for size, keys in zip((height, width), key_size, strict=True)
    )
    rows, columns = None if tables == "columns" else rows, None if tables == "rows" else columns
    if tables == "per head, columns shared":
        columns = columns[0]
    given = [tensor for tensor in (query, rows, columns) if tensor is not None]
    leaves = [tensor.double().requires_grad_() for tensor in given]
    of = [None if table is None else leaves[1 if table is rows else -1] for table in (rows, columns)]
    index = "key_minus_query" if key_minus_query else "query_minus_key"
    expected = reference.relative_logits(leaves[0], *of, key_size, 1.0, index)
    arguments = key_size, key_minus_query, "ieee"
    actual, launches = relative_logits.plan_logits(query, rows, columns, *arguments)
    for launch in launches:
        launch.run()
    outputs = [(a, e) for a, e in zip(actual, expected, strict=True) if e is not None]
    assert [logits is None for logits in actual] == [logits is None for logits in expected]
    for a, e in outputs:
        torch.testing.assert_close(a, e.float())

    grads = [None if logits is None else draw(*logits.shape) for logits in actual]
    before = draw(*query.shape)
    d_query = before.clone(memory_format=torch.preserve_format)
    d_tables = [None if table is None else torch.full_like(table, math.nan) for table in (rows, columns)]
    for launch in relative_logits.plan_logits_backward(*grads, query, rows, columns, d_query, *d_tables, *arguments):
        launch.run()
    wanted = torch.autograd.grad([e for _, e in outputs], leaves, [grad.double() for grad in grads if grad is not None])
    got = [d_query - before, *(grad for grad in d_tables if grad is not None)]
    for a, e in zip(got, wanted, strict=True):
        torch.testing.assert_close(a, e.float(), rtol=1e-5, atol=2e-5)
