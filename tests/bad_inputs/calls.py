"""Valid calls made invalid."""

from collections.abc import Callable
from typing import Any

import torch

from fused_attn.testing.checks import BadInput

CPU, F32, F64 = torch.device("cpu"), torch.float32, torch.float64


def bad_call(
    make: Callable[[torch.dtype, torch.device], dict[str, Any]],
    name: str,
    error: type[Exception],
    match: str,
    /,
    **changes: Any,
) -> BadInput:
    """The valid call that ``make`` makes with some arguments replaced; a callable is applied to the argument."""

    def build() -> dict[str, Any]:
        torch.manual_seed(0)
        inputs = make(F32, CPU)
        for argument, change in changes.items():
            inputs[argument] = change(inputs[argument]) if callable(change) else change
        return inputs

    return BadInput(name, build, error, match)


def bad_impl(make: Callable[[torch.dtype, torch.device], dict[str, Any]]) -> tuple[BadInput, ...]:
    """What every function refuses as its implementation; no kernel takes float64."""

    def cannot_run(name: str, impl: str, match: str) -> BadInput:
        return BadInput(name, lambda: {**make(F64, CPU), "impl": impl}, RuntimeError, match)

    return (
        bad_call(make, "impl unknown", ValueError, r"impl must be one of 'auto', .* got 'fast'", impl="fast"),
        bad_call(make, "impl of other ops", ValueError, r"impl must be one of .* got 'cuda'", impl="cuda"),
        cannot_run("impl cannot run", "cpu", r"impl='cpu' cannot run: .*(float64|not available)"),
        cannot_run("triton cannot run", "triton", r"impl='triton' cannot run: (it|the package) "),
    )
