"""Free tables, segments and prefix keys in Triton's interpreter, run by tests/ops/test_interpreted.py."""

import pytest
import torch

from fused_attn.ops import SPECS
from fused_attn.ops.rel_attention_2d import triton_launch, triton_tile_table
from fused_attn.testing import checks

pytestmark = pytest.mark.usefixtures("unwritten_memory_is_nan")
BY_NAME = {spec.name: {sample.name: sample for sample in spec.samples} for spec in SPECS}
SPEC = {spec.name: spec for spec in SPECS}
NAMES = (
    "small",
    "key_minus_query, unequal grids",
    "table of positions by heads",
    "shifted windows 7x7",
    "spread",
    "padded, width 8",
    "padded, channels_last",
    "empty, small",
    "prefix 5, width 8",
    "prefix 1, no keys",
    "no queries",
    "segments, prefix, dropout",
)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", NAMES)
def test_bias_attention_2d(name, dtype):
    sample = BY_NAME["bias_attention_2d"][name]
    checks.check_numerics(
        SPEC["bias_attention_2d"], "triton", *(sample.inputs(dtype, "cpu", draw) for draw in range(3))
    )


@pytest.mark.parametrize("arch", ["sm_80", "sm_100"])
def test_tiles_of_other_parts_before_triton_3_7(monkeypatch, arch):
    monkeypatch.setattr(triton_launch, "architecture", lambda tensor: arch)
    monkeypatch.setattr(triton_tile_table, "triton_before", lambda *version: True)
    triton_tile_table.blocks.cache_clear()
    inputs = BY_NAME["bias_attention_2d"]["shifted windows 7x7"].inputs(torch.bfloat16)
    checks.check_numerics(SPEC["bias_attention_2d"], "triton", inputs)
    triton_tile_table.blocks.cache_clear()


@pytest.mark.parametrize("op", ["rel_attention_2d", "decomposed_bias_attention"])
@pytest.mark.parametrize("name", ["padded, small", "prefix 1, small", "segments, prefix, dropout", "no queries"])
def test_segments_and_prefix_keys(op, name):
    sample = BY_NAME[op][name]
    checks.check_numerics(SPEC[op], "triton", *(sample.inputs(torch.float32, "cpu", draw) for draw in range(3)))


@pytest.mark.parametrize("dtype", [torch.bfloat16])
@pytest.mark.parametrize("name", ["shifted windows 7x7", "segments, prefix, dropout"])
def test_repeated_runs_are_bitwise_equal(name, dtype):
    inputs = BY_NAME["bias_attention_2d"][name].inputs(dtype)
    checks.check_deterministic(SPEC["bias_attention_2d"], "triton", inputs, 2)
