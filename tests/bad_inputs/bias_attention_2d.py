"""Invalid calls of bias_attention_2d."""

from functools import partial

from fused_attn.ops.bias_attention_2d import spec

from .calls import bad_call
from .rel_attention_2d import common_bad

_make = partial(spec.make_inputs, **spec.SMALL)
_bad = partial(bad_call, _make)
BAD_INPUTS = {
    "bias_attention_2d": (
        *common_bad(_make),
        _bad("index", ValueError, r"index must be one of .*, got 'q-k'", index="q-k"),
        _bad("no table", TypeError, r"bias_table must be a tensor, got NoneType", bias_table=None),
        _bad(
            "table height",
            ValueError,
            r"bias_table must have shape \(heads, Hq\+Hk-1, Wq\+Wk-1\)=\(2, 5, 7\), got \(2, 4, 7\)",
            bias_table=lambda x: x[:, 1:],
        ),
        _bad("table width", ValueError, r"bias_table must .*, got \(2, 5, 6\)", bias_table=lambda x: x[..., 1:]),
        _bad("table transposed", ValueError, r"bias_table must .*, got \(2, 7, 5\)", bias_table=lambda x: x.mT),
        _bad("table heads", ValueError, r"bias_table must .*, got \(1, 5, 7\)", bias_table=lambda x: x[:1]),
        _bad("table rank", ValueError, r"bias_table must .*, got \(5, 7\)", bias_table=lambda x: x[0]),
        _bad(
            "table of positions by heads",
            ValueError,
            r"bias_table must have shape .*, got \(35, 2\)",
            bias_table=lambda x: x.flatten(1).mT,
        ),
        _bad("table integer", TypeError, r"bias_table must have a floating", bias_table=lambda x: x.int()),
        _bad("table dtype", ValueError, r"bias_table must have the dtype of query", bias_table=lambda x: x.half()),
        _bad("table device", ValueError, r"bias_table must be on the device of", bias_table=lambda x: x.to("meta")),
    ),
}
