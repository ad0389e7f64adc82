"""Calls every op forward and backward, for tools that watch a process: compute-sanitizer and ncu.

    python benchmarks/gpu/gpu_cases.py small        the small samples of each op's spec, float32 and bfloat16
    python benchmarks/gpu/gpu_cases.py benchmark    the benchmark shapes, bfloat16, after a first call that compiles

The numbers are the contract test's business; here an output or gradient that is not finite, where the reference's is,
is an error.
"""

from __future__ import annotations

import argparse
import sys
import time

import torch

from fused_attn.ops import SPECS
from fused_attn.ops._floor.declarations import OpSpec, Sample
from fused_attn.testing.numerics import draw_grad_out, evaluate


def run(spec: OpSpec, sample: Sample, impl: str, dtype: torch.dtype, device: str, calls: int) -> str:
    """Call ``sample``; says in a word what came of it.

    Raises:
        ArithmeticError: a result is not finite where the reference's is.
    """
    inputs = sample.inputs(dtype, device)
    reason = spec.reason(impl, inputs)
    if reason is not None:
        return f"not run: {reason}"
    grad_out = draw_grad_out(spec, inputs)

    def function(chosen):
        return evaluate(lambda **call: spec.function(**call, impl=chosen), inputs, grad_out)

    for _ in range(calls):
        results = function(impl)
    if calls == 1:
        expected = function("reference")
        wrong = [
            name
            for name, value in results.items()
            if bool(expected[name].isfinite().all()) and not bool(value.isfinite().all())
        ]
        if wrong:
            raise ArithmeticError(f"{spec.name}, {sample.name}, {dtype}: not finite: {', '.join(wrong)}")
    return "ran"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shapes", choices=("small", "benchmark"))
    parser.add_argument("--op", action="append", choices=[spec.name for spec in SPECS], help="default: all")
    parser.add_argument("--impl", default="triton")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--limit", type=int, help="so many samples of each op at most")
    options = parser.parse_args()

    small = options.shapes == "small"
    dtypes = (torch.float32, torch.bfloat16) if small else (torch.bfloat16,)
    ran = 0
    for spec in SPECS:
        if options.op and spec.name not in options.op:
            continue
        samples = [sample for sample in spec.samples if sample.small] if small else list(spec.gpu_shapes or spec.shapes)
        for sample in samples[: options.limit]:
            for dtype in dtypes:
                start = time.perf_counter()
                outcome = run(spec, sample, options.impl, dtype, options.device, calls=1 if small else 2)
                ran += outcome == "ran"
                print(
                    f"{spec.name}, {sample.name}, {dtype}: {outcome}, {time.perf_counter() - start:.1f} s", flush=True
                )
    print(f"{ran} calls")
    return 0 if ran else 1


if __name__ == "__main__":
    sys.exit(main())
