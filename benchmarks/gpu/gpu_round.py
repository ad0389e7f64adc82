"""A whole round on a GPU machine, with no network: install, tests, sanitizer, benchmarks, networks, training.

    python benchmarks/gpu/gpu_round.py [--slice NAME] [--out DIR] [--budget SECONDS] [--data DIR] [--dry-run]

Needs torch 2.11 or later and Triton; what else a step needs and does not find, the step says, and is "not run".  Every
step has a time limit, a log and a result file, and a failing one does not stop the others.  The steps come in the
order of their worth; those that time nothing run several at once.  A step with a result is not run again, so that a
round that was cut short goes on where it stopped: ``--retry`` runs what failed once more.  Only the setup is repeated
every time: the machine may be another.  ``--budget`` ends after so many seconds; the step that it cuts short is run
again by the next call.  ``--dry-run`` goes through the round where there is no GPU: Triton's interpreter, few and tiny
cases.

Writes summary.json, summary.md, machine.json, and NAME.log and NAME.json of every step, and all of it as
results.tar.gz, for a machine that gives few files back.  Exit status: 0, 1 when a step failed, 3 when steps are left
for the next call.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path

import gpu_setup

ROOT = gpu_setup.ROOT
SLICES = ("setup", "tests", "memcheck", "bench", "networks", "train", "thorough")
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
    #: whether it runs beside its neighbours that do so too: it times nothing
    beside: bool = False


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
    """All steps, those worth most first."""
    makers = (_setup, _tests, _memcheck, _bench, _networks, _train, _thorough)
    return [step for maker in makers for step in maker(plan)]


def _python(*arguments: object) -> tuple[str, ...]:
    return (sys.executable, *map(str, arguments))


def _setup(plan: Round) -> Iterator[Step]:
    script = Path(__file__).with_name("gpu_setup.py")
    build = ("--no-build",) if plan.dry else ()
    yield Step("install", "setup", _python(script, "install", plan.out, *build), 240)
    yield Step("environment", "setup", _python(script, "environment", plan.out), 120, needs=("torch",))


def _tests(plan: Round) -> Iterator[Step]:
    needs = ("pytest", "hypothesis", "pytest_timeout", "triton")
    parallel = not plan.dry and importlib.util.find_spec("xdist") is not None

    def pytest(workers: int, *arguments: object) -> tuple[str, ...]:
        several = ("-n", min(workers, os.cpu_count() or 1), "--dist", "worksteal") if parallel else ()
        return _python("-m", "pytest", "-p", "gpu_failures", "--tb=short", "--durations=25", *several, *arguments)

    def failures(name: str) -> dict[str, str]:
        return {
            "FAILURES": str(plan.out / f"{name}.failures"),
            "PYTHONPATH": os.pathsep.join((gpu_setup.search_path(plan.out), str(Path(__file__).parent))),
        }

    chosen = "triton or cuda"
    if plan.dry:  # the interpreter takes seconds for one small case
        chosen = f"({chosen}) and test_explicit_implementation_runs_its_own_operators"
    contract = pytest(12, ROOT / "tests" / "test_op_contract.py", "-k", chosen)
    yield Step("tests", "tests", contract, 420, needs, environment=failures("tests"), beside=True)
    # By file: others import what the machine may lack.  Few at once: the float64 references are large.
    files = [path for path in sorted((ROOT / "tests").rglob("test_*.py")) if "pytest.mark.gpu" in path.read_text()]
    reason = "there is no GPU" if plan.dry else None
    on_gpu = pytest(4, "-m", "gpu", *files)
    yield Step("tests-gpu", "tests", on_gpu, 300, needs, environment=failures("tests-gpu"), reason=reason, beside=True)


def _cases(plan: Round, shapes: str, *arguments: object) -> tuple[str, ...]:
    limit = ("--limit", 1) if plan.dry else ()
    return _python(Path(__file__).with_name("gpu_cases.py"), shapes, "--device", plan.device, *limit, *arguments)


def _sanitized(plan: Round, tool: str, slice: str, limit: int, *arguments: object) -> Iterator[Step]:
    # Of the other two tools' kernels, only ours; what PyTorch's write has to be seen by initcheck.
    ours = tuple(argument for name in kernels() for argument in ("--kernel-name", f"kns={name}"))
    options = {"memcheck": ("--report-api-errors", "no", *ours), "racecheck": ours, "initcheck": ()}[tool]
    # Blocks that PyTorch keeps would hide accesses past their end.
    environment = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    for op in plan.ops:
        command = ("--tool", tool, "--error-exitcode", "9", *options, *_cases(plan, "small", "--op", op, *arguments))
        name = f"{tool}-{op}"
        yield Step(name, slice, command, limit, ("triton",), "compute-sanitizer", environment, beside=True)


def _memcheck(plan: Round) -> Iterator[Step]:
    yield Step("cases-small", "memcheck", _cases(plan, "small"), 180, ("triton",), beside=True)
    yield from _sanitized(plan, "memcheck", "memcheck", 180, *(() if plan.dry else ("--limit", 4)))


_BENCH_NEEDS = ("tyro", "tqdm", "rich", "matplotlib")


def _ops_bench(plan: Round, dtype: str, slice: str, limit: int, *options: str) -> Iterator[Step]:
    for op, smallest in plan.ops.items():
        name = f"bench-{op}-{dtype}"
        command = _python("-m", "fused_attn.cli", "bench", op, "--device", plan.device, "--dtype", dtype, *options)
        command += ("--out", str(plan.out / name))
        if plan.dry:
            command += ("--shape", smallest, "--providers", "reference", "--seconds", "0.1", "--no-memory")
        yield Step(name, slice, command, limit, _BENCH_NEEDS)


def _bench(plan: Round) -> Iterator[Step]:
    # What is compiled here, several ops at once, is found in the compilers' caches when it is timed.
    for step in _ops_bench(plan, "bf16", "bench", 240, "--no-growth", "--no-memory", "--seconds", "0.01"):
        out = str(plan.out / step.name)
        command = tuple(f"{out}-compiled" if word == out else word for word in step.command)
        yield replace(step, name=f"{step.name}-compiled", command=command, beside=True)
    yield from _ops_bench(plan, "bf16", "bench", 240, "--no-growth", "--seconds", "3")


def _networks(plan: Round) -> Iterator[Step]:
    command = _python("-m", "fused_attn.cli", "bench", "networks", "--device", plan.device)
    if plan.dry:
        command += ("--model", "aa_wrn_10_1", "--batch-size", "2", "--coverage", "none", "--seconds", "0.1")
    else:
        command += ("--dtype", "bf16")
    yield Step("networks", "networks", (*command, "--out", str(plan.out / "networks")), 300, _BENCH_NEEDS)


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


def _tile_times(plan: Round) -> Iterator[Step]:
    script, parts = Path(__file__).with_name("tile_times.py"), 0 if plan.dry else 8
    for part in range(parts):
        command = _python(script, "--compile", f"{part}/{parts}")
        yield Step(f"tile-times-compile-{part}", "thorough", command, 240, ("triton",), beside=True)
    command = _python(script, "--device", plan.device, "--out", plan.out / "tile_times.json")
    yield Step("tile-times", "thorough", command, 120, ("triton",))


def _thorough(plan: Round) -> Iterator[Step]:
    yield from _tile_times(plan)
    for op in plan.ops:
        only = ("--kernel-name", f"regex:^({'|'.join(kernels())})$")
        metrics = ("--section", "SpeedOfLight", "--clock-control", "none", "--launch-count", "40", "--page", "details")
        command = (*metrics, *only, *_cases(plan, "benchmark", "--op", op))
        yield Step(f"ncu-{op}", "thorough", command, 270, ("triton",), "ncu")
    yield from _ops_bench(plan, "fp32", "thorough", LONGEST)
    for tool in ("racecheck", "initcheck"):
        yield from _sanitized(plan, tool, "thorough", 270)


# --- running ----------------------------------------------------------------------------------------------------------


#: Processes of the steps that run now; each leads a group.
running: set[subprocess.Popen] = set()


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
        # Of an earlier try: a training run refuses to go over it, and failures are added to those that are there.
        shutil.rmtree(plan.out / step.name, ignore_errors=True)
        (plan.out / f"{step.name}.failures").unlink(missing_ok=True)
        start = time.monotonic()
        with log.open("wb") as file:
            # Outside the source tree: an installed wheel comes before it.
            process = subprocess.Popen(
                command, cwd=plan.out, env=environment, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
            )
            running.add(process)
            status = _finish(process, limit)
            running.discard(process)
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


def pack(plan: Round) -> None:
    """Write what the round has written so far to results.tar.gz, without what was installed."""
    path = plan.out / "results.tar.gz"
    temporary = path.with_suffix(".tmp")
    with tarfile.open(temporary, "w:gz") as archive:
        for found in sorted(plan.out.iterdir()):
            if found.name != "site" and found not in (path, temporary):
                archive.add(found, found.name)
    temporary.replace(path)


def go(plan: Round, every: list[Step], chosen: list[Step], budget: float, retry: bool) -> int:
    """Run what has no result yet; the exit status."""
    start = time.monotonic()
    again = ("failed", "timed out", "not run") if retry else ()
    pending = []
    for step in chosen:
        path = plan.out / f"{step.name}.json"
        if step.slice == "setup" or not path.exists() or json.loads(path.read_text())["outcome"] in again:
            path.unlink(missing_ok=True)
            pending.append(step)
    left: list[str] = []

    def attempt(step: Step) -> None:
        limit = min(step.limit, start + budget - time.monotonic())
        if limit < min(step.limit, WORTHWHILE):
            left.append(step.name)
            return
        print(f"{step.name} ...", flush=True)
        result = run(step, plan, limit)
        if result["outcome"] == "timed out" and limit < step.limit:
            print(f"{step.name}: cut short by the budget after {limit:.0f} s", flush=True)
            left.append(step.name)
            return
        _write(plan.out / f"{step.name}.json", json.dumps(result, indent=1, allow_nan=False) + "\n")
        print(f"{step.name}: {result['outcome']} {result['reason'] or ''} {result.get('seconds', '')}", flush=True)

    for (_, beside), group in itertools.groupby(pending, lambda step: (step.slice, step.beside)):
        with ThreadPoolExecutor(max(1, (os.cpu_count() or 1) // 2) if beside else 1) as pool:
            for _ in pool.map(attempt, group):
                summarise(plan, every)
        pack(plan)
    summary = summarise(plan, every)
    pack(plan)
    print((plan.out / "summary.md").read_text())
    of_budget = f" of {budget:.0f}" if budget < float("inf") else ""
    print(f"spent {time.monotonic() - start:.0f} s{of_budget}")
    names = {step.name for step in chosen}
    outcomes = {result["outcome"] for result in summary["steps"] if result["name"] in names}
    if outcomes & {"failed", "timed out"}:
        return 1
    if left:
        print(f"left for the next call: {', '.join(left)}")
        return 3
    return 0


def stop(*_: object) -> None:
    """End what runs, and this process: for a signal from outside."""
    for process in tuple(running):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    os._exit(128 + signal.SIGTERM)


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
    signal.signal(signal.SIGTERM, stop)
    if options.budget < WORTHWHILE:
        parser.error(f"--budget must be at least {WORTHWHILE} seconds, got {options.budget:g}")
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
