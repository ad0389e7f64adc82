"""Invalid calls of the ops, a file for each folder of ops: ``BAD_INPUTS``, op name -> what it must refuse."""

import importlib
import pkgutil

BAD_INPUTS = {
    name: bad
    for module in pkgutil.iter_modules(__path__)
    for name, bad in getattr(importlib.import_module(f"{__name__}.{module.name}"), "BAD_INPUTS", {}).items()
}
