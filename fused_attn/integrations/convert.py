"""Fused ops in the place of attention and squeeze-excite layers of a model, and back."""

from __future__ import annotations

import functools
import inspect
import os
import sys
from collections.abc import Collection, Iterable, Iterator, Mapping

from torch import nn

from . import kornia_hosts, lucidrains_hosts, timm_hosts, transformers_hosts
from .host import Host, class_path, method_of, own_methods, release, version_of
from .report import ALREADY, REPLACED, Candidate, Report

#: ``module:Class`` of a host, or ``module:Class.method`` where that is served and not its forward -> how.
#: Strings: no host is imported for it.
HOSTS: dict[str, Host] = {
    **timm_hosts.HOSTS,
    **transformers_hosts.HOSTS,
    **kornia_hosts.HOSTS,
    **lucidrains_hosts.HOSTS,
}
OPS = tuple(dict.fromkeys(host.op for host in HOSTS.values()))
#: package -> the versions whose classes the layers were written for and tested with: from the first to below the second
VERSIONS = {
    "bottleneck_transformer_pytorch": lucidrains_hosts.VERSIONS,
    "kornia": kornia_hosts.VERSIONS,
    "timm": timm_hosts.VERSIONS,
    "transformers": transformers_hosts.VERSIONS,
}

#: what a subclass may define anew: ``reason`` looks at what ``__init__`` has left, and the others compute nothing
_HARMLESS = ("__init__", "extra_repr", "__doc__", "__annotate__", "__annotate_func__")
_OUR_LAYERS = frozenset(host.layer for host in HOSTS.values())
_METHODS = tuple(dict.fromkeys(map(method_of, HOSTS)))


def convert(model: nn.Module, ops: Iterable[str] | None = None, strict: bool = False) -> Report:
    """Run fused ops in the place of a model's attention and squeeze-excite layers, where they compute the same.

    Modules, parameters, buffers, state-dict keys and hooks stay as they are; only ``forward`` is bound anew, on each
    instance, or the one method of a model that computes what an op does.  A call that only the original can serve, for
    attention weights say, runs the original.

    Args:
        model: any module; classes of timm, transformers, kornia and lucidrains in it are known.  May be on meta,
            compiled (``torch.compile`` compiles it anew at its next call), or wrapped in ``DistributedDataParallel``.
        ops: names of ops to use, of ``rel_attention_2d``, ``bias_attention_2d``, ``squeeze_excite`` and
            ``row_col_softmax``.  None: all, but none on the CPU where it is not faster there.
        strict: raise where a candidate for one of ``ops`` is left alone.

    Returns:
        Every module of a known class, with its op, and ``"replaced"``, ``"already"`` or the reason why not.

    Raises:
        TypeError: ``model`` is not a module, or ``ops`` is not a collection of names.
        ValueError: an op is not known, or ``strict`` and a candidate cannot be replaced; then nothing was changed.

    Attention dropout keeps its probability; its masks are other ones than the host draws.
    """
    return convert_modules(_modules(model), None if ops is None else _checked_ops(ops), strict)


def convert_modules(modules: Mapping[str, nn.Module], ops: Collection[str] | None, strict: bool) -> Report:
    """:func:`convert` of these modules, by path, and not of those within them."""
    found = list(_candidates(modules, ops))
    report = Report(tuple(candidate for _, candidate in found))
    if strict:
        left = [each for each in report if not each.fused and (ops is None or each.op in ops)]
        if left:
            texts = "; ".join(f"{each.path or '(model)'} ({each.host.split(':')[1]}): {each.outcome}" for each in left)
            raise ValueError(f"{len(left)} of {len(report)} candidates cannot be replaced: {texts}")
    for module, candidate in found:
        method = method_of(candidate.host)
        if candidate.outcome == REPLACED:
            setattr(module, method, functools.partial(HOSTS[candidate.host].layer.forward, module))
        elif not candidate.fused and _is_ours(module, method):  # changed since it was converted
            del module.__dict__[method]
    return report


def restore(model: nn.Module) -> int:
    """Undo :func:`convert`: every module computes what its class says again.

    Returns:
        How many modules were restored; 0 where none was converted.

    Raises:
        TypeError: ``model`` is not a module.
    """
    return restore_modules(_modules(model).values())


def restore_modules(modules: Iterable[nn.Module]) -> int:
    """:func:`restore` of these modules, and not of those within them."""
    restored = [(module, method) for module in modules for method in _METHODS if _is_ours(module, method)]
    for module, method in restored:
        del module.__dict__[method]
    return len(restored)


def _modules(model: nn.Module) -> dict[str, nn.Module]:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    return dict(model.named_modules())


def _checked_ops(ops: Iterable[str]) -> Collection[str]:
    if isinstance(ops, str) or not isinstance(ops, Iterable):
        raise TypeError(f"ops must be a collection of names, got {ops!r}")
    names = list(ops)
    for name in names:
        if name not in OPS:
            raise ValueError(f"ops must be among {', '.join(OPS)}, got {name!r}")
    return names


def _candidates(modules: Mapping[str, nn.Module], ops: Collection[str] | None) -> Iterator[tuple[nn.Module, Candidate]]:
    for path, module in modules.items():
        for method in _METHODS:
            if (defining := _defines(type(module), method)) is None:
                continue
            name = class_path(defining) + ("" if method == "forward" else f".{method}")
            if (host := HOSTS.get(name)) is not None:
                yield module, Candidate(path, name, host.op, _outcome(module, defining, method, host, ops))


def _defines(kind: type, method: str) -> type | None:
    return next((each for each in kind.__mro__ if method in each.__dict__), None)


def _outcome(module: nn.Module, defining: type, method: str, host: Host, ops: Collection[str] | None) -> str:
    ours = _is_ours(module, method)
    if not ours and ops is not None and host.op not in ops:
        return f"{host.op} is not among ops"
    reason = _unknown_class(type(module), defining, method, host)
    if replaced := [name for name in own_methods(module) if not _is_ours(module, name)]:
        reason = f"something else has replaced its {replaced[0]}"
    if reason is None:
        try:
            reason = host.reason(module)
        except AttributeError as error:
            reason = f"it is not built as its class is known: {error}"
    if ours:
        return reason or ALREADY
    if reason is None and ops is None and not host.faster_on_cpu and _is_on_cpu(module):
        reason = f"no faster on the CPU; ops={[host.op]} replaces it"
    return reason or REPLACED


def _is_ours(module: nn.Module, method: str) -> bool:
    bound = module.__dict__.get(method)
    return isinstance(bound, functools.partial) and any(bound.func is layer.forward for layer in _OUR_LAYERS)


def _is_on_cpu(module: nn.Module) -> bool:
    return all(parameter.device.type == "cpu" for parameter in module.parameters())


def _unknown_class(kind: type, defining: type, method: str, host: Host) -> str | None:
    """Why instances of a class may compute something else than the one that the registry names."""
    package = defining.__module__.partition(".")[0]
    low, high = VERSIONS[package]
    version = version_of(package)
    if not release(low) <= release(version) < release(high):
        return f"{package} {version} is not from {low} to below {high}"
    theirs = getattr(defining, method)
    if class_path(defining) != f"{theirs.__module__}:{theirs.__qualname__.rpartition('.')[0]}":
        return f"the {method} of {defining.__name__} was replaced"
    if [*inspect.signature(theirs).parameters] != [*inspect.signature(host.layer.forward).parameters]:
        return f"the {method} of {defining.__name__} takes other arguments than it is known to"
    # functools.wraps copies all names; a host's own decorators lie in its package.
    folder = os.path.dirname(sys.modules[package].__file__ or "")
    if not theirs.__code__.co_filename.startswith(folder):
        return f"the {method} of {defining.__name__} was replaced"
    for each in kind.__mro__[: kind.__mro__.index(defining)]:
        for name, value in each.__dict__.items():
            overrides = callable(value) or isinstance(value, (property, staticmethod, classmethod))
            if overrides and hasattr(defining, name) and name not in _HARMLESS:
                return f"{each.__name__} overrides {name} of {defining.__name__}"
    return None
