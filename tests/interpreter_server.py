"""pytest in Triton's interpreter, each run in a process that has imported PyTorch and Triton and done nothing else."""

import gc
import json
import os

import commands
import fork_server


def run(*arguments: str) -> tuple[int, str]:
    """Exit status and output of ``pytest arguments``."""
    # TRITON_INTERPRET is read when triton is imported.
    result = fork_server.ask(__file__, commands.environment(TRITON_INTERPRET="1"), list(arguments))
    return result.get("status", -1), result.get("output") or result.get("error")


def _pytest(arguments: list[str]) -> None:
    os.chdir(commands.ROOT)
    status, output = fork_server.captured(lambda: int(pytest.main(["-n0", *arguments])))
    print(json.dumps({"status": status, "output": output}))


if __name__ == "__main__":
    import hypothesis.strategies  # noqa: F401
    import interpreter  # noqa: F401
    import pytest

    from fused_attn.ops import SPECS  # noqa: F401
    from fused_attn.testing import checks  # noqa: F401

    gc.collect()
    gc.freeze()
    fork_server.serve(_pytest)
    gc.unfreeze()
