"""Every submodule of every model is called: hooks run, what they return counts, offloading and sharding work."""

import re
from collections import defaultdict

import pytest
import torch
from model_checks import MODELS, build, images
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.optim.swa_utils import update_bn

from fused_attn import list_models
from fused_attn.models import registry

models = pytest.mark.parametrize("label", MODELS)


def scalar(out):
    """A number that depends on every output of a model."""
    if isinstance(out, torch.Tensor):
        return out.square().sum()
    return sum(scalar(part) for part in out)


def watched(model):
    """Every module that is called: those with state in them, but for lists, and for the whole where it returns one."""
    return {
        path: part
        for path, part in model.named_modules()
        if [*part.buffers(), *part.parameters()]
        and not isinstance(part, (nn.ModuleList, nn.ModuleDict))
        and (path or getattr(model, "fc", model) is not None)
    }


def test_every_class_of_the_registry_is_here():
    there = {family.build for family in registry._FAMILIES}
    here = {registry._find(name).build for name, _ in MODELS.values()}
    assert there == here
    for pattern in ("aa_*", "sa_*", "mrla_base_*", "mrla_light_*", "se_a_*", "se_r_*", "se_m_*"):
        assert {*list_models(pattern)} & {name for name, _ in MODELS.values()}, pattern


@models
def test_every_hook_runs(label):
    """Forward and backward, before and after, as often as each other."""
    model, seen = build(label), []
    for path, part in watched(model).items():
        part.register_forward_pre_hook(lambda m, args, p=path: seen.append(("forward pre", p)))
        part.register_forward_hook(lambda m, args, out, p=path: seen.append(("forward", p)))
        part.register_full_backward_pre_hook(lambda m, grad, p=path: seen.append(("backward pre", p)))
        part.register_full_backward_hook(lambda m, gi, go, p=path: seen.append(("backward", p)))
    scalar(model(images())).backward()
    kinds = ("forward pre", "forward", "backward pre", "backward")
    ran = {kind: sorted(path for k, path in seen if k == kind) for kind in kinds}
    assert set(ran["forward"]) == set(watched(model))
    for kind in kinds:
        assert ran[kind] == ran["forward"], kind
    assert all(parameter.grad is not None for parameter in model.parameters())


@models
def test_what_a_hook_returns_counts(label):
    """One layer of every kind, a kind being the same path but for the numbers in it."""
    model = build(label).double()
    update_bn([images().double()], model)  # or values grow from block to block, until softmaxes are at their ends
    model.eval()
    kinds = defaultdict(list)
    for path, part in watched(model).items():
        if not any(True for _ in part.children()):
            kinds[re.sub(r"\d+", "#", path)].append(path)

    def changed(path):
        handle = model.get_submodule(path).register_forward_hook(lambda m, args, out: out * 0.01 + 0.1)
        out = scalar(model(images().double()))
        handle.remove()
        return out != before

    with torch.no_grad():
        before = scalar(model(images().double()))
        for kind, paths in kinds.items():
            if kind.startswith("auxiliary") and label not in ("se_r", "se_m"):
                continue  # for the loss of the training only
            # The first of several layers has no others to attend to; what the last does to patches no one sees; a
            # softmax or sigmoid may be at its end.
            assert any(changed(path) for path in (paths[-1], paths[len(paths) // 2])), kind
        assert scalar(model(images().double())) == before


@models
def test_what_a_hook_keeps_is_what_the_module_returned(label):
    """No later layer writes into it."""
    model, kept = build(label), []

    def keep(module, args, out):
        if isinstance(out, torch.Tensor):
            kept.append((type(module).__name__, out, out.detach().clone()))

    for part in watched(model).values():
        part.register_forward_hook(keep)
    model(images())
    assert kept
    assert not [name for name, out, copied in kept if not torch.equal(out, copied)]


OFFLOADED = ["aa_wrn", "sa_resnet20", "mrla_light_deit", "mrla_base_deit", "se_r", "attention_wise", "googlenet"]


@pytest.mark.parametrize("label", OFFLOADED)
def test_cpu_offload(label):
    accelerate = pytest.importorskip("accelerate")
    model = build(label).eval()
    with torch.no_grad():
        expected = model(images())
        offloaded = accelerate.cpu_offload(model, execution_device="cpu")
        assert all(parameter.is_meta for parameter in offloaded.parameters())
        torch.testing.assert_close(offloaded(images()), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("label", ["sa_resnet20", "deit", "se", "se_r"])
def test_dynamic_quantisation(label):
    model = build(label).eval()
    quantised = torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, torch.qint8)
    assert not any(type(part) is nn.Linear for part in quantised.modules())
    with torch.no_grad():
        out, expected = quantised(images()), model(images())
    assert not torch.equal(out, expected)
    torch.testing.assert_close(out, expected, rtol=0.2, atol=0.1 * float(expected.abs().max()))


@pytest.fixture
def one_process(tmp_path):
    """A process group of this process alone."""
    dist = pytest.importorskip("torch.distributed")
    if not dist.is_available():
        pytest.skip("torch.distributed is not available")
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'group'}", rank=0, world_size=1)
    try:
        yield init_device_mesh("cpu", (1,))
    finally:
        dist.destroy_process_group()


SHARDED = {
    "every Linear": lambda part: type(part) is nn.Linear,
    "every block": lambda part: re.search("Block|Bottleneck$", type(part).__name__),
    "every stage": lambda part: isinstance(part, nn.Sequential) and len(part) > 1,
}


@pytest.mark.parametrize(
    "label", ["aa_wrn", "sa_resnet20", "sa_resnet20 of convolutions", "se", "se_r", "mrla_base_deit"]
)
@pytest.mark.parametrize("what", SHARDED)
def test_fully_shard(label, what, one_process):
    """Two steps, as without sharding."""
    losses = []
    for sharded in (False, True):
        model = build(label)
        if sharded:
            parts = [part for part in model.modules() if SHARDED[what](part)]
            if not parts:
                pytest.skip("has none")
            for part in parts:
                fully_shard(part, mesh=one_process)
            fully_shard(model, mesh=one_process)
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
        torch.manual_seed(1)  # of the dropout
        losses.append([])
        for _ in range(2):
            loss = scalar(model(images()))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses[-1].append(loss.detach())
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-3, atol=1e-4)
    assert losses[0][0] != losses[0][1]
