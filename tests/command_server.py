"""``python -m fused_attn.cli``, each in a process that has imported what commands need, and ends as Python does."""

import ctypes
import json
import os
import runpy
import sys
import tempfile
from pathlib import Path

import commands
import fork_server


def run(*arguments: str, cwd: Path, stdout: str, stderr: str = "kept") -> tuple[int, str]:
    """Exit status, and what went to stderr where that is ``"kept"``.

    ``stdout`` and ``stderr`` are ``"closed"``, a pipe that nobody reads, or the name of a file.
    """
    result = fork_server.ask(__file__, commands.environment(), [str(cwd), stdout, stderr, *arguments])
    return result.get("status", -1), result.get("errors") or result.get("error", "")


def _command(arguments: list[str]) -> None:
    cwd, *streams = arguments[:3]
    sys.argv[1:] = arguments[3:]
    with tempfile.TemporaryFile("w+") as kept:
        process = os.fork()
        if process == 0:
            os.chdir(cwd)
            for stream, name in enumerate(streams, start=1):
                os.dup2(kept.fileno() if name == "kept" else _opened(name), stream)
            status = 1
            try:
                runpy.run_module("fused_attn.cli", run_name="__main__", alter_sys=True)
            except SystemExit as end:
                status = end.code
            ctypes.pythonapi.Py_Exit(status)  # what the interpreter calls for SystemExit
        status = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
        kept.seek(0)
        print(json.dumps({"status": status, "errors": kept.read()}))


def _opened(name: str) -> int:
    if name != "closed":
        return os.open(name, os.O_WRONLY)
    reading, writing = os.pipe()
    os.close(reading)
    return writing


if __name__ == "__main__":
    # What commands import when they need it, which takes longer than they do.
    import accelerate  # noqa: F401
    import kornia.augmentation  # noqa: F401
    import matplotlib.pyplot  # noqa: F401
    import sklearn.datasets  # noqa: F401
    import torchmetrics  # noqa: F401
    import tyro  # noqa: F401

    fork_server.serve(_command)
