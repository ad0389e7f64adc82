"""Times the README's commands in a fresh clone, from nothing: writes results/commands.md.

Run from the repository root: ``python benchmarks/report/commands.py``; needs a clean checkout, as it clones HEAD.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results"
DEMO = "make demo (environment, build, training, comparison)"
TEST = "make test (with the environment there)"
CI = ".ci/run (lint, make test, demo in smoke mode)"


def measure(clone: Path) -> dict[str, float]:
    """Seconds of each command, one after the other; ``.ci/run`` says how long its ``make test`` took."""
    started = time.monotonic()
    subprocess.run(["make", "demo"], cwd=clone, check=True)
    demo = time.monotonic() - started
    started = time.monotonic()
    result = subprocess.run([".ci/run"], cwd=clone, stdout=subprocess.PIPE, text=True)
    ci = time.monotonic() - started
    print(result.stdout, flush=True)
    result.check_returncode()
    output = result.stdout
    return {DEMO: demo, TEST: float(re.search(r"^make test: (\d+) s$", output, re.MULTILINE)[1]), CI: ci}


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        clone = Path(folder) / "clone"
        subprocess.run(["git", "clone", "--quiet", str(ROOT), str(clone)], check=True)
        report(measure(clone), clone / "runs" / "demo-1")


def report(seconds: dict[str, float], demo: Path) -> None:
    """Write commands.md from the commands' times, and keep the demo's results."""
    (RESULTS / "demo").mkdir(exist_ok=True)
    for name in ("curves.png", "comparison.png", "metrics.json", "comparison.json"):
        shutil.copy(demo / name, RESULTS / "demo" / name)
    metrics = json.loads((demo / "metrics.json").read_text())
    comparison = json.loads((demo / "comparison.json").read_text())
    environment = metrics["environment"]
    fused, eager = (comparison["seconds"][impl] * 1e3 for impl in ("cpu", "reference"))
    lines = [
        f"In a fresh clone on {environment['cores']} cores of {environment['cpu']}, torch {environment['torch']}, "
        f"{environment['date']}:",
        "",
        "| command | minutes |",
        "| --- | ---: |",
        *(f"| {command} | {value / 60:.1f} |" for command, value in seconds.items()),
        "",
        f"The demo's network reached {metrics['test_accuracy']:.1%} test accuracy in {metrics['seconds']:.0f} s; "
        f"forward + backward of the op took {fused:.0f} ms, of eager PyTorch {eager:.0f} ms "
        "([curves](demo/curves.png), [comparison](demo/comparison.png)).",
    ]
    (RESULTS / "commands.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
