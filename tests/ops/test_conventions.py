"""The relative positions of other code bases, against loops written from their definitions."""

import numpy as np
import pytest
import torch

from fused_attn import decomposed_bias_attention, rel_attention_2d, sam_relative_logits


def resized(table, length):
    """Linear resampling with samples at the centres of equal cells; numpy, one row at a time."""
    rows = []
    for i in range(length):
        position = min(max((i + 0.5) * len(table) / length - 0.5, 0.0), len(table) - 1.0)
        low = int(position)
        high = min(low + 1, len(table) - 1)
        rows.append(table[low] * (1 - (position - low)) + table[high] * (position - low))
    return np.stack(rows)


def sam_axis_logits(query_row, table, queries, keys):
    """(queries, d) -> (queries, keys) along one axis; coordinates in float32 as in SAM and MViTv2."""
    table = resized(table, 2 * max(queries, keys) - 1)
    query_ratio, key_ratio = np.float32(max(keys / queries, 1.0)), np.float32(max(queries / keys, 1.0))
    shift = np.float32((keys - 1) * max(queries / keys, 1.0))
    logits = np.zeros((queries, keys))
    for q in range(queries):
        for k in range(keys):
            offset = np.float32(q) * query_ratio - np.float32(k) * key_ratio + shift
            logits[q, k] = query_row[q] @ table[int(offset)]
    return logits


@pytest.mark.parametrize(
    ("query_size", "key_size", "lengths"),
    [
        ((4, 3), (4, 3), (7, 5)),  # SAM as trained
        ((4, 3), (4, 3), (5, 9)),  # tables resized, down and up
        ((6, 8), (3, 2), (11, 15)),  # MViTv2: pooled keys
        ((3, 2), (6, 5), (11, 9)),  # pooled queries, ratio 5/2
        ((7, 5), (3, 4), (4, 1)),  # ratios 7/3 and 5/4, resized
        ((1, 1), (5, 1), (3, 1)),
        ((8, 16), (6, 7), (15, 31)),  # float32 and float64 coordinates truncate differently
    ],
)
def test_sam_logits_follow_the_definition(query_size, key_size, lengths):
    query = torch.randn(2, 2, *query_size, 4, dtype=torch.float64)
    rel_h, rel_w = (torch.randn(length, 4, dtype=torch.float64) for length in lengths)
    bias_h, bias_w = sam_relative_logits(query, rel_h, rel_w, key_size)
    for batch in range(2):
        for head in range(2):
            q = query[batch, head].numpy()
            for x in range(query_size[1]):
                expected = sam_axis_logits(q[:, x], rel_h.numpy(), query_size[0], key_size[0])
                np.testing.assert_allclose(bias_h[batch, head, :, x].numpy(), expected, atol=1e-12)
            for y in range(query_size[0]):
                expected = sam_axis_logits(q[y], rel_w.numpy(), query_size[1], key_size[1])
                np.testing.assert_allclose(bias_w[batch, head, y].numpy(), expected, atol=1e-12)


@pytest.mark.parametrize("queries", range(1, 20))
def test_stretched_coordinates_stay_inside_the_table(queries):
    """Whatever the ratio rounds to: every row of the table is in reach and the corners are the first and last."""
    for keys in range(1, 20):
        length = 2 * max(queries, keys) - 1
        query = torch.ones(1, 1, queries, 1, 1, dtype=torch.float64)
        table = torch.arange(length, dtype=torch.float64)[:, None]
        rows = sam_relative_logits(query, table, table[:1], (keys, 1))[0][0, 0, :, 0]
        stretch = max(queries / keys, 1.0)
        assert rows.min() == rows[0, -1] == 0
        # The nearest key of the last query: all of the table but the last stretch of coordinates.
        assert rows.max() == rows[-1, 0]
        assert length - 1 - max(stretch, keys / queries) < rows.max() <= length - 1


def test_sam_equals_rel_attention_2d_where_grids_agree():
    query, key = (torch.randn(2, 2, 4, 3, 5, dtype=torch.float64) for _ in range(2))
    value = torch.randn(2, 2, 4, 3, 6, dtype=torch.float64)
    rel_h, rel_w = torch.randn(7, 5, dtype=torch.float64), torch.randn(5, 5, dtype=torch.float64)
    bias_h, bias_w = sam_relative_logits(query, rel_h, rel_w, (4, 3))
    torch.testing.assert_close(
        decomposed_bias_attention(query, key, value, bias_h, bias_w),
        rel_attention_2d(query, key, value, rel_h, rel_w, index="query_minus_key", rel_scale=1.0),
    )


def test_per_head_tables_are_one_table_per_head():
    query = torch.randn(1, 3, 4, 3, 5, dtype=torch.float64)
    rel_h, rel_w = torch.randn(3, 9, 5, dtype=torch.float64), torch.randn(3, 5, 5, dtype=torch.float64)
    logits = sam_relative_logits(query, rel_h, rel_w, (2, 3))
    for head in range(3):
        alone = sam_relative_logits(query[:, head : head + 1], rel_h[head], rel_w[head], (2, 3))
        for together, single in zip(logits, alone, strict=True):
            torch.testing.assert_close(together[:, head : head + 1], single)


def test_sam_logits_have_exact_gradients():
    query = torch.randn(1, 1, 3, 2, 2, dtype=torch.float64, requires_grad=True)
    rel_h = torch.randn(4, 2, dtype=torch.float64, requires_grad=True)
    rel_w = torch.randn(3, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda *tensors: sam_relative_logits(*tensors, (2, 2)), (query, rel_h, rel_w))


@pytest.mark.parametrize("scale_pos_embed", [True, False])
def test_bello_and_timm_arguments(scale_pos_embed):
    """AA-Conv and BoTNet: row k - q + L - 1; timm leaves the relative term unscaled unless told otherwise."""
    height, width, depth = 3, 4, 5
    query, key, value = (torch.randn(1, 1, height, width, depth, dtype=torch.float64) for _ in range(3))
    rel_h = torch.randn(2 * height - 1, depth, dtype=torch.float64)
    rel_w = torch.randn(2 * width - 1, depth, dtype=torch.float64)
    rel_scale = None if scale_pos_embed else 1.0
    out = rel_attention_2d(query, key, value, rel_h, rel_w, index="key_minus_query", rel_scale=rel_scale)
    for yq in range(height):
        for xq in range(width):
            q = query[0, 0, yq, xq]
            logits = torch.zeros(height, width, dtype=torch.float64)
            for yk in range(height):
                for xk in range(width):
                    content = q @ key[0, 0, yk, xk]
                    position = q @ (rel_h[yk - yq + height - 1] + rel_w[xk - xq + width - 1])
                    if scale_pos_embed:
                        logits[yk, xk] = (content + position) * depth**-0.5
                    else:
                        logits[yk, xk] = content * depth**-0.5 + position
            weights = logits.flatten().softmax(0)
            torch.testing.assert_close(out[0, 0, yq, xq], weights @ value[0, 0].flatten(0, 1))


@pytest.mark.parametrize(
    ("query", "rel_h", "match"),
    [
        ((1, 4, 3, 5), (7, 5), r"query must have 5 dimensions .* got shape \(1, 4, 3, 5\)"),
        ((1, 2, 4, 3, 5), (7, 4), r"rel_h must have shape \(L, d_k\)=\(L, 5\) .* got \(7, 4\)"),
        ((1, 2, 4, 3, 5), (3, 7, 5), r"rel_h must have .*\(heads, L, d_k\)=\(2, L, 5\), got \(3, 7, 5\)"),
        ((1, 2, 4, 3, 5), (0, 5), r"rel_h must have .* got \(0, 5\)"),
    ],
)
def test_bad_inputs(query, rel_h, match):
    with pytest.raises(ValueError, match=match):
        sam_relative_logits(torch.randn(query), torch.randn(rel_h), torch.randn(5, 5), (4, 3))


@pytest.mark.parametrize(
    ("name", "change", "error", "match"),
    [
        (
            "rel_h",
            torch.Tensor.half,
            ValueError,
            "rel_h must have the dtype of query, torch.float32, got torch.float16",
        ),
        (
            "rel_w",
            torch.Tensor.double,
            ValueError,
            "rel_w must have the dtype of query, torch.float32, got torch.float",
        ),
        (
            "query",
            torch.Tensor.half,
            ValueError,
            "rel_h must have the dtype of query, torch.float16, got torch.float32",
        ),
        ("rel_h", torch.Tensor.long, TypeError, "rel_h must have a floating-point dtype, got torch.int64"),
        ("query", torch.Tensor.long, TypeError, "query must have a floating-point dtype, got torch.int64"),
        ("rel_w", lambda table: None, TypeError, "rel_w must be a tensor, got NoneType"),
        ("rel_w", lambda table: table.to("meta"), ValueError, "rel_w must be on the device of query, cpu, got meta"),
        ("key_size", lambda size: 4, ValueError, r"key_size must be two positive sizes \(Hk, Wk\), got 4"),
        ("key_size", lambda size: (4.0, 3.0), ValueError, r"key_size must be two positive sizes .* got \(4.0, 3.0\)"),
        ("key_size", lambda size: (0, 3), ValueError, r"key_size must be two positive sizes .* got \(0, 3\)"),
        (
            "query",
            lambda query: query[:, :, :0],
            ValueError,
            r"query must have at least one position, got shape \(1, 2, 0",
        ),
    ],
)
def test_inputs_that_do_not_fit(name, change, error, match):
    inputs = {"query": torch.randn(1, 2, 4, 3, 5), "rel_h": torch.randn(7, 5), "rel_w": torch.randn(5, 5)}
    inputs["key_size"] = (4, 3)
    inputs[name] = change(inputs[name])
    with pytest.raises(error, match=match):
        sam_relative_logits(**inputs)


def test_sam_logits_under_autocast_take_tables_of_another_dtype():
    """As in SAM: the parameters are in float32, the query comes from a convolution in lower precision."""
    query, rel_h, rel_w = torch.randn(1, 2, 4, 3, 5).bfloat16(), torch.randn(7, 5), torch.randn(5, 5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = sam_relative_logits(query, rel_h, rel_w, (4, 3))
        with pytest.raises(ValueError, match=r"rel_h must have the dtype of query, .*bfloat16, got .*float64"):
            sam_relative_logits(query, rel_h.double(), rel_w, (4, 3))
    for logits, expected in zip(
        actual, sam_relative_logits(query, rel_h.bfloat16(), rel_w.bfloat16(), (4, 3)), strict=True
    ):
        assert torch.equal(logits, expected)
