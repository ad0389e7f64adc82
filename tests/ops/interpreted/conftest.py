"""Triton's interpreter looks through all of ``triton.language`` at every call of a function: a third of its time.

Once is enough: what there is to wrap does not change.
"""

import functools
import inspect

from triton import language as tl
from triton.runtime import interpreter


@functools.cache
def builtins(package) -> list[str]:
    return [name for name, member in inspect.getmembers(package) if tl.core.is_builtin(member)]


def patch_builtin(package, *rest):
    for name in builtins(package):
        member = getattr(package, name)
        if tl.core.is_builtin(member):
            interpreter._patch_attr(package, name, member, *rest)


if hasattr(interpreter, "_patch_builtin") and hasattr(interpreter, "_patch_attr"):
    interpreter._patch_builtin = patch_builtin
