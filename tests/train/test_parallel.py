"""A network in shards over two processes takes the steps of one process, and its files are those of one."""

import pytest
import torch
from runs import FEW_BLOCKS, PLAIN, events, linear, two_processes
from safetensors.torch import load_file

from fused_attn.models import bottleneck_resnet
from fused_attn.train import TrainError, checkpoint, loop, train

#: Nothing is drawn in a step, and a part of the batch is a process's share: batch statistics are of the same images.
STILL = {"crop_padding": 0, "flip": False, "batch_size": 8, "train_images": 32, "eval_every": 0}
MODELS = {
    "aa_wrn": {"model": "aa_wrn_10_1", "max_steps": 4},
    "mrla_base": {"model": "mrla_base_resnet50", "model_options": ("stem=cifar",), "max_steps": 2, "lr": 0.01},
}


def losses(folder):
    return [event["loss"] for event in events(folder)]


def same_files(folder, other, exact=()):
    """Checkpoints of the same names, shapes and dtypes, and of nearly the same numbers."""
    last = (checkpoint.find(each / "checkpoints")[-1] for each in (folder, other))
    (one, state), (two, others) = map(checkpoint.load, last)
    pairs = [(one[stem], two[stem]) for stem in one]
    pairs += [(state["optimizer"]["state"][i], values) for i, values in others["optimizer"]["state"].items()]
    pairs += [tuple(load_file(each / "model.safetensors") for each in (folder, other))]
    assert one.keys() == two.keys()
    assert state.keys() == others.keys()
    assert state["optimizer"]["param_groups"] == others["optimizer"]["param_groups"]
    for ours, theirs in pairs:
        assert ours.keys() == theirs.keys()
        for name, tensor in ours.items():
            if isinstance(tensor, torch.Tensor):
                assert type(theirs[name]) is torch.Tensor
                torch.testing.assert_close(theirs[name], tensor, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", MODELS)
def test_sharded_models(small, tmp_path, monkeypatch, name):
    monkeypatch.setitem(bottleneck_resnet.BLOCKS, 50, FEW_BLOCKS)
    settings = {**STILL, **MODELS[name]}
    train(small(tmp_path / "one", **settings, accumulate=2))
    two_processes(tmp_path / "two", **settings, parallel="fsdp")
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-4)


@pytest.mark.parametrize("first", [1, 2])
def test_sharded_runs_resume_in_one_process_and_the_other_way_round(small, tmp_path, monkeypatch, first):
    monkeypatch.setattr(loop, "build_network", linear)
    settings = {"ema": 0.9, "momentum": 0.9, "log_gradient": "1.weight[2]"}
    settings |= {"optimizer": "adamw", "lr": 0.01} if first == 1 else {"clip_norm": 0.5}
    train(small(tmp_path / "whole", **PLAIN | settings))
    for processes, more in ((first, {"max_steps": 5}), (3 - first, {"resume": True})):
        if processes == 1:
            train(small(tmp_path / "parts", **PLAIN | settings | more, parallel="fsdp"))
        else:
            two_processes(tmp_path / "parts", **settings, **more, parallel="fsdp")
    assert losses(tmp_path / "parts") == pytest.approx(losses(tmp_path / "whole"), rel=1e-4)
    for one, other in zip(events(tmp_path / "parts"), events(tmp_path / "whole"), strict=True):
        assert one["gradient_mean"] == pytest.approx(other["gradient_mean"], rel=1e-3, abs=1e-6)
    same_files(tmp_path / "whole", tmp_path / "parts")


def test_runs_of_copies_resume_in_shards(small, tmp_path, monkeypatch):
    """In evaluation, processes with fewer images go through as many forward passes: they gather shards together."""
    monkeypatch.setattr(loop, "build_network", linear)
    settings = {"epochs": 1, "validation": 33, "eval_batch_size": 16}  # 17 images and 16
    two_processes(tmp_path / "run", **settings, max_steps=3)
    two_processes(tmp_path / "run", **settings, max_steps=6, parallel="fsdp", resume=True)
    train(small(tmp_path / "one", **PLAIN | settings | {"max_steps": 6}))
    ours, theirs = (events(tmp_path / name, "epoch")[-1] for name in ("run", "one"))
    for split in ("validation", "test"):
        assert ours[f"{split}_accuracy"] == theirs[f"{split}_accuracy"]
        assert ours[f"{split}_loss"] == pytest.approx(theirs[f"{split}_loss"], rel=1e-5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mixed_precision": "fp16"}, "mixed_precision must be no or bf16 with fsdp, got 'fp16'"),
        ({"compile": True}, "compile must be False with fsdp, got True"),
        ({"parallel": "zero"}, "parallel must be "),
    ],
)
def test_what_does_not_go_with_shards(small, tmp_path, changes, message):
    with pytest.raises(TrainError, match=message):
        small(tmp_path, **{"parallel": "fsdp", **changes})
