"""DTensors, tensor parallel and FSDP: several processes against one."""

import json

import commands
import fork_server
import pytest
import torch
import torch.distributed as dist

from fused_attn.ops import SPECS
from fused_attn.ops._floor import sharding

if not dist.is_available():
    pytest.skip("torch.distributed is not available", allow_module_level=True)

import shard_processes


@pytest.mark.parametrize("processes", [2, 4])
def test_several_processes_give_what_one_gives(processes, tmp_path):
    """All in one group: what starts it takes longer than most of what it does."""
    result = fork_server.ask(shard_processes.__file__, commands.environment(), [str(processes), str(tmp_path)])
    assert result.get("statuses") == [0] * processes, result
    for rank in range(processes):
        failed = json.loads((tmp_path / f"{rank}.json").read_text())
        assert not failed, "\n\n".join(f"{name}, process {rank}: {error}" for name, error in failed.items())


def test_every_operator_has_a_rule():
    from torch.distributed.tensor import DTensor

    sharding.register()
    shared = {"decomposed_bias_attention", "bias_attention_2d"}  # the operators of rel_attention_2d
    names = {
        f"fused_attn::{spec.name}_{impl}" for spec in SPECS for impl in ("cpu", "triton") if spec.name not in shared
    }
    operators = [name for name in torch._C._dispatch_get_all_op_names() if name.removesuffix("_backward") in names]
    assert len(operators) == 2 * len(names) == 28
    for name in operators:
        rules = torch._library.simple_registry.singleton.find(name).torch_dispatch_rules
        assert rules.find(DTensor) is not None, name
    assert {op for op, *_ in shard_processes.CASES.values()} == {spec.name for spec in SPECS}
