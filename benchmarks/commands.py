"""Times the README's commands in a fresh clone, from nothing: writes results/commands.md.

Run from the repository root: ``python benchmarks/commands.py``; needs a clean checkout, as it clones HEAD.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"


def timed(command: list[str], clone: Path) -> float:
    started = time.monotonic()
    subprocess.run(command, cwd=clone, check=True)
    return time.monotonic() - started


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        clone = Path(folder) / "clone"
        subprocess.run(["git", "clone", "--quiet", str(ROOT), str(clone)], check=True)
        seconds = {
            "make demo (environment, build, training, comparison)": timed(["make", "demo"], clone),
            "make test (with the environment there)": timed(["make", "test"], clone),
        }
        metrics = json.loads((clone / "runs" / "demo-1" / "metrics.json").read_text())
        comparison = json.loads((clone / "runs" / "demo-1" / "comparison.json").read_text())
        for picture in ("curves.png", "comparison.png"):
            (RESULTS / "demo").mkdir(exist_ok=True)
            (RESULTS / "demo" / picture).write_bytes((clone / "runs" / "demo-1" / picture).read_bytes())
        for name in ("metrics", "comparison"):
            text = (clone / "runs" / "demo-1" / f"{name}.json").read_text()
            (RESULTS / "demo" / f"{name}.json").write_text(text)
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
        "([curves](benchmarks/results/demo/curves.png), [comparison](benchmarks/results/demo/comparison.png)).",
    ]
    (RESULTS / "commands.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    sys.exit(main())
