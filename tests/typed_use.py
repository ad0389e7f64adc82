"""What a type checker must make of the public API: read by mypy (``make lint``), not run."""

from torch import Tensor, nn
from typing_extensions import assert_type

import fused_attn
from fused_attn import modules


def ops(x: Tensor, images: Tensor) -> None:
    assert_type(fused_attn.rel_attention_2d(x, x, x, rel_scale=1.0), Tensor)
    assert_type(fused_attn.decomposed_bias_attention(x, x, x, None, x), Tensor)
    assert_type(fused_attn.bias_attention_2d(x, x, x, x, query_segments=x, key_segments=x), Tensor)
    assert_type(fused_attn.layer_attention(x, [x], [x]), Tensor)
    assert_type(fused_attn.weighted_layer_sum(x, [x]), Tensor)
    assert_type(fused_attn.attention_residual([x], x, norm_weight=x), Tensor)
    assert_type(fused_attn.row_col_softmax(x, impl="reference"), Tensor)
    assert_type(fused_attn.elementwise_attention(images, x, x, None, None, training=True), Tensor)
    fused_attn.rel_attention_2d(x, x, 1.0)  # type: ignore[arg-type]
    fused_attn.rel_attention_2d(x, x, x, window=3)  # type: ignore[call-arg]


def models() -> None:
    assert_type(fused_attn.list_models("aa_*"), list[str])
    assert_type(fused_attn.create_model("aa_wrn_28_10", num_classes=100), nn.Module)


def layers(x: Tensor, layer: nn.Module) -> None:
    assert_type(modules.MRLALight(64).forward(x, x), Tensor)
    assert_type(modules.MRLABase(64).forward(x, fused_attn.LayerCache()), Tensor)
    assert_type(modules.WindowAttention2d(96, 3, 7, shift=3).forward(x), Tensor)
    assert_type(modules.WindowAttention2d(96, 3, 7, resize_tables=True).forward(x, window=(9, 9)), Tensor)
    assert_type(modules.GridAttention2d(96, 3, (7, 7)).forward(x, grid=5), Tensor)
    assert_type(modules.resize_state_dict(layer, layer.state_dict()), tuple[dict[str, Tensor], list[str]])
    assert_type(modules.SqueezeExcite(64).forward(x), Tensor)
    modules.MRLALight("64")  # type: ignore[arg-type]
