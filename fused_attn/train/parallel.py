"""Several processes: the network whole in each of them, or its parameters in shards."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from torch import Tensor, nn

from .config import TrainConfig


def make_accelerator(config: TrainConfig) -> Accelerator:
    # Accelerate keeps one state per process, and refuses another precision for a second run in the same process.
    AcceleratorState._reset_state(reset_partial_state=False)
    GradientState._reset_state()
    return Accelerator(
        cpu=not torch.cuda.is_available(),  # without a GPU it sees torchrun's processes only when told so
        mixed_precision=config.mixed_precision,
        gradient_accumulation_steps=config.accumulate,
    )


def shard(network: nn.Module, accelerator: Accelerator) -> None:
    """Shard the parameters of a network over all processes, in place: they become DTensors.

    Those of a block are whole while it computes, and those outside of blocks while the network does.  PyTorch's own
    ``fully_shard`` rather than Accelerate's plugin, which has it on accelerators alone.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(accelerator.device.type, (accelerator.num_processes,))
    for module in (*_blocks(network), network):
        # The whole network too, which otherwise stays whole after a forward pass without a backward pass.
        fully_shard(module, mesh=mesh, reshard_after_forward=True)


def _blocks(network: nn.Module) -> Iterator[nn.Module]:
    """What the sequences and lists within a network consist of, but for single layers."""
    containers = (nn.Sequential, nn.ModuleList)
    for module in network.modules():
        if isinstance(module, containers):
            for part in module:
                if not isinstance(part, containers) and [*part.children()] and [*part.parameters()]:
                    yield part


def whole(state: Any) -> Any:
    """A state or a tensor, with whole tensors in the place of sharded ones, which all processes gather together."""
    if isinstance(state, Mapping):
        return {name: whole(value) for name, value in state.items()}
    if isinstance(state, (list, tuple)):
        return type(state)(map(whole, state))
    return state.full_tensor() if _is_sharded(state) else state


def sharded_as(tensor: Any, parameter: Tensor) -> Any:
    """The shard of ``tensor``, which every process has, where ``parameter`` is sharded and of its shape."""
    if not _is_sharded(parameter) or not isinstance(tensor, Tensor) or tensor.shape != parameter.shape:
        return tensor
    from torch.distributed.tensor import distribute_tensor

    sharded: Any = parameter
    return distribute_tensor(tensor.to(sharded.device), sharded.device_mesh, sharded.placements, src_data_rank=None)


def load_network(network: nn.Module, state: Mapping[str, Tensor]) -> None:
    """``network.load_state_dict`` of whole tensors."""
    own = network.state_dict()
    network.load_state_dict({name: sharded_as(value, own.get(name, value)) for name, value in state.items()})


def load_optimizer(optimizer: torch.optim.Optimizer, state: Mapping[str, Any]) -> None:
    """``optimizer.load_state_dict`` of whole tensors."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    of_parameters = {
        number: {name: sharded_as(value, parameters[number]) for name, value in values.items()}
        for number, values in state["state"].items()
    }
    optimizer.load_state_dict({**state, "state": of_parameters})


def _is_sharded(value: object) -> bool:
    return isinstance(value, Tensor) and hasattr(value, "full_tensor")
