"""Whether a fused op may read a submodule's tensors where PyTorch would call the submodule."""

from __future__ import annotations

from torch import nn
from torch.nn.modules.module import _has_any_global_hook
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

#: Where ``nn.Module.__call__`` looks for hooks.
_HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")


def why_not_plain(module: nn.Module, kind: type[nn.Module]) -> str | None:
    """Why the tensors of a layer do not stand for calling it; None where they do.

    Args:
        module: what stands where the constructor put a ``kind``.
        kind: ``nn.Linear``, ``nn.BatchNorm2d``.

    Not plain are: another class, which is what adapters (LoRA), quantisation, ``torch.nn.utils.parametrize``,
    ``fully_shard`` and ``convert_sync_batchnorm`` leave; hooks, its own as those of all modules, which are also how
    pruning and the older weight and spectral norms renew the weight; a ``forward`` of its own, as accelerate's
    offloading sets; parameters under other names; tensors of a class that wraps others, as ``DTensor``.
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
    """Whether a ``kind`` is in no way changed from outside: see :func:`why_not_plain`."""
    return why_not_plain(module, kind) is None
