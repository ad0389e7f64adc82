"""Cases of the compile report: the launches of triton_launch.py over meta tensors."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from .._floor.launch import Launch
from . import relative_logits
from .triton_launch import Factors, Gradients, Terms, plan_backward, plan_forward, strips

#: Cases of the compile report: name -> (query grid, d_k, d_v, dtype, options).
_COMPILE_SHAPES: dict[str, tuple] = {
    "aa-wrn stage 1": ((32, 32), 20, 2, torch.bfloat16, {}),
    "aa-wrn stage 2": ((16, 16), 20, 4, torch.bfloat16, {}),
    "aa-wrn stage 3": ((8, 8), 20, 8, torch.bfloat16, {}),
    "aa-wrn stage 1, channels first": ((32, 32), 20, 2, torch.bfloat16, {"channels_first": True}),
    "aa-wrn stage 1, dropout": ((32, 32), 20, 2, torch.bfloat16, {"dropout_p": 0.1}),
    "aa-wrn stage 1, no logits": ((32, 32), 20, 2, torch.bfloat16, {"logits": False}),
    "odd grid 33x47": ((33, 47), 20, 2, torch.float16, {}),
    "sam window 14x14": ((14, 14), 64, 64, torch.float16, {}),
    "sam global 64x64": ((64, 64), 64, 64, torch.bfloat16, {}),
    "botnet 14x14": ((14, 14), 128, 128, torch.bfloat16, {}),
    "deep 16x16": ((16, 16), 256, 256, torch.bfloat16, {}),
    "aa-wrn stage 1, float32": ((32, 32), 20, 2, torch.float32, {}),
    "sam global 64x64, float32": ((64, 64), 64, 64, torch.float32, {}),
    "botnet 14x14, float32": ((14, 14), 128, 128, torch.float32, {}),
    "swin 7x7": ((7, 7), 32, 32, torch.bfloat16, {"logits": False, "table": True, "segments": True}),
    "swin 7x7, float32": ((7, 7), 32, 32, torch.float32, {"logits": False, "table": True, "segments": True}),
    "coatnet 14x14": ((14, 14), 32, 32, torch.bfloat16, {"logits": False, "table": True}),
    "free table 16x16, d 64": ((16, 16), 64, 64, torch.bfloat16, {"logits": False, "table": True}),
    "14x14, d 64, prefix": ((14, 14), 64, 64, torch.bfloat16, {"prefixes": 1}),
    "14x14, d 64, prefix, float32": ((14, 14), 64, 64, torch.float32, {"prefixes": 1}),
    "14x14, d 96": ((14, 14), 96, 96, torch.bfloat16, {}),
    "14x14, d 96, prefix": ((14, 14), 96, 96, torch.bfloat16, {"prefixes": 1}),
    "14x14, d 96, prefix, float32": ((14, 14), 96, 96, torch.float32, {"prefixes": 1}),
    "56x56, d 96": ((56, 56), 96, 96, torch.bfloat16, {}),
    "56x56, d 96, dropout": ((56, 56), 96, 96, torch.bfloat16, {"dropout_p": 0.1}),
    "free table 14x14, d 96": ((14, 14), 96, 96, torch.bfloat16, {"logits": False, "table": True, "segments": True}),
}

#: Tables and their logits: name -> (query grid, d_k, dtype, tables of each head, channels first).
_TABLE_SHAPES = {
    "tables 32x32, d 20": ((32, 32), 20, torch.bfloat16, False, False),
    "tables 32x32, d 20, channels first": ((32, 32), 20, torch.bfloat16, False, True),
    "tables 8x8, d 20, per head": ((8, 8), 20, torch.bfloat16, True, False),
    "tables 64x64, d 64": ((64, 64), 64, torch.bfloat16, False, False),
    "tables 14x14, d 256": ((14, 14), 256, torch.float16, False, False),
    "tables 32x32, d 20, float32": ((32, 32), 20, torch.float32, False, False),
    "tables 64x64, d 64, float32": ((64, 64), 64, torch.float32, False, False),
    "tables 14x14, d 128, float32": ((14, 14), 128, torch.float32, True, False),
}

COMPILE_NOTES = """
Instructions per score that no formulation of the loop avoids, for d_k=20, d_v=2 in bfloat16 (tensor products run
beside them):

- forward 6.5: scale and column logit (1 FMA), row logit (1), maximum (1), subtraction (1), exponential (2), half a
  conversion.  Row logit less maximum could be one number per row, but not for logits of which one rounds the other
  away, as masks do; and scales that hold log2(e) would make infinities of masks.  The row sum is a column of ones in
  the padding of the values and costs none.  What remains in the loop loads the key tile and builds that column.
- dQ pass 9.5: FMA, row logit, subtraction, exponential (2), subtraction of delta, product, one addition each for the
  row and the column gradient, half a conversion.  The sum of the exponentials divides what the loop has added up.
- dK/dV pass 9.0: FMA, row logit, subtraction, exponential (2), product with the inverse sum, subtraction of delta,
  product, two half conversions.  Column logits change with every tile here, so that reading and widening them adds
  about 2.
- dropout adds the hash, about 11 integer instructions.

Not a case above: the dQ pass of a 56x56 grid at depth 96 with prefix keys on sm_90.  Triton 3.9 spills there: 51 loads
and stores (18.5 instructions per score).
"""


def compile_cases(arch: str) -> Iterator[tuple[str, Launch]]:
    """(case, launch) of every shipped configuration on ``arch``, over meta tensors: see compile_report.py."""
    for name, (grid, d_k, d_v, dtype, options) in _COMPILE_SHAPES.items():
        for launch in _plan_all(grid, d_k, d_v, dtype, arch, **options):
            if launch.arguments.get("DELTA_ONLY"):
                yield f"{name}, delta", launch
            elif launch.arguments.get("first_key"):
                yield f"{name}, prefix keys", launch
            else:
                yield name, launch
    for name, case in _TABLE_SHAPES.items():
        for launch in _plan_tables(*case):
            yield name, launch


def _plan_tables(grid, depth, dtype, per_head, channels_first) -> list[Launch]:
    lead = (128, 8)

    def empty(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    query = empty(*lead, depth, *grid).permute(0, 1, 3, 4, 2) if channels_first else empty(*lead, *grid, depth)
    tables = [empty(*((lead[1],) if per_head else ()), 2 * length - 1, depth) for length in grid]
    arguments = grid, True, "ieee"
    logits, launches = relative_logits.plan_logits(query, *tables, *arguments)
    return [*launches, *relative_logits.plan_logits_backward(*logits, query, *tables, query, *tables, *arguments)]


def _plan_all(
    grid, d_k, d_v, dtype, arch, *, channels_first=False, dropout_p=0.0, logits=True, table=False, segments=False,
    prefixes=0,
) -> list[Launch]:  # fmt: skip
    lead = (8, 8)

    def empty(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    def feature(depth: int) -> Tensor:
        return empty(*lead, depth, *grid).permute(0, 1, 3, 4, 2) if channels_first else empty(*lead, *grid, depth)

    query, key, value, out, grad_out = feature(d_k), feature(d_k), feature(d_v), feature(d_v), feature(d_v)
    row_logits = empty(*lead, *grid, grid[0]) if logits else None
    col_logits = empty(*lead, *grid, grid[1]) if logits else None
    statistics = empty(*lead, *grid, 2, dtype=torch.float32)
    per_query = empty(5, *lead, *grid, dtype=torch.float32)
    seed = torch.empty(1, dtype=torch.int64, device="meta")
    bias_table = empty(lead[1], 2 * grid[0] - 1, 2 * grid[1] - 1) if table else None
    segments_of = empty(4, *grid, dtype=torch.int32) if segments else None
    prefix = [empty(*lead, 1, prefixes, depth) if prefixes else None for depth in (d_k, d_v)]
    terms = Terms(query, key, value, row_logits, col_logits, bias_table, segments_of, segments_of, *prefix)
    factors = Factors(d_k**-0.5, 1.0, 1.0, dropout_p, seed, True, "ieee")
    d_row = None
    if logits:
        several = strips(terms, seed if dropout_p > 0.0 else None, arch) > 1
        d_row = empty(*row_logits.shape, dtype=torch.float32) if several else row_logits
    grads = Gradients(query, key, value, d_row, col_logits, bias_table, *prefix)
    return [
        plan_forward(terms, factors, out, statistics, arch),
        *plan_backward(grad_out, terms, factors, out, statistics, per_query, grads, arch),
    ]
