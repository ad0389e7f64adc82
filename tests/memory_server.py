"""``measure.peak_extra_bytes`` without the seconds that each of its processes takes to import PyTorch.

Each measurement still has a process of its own, forked from one that has imported PyTorch and done nothing else.
"""

import atexit
import functools
import json
import os
import subprocess
import sys
import traceback

import torch

from fused_attn.bench import measure


@functools.cache
def server() -> subprocess.Popen:
    """One for this process, as long as it lives."""
    process = subprocess.Popen(
        [sys.executable, __file__],
        env=measure.child_environment(),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    atexit.register(process.communicate)
    return process


def peak_extra_bytes(op: str, shape: str, impl: str, *, device: str = "cpu") -> int:
    """Most bytes held beyond the inputs while ``impl`` runs forward and backward once, in float32."""
    arguments = [op, shape, impl, device, "float32", str(torch.get_num_threads())]
    try:
        print(json.dumps(arguments), file=server().stdin, flush=True)
        result = json.loads(server().stdout.readline())
    except BaseException:  # a time limit: what this one answers is not the next one's
        server.cache_clear()
        raise
    if "reason" in result:
        raise NotImplementedError(result["reason"])
    if "error" in result:
        raise RuntimeError(f"the memory of {impl} on {op}, {shape} could not be measured: {result['error']}")
    return result["both"]


def _measure(arguments: list[str]) -> None:
    """In a process of its own."""
    process = os.fork()
    if process == 0:
        try:
            measure.main(arguments)
        except BaseException:
            print(json.dumps({"error": traceback.format_exc()}))
        sys.stdout.flush()
        os._exit(0)
    status = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
    if status != 0:
        print(json.dumps({"error": f"exit status {status}"}), flush=True)


if __name__ == "__main__":
    for line in sys.stdin:
        _measure(json.loads(line))
