"""What ``torch.fx`` and ``torch.jit.trace`` record of functions, and when plain PyTorch takes their place."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch.fx import Proxy, _symbolic_trace

_Function = TypeVar("_Function", bound=Callable[..., Any])

#: Where PyTorch notes that it exports to ONNX.
_ONNX_FLAGS = "torch.onnx._internal.exporter._flags"
#: How many ``export_mode`` are open in the process.
_open = 0


@contextmanager
def export_mode() -> Iterator[None]:
    """Within it every op is its formula in plain PyTorch, whatever ``impl`` says, also in models that exist already.

    What is exported within (``torch.export.export``, ``torch.jit.trace``, ``make_fx``) holds PyTorch's own operators
    and nothing of this package: it can be lowered, compiled and loaded where the package is not.  Attention then forms
    its N x N map, and ``attention_residual`` a stack of its values.  ``torch.onnx.export`` needs no such block: the ops
    take their formulas in it anyway.

    It holds for all threads of the process.  Functions of ``torch.compile`` are compiled anew within.

    Example::

        with fused_attn.export_mode():
            program = torch.export.export(model, (images,))
    """
    global _open
    _open += 1
    try:
        yield
    finally:
        _open -= 1


def exports_plainly() -> bool:
    """Whether the reference has to run: within :func:`export_mode`, and within ``torch.onnx.export``."""
    # Every call asks, and is_in_onnx_export imports the exporter: where nobody has, it is not running.
    may_export = torch.compiler.is_compiling() or _ONNX_FLAGS in sys.modules
    return _open > 0 or (may_export and torch.onnx.is_in_onnx_export())


def leaf(function: _Function) -> _Function:
    """Make ``torch.fx`` record calls of a function, instead of tracing what it does with sizes and dtypes.

    A call with a ``Proxy`` among its arguments, or in a list of them, becomes a node ``call_function``; checks are then
    made when the graph runs.  ``torch.fx.wrap`` would serve one module of the names under which others import it.
    """

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        if not _symbolic_trace._is_fx_tracing_flag or torch.compiler.is_compiling():
            return function(*args, **kwargs)
        proxy = _proxy(args) or _proxy(kwargs.values())
        if proxy is None:
            return function(*args, **kwargs)
        return proxy[0].tracer.create_proxy("call_function", call, args, kwargs)

    return call  # type: ignore[return-value]  # the same signature


def pinned(tensor: Any, first: int = 1) -> Any:
    """A tensor whose dimensions from ``first`` on keep their sizes in a graph of ``torch.jit.trace``.

    Such a graph repeats neither the checks of an op nor what was computed in Python of a size, and kernels trust the
    sizes that they get.  On others it raises an error; elsewhere, and of None, this does nothing.
    """
    if tensor is None or not torch.jit.is_tracing():
        return tensor
    for dim in range(first, tensor.dim()):
        tensor = tensor.unflatten(dim, (int(tensor.shape[dim]),))
    return tensor


def is_traced(values: Iterable[Any]) -> bool:
    """Whether one of the values, or of those in a list of them, is a ``Proxy`` of ``torch.fx``."""
    return _proxy(values) is not None


def _proxy(values: Iterable[Any]) -> tuple[Proxy] | None:
    """A proxy among the values, in a tuple, as it has no truth value; None: there is none."""
    for value in values:
        if isinstance(value, Proxy):
            return (value,)
        if (type(value) is list or type(value) is tuple) and (found := _proxy(value)) is not None:
            return found
    return None
