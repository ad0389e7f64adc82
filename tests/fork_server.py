"""Processes of their own without the seconds that each takes to import PyTorch: forked from one that has, and idles."""

import atexit
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable, Sequence
from typing import Any

#: The one of each script, as long as this process lives.
_SERVERS: dict[str, subprocess.Popen] = {}


def _start(script: str, environment: dict[str, str]) -> subprocess.Popen:
    process = subprocess.Popen(
        [sys.executable, script],
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    atexit.register(process.communicate)
    return process


def ask(script: str, environment: dict[str, str], arguments: list[str]) -> dict[str, Any]:
    """What the function that ``script`` serves prints, given ``arguments`` in a process of its own."""
    if script not in _SERVERS:
        _SERVERS[script] = _start(script, environment)
    process = _SERVERS[script]
    try:
        print(json.dumps(arguments), file=process.stdin, flush=True)
        return json.loads(process.stdout.readline())
    except BaseException:  # a time limit: what this one answers is not the next one's
        os.killpg(process.pid, signal.SIGKILL)
        del _SERVERS[script]
        raise


def serve(function: Callable[[list[str]], None]) -> None:
    """Run ``function``, which prints one line of JSON, in a process of its own for every line of arguments."""
    for line in sys.stdin:
        process = os.fork()
        if process == 0:
            try:
                function(json.loads(line))
            except BaseException:
                print(json.dumps({"error": traceback.format_exc()}))
            sys.stdout.flush()
            os._exit(0)
        status = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
        if status != 0:
            print(json.dumps({"error": f"exit status {status}"}), flush=True)


def run_all(processes: Sequence[multiprocessing.Process]) -> None:
    """Run processes together, and print their statuses and what they wrote as the line of JSON to answer with."""

    def run() -> None:
        for process in processes:
            process.start()
        for process in processes:
            process.join()

    _, output = captured(run)
    print(json.dumps({"statuses": [process.exitcode for process in processes], "output": output}))


def captured(function: Callable[[], Any]) -> tuple[Any, str]:
    """What ``function`` returns, and what it and the processes that it starts write meanwhile."""
    streams = {stream: os.dup(stream) for stream in (1, 2)}
    with tempfile.TemporaryFile("w+") as file:
        for stream in streams:
            os.dup2(file.fileno(), stream)
        try:
            result = function()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            for stream, before in streams.items():
                os.dup2(before, stream)
        file.seek(0)
        return result, file.read()
