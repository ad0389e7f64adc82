"""Invalid calls of bias_attention_2d."""

from functools import partial

from fused_attn.ops.bias_attention_2d import spec
from fused_attn.testing.checks import BadInput

from .rel_attention_2d import bad_call, common_bad

_bad = partial(bad_call, spec.make_inputs)
BAD_INPUTS = {
    "bias_attention_2d": (
        *common_bad(spec.make_inputs),
        BadInput("index", _bad(index="q-k"), ValueError, r"index must be one of .*, got 'q-k'"),
        BadInput("no table", _bad(bias_table=None), TypeError, r"bias_table must be a tensor, got NoneType"),
        BadInput(
            "table height",
            _bad(bias_table=lambda x: x[:, 1:]),
            ValueError,
            r"bias_table must have shape \(heads, Hq\+Hk-1, Wq\+Wk-1\)=\(2, 5, 7\), got \(2, 4, 7\)",
        ),
        BadInput(
            "table width", _bad(bias_table=lambda x: x[..., 1:]), ValueError, r"bias_table must .*, got \(2, 5, 6\)"
        ),
        BadInput(
            "table transposed", _bad(bias_table=lambda x: x.mT), ValueError, r"bias_table must .*, got \(2, 7, 5\)"
        ),
        BadInput("table heads", _bad(bias_table=lambda x: x[:1]), ValueError, r"bias_table must .*, got \(1, 5, 7\)"),
        BadInput("table rank", _bad(bias_table=lambda x: x[0]), ValueError, r"bias_table must .*, got \(5, 7\)"),
        BadInput(
            "table of positions by heads",
            _bad(bias_table=lambda x: x.flatten(1).mT),
            ValueError,
            r"bias_table must have shape .*, got \(35, 2\)",
        ),
        BadInput("table integer", _bad(bias_table=lambda x: x.int()), TypeError, r"bias_table must have a floating"),
        BadInput(
            "table dtype", _bad(bias_table=lambda x: x.half()), ValueError, r"bias_table must have the dtype of query"
        ),
        BadInput(
            "table device", _bad(bias_table=lambda x: x.to("meta")), ValueError, r"bias_table must be on the device of"
        ),
    ),
}
