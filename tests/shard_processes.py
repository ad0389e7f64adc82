"""What each of several processes does in tests/test_sharding.py: started processes import no test file."""

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

import fused_attn
from fused_attn import LayerCache
from fused_attn.ops.layer_attention import gated_shortcut  # noqa: F401


def draw(*size, dtype=torch.float32):
    return torch.randn(size, generator=torch.Generator().manual_seed(sum(size))).to(dtype)


def attention(dtype=torch.float32, batch=4, heads=2):
    """Query, key and value of 3 x 4 queries and 2 x 3 keys."""
    sizes = (3, 4, 8), (2, 3, 8), (2, 3, 5)
    return dict(zip(("query", "key", "value"), (draw(batch, heads, *size, dtype=dtype) for size in sizes), strict=True))


def prefix():
    return {"prefix_key": draw(4, 2, 3, 8), "prefix_value": draw(4, 2, 3, 5)}


def segments(sets):
    ids = torch.arange(sets * 12, dtype=torch.int32).view(sets, 3, 4) // 5 % 3
    return {"query_segments": ids, "key_segments": ids[:, :2, :3].contiguous()}


def images(names, dim=0):
    return dict.fromkeys(names.split(), Shard(dim))


MAPS = "query key value prefix_key prefix_value bias_h bias_w"
HEADS = images(MAPS, 1) | {"rel_h": Shard(0), "rel_w": Shard(0), "bias_table": Shard(0)}
EXCITE = {"x": draw(4, 6, 3, 5), "fc1_weight": draw(4, 6), "fc1_bias": draw(4), "fc2_weight": draw(6, 4)}
EXCITE |= {"fc2_bias": draw(6), "residual": draw(4, 6, 3, 5) + 0.5, "activation": "relu"}
SOFTMAX = {"x": draw(4, 2, 3, 5), "weight_row": draw(4, 2, 3, 5), "weight_col": draw(4, 2, 3, 5) + 0.1}
RUNNING = {"running_mean": draw(8), "running_var": draw(8).abs() + 0.5}
ONE_HEAD = {name: tensor[:1] if "weight" in name else tensor for name, tensor in SOFTMAX.items()}
LAYERS = {"query": draw(4, 2, 3), "keys": [draw(4, 2, 3) + i for i in range(3)], "bias": draw(3, 2)}
LAYERS["values"] = [draw(4, 6, 3, 5) + i for i in range(3)]
RESIDUAL = {"values": [draw(4, 6, 8) + i for i in range(3)], "query": draw(8), "norm_weight": draw(8)}

#: Name -> (function, arguments, shards of the arguments, shards of the output; what is not named is replicated).
CASES = {
    "rel_attention_2d, images": (
        "rel_attention_2d",
        {**attention(), "rel_h": draw(4, 8), "rel_w": draw(6, 8), **prefix()},
        images(MAPS),
        Shard(0),
    ),
    "rel_attention_2d, heads": (
        "rel_attention_2d",
        {**attention(), "rel_h": draw(2, 4, 8), "rel_w": draw(6, 8), **prefix()},
        {**HEADS, "rel_w": Replicate()},
        Shard(1),
    ),
    "rel_attention_2d, bfloat16": (
        "rel_attention_2d",
        {**attention(torch.bfloat16), "rel_h": draw(4, 8, dtype=torch.bfloat16)},
        images(MAPS),
        Shard(0),
    ),
    "rel_attention_2d, depths": ("rel_attention_2d", attention(), images(MAPS, 4), Replicate()),
    "rel_attention_2d, three images": ("rel_attention_2d", attention(batch=3), images(MAPS), Replicate()),
    "rel_attention_2d, only the key": ("rel_attention_2d", attention(), images("key"), Shard(0)),
    "rel_attention_2d, key by images and query by heads": (
        "rel_attention_2d",
        attention(),
        {"query": Shard(1), "key": Shard(0), "value": Partial()},
        Shard(1),
    ),
    "rel_attention_2d, dropout": ("rel_attention_2d", {**attention(), "dropout_p": 0.5}, images(MAPS), Shard(0)),
    "rel_attention_2d, dropout of heads": ("rel_attention_2d", {**attention(), "dropout_p": 0.5}, HEADS, Replicate()),
    "rel_attention_2d, dropout of copies": ("rel_attention_2d", {**attention(), "dropout_p": 0.5}, {}, Replicate()),
    "decomposed_bias_attention, images": (
        "decomposed_bias_attention",
        {**attention(), "bias_h": draw(4, 2, 3, 4, 2), "bias_w": draw(4, 2, 3, 4, 3)},
        images(MAPS),
        Shard(0),
    ),
    "decomposed_bias_attention, heads": (
        "decomposed_bias_attention",
        {**attention(), "bias_h": draw(4, 2, 3, 4, 2), "bias_w": draw(4, 2, 3, 4, 3)},
        HEADS,
        Shard(1),
    ),
    "bias_attention_2d, images": (
        "bias_attention_2d",
        {**attention(), "bias_table": draw(2, 4, 6), **segments(1)},
        images(MAPS),
        Shard(0),
    ),
    "bias_attention_2d, heads": (
        "bias_attention_2d",
        {**attention(), "bias_table": draw(2, 4, 6), **segments(4), **prefix()},
        HEADS,
        Shard(1),
    ),
    "bias_attention_2d, two sets of segments": (
        "bias_attention_2d",
        {**attention(), "bias_table": draw(2, 4, 6), **segments(2)},
        images(MAPS),
        Shard(0),
    ),
    "bias_attention_2d, segments of every image": (
        "bias_attention_2d",
        {**attention(), "bias_table": draw(2, 4, 6), **segments(4)},
        images(MAPS),
        Shard(0),
    ),
    "bias_attention_2d, sets that would be parted": (
        "bias_attention_2d",
        {**attention(batch=6), "bias_table": draw(2, 4, 6), **segments(2)},
        images(MAPS),
        Replicate(),
    ),
    "row_col_softmax, images": ("row_col_softmax", SOFTMAX, images("x"), Shard(0)),
    "row_col_softmax, channels": ("row_col_softmax", SOFTMAX, images("x weight_row weight_col", 1), Shard(2)),
    "row_col_softmax, heads": ("row_col_softmax", SOFTMAX, images("weight_row weight_col"), Shard(1)),
    "row_col_softmax, rows": ("row_col_softmax", SOFTMAX, images("x weight_row weight_col", 3), Replicate()),
    "row_col_softmax, masks": (
        "row_col_softmax",
        {"x": draw(4, 2, 3, 5), "row_mask": draw(4, 3) > -1, "col_mask": draw(4, 5) > -1, "temperature": 0.5},
        images("x row_mask col_mask"),
        Shard(0),
    ),
    "row_col_softmax, channels under masks": (
        "row_col_softmax",
        {"x": draw(4, 2, 3, 5), "row_mask": draw(4, 3) > -1},
        images("x", 1),
        Shard(1),
    ),
    "elementwise_attention, images in training": (
        "elementwise_attention",
        {**SOFTMAX, **RUNNING, "training": True},
        images("x"),
        Replicate(),
    ),
    "elementwise_attention, images": (
        "elementwise_attention",
        {**SOFTMAX, **RUNNING, "training": False},
        images("x"),
        Shard(0),
    ),
    "elementwise_attention, heads in training": (
        "elementwise_attention",
        {**SOFTMAX, **RUNNING, "training": True},
        images("weight_row weight_col running_mean running_var"),
        Shard(1),
    ),
    "elementwise_attention, channels of several heads": (
        "elementwise_attention",
        {**SOFTMAX, **RUNNING, "training": False},
        images("x weight_row weight_col", 1),
        Replicate(),
    ),
    "elementwise_attention, channels in training": (
        "elementwise_attention",
        {**ONE_HEAD, "running_mean": None, "running_var": None, "training": True},
        images("x weight_row weight_col", 1),
        Shard(1),
    ),
    "layer_attention, images": ("layer_attention", LAYERS, images("query keys values"), Shard(0)),
    "layer_attention, groups": ("layer_attention", LAYERS, images("query keys values bias", 1), Shard(1)),
    "layer_attention, one query for all": (
        "layer_attention",
        {**LAYERS, "query": draw(2, 3), "activation": "sigmoid"},
        images("keys values"),
        Shard(0),
    ),
    "weighted_layer_sum, images": (
        "weighted_layer_sum",
        {"weights": draw(4, 2, 3), "values": LAYERS["values"]},
        images("weights values"),
        Shard(0),
    ),
    "weighted_layer_sum, groups": (
        "weighted_layer_sum",
        {"weights": draw(4, 2, 3), "values": LAYERS["values"]},
        images("weights values", 1),
        Shard(1),
    ),
    "attention_residual, images": ("attention_residual", RESIDUAL, images("values"), Shard(0)),
    "attention_residual, tokens": ("attention_residual", RESIDUAL, images("values", 1), Shard(1)),
    "attention_residual, depths": ("attention_residual", RESIDUAL, images("values", 2), Replicate()),
    "squeeze_excite, images": ("squeeze_excite", EXCITE, images("x residual"), Shard(0)),
    "squeeze_excite, channels": ("squeeze_excite", EXCITE, images("x residual", 1), Replicate()),
    "squeeze_excite, result": (
        "squeeze_excite",
        {"x": draw(4, 6, 3, 5), "fc1_weight": draw(4, 9), "fc1_bias": None, "fc2_weight": draw(6, 4)}
        | {"result": draw(4, 3)},
        images("x result"),
        Shard(0),
    ),
    "squeeze_excite, share and one layer": (
        "squeeze_excite",
        {"x": draw(4, 6, 3, 5), "fc1_weight": draw(6, 6), "fc1_bias": draw(6), "result_share": draw(4, 6)},
        images("x result_share"),
        Shard(0),
    ),
}  # fmt: skip


def prepared(arguments, place):
    """The arguments with ``place(name, tensor)`` in the place of every tensor, and those of them that have gradients."""
    leaves, call = [], {}
    for name, value in arguments.items():
        items = []
        for item in value if isinstance(value, list) else [value]:
            if isinstance(item, torch.Tensor):
                item = place(name, item.clone())
                if item.is_floating_point() and "running" not in name:
                    leaves.append(item.requires_grad_())
            items.append(item)
        call[name] = items if isinstance(value, list) else items[0]
    return call, leaves


def run(function, call, leaves):
    """The output, then all gradients, then the running statistics."""
    torch.manual_seed(5)
    out = function(**call)
    (out * draw_like(out)).sum().backward()
    return [out, *(leaf.grad for leaf in leaves), *(value for name, value in call.items() if "running" in name)]


def draw_like(out):
    factors = draw(*out.shape, dtype=out.dtype)
    if isinstance(out, DTensor):
        factors = distribute_tensor(factors, out.device_mesh, [Replicate()] * out.device_mesh.ndim)
    return factors


def whole(tensor):
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def check(name, mesh):
    op, arguments, shards, expected = CASES[name]
    function = getattr(fused_attn, op)

    def place(argument, tensor):
        placement = shards.get(argument, Replicate())
        if placement.is_partial():
            return DTensor.from_local(tensor / mesh.size(), mesh, [placement])
        return distribute_tensor(tensor, mesh, [placement])

    plain = run(function, *prepared(arguments, lambda argument, tensor: tensor))
    sharded = run(function, *prepared(arguments, place))
    assert sharded[0].placements == (expected,), f"{name}: {sharded[0].placements}"
    for got, want in zip(sharded, plain, strict=True):
        if want is None:
            assert got is None, name
            continue
        got = whole(got)
        bar = 0.03 if want.dtype == torch.bfloat16 else 2e-5
        torch.testing.assert_close(got, want, rtol=bar, atol=bar, msg=lambda text: f"{name}: {text}")
