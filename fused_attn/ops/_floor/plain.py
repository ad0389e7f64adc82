"""Whether a fused op may read a submodule's tensors where PyTorch would call the submodule."""

from __future__ import annotations

from torch import nn
from torch.nn.modules.module import _has_any_global_hook
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

#: Where ``nn.Module.__call__`` looks for hooks.
_HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")


def why_not_plain(module: nn.Module, kind: type[nn.Module]) -> str | None:
    """Say why computing with a layer's weights would differ from calling the layer; None where it would not.

    Args:
        module: what stands where the constructor put a ``kind``.
        kind: ``nn.Linear``, ``nn.BatchNorm2d``.

    A layer is not plain if

    - it has another class: adapters (LoRA), quantisation, ``torch.nn.utils.parametrize``, ``fully_shard`` and
      ``convert_sync_batchnorm`` put one there;
    - it has hooks, or all modules have: pruning and the older weight and spectral norms compute the weight in one;
    - its ``forward`` was replaced on the instance, as accelerate's offloading does;
    - its parameters have other names than ``weight`` and ``bias``;
    - its tensors are of a class that wraps others, such as ``DTensor``.
    """
    if type(module) is not kind:
        return f"is a {type(module).__name__}"
    if "forward" in module.__dict__:
        return "has its forward replaced"
    if any(getattr(module, hooks) for hooks in _HOOKS) or _has_any_global_hook():
        return "has hooks"
    if module._parameters.keys() != {"weight", "bias"} or module._modules:
        return "has other parameters than weight and bias"
    tensors = (*module._parameters.values(), *module._buffers.values())
    if any(tensor is not None and is_traceable_wrapper_subclass(tensor) for tensor in tensors):
        return "has tensors of another class"
    return None


def is_plain(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether computing with the layer's weights is the same as calling it: see :func:`why_not_plain`."""
    return why_not_plain(module, kind) is None
