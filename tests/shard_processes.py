"""What each of several processes does in tests/test_sharding.py.  As a script, the server that they are forked from."""

import copy
import datetime
import json
import multiprocessing
import re
import traceback

import fork_server
import pytest
import torch
import torch.distributed as dist
from model_checks import build
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_module, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

import fused_attn
from fused_attn import LayerCache, modules


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

# --- operators --------------------------------------------------------------------------------------------------------

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
    """The arguments with ``place(name, tensor)`` in the place of every tensor, and those that have gradients."""
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


def run(function, call, leaves, seed=5):
    """The output, then all gradients, then the running statistics."""
    torch.manual_seed(seed)
    out = function(**call)
    factors = draw(*out.shape, dtype=out.dtype)
    if isinstance(out, DTensor):
        factors = distribute_tensor(factors, out.device_mesh, [Replicate()] * out.device_mesh.ndim)
    (out * factors).sum().backward()
    return [out, *(leaf.grad for leaf in leaves), *(value for name, value in call.items() if "running" in name)]


def whole(tensor):
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def close(got, want, bar=2e-5):
    for one, other in zip(got, want, strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            torch.testing.assert_close(whole(one), whole(other), rtol=bar, atol=bar)


def compare(mesh, op, arguments, shards, expected):
    """One call with the tensors sharded as ``shards`` says, against the plain one."""
    function = getattr(fused_attn, op)

    def place(name, tensor):
        placements = shards.get(name, (Replicate(),) * mesh.ndim)
        if Partial() in placements:
            return DTensor.from_local(tensor / mesh.size(), mesh, placements)
        return distribute_tensor(tensor, mesh, placements)

    plain = run(function, *prepared(arguments, lambda name, tensor: tensor))
    # Every process draws another seed, and that of the first counts.
    sharded = run(function, *prepared(arguments, place), seed=5 + dist.get_rank())
    assert sharded[0].placements == expected, sharded[0].placements
    close(sharded, plain, 0.03 if plain[0].dtype == torch.bfloat16 else 2e-5)


def on_one_mesh(mesh, case):
    op, arguments, shards, expected = CASES[case]
    compare(mesh, op, arguments, {name: (placement,) for name, placement in shards.items()}, (expected,))


def layer_cache(mesh):
    """Its kernels are called below the dispatcher, where no rule of DTensor is."""

    def grads(place):
        layers = [place(draw(4, 2, 3) + i).requires_grad_() for i in range(3)]
        values = [place(draw(4, 6, 3, 5) + i).requires_grad_() for i in range(3)]
        cache, total = LayerCache(), 0.0
        for layer, value in zip(layers, values, strict=True):
            cache.append(layer, value)
            total = total + cache.attend(layer).square().sum()
        total.backward()
        return [each.grad for each in (*layers, *values)]

    close(grads(lambda tensor: distribute_tensor(tensor, mesh, [Shard(0)])), grads(torch.clone))


def without_gradients(mesh):
    query = distribute_tensor(draw(4, 2, 3, 4, 8), mesh, [Shard(0)]).requires_grad_()
    with torch.no_grad():
        out = fused_attn.rel_attention_2d(query, query, query)
    assert out.placements == (Shard(0),)
    assert not out.requires_grad
    with torch.inference_mode():
        assert fused_attn.rel_attention_2d(query, query, query).placements == (Shard(0),)


def errors(mesh):
    plain = draw(4, 2, 3, 4, 8)
    query = distribute_tensor(plain, mesh, [Shard(0)])
    other = distribute_tensor(plain, init_device_mesh("cpu", (dist.get_world_size(), 1)), [Replicate()] * 2)
    for key, kind, text in (
        (plain, TypeError, "key must be a DTensor, as query is, got a Tensor"),
        (other, ValueError, "key must be on the mesh of query"),
    ):
        with pytest.raises(kind, match=text):
            fused_attn.rel_attention_2d(query, key, query)


def compiled(mesh):
    """Forward and backward in one graph each."""
    function = torch.compile(fused_attn.rel_attention_2d, backend="aot_eager", fullgraph=True, dynamic=False)
    _, arguments, shards, _ = CASES["rel_attention_2d, heads"]
    results = []
    for call in (fused_attn.rel_attention_2d, function):
        place = {name: [placement] for name, placement in shards.items()}
        results.append(run(call, *prepared(arguments, lambda name, it, p=place: distribute_tensor(it, mesh, p[name]))))
    assert results[1][0].placements == (Shard(1),)
    close(*results)


# --- modules ----------------------------------------------------------------------------------------------------------


class Attention(nn.Module):
    """Attention over a grid whose projections can be split by heads; the number of heads is that of this process."""

    def __init__(self, dim=8, head_dim=4, size=(3, 4)):
        super().__init__()
        self.head_dim = head_dim
        self.query, self.key, self.value, self.proj = (nn.Linear(dim, dim) for _ in range(4))
        self.table = nn.Parameter(torch.randn(dim // head_dim, 2 * size[0] - 1, 2 * size[1] - 1))

    def forward(self, x):
        query, key, value = (
            project(x).unflatten(-1, (-1, self.head_dim)).permute(0, 3, 1, 2, 4)
            for project in (self.query, self.key, self.value)
        )
        out = fused_attn.bias_attention_2d(query, key, value, self.table)
        return self.proj(out.permute(0, 2, 3, 1, 4).flatten(3))


def same_module(mesh, module, x, shard, bar=2e-5):
    """Output and gradients of a module before and after ``shard(module)``, which may change the input too."""
    torch.manual_seed(1)
    plain = module()
    for parameter in plain.parameters():
        nn.init.normal_(parameter, std=0.5)
    sharded = copy.deepcopy(plain)
    x = shard(sharded, x)
    results = []
    for each, given in ((plain, whole(x)), (sharded, x)):
        given = given.detach().clone().requires_grad_()
        out = each(given)
        out.square().sum().backward()
        results.append([out, given.grad, *(parameter.grad for parameter in each.parameters())])
    close(results[1], results[0], bar)
    return results[1][0]


def heads_of_a_module(mesh):
    def shard(module, x):
        by_heads = ColwiseParallel(use_local_output=False)
        plan = {"query": by_heads, "key": by_heads, "value": by_heads, "proj": RowwiseParallel()}
        parallelize_module(module, mesh, plan)
        module.table = nn.Parameter(distribute_tensor(module.table.detach(), mesh, [Shard(0)]))
        return x

    same_module(mesh, Attention, draw(2, 3, 4, 8), shard)


def layers_of_squeeze_excite(mesh):
    def shard(module, x):
        parallelize_module(module, mesh, {"fc1": ColwiseParallel(), "fc2": RowwiseParallel()})
        return x

    same_module(mesh, lambda: modules.SqueezeExcite(8, 2), draw(4, 8, 3, 5), shard)


def images_of_modules(mesh):
    def shard(module, x):
        distribute_module(module, mesh)
        return distribute_tensor(x, mesh, [Shard(0)])

    for build_module in (
        lambda: modules.WindowAttention2d(8, 2, 4, 2),
        lambda: modules.RelPosAttention2d(8, 8, 8, 2, (8, 8)),
        lambda: modules.SqueezeExcite(8, 2),
    ):
        out = same_module(mesh, build_module, draw(4, 8, 8, 8), shard, 1e-4)
        assert out.placements == (Shard(0),), out.placements


# --- models -----------------------------------------------------------------------------------------------------------


def shard_blocks(model, mesh, low):
    """The recipe of docs/training.md: a group for each block; in low precision, norms in one of their own."""
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32) if low else None
    if low:
        full = MixedPrecisionPolicy(param_dtype=torch.float32, cast_forward_inputs=False)
        for module in model.modules():
            if isinstance(module, (nn.BatchNorm2d, nn.LayerNorm)) and module.weight is not None:
                fully_shard(module, mesh=mesh, mp_policy=full)
    options = {"mp_policy": policy} if low else {}
    blocks = [module for module in model.modules() if re.search("Block|Bottleneck$", type(module).__name__)]
    assert blocks
    for module in (*blocks, model):
        fully_shard(module, mesh=mesh, **options)


def fsdp(mesh, label, low):
    """Two steps, against a process that takes the mean of what the processes' images give."""
    model = build(label).train()
    alone = copy.deepcopy(model)
    shard_blocks(model, mesh, low)
    dtypes = set()
    for module in model.modules():
        if isinstance(module, (nn.BatchNorm2d, nn.LayerNorm, nn.Conv2d, nn.Linear)) and module.weight is not None:
            module.register_forward_hook(lambda m, *_: dtypes.add(("Norm" in type(m).__name__, m.weight.dtype)))
    shares = [draw(2, 3, 16, 16) + i for i in range(mesh.size())]
    steps = [torch.optim.SGD(each.parameters(), lr=0.05) for each in (model, alone)]
    for step in range(2):
        torch.manual_seed(step)
        loss = model(shares[dist.get_rank()]).float().square().mean()
        loss.backward()
        losses = []
        for images in shares:
            torch.manual_seed(step)
            losses.append(alone(images).square().mean())
            (losses[-1] / mesh.size()).backward()
        for each in steps:
            each.step()
            each.zero_grad()
        close([loss], [losses[dist.get_rank()]], 0.05 if low else 1e-4)
    assert dtypes == {(True, torch.float32), (False, torch.bfloat16 if low else torch.float32)}, dtypes
    close(model.parameters(), alone.parameters(), 0.02 if low else 1e-4)


# --- processes --------------------------------------------------------------------------------------------------------

TWO = {case: (lambda mesh, case=case: on_one_mesh(mesh, case)) for case in CASES}
TWO |= {
    function.__name__: function
    for function in (
        layer_cache, without_gradients, errors, compiled, heads_of_a_module, layers_of_squeeze_excite,
        images_of_modules,
    )
}  # fmt: skip
TWO |= {
    f"fully_shard, {label}, {dtype}": lambda mesh, label=label, low=low: fsdp(mesh, label, low)
    for label in ("aa_wrn", "mrla_base_deit", "coatnet")
    for dtype, low in (("float32", False), ("bfloat16", True))
}

BOTH = dict.fromkeys(["query", "key", "value", "prefix_key", "prefix_value"], (Shard(0), Shard(1)))
FOUR = {
    "images and heads": (
        "rel_attention_2d",
        {**attention(), "rel_h": draw(2, 4, 8), "rel_w": draw(6, 8), **prefix()},
        BOTH | {"rel_h": (Replicate(), Shard(0))},
        (Shard(0), Shard(1)),
    ),
    "images twice, dropout": (
        "bias_attention_2d",
        {**attention(batch=8), "bias_table": draw(2, 4, 6), **segments(2), "dropout_p": 0.5},
        dict.fromkeys(BOTH, (Shard(0), Shard(0))),
        (Shard(0), Shard(0)),
    ),
    "images too few for both": ("rel_attention_2d", attention(batch=2), BOTH, (Shard(0), Shard(1))),
    "images too few": (
        "rel_attention_2d",
        attention(batch=2),
        dict.fromkeys(BOTH, (Shard(0), Shard(0))),
        (Shard(0), Replicate()),
    ),
    "images and groups": (
        "layer_attention",
        LAYERS,
        dict.fromkeys(("query", "keys", "values"), (Shard(1), Shard(0))),
        (Shard(1), Shard(0)),
    ),
}


def _process(rank, processes, folder):
    """Do all that ``processes`` processes do; the names of what failed, with the errors, are in ``folder``."""
    torch.set_num_threads(1)
    limit = datetime.timedelta(seconds=60)  # where one process stops at an error, and the other waits for it
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/group", rank=rank, world_size=processes, timeout=limit
    )
    mesh = init_device_mesh("cpu", (2,) * (processes // 2))
    steps = TWO if processes == 2 else {name: lambda mesh, c=case: compare(mesh, *c) for name, case in FOUR.items()}
    failed = {}
    for name, step in steps.items():
        try:
            step(mesh)
        except Exception:
            failed[name] = traceback.format_exc()
    with open(f"{folder}/{rank}.json", "w") as file:
        json.dump(failed, file)
    dist.barrier()
    dist.destroy_process_group()


def _group(arguments):
    processes, folder = int(arguments[0]), arguments[1]
    fork = multiprocessing.get_context("fork")
    group = [fork.Process(target=_process, args=(rank, processes, folder)) for rank in range(processes)]
    fork_server.run_all(group)


if __name__ == "__main__":
    import torch._dynamo
    import torch._inductor.compile_fx

    fork_server.serve(_group)
