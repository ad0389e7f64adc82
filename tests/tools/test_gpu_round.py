"""The round on a GPU machine: its runner, and a dry run of its first steps."""

import json
import os
import sys
import tarfile
import time
import zipfile
from pathlib import Path

import pytest
from commands import ROOT, python, tool

pytest.importorskip("triton")

gpu_setup = tool("gpu/gpu_setup")
gpu_round = tool("gpu/gpu_round")


def step(name: str, code: str, limit: int = 20, **options):
    return gpu_round.Step(name, "tests", (sys.executable, "-c", code), limit, **options)


def outcomes(out: Path) -> dict[str, str]:
    return {s["name"]: s["outcome"] for s in json.loads((out / "summary.json").read_text())["steps"]}


def test_failing_step_stops_no_other_and_every_outcome_is_told(tmp_path):
    plan = gpu_round.Round(tmp_path, {}, dry=True)
    child = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'import time; time.sleep(60)'])"
    every = [
        step("bad", "print('reason it failed'); raise SystemExit(7)"),
        step("slow", child, limit=1),
        step("module", "", needs=("no_such_module", "json")),
        step("tool", "", tool="no-such-tool"),
        step(
            "good", "import os; print(os.environ['TRITON_INTERPRET'], os.environ['EXTRA'])", environment={"EXTRA": "x"}
        ),
    ]
    start = time.monotonic()
    assert gpu_round.go(plan, every, every, float("inf"), retry=False) == 1
    assert time.monotonic() - start < 30
    assert outcomes(tmp_path) == {
        "bad": "failed", "slow": "timed out", "module": "not run", "tool": "not run", "good": "passed",
    }  # fmt: skip
    assert (tmp_path / "good.log").read_text() == "1 x\n"
    with tarfile.open(tmp_path / "results.tar.gz") as archive:
        packed = {name for name in archive.getnames() if "/" not in name}
    assert packed == {path.name for path in tmp_path.iterdir()} - {"results.tar.gz", "site"}
    summary = (tmp_path / "summary.md").read_text()
    assert "reason it failed" in summary
    assert "| module | tests | not run |  | missing: no_such_module |" in summary
    assert "| tool | tests | not run |  | no no-such-tool |" in summary
    assert "| slow | tests | timed out |" in summary


def test_finished_steps_are_not_run_again_unless_asked(tmp_path):
    plan, mark = gpu_round.Round(tmp_path, {}), tmp_path / "mark"
    flaky = step("flaky", f"import pathlib as p; m = p.Path({str(mark)!r}); ok = m.exists(); m.touch(); assert ok")
    fine = step("fine", "")
    assert gpu_round.go(plan, [flaky, fine], [flaky, fine], float("inf"), retry=False) == 1
    before = (tmp_path / "fine.json").stat().st_mtime_ns
    assert gpu_round.go(plan, [flaky, fine], [flaky, fine], float("inf"), retry=False) == 1
    assert gpu_round.go(plan, [flaky, fine], [flaky, fine], float("inf"), retry=True) == 0
    assert outcomes(tmp_path) == {"flaky": "passed", "fine": "passed"}
    assert (tmp_path / "fine.json").stat().st_mtime_ns == before


def test_budget_leaves_steps_for_the_next_call(tmp_path):
    plan, every = gpu_round.Round(tmp_path, {}), [step("one", "", limit=20), step("two", "", limit=60)]
    assert gpu_round.go(plan, every, every, 30, retry=False) == 3
    assert outcomes(tmp_path) == {"one": "passed", "two": "pending"}
    assert gpu_round.go(plan, every, every, 70, retry=False) == 0
    assert outcomes(tmp_path) == {"one": "passed", "two": "passed"}


def test_step_cut_short_by_the_budget_is_run_again(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_round, "WORTHWHILE", 1)
    plan, mark = gpu_round.Round(tmp_path, {}), tmp_path / "mark"
    code = f"import pathlib as p, time; m = p.Path({str(mark)!r}); time.sleep(0 if m.exists() else [m.touch(), 60][1])"
    every = [step("long", code, limit=100), step("after", "", limit=100)]
    assert gpu_round.go(plan, every, every, 3, retry=False) == 3
    assert outcomes(tmp_path) == {"long": "pending", "after": "pending"}
    assert gpu_round.go(plan, every, every, 100, retry=False) == 0
    assert outcomes(tmp_path) == {"long": "passed", "after": "passed"}


def test_steps_fit_into_ten_minutes_and_cover_every_op_and_tool(tmp_path):
    plan = gpu_round.Round(tmp_path, gpu_round.find_ops(), data=tmp_path)
    every = gpu_round.steps(plan)
    names = [s.name for s in every]
    assert len(set(names)) == len(names)
    assert {s.slice for s in every} == set(gpu_round.SLICES)
    assert max(s.limit for s in every) <= gpu_round.LONGEST < 600
    assert "rel_attention_2d" in plan.ops
    for op in plan.ops:
        expected = {"memcheck", "racecheck", "initcheck", "ncu"}
        assert {f"{kind}-{op}" for kind in expected} | {f"bench-{op}-bf16", f"bench-{op}-fp32"} <= set(names)
        assert names.index(f"memcheck-{op}") < names.index(f"bench-{op}-bf16") < names.index(f"racecheck-{op}")
    assert names.index("tests") < names.index("tests-gpu") < names.index("cases-small")
    # What is timed has the machine to itself.
    assert not any(
        s.beside for s in every if s.name.startswith(("bench", "networks", "train", "ncu")) and "compiled" not in s.name
    )
    assert "rel_attention_fwd_kernel" in gpu_round.kernels()
    assert str(ROOT / "tests" / "test_gpu.py") in next(s.command for s in every if s.name == "tests-gpu")
    without_data = gpu_round.steps(gpu_round.Round(tmp_path, {}))
    assert "no data" in next(s.reason for s in without_data if s.name == "train")


def test_steps_beside_each_other_run_at_once(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_round.os, "cpu_count", lambda: 4)
    plan = gpu_round.Round(tmp_path, {})
    meet = "import pathlib as p, sys, time; m, o = (p.Path(a) for a in sys.argv[1:]); m.touch(); t = time.time()\n"
    meet += "while not o.exists(): time.sleep(0.05); assert time.time() - t < 15"
    paths = [str(tmp_path / name) for name in ("mark1", "mark2")]
    every = [
        gpu_round.Step(name, "memcheck", (sys.executable, "-c", meet, *order), 20, beside=True)
        for name, order in (("one", paths), ("two", paths[::-1]))
    ]
    assert gpu_round.go(plan, every, every, float("inf"), retry=False) == 0


def test_setup_is_done_again_in_every_call(tmp_path):
    plan = gpu_round.Round(tmp_path, {})
    setup = gpu_round.Step("install", "setup", (sys.executable, "-c", "print(1)"), 20)
    assert gpu_round.go(plan, [setup], [setup], float("inf"), retry=False) == 0
    (tmp_path / "install.log").unlink()
    assert gpu_round.go(plan, [setup], [setup], float("inf"), retry=False) == 0
    assert (tmp_path / "install.log").read_text() == "1\n"


def test_failures_are_kept_of_a_run_that_is_cut_short(tmp_path):
    test = tmp_path / "test_it.py"
    test.write_text("import os\n\ndef test_bad():\n    assert 1 == 2\n\ndef test_end():\n    os._exit(3)\n")
    failures = tmp_path / "failures"
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "benchmarks" / "gpu"), "FAILURES": str(failures)}
    environment.pop("PYTEST_XDIST_WORKER", None)
    options = ["-p", "gpu_failures", "-p", "no:cacheprovider", "-p", "no:xdist"]
    assert python("-m", "pytest", *options, test, cwd=tmp_path, env=environment).returncode == 3
    assert "test_it.py::test_bad" in failures.read_text()
    assert "assert 1 == 2" in failures.read_text()


def test_wheel_of_other_sources_is_refused(tmp_path):
    wheel = tmp_path / "fused_attn-0-py3-none-any.whl"
    sources = sorted((ROOT / "fused_attn").rglob("*.py"))
    with zipfile.ZipFile(wheel, "w") as archive:
        for path in sources:
            archive.write(path, path.relative_to(ROOT))
    assert gpu_setup.differing(wheel) == []
    with zipfile.ZipFile(wheel, "w") as archive:
        for path in sources[1:]:
            archive.write(path, path.relative_to(ROOT))
        archive.writestr("fused_attn/more.py", "")
    assert gpu_setup.differing(wheel) == sorted([str(sources[0].relative_to(ROOT)), "fused_attn/more.py"])


def test_missing_dependencies_are_named(monkeypatch):
    monkeypatch.setattr(gpu_setup, "_version", lambda name: None if name == "tyro" else "1")
    found = gpu_setup.dependencies()
    assert [name for name, version in found.items() if version is None] == ["tyro"]
    assert {"torch", "kornia", "pytest", "hypothesis", "triton"} <= found.keys()


def test_dry_run(tmp_path):
    command = ["benchmarks/gpu/gpu_round.py", "--dry-run", "--slice", "memcheck", "--out", tmp_path]
    # All that starts no test, training or benchmark; the tools are not there, or find no GPU.
    only = ["--step", "cases-small", "--step", "memcheck-rel_attention_2d"]
    result = python(*command, *only)
    found = outcomes(tmp_path)
    assert found["install"] == found["environment"] == found["cases-small"] == "passed", result.stdout
    assert found["tests-gpu"] == "pending"
    assert "rel_attention_2d" in (tmp_path / "cases-small.log").read_text()
    machine = json.loads((tmp_path / "machine.json").read_text())
    assert machine["installed"].startswith("used as it is")
    assert machine["torch"]
    if gpu_setup.find_tool("compute-sanitizer") is None:
        assert found["memcheck-rel_attention_2d"] == "not run"
        assert "not run" in result.stdout
        assert result.returncode == 0
    again = python(*(argument for argument in command if argument != "--dry-run"))
    assert again.returncode == 2
    assert "holds a round run dry" in again.stderr
