"""Commands in processes of their own, and the tools of ``benchmarks``, which are no package."""

import functools
import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).parents[1]
#: A training of the command line that takes a moment.
TRAIN = ["train", "--dataset", "digits", "--image-size", "8", "--train-images", "64", "--batch-size", "32"]
TRAIN += ["--threads", "1"]


def environment(**variables: str) -> dict[str, str]:
    """That of a process that finds this source tree."""
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path, **variables}


def python(*arguments, cwd=ROOT, env=None, **streams) -> subprocess.CompletedProcess:
    """``python ARGUMENTS``, to its end; what it writes is kept unless it goes elsewhere."""
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **streams}
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, env=env or environment(), text=True, **streams)


@functools.cache
def tool(path: str) -> ModuleType:
    """``benchmarks/PATH.py`` as a module, which others of its folder may import."""
    spec = importlib.util.spec_from_file_location(Path(path).name, ROOT / "benchmarks" / f"{path}.py")
    module = importlib.util.module_from_spec(spec)
    before = list(sys.path)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    sys.path[:] = before
    return module
