"""Calls of every op with masks and with huge logits, for tests/ops/test_masks.py and the interpreter's copy of it."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from fused_attn.ops import SPECS
from fused_attn.testing.checks import remember
from fused_attn.testing.numerics import numeric_mismatches

SPEC = {spec.name: spec for spec in SPECS}
MASKS = ("-1e4", "-1e9", "-1e30", "finfo.min", "-inf")
F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
Edit = Callable[[dict[str, Any], float, float], None]


def mask_value(mask: str, dtype: torch.dtype) -> float:
    return torch.finfo(dtype).min if mask == "finfo.min" else float(mask)


def representable(mask: str, dtype: torch.dtype) -> bool:
    return dtype != F16 or mask not in ("-1e9", "-1e30")


@dataclass(frozen=True)
class Case:
    """One op, one sample of it and one edit of that sample: ``edit(inputs, mask, other mask)``."""

    op: str
    sample: str
    name: str
    edit: Edit
    masks: tuple[tuple[str, str], ...]
    dtypes: tuple[torch.dtype, ...] = (F32, BF16, F16)

    @property
    def id(self) -> str:
        return f"{self.op}-{self.sample}-{self.name}"

    def calls(self, dtype: torch.dtype, mask: str, other: str, draws: int = 3) -> list[dict[str, Any]]:
        """Draws of the sample, edited."""
        sample = next(sample for sample in SPEC[self.op].samples if sample.name == self.sample)
        calls = [sample.inputs(dtype, draw=draw) for draw in range(draws)]
        for inputs in calls:
            self.edit(inputs, mask_value(mask, dtype), mask_value(other, dtype))
        return calls

    def mismatches(self, impl: str, draws: int = 3) -> Iterator[str]:
        """What ``impl`` gets wrong, over every mask and dtype."""
        spec = SPEC[self.op]

        def function(**inputs):
            return spec.function(**inputs, impl=impl)

        for dtype, (mask, other) in itertools.product(self.dtypes, self.masks):
            if representable(mask, dtype) and representable(other, dtype):
                calls = self.calls(dtype, mask, other, draws)
                for text in numeric_mismatches(spec, function, *calls, remember=remember):
                    yield f"{dtype}, {mask}, {other}: {text}"


# --- masks of decomposed_bias_attention ------------------------------------------------------------------------------


def queries_by_row(inputs, mask, other):
    """Every key of the queries of one row, through the row logits."""
    inputs["bias_h"][:, :, 1] = mask


def queries_by_column(inputs, mask, other):
    inputs["bias_w"][:, :, 1] = mask


def queries_by_both(inputs, mask, other):
    """The least finite number twice is -inf: zeros."""
    inputs["bias_h"][:, :, 1] = inputs["bias_w"][:, :, 1] = mask


def key_row(inputs, mask, other):
    inputs["bias_h"][..., 0] = mask


def key_columns(inputs, mask, other):
    inputs["bias_w"][..., 1:] = mask


def all_but_one_key(inputs, mask, other):
    inputs["bias_h"][..., 1:] = inputs["bias_w"][..., 1:] = mask


def mixed(inputs, mask, other):
    """Every key of some queries, by two different masks; some keys by one, others by the other."""
    inputs["bias_h"][:, :, 0, 0] = mask
    inputs["bias_h"][:, :, 0, 0, 1:] = other
    inputs["bias_w"][:, :, 1, :] = mask
    inputs["bias_w"][:, :, 1, :, 1:] = other
    inputs["bias_h"][:, :, 2, :, 0] = mask
    inputs["bias_w"][:, :, 2, :, 2:] = other


# --- masks of the other ops ------------------------------------------------------------------------------------------


def one_layer(inputs, mask, other):
    inputs["bias"][1] = mask


def all_layers(inputs, mask, other):
    inputs["bias"][:, 0] = mask
    inputs["bias"][1:, 0] = other


def elements(inputs, mask, other):
    """A row and a column of two images, and elements beside them."""
    x = inputs["x"]
    x[0, 0, -1] = mask
    x[0, 0, 0, 0] = other
    x[1, 0, :, -1] = mask
    x[1, 0, 0, 0] = other


def weights(inputs, mask, other):
    """Of values between 1/2 and 1, so that no logit is above 0 where the mask is."""
    inputs["x"].abs_().clamp_(0.5, 1.0)
    inputs["weight_row"][0, 0, 1] = mask
    inputs["weight_row"][..., 0] = other
    inputs["weight_col"][0, 0, :, 1] = mask
    inputs["weight_col"][:, :, 0] = other


def gates(inputs, mask, other):
    inputs["fc2_bias"][::2] = mask
    inputs["fc2_bias"][1::2] = -mask


#: For the interpreter, which takes a second for what a kernel takes a millisecond for.
FEW = (("-1e9", "-1e9"), ("finfo.min", "finfo.min"), ("finfo.min", "-inf"))
ALONE = tuple((mask, mask) for mask in MASKS)
PAIRS = tuple(itertools.permutations(MASKS, 2))
FINITE = ALONE[:-1]


def bias_cases(samples=("small", "width 8", "width 33"), dtypes=(F32, BF16, F16)) -> list[Case]:
    op = "decomposed_bias_attention"
    edits = (queries_by_row, queries_by_column, queries_by_both, key_row, key_columns, all_but_one_key)
    return [
        *(Case(op, s, edit.__name__, edit, ALONE, dtypes) for s, edit in itertools.product(samples, edits)),
        Case(op, samples[0], "mixed", mixed, PAIRS, dtypes),
    ]


OTHER_CASES = [
    Case("layer_attention", "bias", "one_layer", one_layer, ALONE),
    Case("layer_attention", "bias", "all_layers", all_layers, (*ALONE, *PAIRS)),
    Case("layer_attention", "sigmoid, bias, learned query", "all_layers", all_layers, ALONE),
    Case("row_col_softmax", "dual, small", "elements", elements, (*ALONE, *PAIRS)),
    Case("row_col_softmax", "small", "weights", weights, ALONE),
    Case("elementwise_attention", "evaluation, small", "weights", weights, FINITE[:3], (F32, BF16)),
    Case("squeeze_excite", "small", "gates", gates, ALONE),
]
#: Of planes and grids that the kernels walk in several blocks.
LARGE_CASES = [
    *bias_cases(("deep, several tiles",), (F32,))[:4],
    Case("row_col_softmax", "dual, two blocks", "elements", elements, (*ALONE, PAIRS[3], PAIRS[-2])),
    Case("row_col_softmax", "two blocks", "weights", weights, FINITE, (F32,)),
]


# --- huge logits -----------------------------------------------------------------------------------------------------

HUGE = (("1e10", "1e10"), ("1e30", "1e30"))


def _integers(inputs, *names):
    """Small integers, whose products are exact in any order: logits tie, or differ by more than any exponent."""
    for name in names:
        for tensor in inputs[name] if isinstance(inputs[name], list) else [inputs[name]]:
            tensor.copy_((2 * tensor).round().clamp(-3, 3))


def _power(size: float) -> float:
    return 2.0 ** round(torch.tensor(float(size), dtype=torch.float64).log2().item())


def huge_queries(inputs, size, other):
    names = [name for name in ("query", "key", "rel_h", "rel_w", "bias_h", "bias_w") if name in inputs]
    _integers(inputs, *names)
    inputs["query"] *= _power(size)
    inputs["scale"] = 0.5


def huge_terms(inputs, size, other):
    _integers(inputs, "query", "key", "bias_h", "bias_w")
    inputs["bias_h"] *= _power(size)
    inputs["bias_w"] *= _power(size) / 4
    inputs["scale"] = 0.5


def largest_terms(inputs, mask, other):
    """Terms near the largest finite number, alone and two to a sum that is finite."""
    inputs["bias_h"][:, :, 1, :, 0] = -mask
    inputs["bias_w"][:, :, 2, :, 1] = -mask
    inputs["bias_h"][:, :, 0, :, 1] = -mask / 2
    inputs["bias_w"][:, :, 0, :, 1] = -mask / 4


def huge_layer_scores(inputs, size, other):
    _integers(inputs, "query", "keys")
    inputs["query"] *= _power(size)
    inputs["scale"] = 0.5


def huge_elements(inputs, size, other):
    _integers(inputs, "x")
    inputs["x"] *= _power(size)


def huge_weights(inputs, size, other):
    """Products that are not exact: a maximum must be that of what it is subtracted from."""
    inputs["weight_row"] *= _power(size)
    inputs["weight_col"] *= _power(size)


def huge_score_vector(inputs, size, other):
    """The logits are of that size, but products of query and value overflow."""
    inputs["query"] *= _power(size)
    for value in inputs["values"]:
        value *= 2.0**45


def huge_squares(inputs, size, other):
    """Sums of squares overflow: the root mean square is infinite, the logits 0."""
    for value in inputs["values"]:
        value *= 2.0**70


def huge_gates(inputs, size, other):
    _integers(inputs, "fc2_weight", "fc2_bias")
    inputs["fc2_bias"] *= _power(size)


def _huge(op: str, sample: str, edit: Edit, dtypes=(F32, BF16)) -> Case:
    return Case(op, sample, edit.__name__, edit, HUGE, dtypes)


HUGE_CASES = [
    _huge("rel_attention_2d", "small", huge_queries),
    _huge("rel_attention_2d", "no tables", huge_queries),
    _huge("decomposed_bias_attention", "small", huge_queries),
    _huge("decomposed_bias_attention", "small", huge_terms),
    Case("decomposed_bias_attention", "small", "largest_terms", largest_terms, (("finfo.min", "finfo.min"),)),
    _huge("layer_attention", "small", huge_layer_scores),
    _huge("layer_attention", "many layers", huge_layer_scores),
    _huge("layer_attention", "sigmoid", huge_layer_scores),
    _huge("row_col_softmax", "dual, small", huge_elements),
    _huge("row_col_softmax", "small", huge_weights, (F32,)),
    _huge("row_col_softmax", "width 17", huge_weights, (F32,)),
    _huge("attention_residual", "small", huge_score_vector, (F32,)),
    _huge("attention_residual", "depth 77", huge_score_vector, (F32,)),
    _huge("squeeze_excite", "small", huge_gates),
]
LARGE_HUGE_CASES = [
    *(_huge("rel_attention_2d", s, huge_queries) for s in ("per-head tables", "width 8", "width 17")),
    *(
        _huge("decomposed_bias_attention", s, edit)
        for s, edit in itertools.product(("width 8", "width 17"), (huge_queries, huge_terms))
    ),
    _huge("row_col_softmax", "dual, two blocks", huge_elements),
    _huge("row_col_softmax", "two blocks", huge_weights, (F32,)),
]
SQUARES_CASE = Case("attention_residual", "small", "huge_squares", huge_squares, (("1", "1"),), (F32, BF16))
