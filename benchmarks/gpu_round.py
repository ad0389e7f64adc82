"""A whole round on a GPU machine, with no network: install, tests, sanitizer, benchmarks, networks, training.

    python benchmarks/gpu_round.py [--slice NAME] [--out DIR] [--budget SECONDS] [--data DIR] [--dry-run]

Needs torch 2.11 or later and Triton; what else a step needs and does not find, the step says, and is "not run".  Every
step has a time limit, a log and a result file, and a failing one does not stop the others.  A step with a result is
not run again, so that a round that was cut short goes on where it stopped: ``--retry`` runs what failed once more.
``--budget`` ends after so many seconds; the step that it cuts short is run again by the next call.  ``--dry-run`` goes
through the round where there is no GPU: Triton's interpreter, few and tiny cases.

Writes summary.json, summary.md, machine.json, and NAME.log and NAME.json of every step.  Exit status: 0, 1 when a
step failed, 3 when steps are left for the next call.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import gpu_setup

ROOT = gpu_setup.ROOT
SLICES = ("setup", "tests", "sanitizer", "bench", "networks", "train")
#: No step is longer, so that a slice of ten minutes holds at least one.
LONGEST = 540
#: With less left of the budget, no longer step is started.
WORTHWHILE = 60


@dataclass(frozen=True)
class Step:
    """One command of the round."""

    name: str
    slice: str
    command: tuple[str, ...]
    #: seconds after which it is ended
    limit: int
    #: modules without which it cannot run
    needs: tuple[str, ...] = ()
    #: program it starts, found by :func:`gpu_setup.find_tool`
    tool: str | None = None
    environment: Mapping[str, str] = field(default_factory=dict)
    #: why it is not run in this round
    reason: str | None = None


@dataclass(frozen=True)
class Round:
    """What the steps depend on."""

    out: Path
    #: op with Triton kernels -> name of the smallest size it is measured at
    ops: Mapping[str, str]
    dry: bool = False
    data: Path | None = None

    @property
    def device(self) -> str:
        return "cpu" if self.dry else "cuda"


def kernels() -> tuple[str, ...]:
    """Names of the package's Triton kernels."""
    found = set()
    for path in sorted((ROOT / "fused_attn" / "ops").glob("*/triton_*.py")):
        found |= set(re.findall(r"^def (\w+_kernel)\(", path.read_text(), re.MULTILINE))
    return tuple(sorted(found))


# --- steps ------------------------------------------------------------------------------------------------------------


def steps(plan: Round) -> list[Step]:
    """All steps in order."""
    makers = (_setup, _tests, _sanitizer, _bench, _networks, _train)
    return [step for maker in makers for step in maker(plan)]


def _python(*arguments: object) -> tuple[str, ...]:
    return (sys.executable, *map(str, arguments))


def _pytest(*arguments: object) -> tuple[str, ...]:
    return _python("-m", "pytest", "-vv", "--durations=10", *arguments)


def _setup(plan: Round) -> Iterator[Step]:
    script = ROOT / "benchmarks" / "gpu_setup.py"
    build = ("--no-build",) if plan.dry else ()
    yield Step("install", "setup", _python(script, "install", plan.out, *build), LONGEST)
    yield Step("environment", "setup", _python(script, "environment", plan.out), 120, needs=("torch",))


def _tests(plan: Round) -> Iterator[Step]:
    needs = ("pytest", "hypothesis", "pytest_timeout", "triton")
    workers = () if plan.dry or importlib.util.find_spec("xdist") is None else ("-n", "6")
    contract = ROOT / "tests" / "test_op_contract.py"
    for op in plan.ops:
        chosen = f"{op}-triton or {op}-cuda"
        if plan.dry:  # the interpreter takes seconds for one small case
            chosen = f"({chosen}) and test_explicit_implementation_runs_its_own_operators"
        command = _pytest(*workers, contract, "-k", chosen)
        yield Step(f"tests-{op}", "tests", command, LONGEST, needs)
    reason = "there is no GPU" if plan.dry else None
    # By file: others import what the machine may lack.
    files = [path for path in sorted((ROOT / "tests").rglob("test_*.py")) if "pytest.mark.gpu" in path.read_text()]
    yield Step("tests-gpu", "tests", _pytest("-m", "gpu", *files), LONGEST, needs, reason=reason)


def _cases(plan: Round, shapes: str, *arguments: object) -> tuple[str, ...]:
    limit = ("--limit", 1) if plan.dry else ()
    return _python(ROOT / "benchmarks" / "gpu_cases.py", shapes, "--device", plan.device, *limit, *arguments)


def _sanitizer(plan: Round) -> Iterator[Step]:
    yield Step("cases-small", "sanitizer", _cases(plan, "small"), 300, ("triton",))
    ours = tuple(argument for name in kernels() for argument in ("--kernel-name", f"kns={name}"))
    options = {
        "memcheck": ("--report-api-errors", "no", *ours),
        "racecheck": ours,
        "initcheck": (),  # what PyTorch's kernels write has to be seen too
    }
    # Blocks that PyTorch keeps would hide accesses past their end.
    environment = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    for tool, chosen in options.items():
        for op in plan.ops:
            command = ("--tool", tool, "--error-exitcode", "9", *chosen, *_cases(plan, "small", "--op", op))
            yield Step(f"{tool}-{op}", "sanitizer", command, 270, ("triton",), "compute-sanitizer", environment)


_BENCH_NEEDS = ("tyro", "tqdm", "rich", "matplotlib")


def _bench(plan: Round) -> Iterator[Step]:
    for op, smallest in plan.ops.items():
        for dtype in ("bf16", "fp32"):
            name = f"bench-{op}-{dtype}"
            command = _python("-m", "fused_attn.cli", "bench", op, "--device", plan.device, "--dtype", dtype)
            command += ("--out", str(plan.out / name))
            if plan.dry:
                command += ("--shape", smallest, "--providers", "reference", "--seconds", "0.1")
                command += ("--no-growth", "--no-memory")
            yield Step(name, "bench", command, LONGEST, _BENCH_NEEDS)
    for op in plan.ops:
        only = ("--kernel-name", f"regex:^({'|'.join(kernels())})$")
        metrics = ("--section", "SpeedOfLight", "--clock-control", "none", "--launch-count", "40", "--page", "details")
        command = (*metrics, *only, *_cases(plan, "benchmark", "--op", op))
        yield Step(f"ncu-{op}", "bench", command, 270, ("triton",), "ncu")


def _networks(plan: Round) -> Iterator[Step]:
    command = _python("-m", "fused_attn.cli", "bench", "networks", "--device", plan.device)
    if plan.dry:
        command += ("--model", "aa_wrn_10_1", "--batch-size", "2", "--coverage", "none", "--seconds", "0.1")
    else:
        command += ("--dtype", "bf16")
    yield Step("networks", "networks", (*command, "--out", str(plan.out / "networks")), LONGEST, _BENCH_NEEDS)


def _train(plan: Round) -> Iterator[Step]:
    needs = ("tyro", "datasets", "kornia", "accelerate", "torchmetrics")
    reason = None if plan.data or plan.dry else "no data: DATA, or --data, names a folder with CIFAR-10"
    data = ("cifar10", "--data-dir", plan.data) if plan.data else ("synthetic",)
    small = ("--model", "aa_wrn_10_1", "--epochs", 1, "--train-images", 8, "--batch-size", 4)
    small += ("--eval-every", 0, "--impl", "reference")  # the interpreter would take minutes
    large = ("--model", "aa_wrn_28_10", "--epochs", 3, "--mixed-precision", "bf16", "--impl", "triton")
    command = _python(
        "-m",
        "fused_attn.cli",
        "train",
        *(small if plan.dry else large),
        "--dataset",
        *data,
        "--out",
        plan.out / "train",
    )
    yield Step("train", "train", command, LONGEST, needs, reason=reason)


# --- running ----------------------------------------------------------------------------------------------------------


def unmet(step: Step, environment: Mapping[str, str]) -> str | None:
    """Why a step cannot run here; None when it can."""
    if step.reason is not None:
        return step.reason
    if step.tool is not None and gpu_setup.find_tool(step.tool) is None:
        return f"no {step.tool}"
    if step.needs:
        code = "import importlib.util as u, sys; print(*[n for n in sys.argv[1:] if u.find_spec(n) is None])"
        command = [sys.executable, "-c", code, *step.needs]
        missing = subprocess.run(command, env=environment, capture_output=True, text=True).stdout.split()
        if missing:
            return f"missing: {', '.join(missing)}"
    return None


def run(step: Step, plan: Round, limit: float) -> dict[str, object]:
    """Run one step to its end or the limit, and write its log; the result is returned."""
    environment = {
        **os.environ,
        "PYTHONPATH": gpu_setup.search_path(plan.out),
        "PYTHONUNBUFFERED": "1",
        "PYTHONDONTWRITEBYTECODE": "1",
        **({"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"} if plan.dry else {}),
        **step.environment,
    }
    reason = unmet(step, environment)
    result: dict[str, object] = {"name": step.name, "slice": step.slice, "outcome": "not run", "reason": reason}
    if reason is None:
        command = [gpu_setup.find_tool(step.tool), *step.command] if step.tool else list(step.command)
        log = plan.out / f"{step.name}.log"
        shutil.rmtree(
            plan.out / step.name, ignore_errors=True
        )  # of an earlier try; a training run refuses to go over it
        start = time.monotonic()
        with log.open("wb") as file:
            # Outside the source tree: an installed wheel comes before it.
            process = subprocess.Popen(
                command, cwd=plan.out, env=environment, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
            )
            status = _finish(process, limit)
        outcome = "timed out" if status is None else "failed" if status else "passed"
        result |= {
            "outcome": outcome,
            "reason": f"longer than {limit:.0f} s" if status is None else None,
            "exit": status,
            "seconds": round(time.monotonic() - start, 1),
            "command": command,
            "tail": log.read_text(errors="replace").splitlines()[-12:],
        }
    return result


def _finish(process: subprocess.Popen, limit: float) -> int | None:
    """Exit status of ``process``; None when it was ended, with all it started, after ``limit`` seconds."""
    try:
        return process.wait(limit)
    except subprocess.TimeoutExpired:
        return None
    finally:
        for number in (signal.SIGTERM, signal.SIGKILL):
            try:
                os.killpg(process.pid, number)
                process.wait(5)
            except ProcessLookupError:
                break
            except subprocess.TimeoutExpired:
                continue
        process.wait()


def _write(path: Path, text: str) -> None:
    temporary = path.with_suffix(path.suffix + ".tmp")
    temporary.write_text(text)
    temporary.replace(path)


def summarise(plan: Round, every: list[Step]) -> dict[str, object]:
    """Write summary.json and summary.md from the result files; steps without one are "pending"."""
    results = []
    for step in every:
        path = plan.out / f"{step.name}.json"
        pending = {"name": step.name, "slice": step.slice, "outcome": "pending", "reason": None}
        results.append(json.loads(path.read_text()) if path.exists() else pending)
    counts = {name: sum(r["outcome"] == name for r in results) for name in dict.fromkeys(r["outcome"] for r in results)}
    path = plan.out / "machine.json"
    machine = json.loads(path.read_text()) if path.exists() else {}
    summary = {"dry_run": plan.dry, "counts": counts, "environment": machine, "steps": results}
    _write(plan.out / "summary.json", json.dumps(summary, indent=1, allow_nan=False) + "\n")
    gpu = (machine.get("gpu") or {}).get("name", "no GPU")
    lines = [
        "# Round on a GPU" + (" (dry run: no GPU, Triton's interpreter)" if plan.dry else ""),
        "",
        f"{gpu}, torch {machine.get('torch')}, Triton {machine.get('triton')}, Python {machine.get('python')}. "
        f"Missing packages: {', '.join(machine.get('missing', [])) or 'none'}. "
        + ", ".join(f"{number} {name}" for name, number in counts.items())
        + ".",
        "",
        "| step | slice | outcome | seconds | reason |",
        "| --- | --- | --- | ---: | --- |",
    ]
    for result in results:
        cells = (result["name"], result["slice"], result["outcome"], result.get("seconds", ""), result["reason"] or "")
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    for result in results:
        if result["outcome"] in ("failed", "timed out"):
            lines += ["", f"## {result['name']}: {result['outcome']}", "", "```", *result["tail"], "```"]
    _write(plan.out / "summary.md", "\n".join(lines) + "\n")
    return summary


def go(plan: Round, every: list[Step], chosen: list[Step], budget: float, retry: bool) -> int:
    """Run what has no result yet; the exit status."""
    end = time.monotonic() + budget
    again = ("failed", "timed out", "not run") if retry else ()
    left = []
    for step in chosen:
        path = plan.out / f"{step.name}.json"
        if path.exists() and json.loads(path.read_text())["outcome"] not in again:
            continue
        path.unlink(missing_ok=True)
        limit = min(step.limit, end - time.monotonic())
        if limit < min(step.limit, WORTHWHILE):
            left.append(step.name)
            continue
        print(f"{step.name} ...", flush=True)
        result = run(step, plan, limit)
        if result["outcome"] == "timed out" and limit < step.limit:
            print(f"{step.name}: cut short by the budget after {limit:.0f} s", flush=True)
            left.append(step.name)
            continue
        _write(path, json.dumps(result, indent=1, allow_nan=False) + "\n")
        print(f"{step.name}: {result['outcome']} {result['reason'] or ''} {result.get('seconds', '')}", flush=True)
        summarise(plan, every)
    summary = summarise(plan, every)
    print((plan.out / "summary.md").read_text())
    names = {step.name for step in chosen}
    outcomes = {result["outcome"] for result in summary["steps"] if result["name"] in names}
    if outcomes & {"failed", "timed out"}:
        return 1
    if left:
        print(f"left for the next call: {', '.join(left)}")
        return 3
    return 0


def find_ops() -> dict[str, str]:
    """``Round.ops``, asked of a process of its own: this one imports neither PyTorch nor the package."""
    code = (
        "import json; from fused_attn.ops import SPECS; "
        "print(json.dumps({s.name: s.growth[0].name for s in SPECS if 'triton' in s.implementations}, allow_nan=False))"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join((str(ROOT), os.environ.get("PYTHONPATH", "")))}
    asked = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, check=True, stdout=subprocess.PIPE)
    return json.loads(asked.stdout)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--slice", action="append", choices=SLICES, help="default: all; setup always comes first")
    parser.add_argument("--step", action="append", help="only steps of these names, and setup")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "gpu-round")
    parser.add_argument("--budget", type=float, default=float("inf"), metavar="SECONDS")
    parser.add_argument("--data", type=Path, help="folder with CIFAR-10 in the hub's Parquet layout, for training")
    parser.add_argument("--retry", action="store_true", help="run again what failed or was not run")
    parser.add_argument("--dry-run", action="store_true")
    options = parser.parse_args(arguments)
    # Ended from outside, it ends what it started.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    if options.budget < LONGEST:
        parser.error(f"--budget must be at least {LONGEST}, the longest step, got {options.budget:g}")
    data = options.data.resolve() if options.data else None
    plan = Round(options.out.resolve(), find_ops(), options.dry_run, data)
    every = steps(plan)
    unknown = set(options.step or ()) - {step.name for step in every}
    if unknown:
        parser.error(f"--step must be among {', '.join(step.name for step in every)}; got {', '.join(sorted(unknown))}")
    slices, names = options.slice or SLICES, options.step
    chosen = [
        step for step in every if step.slice == "setup" or (step.slice in slices and (not names or step.name in names))
    ]
    plan.out.mkdir(parents=True, exist_ok=True)
    earlier = plan.out / "summary.json"
    if earlier.exists() and json.loads(earlier.read_text())["dry_run"] != plan.dry:
        parser.error(f"--out: {plan.out} holds a round {'on a GPU' if plan.dry else 'run dry'}; name another folder")
    return go(plan, every, chosen, options.budget, options.retry)


if __name__ == "__main__":
    sys.exit(main())
