"""``LayerCache``: the gradients of separate calls, in one buffer per value and memory that grows with the layers."""

import threading

import pytest
import torch
from layer_cases import SIDE, B, C, D, G, assert_same, draw, total
from torch.utils.checkpoint import checkpoint

from fused_attn.ops.layer_attention import LayerCache, layer_attention


def stage(queries, keys, values, impl="cpu", **options):
    """The outputs of every layer of a stage, through the cache."""
    cache, outs = LayerCache(), []
    for query, key, value in zip(queries, keys, values, strict=True):
        cache.append(key, value)
        outs.append(cache.attend(query, impl=impl, **options))
    return outs


def separate(queries, keys, values, impl="cpu", **options):
    """The same by separate calls."""
    return [
        layer_attention(query, keys[: i + 1], values[: i + 1], impl=impl, **options) for i, query in enumerate(queries)
    ]


@pytest.mark.parametrize("layers", [1, 2, 5])
@pytest.mark.parametrize("options", [{}, {"activation": "sigmoid"}, {"scale": 0.3}])
def test_gradients_of_separate_calls(layers, options):
    call = draw(layers)
    leaves = [leaf for group in call for leaf in group]
    actual, expected = stage(*call, **options), separate(*call, **options)
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))
    assert_same(torch.autograd.grad(total(actual), leaves), torch.autograd.grad(total(expected), leaves))


def test_bias():
    call = draw(3)
    bias = torch.randn(3, G, requires_grad=True)
    cache = LayerCache()
    for key, value in zip(*call[1:], strict=True):
        cache.append(key, value)
    actual = cache.attend(call[0][0], bias=bias)
    expected = layer_attention(call[0][0], call[1], call[2], bias=bias)
    leaves = [bias, *call[1], *call[2]]
    assert_same(torch.autograd.grad(total([actual]), leaves), torch.autograd.grad(total([expected]), leaves))


@pytest.mark.parametrize("skip", [(3,), (0, 2), (0, 1, 2)])
def test_outputs_that_do_not_reach_the_loss(skip):
    call = draw(4)
    leaves = [*call[1], *call[2]]
    results = [
        torch.autograd.grad(total(function(*call), skip), leaves, allow_unused=True, materialize_grads=True)
        for function in (stage, separate)
    ]
    assert_same(*results)


def test_backward_twice_through_a_kept_graph():
    call = draw(3)
    outs = stage(*call)
    first = torch.autograd.grad(total(outs), call[2], retain_graph=True)
    second = torch.autograd.grad(total(outs), call[2])
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_a_pass_that_needs_no_value_leaves_nothing_behind():
    call = draw(3)
    outs = stage(*call)
    torch.autograd.grad(total(outs), call[0], retain_graph=True)
    torch.autograd.grad(total(outs), call[2][1:], retain_graph=True)
    leaves = [*call[1], *call[2]]
    assert_same(torch.autograd.grad(total(outs), leaves), torch.autograd.grad(total(separate(*call)), leaves))


def test_a_value_used_elsewhere_too():
    call = draw(3)
    bases = [value.detach().requires_grad_() for value in call[2]]

    def loss(function):
        values = [base.sin() for base in bases]
        return total(function(call[0], call[1], values)) + sum(value.pow(3).sum() for value in values)

    assert_same(torch.autograd.grad(loss(stage), bases), torch.autograd.grad(loss(separate), bases))


def test_appended_values_used_elsewhere_too():
    call = draw(2)
    cache = LayerCache()
    for key, value in zip(*call[1:], strict=True):
        cache.append(key, value)
    extra = cache.values[0].pow(3).sum()
    actual = torch.autograd.grad(cache.attend(call[0][0]).sum() + extra, call[2])
    expected = layer_attention(call[0][0], call[1], call[2]).sum() + call[2][0].pow(3).sum()
    assert_same(actual, torch.autograd.grad(expected, call[2]))


def test_values_that_need_no_gradient():
    queries, keys, values = draw(3)
    values = [values[0], values[1].detach(), values[2]]
    leaves = [*queries, *keys, values[0], values[2]]
    actual = torch.autograd.grad(total(stage(queries, keys, values)), leaves)
    assert_same(actual, torch.autograd.grad(total(separate(queries, keys, values)), leaves))


def test_layers_that_build_on_each_other():
    """As in a network: every value comes from the attention before it."""
    queries, keys, values = draw(4)

    def network(cached):
        x, seen, cache = values[0], [], LayerCache()
        for i, (query, key) in enumerate(zip(queries, keys, strict=True)):
            value = x.tanh()
            if cached:
                cache.append(key, value)
                attention = cache.attend(query)
            else:
                seen.append(value)
                attention = layer_attention(query, keys[: i + 1], seen)
            x = x + attention
        return x.square().sum()

    leaves = [*queries, *keys, values[0]]
    assert_same(torch.autograd.grad(network(True), leaves), torch.autograd.grad(network(False), leaves))


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed_stage(reentrant):
    call = draw(3)
    leaves = [leaf for group in call for leaf in group]

    def run(*tensors):
        return total(stage(tensors[:3], tensors[3:6], tensors[6:]))

    checkpoint(run, *leaves, use_reentrant=reentrant).backward()
    assert_same([leaf.grad for leaf in leaves], torch.autograd.grad(run(*leaves), leaves))


def test_hooks_on_values_see_the_whole_gradient():
    call = draw(3)
    seen = []
    call[2][0].register_hook(seen.append)
    total(stage(*call)).backward()
    assert len(seen) == 1
    assert torch.equal(seen[0], call[2][0].grad)


def test_hooks_after_accumulation_run_once():
    """What DistributedDataParallel and optimisers in the backward pass build on."""
    call = draw(3)
    leaves = [leaf for group in call for leaf in group]
    ran = []
    for i, leaf in enumerate(leaves):
        leaf.register_post_accumulate_grad_hook(lambda _, i=i: ran.append(i))
    total(stage(*call)).backward()
    assert sorted(ran) == list(range(len(leaves)))
    assert_same([leaf.grad for leaf in leaves], torch.autograd.grad(total(separate(*call)), leaves))


class _Network(torch.nn.Module):
    """Values, keys and queries from parameters, one layer after the other."""

    def __init__(self, cached, layers=3):
        super().__init__()
        torch.manual_seed(0)
        self.cached = cached
        self.convolutions = torch.nn.ModuleList(torch.nn.Conv2d(C, C, 3, padding=1) for _ in range(layers))
        self.heads = torch.nn.ModuleList(torch.nn.Linear(C, 2 * G * D) for _ in range(layers))

    def forward(self, x):
        cache, keys, values = LayerCache(), [], []
        for convolution, head in zip(self.convolutions, self.heads, strict=True):
            query, key = head(x.mean((2, 3))).view(-1, 2, G, D).unbind(1)
            value = convolution(x)
            if self.cached:
                cache.append(key, value)
                x = x + cache.attend(query)
            else:
                keys.append(key)
                values.append(value)
                x = x + layer_attention(query, keys, values)
        return x


@pytest.fixture
def one_process_group(tmp_path):
    distributed = pytest.importorskip("torch.distributed")
    if not distributed.is_available():
        pytest.skip("this PyTorch has no torch.distributed")
    distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


def test_distributed_data_parallel(one_process_group):
    x = torch.randn(B, C, SIDE, SIDE)
    plain, wrapped = _Network(cached=False), _Network(cached=True)
    parallel = torch.nn.parallel.DistributedDataParallel(wrapped)
    for network in (plain, parallel):
        network(x).square().sum().backward()
    assert_same([p.grad for p in wrapped.parameters()], [p.grad for p in plain.parameters()])


@pytest.mark.parametrize("cached", [False, True])
def test_compiled_stage(cached):
    """In one graph; the cache makes the separate calls there."""
    torch._dynamo.reset()
    x, network, plain = torch.randn(B, C, SIDE, SIDE), _Network(cached), _Network(cached=False)
    compiled = torch.compile(network, fullgraph=True, backend="aot_eager")
    out, expected = compiled(x), plain(x)
    torch.testing.assert_close(out, expected)
    grads = torch.autograd.grad(out.square().sum(), list(network.parameters()))
    assert_same(grads, torch.autograd.grad(expected.square().sum(), list(plain.parameters())))


def _recorded_by_another_thread(function, *args):
    """``function(*args)`` where autograd's count of operations starts anew: its backward pass runs late."""
    results = []
    thread = threading.Thread(target=lambda: results.append(function(*args)))
    thread.start()
    thread.join()
    return results[0]


@pytest.mark.parametrize("layouts", [("last", "first"), ("first", "last"), ("first", "expanded")])
@pytest.mark.parametrize("late", [False, True])
def test_values_of_several_memory_orders(layouts, late):
    """With ``late``, the attention over both values adds to the gradient that the one over the first has begun."""
    queries, keys, _ = draw(2)
    make = {
        "first": lambda: torch.randn(B, C, SIDE, SIDE),
        "last": lambda: torch.randn(B, C, SIDE, SIDE).to(memory_format=torch.channels_last),
        "expanded": lambda: torch.randn(1, C, 1, 1).expand(B, C, SIDE, SIDE),
    }
    values = [make[name]().requires_grad_() for name in layouts]
    cache = LayerCache()
    cache.append(keys[0], values[0])
    first = cache.attend(queries[0])
    cache.append(keys[1], values[1])
    both = _recorded_by_another_thread(cache.attend, queries[1]) if late else cache.attend(queries[1])
    actual = torch.autograd.grad(total([first, both]), values)
    assert_same(actual, torch.autograd.grad(total(separate(queries, keys, values)), values))


def test_autocast():
    call = draw(3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual, expected = stage(*call), separate(*call)
    assert actual[0].dtype == torch.bfloat16
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))
    grads = (torch.autograd.grad(total(outs), call[2]) for outs in (actual, expected))
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=0.02, atol=0.05)


def test_reference_in_float64():
    call = draw(3, torch.float64)
    leaves = [leaf for group in call for leaf in group]
    actual = torch.autograd.grad(total(stage(*call, impl="reference")), leaves)
    assert_same(actual, torch.autograd.grad(total(separate(*call, impl="reference")), leaves))


def test_value_changed_in_place_after_it_was_appended():
    query, key, value = (group[0].detach() for group in draw(1))
    cache = LayerCache()
    cache.append(key, value)
    value.mul_(2)
    with pytest.raises(RuntimeError, match=r"values\[0\] was changed in place"):
        cache.attend(query)


def test_nothing_appended():
    with pytest.raises(ValueError, match="keys must hold at least one layer, got none"):
        LayerCache().attend(torch.randn(B, G, D))


class _Saved:
    """Bytes of the distinct storages that autograd keeps."""

    def __init__(self):
        self.storages = {}

    def pack(self, tensor):
        self.storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor


def test_saved_bytes_grow_with_the_layers_not_their_square():
    saved = {}
    for layers in (4, 8, 16, 32):
        call = draw(layers)
        counter = _Saved()
        with torch.autograd.graph.saved_tensors_hooks(counter.pack, lambda tensor: tensor):
            outs = stage(*call)
        saved[layers] = sum(counter.storages.values())
        del outs
    maps = B * C * SIDE * SIDE * 4
    for layers, size in saved.items():
        # One map, one query, one key of every layer; the weights alone are a number per pair of layers.
        weights = sum(B * G * (i + 1) * 4 for i in range(layers))
        assert size == layers * (maps + 2 * B * G * D * 4) + weights


def test_maps_of_a_backward_pass_grow_with_the_layers_not_their_square():
    """Maps allocated by the backward pass of a stage: one gradient per value, and what autograd adds to it."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Allocations(TorchDispatchMode):
        count = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            if function.overloadpacket in (torch.ops.aten.new_empty_strided, torch.ops.aten.zeros_like):
                self.count += out.numel() == B * C * SIDE * SIDE
            return out

    counts = {}
    for layers in (4, 8, 16):
        call = draw(layers)
        loss = total(stage(*call))
        with Allocations() as allocations:
            loss.backward()
        counts[layers] = allocations.count
    assert counts == {4: 4, 8: 8, 16: 16}


def _peak_of(function):
    """Most bytes that PyTorch's CPU allocator holds at once while ``function`` runs, beyond those before."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        function()
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def test_peak_of_a_backward_pass_grows_with_the_layers_not_their_square():
    maps, peaks = B * C * SIDE * SIDE * 4, {}
    for layers in (4, 8, 16, 32):
        call = draw(layers)
        loss = total(stage(*call))
        peaks[layers] = _peak_of(loss.backward) / maps
    # A gradient of each value and one of each output, and little else: T(T+1)/2 maps would be 528.
    assert all(layers <= peak <= 2.1 * layers for layers, peak in peaks.items()), peaks
