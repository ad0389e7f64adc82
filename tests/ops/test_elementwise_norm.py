"""The batch normalisation in element-wise attention is found, and decides, as any other of a network."""

import copy

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from norm_processes import build, draw, step
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim.swa_utils import AveragedModel, update_bn

from fused_attn import _extension, create_model, row_col_softmax

IMPLEMENTATIONS = ["reference", "cpu"] if _extension.available() else ["reference"]
implementations = pytest.mark.parametrize("impl", IMPLEMENTATIONS)


def expected(module, norm, x):
    """The module's output with another norm, in plain PyTorch."""
    product = row_col_softmax(x, module.weight_row, module.weight_col, impl="reference").flatten(1, 2)
    return norm(product) * x.repeat(1, 3, 1, 1)


def same_buffers(norm, other):
    for (name, buffer), (other_name, other_buffer) in zip(norm.named_buffers(), other.named_buffers(), strict=True):
        assert name == other_name
        torch.testing.assert_close(buffer, other_buffer, rtol=1e-5, atol=1e-7)


def test_it_is_a_batch_norm_without_parameters():
    module = build(eps=1e-3, momentum=0.3)
    norms = [part for part in module.modules() if isinstance(part, _BatchNorm)]
    assert norms == [module.norm]
    assert (module.norm.num_features, module.norm.eps, module.norm.momentum) == (6, 1e-3, 0.3)
    assert not list(module.norm.parameters())
    assert {*module.state_dict()} == {
        "weight_row", "weight_col", "norm.running_mean", "norm.running_var", "norm.num_batches_tracked",
    }  # fmt: skip


def test_state_dicts_with_statistics_of_the_modules_own_load():
    model = create_model("attention_wise_a", image_size=8)
    for batch in draw(3, 4, 3, 8, 8):
        model(batch)
    state = model.state_dict()
    old = {name.replace(".attention.norm.", ".attention."): value for name, value in state.items()}
    assert old.keys() != state.keys()
    again = create_model("attention_wise_a", image_size=8)
    again.load_state_dict(old)
    for name, value in again.state_dict().items():
        assert torch.equal(value, state[name]), name
    averaged = AveragedModel(create_model("attention_wise_a", image_size=8), use_buffers=True)
    averaged.load_state_dict(
        {"n_averaged": torch.tensor(1), **{f"module.{name}": value for name, value in old.items()}}
    )
    assert torch.equal(
        averaged.module.layers[0].attention.norm.running_var, state["layers.0.attention.norm.running_var"]
    )
    del old["layers.0.attention.running_mean"]
    with pytest.raises(RuntimeError, match=r"Missing key.*layers\.0\.attention\.norm\.running_mean"):
        again.load_state_dict(old)


@implementations
def test_update_bn_resets_and_averages(impl):
    module = build(impl)
    module(10.0 * draw(4, 2, 5, 6))  # statistics to forget
    batches = [draw(n, 2, 5, 6) for n in (4, 3, 5)]
    norm = nn.BatchNorm2d(6, affine=False, momentum=None)
    for x in batches:
        expected(module, norm, x)
    update_bn(batches, module)
    same_buffers(module.norm, norm)
    assert module.norm.momentum == 0.1


@implementations
def test_freezing_by_type(impl):
    module = build(impl)
    module(draw(4, 2, 5, 6))
    x = draw(3, 2, 5, 6)
    evaluated = copy.deepcopy(module).eval()(x)
    module.train()
    for part in module.modules():
        if isinstance(part, _BatchNorm):
            part.eval()
    before = copy.deepcopy(module.norm)
    assert torch.equal(module(x), evaluated)
    same_buffers(module.norm, before)
    assert torch.equal(module.norm.num_batches_tracked, before.num_batches_tracked)


@implementations
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    "settings", [{"momentum": 0.7}, {"momentum": None}, {"eps": 0.1}, {"track_running_stats": False}, {}], ids=str
)
def test_what_the_norm_says_counts(impl, training, settings):
    module = build(impl)
    norm = nn.BatchNorm2d(6, affine=False)
    for part in (module.norm, norm):
        for name, value in settings.items():
            setattr(part, name, value)
    for x in (draw(4, 2, 5, 6), draw(3, 2, 5, 6)):
        norm.train(training)
        module.train(training)
        torch.testing.assert_close(module(x), expected(module, norm, x), rtol=1e-4, atol=1e-5)
    same_buffers(module.norm, norm)


@implementations
def test_without_statistics(impl):
    """``track_running_stats=False`` at construction: there are no buffers, and the batch's statistics always count."""
    module = build(impl)
    module.norm = nn.BatchNorm2d(6, affine=False, track_running_stats=False)
    x = draw(4, 2, 5, 6)
    for mode in (True, False):
        torch.testing.assert_close(
            module.train(mode)(x), expected(module, copy.deepcopy(module.norm), x), rtol=1e-4, atol=1e-5
        )


def test_averaged_models_average_it():
    module = build()
    averaged = AveragedModel(module, use_buffers=True)
    averaged.update_parameters(module)
    first = module.norm.running_mean.clone()
    module(draw(4, 2, 5, 6))
    averaged.update_parameters(module)
    torch.testing.assert_close(averaged.module.norm.running_mean, (first + module.norm.running_mean) / 2)


# --- synchronised statistics ------------------------------------------------------------------------------------------


@implementations
def test_converted_to_a_synchronised_batch_norm(impl):
    """Alone, it computes what it did; where it synchronises is its own business."""
    plain = build(impl)
    converted = nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(plain))
    assert isinstance(converted.norm, nn.SyncBatchNorm)
    x = draw(4, 2, 5, 6)
    for training in (True, False):
        results = []
        for module in (plain, converted):
            out = module.train(training)(x)
            results.append((out, *torch.autograd.grad(out.square().sum(), [module.weight_row, module.weight_col])))
        for got, want in zip(*results, strict=True):
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    same_buffers(converted.norm, plain.norm)
    assert converted.state_dict().keys() == plain.state_dict().keys()


@pytest.mark.skipif(not dist.is_available(), reason="torch.distributed is not available")
def test_statistics_over_two_processes_are_those_of_the_whole_batch(tmp_path):
    """Whatever stands in the place of the norm is called, with autograd through it: here one that synchronises."""
    mp.spawn(step, args=(str(tmp_path),), nprocs=2)  # one that dies ends the other, and is an error here
    refusal, state = torch.load(tmp_path / "state", weights_only=True)
    assert "SyncBatchNorm expected input tensor to be on" in refusal  # PyTorch's own error, not unsynchronised numbers
    whole = build(momentum=1.0)
    whole(draw(6, 2, 5, 6)).square().sum().backward()
    for name, parameter in whole.named_parameters():
        torch.testing.assert_close(2 * state[name], parameter.grad, rtol=1e-4, atol=1e-5)  # DDP takes the mean
    for name in ("norm.running_mean", "norm.running_var"):
        torch.testing.assert_close(state[name], whole.get_buffer(name), rtol=1e-4, atol=1e-6)
