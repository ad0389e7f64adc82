"""``LayerCache`` through autograd's other doors: gradients of cached values, hooks, and checkpoints that share it."""

import functools

import pytest
import torch
from layer_cases import SIDE, B, C, D, G, assert_same, draw, total
from torch.utils.checkpoint import checkpoint

from fused_attn.ops.layer_attention import LayerCache, layer_attention


class SeparateCalls:
    """What a cache stands for: lists, and a call of ``layer_attention`` over them."""

    def __init__(self):
        self.keys, self.values = [], []

    def append(self, key, value):
        self.keys.append(key)
        self.values.append(value)

    def attend(self, query, **options):
        return layer_attention(query, self.keys, self.values, **options)


def network(cache, call, build=torch.tanh, impls=("cpu",)):
    """The loss of a stage whose values are computed by ``build`` from those of ``call`` and from the layers before."""
    x, outs = 0.0, []
    for i, (query, key, value) in enumerate(zip(*call, strict=True)):
        cache.append(key, build(value + 0.1 * x) if build else value)
        outs.append(cache.attend(query, impl=impls[i % len(impls)]))
        x = outs[-1]
    return total(outs)


def grad(cache, loss):
    return torch.autograd.grad(loss, list(cache.values))


def grad_of_some(cache, loss):
    return torch.autograd.grad(loss, list(cache.values)[1:2])


def grad_beside_others(cache, loss):
    return torch.autograd.grad(loss, [*cache.values, *cache.keys])


def grad_of_a_loss_that_uses_them(cache, loss):
    return torch.autograd.grad(loss + sum(value.pow(3).sum() for value in cache.values), list(cache.values))


def retain_grad(cache, loss):
    for value in cache.values:
        value.retain_grad()
    loss.backward()
    return [value.grad for value in cache.values]


def retain_grad_twice(cache, loss):
    for value in cache.values:
        value.retain_grad()
    loss.backward(retain_graph=True)
    loss.backward()
    return [value.grad for value in cache.values]


def hooks(cache, loss):
    seen = [[] for _ in cache.values]
    for value, into in zip(cache.values, seen, strict=True):
        value.register_hook(into.append)
    loss.backward()
    assert [len(gradients) for gradients in seen] == [1] * len(seen)
    return [gradients[0] for gradients in seen]


def one_hook_over_all(cache, loss):
    seen = []
    torch.autograd.graph.register_multi_grad_hook(list(cache.values), lambda gradients: seen.extend(gradients))
    loss.backward()
    return seen


OBSERVERS = [
    grad,
    grad_of_some,
    grad_beside_others,
    grad_of_a_loss_that_uses_them,
    retain_grad,
    retain_grad_twice,
    hooks,
    one_hook_over_all,
]


@pytest.mark.parametrize("impls", [("cpu",), ("reference",), ("cpu", "reference")], ids="-".join)
@pytest.mark.parametrize("build", [torch.tanh, None], ids=["computed", "leaves"])
@pytest.mark.parametrize("observe", OBSERVERS, ids=lambda observe: observe.__name__)
def test_gradients_of_cached_values(observe, build, impls):
    results = []
    for cache in (LayerCache(), SeparateCalls()):
        call = draw(4)
        results.append(observe(cache, network(cache, call, build, impls)))
    assert_same(*results)


@pytest.mark.parametrize("observe", OBSERVERS, ids=lambda observe: observe.__name__)
def test_gradients_of_cached_values_under_autocast(observe):
    results = []
    for cache in (LayerCache(), SeparateCalls()):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = network(cache, draw(4))
        results.append(observe(cache, loss))
    for a, b in zip(*results, strict=True):
        assert a.dtype == torch.float32
        torch.testing.assert_close(a, b, rtol=0.02, atol=0.3)


def test_hook_that_changes_the_gradient():
    """What the value was computed from gets what the hook returned."""
    results = []
    for cache in (LayerCache(), SeparateCalls()):
        call = draw(3)
        loss = network(cache, call)
        cache.values[1].register_hook(lambda gradient: 3 * gradient)
        results.append(torch.autograd.grad(loss, [leaf for group in call for leaf in group]))
    assert_same(*results)


def test_cached_values_are_those_that_were_appended():
    call, cache = draw(3), LayerCache()
    network(cache, call, build=None)
    for kept, given in ((cache.values, call[2]), (cache.keys, call[1])):
        assert all(a is b for a, b in zip(kept, given, strict=True))
    for name in ("keys", "values"):
        with pytest.raises(TypeError, match="does not support item assignment"):
            getattr(cache, name)[0] = call[1][0]
        with pytest.raises(AttributeError):
            setattr(cache, name, [])


@pytest.mark.parametrize("late", ["requires_grad_", "no_grad"])
def test_value_that_got_a_gradient_after_it_was_appended(late):
    queries, keys, values = draw(3)
    if late == "requires_grad_":
        values = [value.detach() for value in values]
    results = []
    for cache in (LayerCache(), SeparateCalls()):
        fresh = [value.detach().requires_grad_(late == "no_grad") for value in values]
        with torch.set_grad_enabled(late != "no_grad"):
            for key, value in zip(keys, fresh, strict=True):
                cache.append(key, value)
        for value in fresh:
            value.requires_grad_()
        results.append(torch.autograd.grad(total([cache.attend(query) for query in queries]), fresh))
    assert_same(*results)


def test_passes_without_gradients_of_the_values_leave_nothing_behind():
    call = draw(2)
    cache = LayerCache()
    loss = network(cache, call, torch.tanh)
    for _ in range(3):
        torch.autograd.grad(loss, call[0], retain_graph=True)
    assert not any(layer.buffer.sums for layer in cache._layers)


def test_backward_pass_inside_another():
    """A hook that differentiates the same graph while a pass is half way through it."""
    results = []
    for cache in (LayerCache(), SeparateCalls()):
        call, outs, inner = draw(4), [], []
        for query, key, value in zip(*call, strict=True):
            cache.append(key, value.tanh())
            outs.append(cache.attend(query))
        loss = total(outs)

        def differentiate(_, loss=loss, values=call[2], inner=inner):
            if not inner:  # the hook runs in the inner pass, too
                inner.append(None)
                inner.extend(torch.autograd.grad(loss, values, retain_graph=True))

        # By then the later attentions have added to the values' gradients, the earlier ones have not.
        outs[1].register_hook(differentiate)
        results.append([*torch.autograd.grad(loss, call[2], retain_graph=True), *inner[1:]])
    assert_same(*results)


@pytest.mark.parametrize("transform", ["grad", "jvp", "forward_ad"])
def test_transforms(transform):
    """As the separate calls do: right, or with their error."""
    call = draw(2)
    queries, keys, values = ([leaf.detach() for leaf in group] for group in call)

    def loss(cache, value):
        for query, key, each in zip(queries, keys, (value, values[1]), strict=True):
            cache.append(key, each)
            out = cache.attend(query, impl="reference")
        return out.square().sum()

    results = []
    for cache in (LayerCache(), SeparateCalls()):
        function = functools.partial(loss, cache)
        if transform == "grad":
            results.append([torch.func.grad(function)(values[0])])
        elif transform == "jvp":
            results.append(torch.func.jvp(function, (values[0],), (values[1],)))
        else:
            with torch.autograd.forward_ad.dual_level():
                out = function(torch.autograd.forward_ad.make_dual(values[0], values[1]))
                results.append([torch.autograd.forward_ad.unpack_dual(out).tangent])
    assert_same(*results)


# --- checkpoints ------------------------------------------------------------------------------------------------


class Blocks(torch.nn.Module):
    """Blocks of a network that share a cache, each with parameters of its own."""

    def __init__(self, layers=4):
        super().__init__()
        torch.manual_seed(0)
        self.values = torch.nn.ModuleList(torch.nn.Conv2d(C, C, 3, padding=1) for _ in range(layers))
        self.heads = torch.nn.ModuleList(torch.nn.Linear(C, 2 * G * D) for _ in range(layers))

    def project(self, i, x):
        query, key = self.heads[i](x.mean((2, 3))).view(-1, 2, G, D).unbind(1)
        return query, key, self.values[i](x).tanh()

    def block(self, i, x, cache):
        query, key, value = self.project(i, x)
        cache.append(key, value)
        return (x + cache.attend(query)).sin()

    def forward(self, x, run=None):
        run = run or (lambda function, *args, cache: function(*args, cache))
        cache = LayerCache()
        for i in range(len(self.values)):
            x = run(self.block, i, x, cache=cache)
        return x.square().sum()


def _gradients(function):
    x = torch.linspace(-1, 1, B * C * SIDE * SIDE).view(B, C, SIDE, SIDE).requires_grad_()
    blocks = Blocks()
    loss = function(blocks, x)
    loss.backward()
    return [loss.detach(), x.grad, *(parameter.grad for parameter in blocks.parameters())]


def _expected():
    return _gradients(lambda blocks, x: blocks(x))


def _with_contexts(function, i, x, *, cache):
    return checkpoint(function, i, x, cache, use_reentrant=False, context_fn=cache.checkpoint_contexts)


def test_checkpointed_blocks_that_share_a_cache():
    actual = _gradients(lambda blocks, x: blocks(x, _with_contexts))
    assert all(torch.equal(a, b) for a, b in zip(actual, _expected(), strict=True))


def test_some_blocks_checkpointed():
    def run(function, i, x, *, cache):
        return _with_contexts(function, i, x, cache=cache) if i % 2 else function(i, x, cache)

    actual = _gradients(lambda blocks, x: blocks(x, run))
    assert all(torch.equal(a, b) for a, b in zip(actual, _expected(), strict=True))


@pytest.mark.parametrize("early_stop", [False, True])
def test_two_blocks_to_a_checkpoint(early_stop):
    def forward(blocks, x):
        cache = LayerCache()

        def pair(i, x):
            return blocks.block(i + 1, blocks.block(i, x, cache), cache)

        with torch.utils.checkpoint.set_checkpoint_early_stop(early_stop):
            for i in (0, 2):
                x = checkpoint(pair, i, x, use_reentrant=False, context_fn=cache.checkpoint_contexts)
        return x.square().sum()

    assert all(torch.equal(a, b) for a, b in zip(_gradients(forward), _expected(), strict=True))


def test_checkpointed_blocks_run_backward_twice():
    def twice(blocks, x):
        loss = blocks(x, _with_contexts)
        loss.backward(retain_graph=True)
        for leaf in (x, *blocks.parameters()):
            leaf.grad = None
        return loss

    assert all(torch.equal(a, b) for a, b in zip(_gradients(twice), _expected(), strict=True))


def test_cache_is_as_before_after_a_checkpointed_backward():
    blocks, cache = Blocks(2), LayerCache()
    x = torch.randn(B, C, SIDE, SIDE, requires_grad=True)
    for i in range(2):
        x = _with_contexts(blocks.block, i, x, cache=cache)
    values = cache.values
    x.sum().backward()
    assert len(cache) == 2
    assert all(a is b for a, b in zip(cache.values, values, strict=True))


@pytest.mark.parametrize("reentrant", [False, True])
def test_cache_outside_the_checkpoints(reentrant):
    """The way that both kinds of checkpoint take: project inside, append and attend outside."""

    def forward(blocks, x):
        cache = LayerCache()
        for i in range(len(blocks.values)):
            query, key, value = checkpoint(blocks.project, i, x, use_reentrant=reentrant)
            cache.append(key, value)
            x = (x + cache.attend(query)).sin()
        return x.square().sum()

    assert_same(_gradients(forward), _expected())


SHARED = r"LayerCache: (append|attend) .* ran again in the backward pass.*context_fn=cache.checkpoint_contexts"


@pytest.mark.parametrize("inside", ["both", "append", "attend"])
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("early_stop", [False, True])
def test_cache_that_a_checkpoint_would_change_again(reentrant, inside, early_stop):
    def forward(blocks, x):
        cache = LayerCache()

        def run(i, x, query, key, value):
            query, key, value = (query, key, value) if inside == "attend" else blocks.project(i, x)
            if inside != "attend":
                cache.append(key, value)
            return (x + cache.attend(query)).sin() if inside != "append" else (x * 1, query)

        for i in range(len(blocks.values)):
            outside = (None, None, None)
            if inside == "attend":
                outside = blocks.project(i, x)
                cache.append(*outside[1:])
            x = checkpoint(run, i, x, *outside, use_reentrant=reentrant)
            if inside == "append":
                x, query = x
                x = (x + cache.attend(query)).sin()
        return x.square().sum()

    if (reentrant, inside) == (False, "append") and early_stop:
        # The second run ends with the last tensor that is needed, before it gets to the cache.
        assert all(torch.equal(a, b) for a, b in zip(_gradients(forward), _expected(), strict=True))
        return
    with pytest.raises(RuntimeError, match=SHARED), torch.utils.checkpoint.set_checkpoint_early_stop(early_stop):
        _gradients(forward)


@pytest.mark.parametrize("outer", [False, True])
@pytest.mark.parametrize("inner", [False, True])
def test_nested_checkpoints(outer, inner):
    """The cache is made in the outer one: the inner ones, which share it, say so or are told how long it was."""

    def forward(blocks, x, contexts):
        def stage(x):
            cache = LayerCache()
            for i in range(3):
                options = {"context_fn": cache.checkpoint_contexts} if contexts else {}
                x = checkpoint(blocks.block, i, x, cache, use_reentrant=inner, **options)
            return x

        return checkpoint(stage, x, use_reentrant=outer).square().sum()

    with pytest.raises(RuntimeError, match=SHARED):
        _gradients(lambda blocks, x: forward(blocks, x, contexts=False))
    if not inner:
        actual = _gradients(lambda blocks, x: forward(blocks, x, contexts=True))
        expected = _gradients(lambda blocks, x: _stage(blocks, x))
        for a, b in zip(actual, expected, strict=True):
            assert (a is None) == (b is None)
            assert a is None or torch.equal(a, b)


def _stage(blocks, x):
    cache = LayerCache()
    for i in range(3):
        x = blocks.block(i, x, cache)
    return x.square().sum()
