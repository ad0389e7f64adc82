"""Checkpoints: whole or absent, whatever the disk does."""

import errno
import hashlib
import json
import os
import pickle
import resource
import zipfile
from pathlib import Path

import pytest
import torch

from fused_attn.train import TrainError, atomic, checkpoint


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def save(folder, step, size=10):
    weights = {"model": {"weight": torch.full((size,), float(step)), "count": torch.tensor(step)}}
    return checkpoint.save(folder, step, weights, {"step": step, "optimizer": {"momentum": torch.ones(3)}})


def test_what_is_saved_is_loaded_and_the_last_two_are_kept(tmp_path):
    for step in (5, 10, 15):
        save(tmp_path, step)
    assert [path.name for path in checkpoint.find(tmp_path)] == ["step-00000010", "step-00000015"]
    weights, state = checkpoint.load(checkpoint.find(tmp_path)[-1])
    assert torch.equal(weights["model"]["weight"], torch.full((10,), 15.0))
    assert weights["model"]["count"].dtype == torch.int64
    assert state["step"] == 15
    assert torch.equal(state["optimizer"]["momentum"], torch.ones(3))


def test_tensors_in_channels_last_memory_survive(tmp_path):
    weight = torch.randn(4, 3, 2, 2).contiguous(memory_format=torch.channels_last)
    path = checkpoint.save(tmp_path, 1, {"model": {"weight": weight}}, {"momentum": weight})
    weights, state = checkpoint.load(path)
    assert torch.equal(weights["model"]["weight"], weight)
    assert torch.equal(state["momentum"], weight)


@pytest.mark.parametrize(
    ("module", "function"), [(checkpoint, "save_file"), (torch, "save"), (os, "fsync"), (os, "rename")]
)
def test_a_full_disk_leaves_the_earlier_checkpoints_alone(tmp_path, monkeypatch, module, function):
    save(tmp_path, 1)
    save(tmp_path, 2)
    before = contents(tmp_path)

    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(module, function, full)
    with pytest.raises(TrainError, match=r"step-00000003 could not be written .*No space left.*step-00000002"):
        save(tmp_path, 3)
    monkeypatch.undo()
    assert contents(tmp_path) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000001", "step-00000002"]
    save(tmp_path, 3)
    checkpoint.load(checkpoint.find(tmp_path)[-1])


def test_a_disk_that_takes_no_more_bytes(tmp_path):
    """The kernel refuses the write itself: no function is replaced."""
    save(tmp_path, 1)
    before = contents(tmp_path)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        with pytest.raises(TrainError, match=r"step-00000002 could not be written .*step-00000001"):
            save(tmp_path, 2, size=1_000_000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert contents(tmp_path) == before


@pytest.mark.parametrize("name", ["model.safetensors", "state.pt", "checksums.json"])
@pytest.mark.parametrize("damage", ["flipped", "truncated", "missing"])
def test_damage_is_found_and_named_with_the_checkpoint_before(tmp_path, name, damage):
    save(tmp_path, 1)
    path = save(tmp_path, 2)
    content = bytearray((path / name).read_bytes())
    if damage == "missing":
        (path / name).unlink()
    elif damage == "truncated":
        (path / name).write_bytes(content[: len(content) // 2])
    else:
        middle = len(content) // 2
        content[middle] ^= 0x55
        (path / name).write_bytes(content)
    with pytest.raises(TrainError, match=r"step-00000002 cannot be read .*remove it to resume from step-00000001"):
        checkpoint.load(path)
    checkpoint.load(checkpoint.find(tmp_path)[0])


class Bomb:
    def __reduce__(self):
        return os.mkdir, (os.environ["BOMB"],)


def test_a_state_that_would_run_code_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("BOMB", str(tmp_path / "exploded"))
    path = save(tmp_path / "run", 1)
    state = path / "state.pt"
    with zipfile.ZipFile(state) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(state, "w") as archive:
        for name, content in entries.items():
            archive.writestr(name, pickle.dumps(Bomb(), protocol=2) if name.endswith("data.pkl") else content)
    sums = json.loads((path / "checksums.json").read_text())
    sums["state.pt"] = hashlib.sha256(state.read_bytes()).hexdigest()
    (path / "checksums.json").write_text(json.dumps(sums))
    with pytest.raises(TrainError, match="Weights only load failed"):
        checkpoint.load(path)
    assert not (tmp_path / "exploded").exists()


def test_text_is_replaced_whole_or_not_at_all(tmp_path, monkeypatch):
    atomic.write_text(tmp_path / "metrics.json", "old")

    def full(*args):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        atomic.write_text(tmp_path / "metrics.json", "new")
    assert (tmp_path / "metrics.json").read_text() == "old"
