"""Compile every Triton kernel in its shipped configurations, with no GPU, and tabulate what the compilers made of them.

    python benchmarks/gpu/compile_report.py              every op, every target; writes results/compile_report.{md,json}
    python benchmarks/gpu/compile_report.py --op NAME    that op only; the other ops' rows in the report stay
    python benchmarks/gpu/compile_report.py --peers      the peers' kernels only, likewise
    python benchmarks/gpu/compile_report.py --check      writes nothing; fails where the report says otherwise
    python benchmarks/gpu/compile_report.py --tried      with another Triton: adds whether everything compiles

``--arch``, ``--filter`` and ``--quick`` narrow any of them, ``--no-write`` prints the report instead.  For each
kernel, case and target: registers, spills, shared memory; on NVIDIA also the instructions of the innermost loop per
score or byte, by class, and what bounds it.  The exit status is 1 when one of our kernels does not compile or spills
on an NVIDIA target.

An op takes part by a ``triton_launch`` module, or a ``triton_compile_cases`` module beside it, with
``compile_cases(arch) -> iterator of (case name, launch)``; what a launch is, is in ``gpu_code.py``.  Its optional
``COMPILE_NOTES`` is appended to the report.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import functools
import importlib
import json
import os
import re
import sys
from pathlib import Path
from typing import Any

os.environ.pop("TRITON_INTERPRET", None)
sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import compile_peers
import gpu_bounds
import gpu_code
import triton

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results"
KEY = ("op", "kernel", "case", "target")
#: What ``--check`` compares; compilation is deterministic, so exactly.
COMPARED = ("registers", "spills", "shared", "instructions")


def ops() -> list[str]:
    """Folders of ``fused_attn/ops`` whose Triton launches can be compiled."""
    found = sorted(path.parent.name for path in (ROOT / "fused_attn" / "ops").glob("*/triton_launch.py"))
    return [op for op in found if hasattr(_launches(op), "compile_cases")]


def _launches(op: str) -> Any:
    apart = (ROOT / "fused_attn" / "ops" / op / "triton_compile_cases.py").exists()
    return importlib.import_module(f"fused_attn.ops.{op}.{'triton_compile_cases' if apart else 'triton_launch'}")


@functools.cache
def _cases(source: str, arch: str, pattern: str, quick: bool = False) -> list[tuple[str, str, Any]]:
    """(op or peer, case, launch) of an op, or of "peers"; with ``quick`` the first of each kernel."""
    if source == "peers":
        found = list(compile_peers.cases(arch))
    else:
        found = [(source, case, launch) for case, launch in _launches(source).compile_cases(arch)]
    found = [c for c in found if re.search(pattern, f"{c[2].kernel.__name__}: {c[1]}")]
    first = {c[2].kernel.__name__: c for c in reversed(found)}
    return [c for c in found if not quick or c is first[c[2].kernel.__name__]]


def compile_one(source: str, arch: str, pattern: str, quick: bool, index: int) -> dict[str, Any]:
    """Row of case ``index`` of ``source`` on ``arch``."""
    op, case, launch = _cases(source, arch, pattern, quick)[index]
    return {"op": op, "case": case} | gpu_code.measure_launch(launch, arch)


def compile_all(sources: list[str], archs: list[str], pattern: str, quick: bool, jobs: int) -> list[dict[str, Any]]:
    """Rows of every case, in a fixed order."""
    work = [
        (source, arch, pattern, quick, index)
        for arch in archs
        for source in sources
        for index in range(len(_cases(source, arch, pattern, quick)))
    ]
    if not work:
        return []
    with concurrent.futures.ProcessPoolExecutor(jobs) as pool:
        rows = list(pool.map(compile_one, *zip(*work, strict=True)))
    return _sorted(rows)


def _sorted(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    targets = list(gpu_code.TARGETS)
    return sorted(rows, key=lambda row: (row["op"], row["kernel"], row["case"], targets.index(row["target"])))


def _key(row: dict[str, Any]) -> tuple[str, ...]:
    return tuple(row[name] for name in KEY)


# --- verdicts ---------------------------------------------------------------------------------------------------------


def problems(rows: list[dict[str, Any]]) -> list[str]:
    """Our kernels that do not compile, or spill on an NVIDIA target, in words."""
    found = []
    for row in rows:
        name = f"{row['kernel']}, {row['case']}, {row['target']}"
        if "error" in row:
            found.append(f"does not compile: {name}: {row['error']}")
        elif row["spills"] and not row["target"].startswith("gfx"):
            found.append(f"spills: {name}: {row['spills']}")
    return found


def differences(rows: list[dict[str, Any]], committed: dict[str, Any], complete: bool) -> list[str]:
    """Where ``committed`` does not say what ``rows`` say; ``complete``: it may hold no other row either."""
    if committed["triton"] != triton.__version__:
        return []
    known = {_key(row): row for row in committed["rows"]}
    found = []
    for row in rows:
        old = known.pop(_key(row), None)
        if old is None:
            found.append(f"not in the report: {', '.join(_key(row))}; run compile_report.py --op {row['op']}")
            continue
        changed = [f"{name} {old.get(name)} -> {row.get(name)}" for name in COMPARED if old.get(name) != row.get(name)]
        if changed:
            found.append(f"the report is out of date: {', '.join(_key(row))}: {', '.join(changed)}")
    if complete:
        found += [f"in the report, but no longer compiled: {', '.join(key)}" for key in known]
    return found


def unlisted(committed: dict[str, Any]) -> list[str]:
    """Cases that the report lacks or has in excess, by name; compiles nothing."""
    expected = {
        (op, launch.kernel.__name__, case, arch)
        for source in ops()
        for arch in gpu_code.TARGETS
        for op, case, launch in _cases(source, arch, "")
    }
    return [", ".join(key) for key in sorted(expected ^ {_key(row) for row in committed["rows"]})]


# --- report -----------------------------------------------------------------------------------------------------------


def _table(header: list[str], rows: list[list[Any]], left: int) -> list[str]:
    """Markdown; the first ``left`` columns hold text."""
    lines = ["| " + " | ".join(header) + " |", "|" + " --- |" * left + " ---: |" * (len(header) - left)]
    return lines + ["| " + " | ".join(str(cell) for cell in row) + " |" for row in rows]


def _resources(row: dict[str, Any]) -> list[Any]:
    if "error" in row:
        return [row["warps"], row["stages"], f"does not compile: {row['error']}", "", "", "", "", ""]
    bound = f"{row['bound']} {row['clocks'][row['bound']]:.0f}" if "bound" in row else ""
    cells = (row["registers"], row["spills"], row["shared"], row.get("instructions", ""), bound)
    return [row["warps"], row["stages"], *cells, row.get("seconds", "")]


_RESOURCES = ["warps", "stages", "registers", "spills", "shared (bytes)", "instructions", "bound", "compiled in s"]


def markdown(report: dict[str, Any]) -> str:
    """The report as committed."""
    rows = report["rows"]
    lines = [
        "# Compile report",
        "",
        f"Written by `python benchmarks/gpu/compile_report.py` with Triton {report['triton']}; no GPU involved.",
        "",
        "- Tile: queries x (key rows x key columns); (query rows x query columns) where the loop is over queries.",
        "- Spills: local loads and stores in the code (NVIDIA), spilled registers (AMD).",
        "- Instructions: thread instructions of the innermost loop per score, or per byte of global memory.",
        f"- Bound: what bounds the loop, and the clocks of one multiprocessor for {gpu_bounds.WORK:,} scores or bytes "
        "that follow from it, every unit at its peak and all at once: no schedule of that code is faster, the code may "
        "well be slower.",
        "- Compiled in s: CPU time, of one core that may be shared; only the order of magnitude is meant.",
        "",
    ]
    for version, verdict in sorted(report["versions"].items()):
        bad = verdict["problems"]
        outcome = f"{len(bad)} with problems:" if bad else "every one, without spills on an NVIDIA target."
        lines += [f"Triton {version} compiled {verdict['compiled']} launches, {outcome}", ""]
        lines += [*(f"- {text}" for text in bad), ""] if bad else []
    for kernel in dict.fromkeys(row["kernel"] for row in rows):
        lines += [f"## {kernel}", ""]
        cells = [[row["case"], row["target"], row["tile"], *_resources(row)] for row in rows if row["kernel"] == kernel]
        lines += [*_table(["case", "target", "tile", *_RESOURCES], cells, 3), ""]
    lines += _classes(rows) + _bounds(rows) + _peers(report)
    for op in dict.fromkeys(row["op"] for row in rows):
        notes = getattr(_launches(op), "COMPILE_NOTES", "")
        lines += ["", f"## Notes on {op}", notes.rstrip()] if notes else []
    return "\n".join(lines) + "\n"


def _classes(rows: list[dict[str, Any]]) -> list[str]:
    measured = [row for row in rows if row["target"] == "sm_90" and "classes" in row]
    names = [name for name in (*gpu_code.CLASSES, "other") if any(name in row["classes"] for row in measured)]
    cells = [
        [row["kernel"], row["case"], row["unit"], *(f"{row['classes'].get(name, 0):.2f}" for name in names)]
        for row in measured
    ]
    header = ["kernel", "case", "per", *names]
    return ["## Instructions by class, sm_90", "", *_table(header, cells, 3), ""]


def _bounds(rows: list[dict[str, Any]]) -> list[str]:
    lines = [
        "## Bounds",
        "",
        f"Clocks of one multiprocessor for {gpu_bounds.WORK:,} scores or bytes, by unit; the largest is the bound.",
        "",
    ]
    lines += [f"- {name}: {text}" for name, text in gpu_bounds.UNITS.items()]
    rates = [
        [arch, r.part, r.issue, r.special, r.fma, r.minmax, r.alu, r.shuffle, r.tensor, f"{r.l2:.1f}",
         f"{r.memory:.1f}"]
        for arch, r in gpu_bounds.MULTIPROCESSORS.items()
    ]  # fmt: skip
    header = ["target", "part", "issue", "exp", "fma", "min/max", "alu", "shuffle", "tensor FLOP (16-bit)"]
    header += ["L2 B", "memory B"]
    lines += [
        "",
        "Bytes asked: of global memory by the loop's instructions, lanes that are masked off or share an address ",
    ]
    lines[-1] += "counted each, per score or byte."
    lines += ["", "Per multiprocessor and clock (sources in `gpu_bounds.py`):", "", *_table(header, rates, 2), ""]
    names = list(gpu_bounds.UNITS)
    cells = [
        [row["kernel"], row["case"], row["target"], row["unit"]]
        + [f"**{row['clocks'][n]:.0f}**" if n == row["bound"] else f"{row['clocks'][n]:.0f}" for n in names]
        + [f"{row['bytes_asked']:.2f}"]
        for row in rows
        if "clocks" in row
    ]
    header = ["kernel", "case", "target", "per", *names, "bytes asked"]
    return [*lines, *_table(header, cells, 4), ""]


def _peers(report: dict[str, Any]) -> list[str]:
    lines = [
        "## Peers",
        "",
        "The peers' kernels, compiled like ours. FlexAttention: the kernels that TorchInductor writes for captured row "
        f"and column logits (torch {report['peers'].get('torch', 'not run')}), in its own choice of tile, values of "
        "depth 16 where ours have 2, the smallest it takes. Its backward pass is one kernel of two loops, counted "
        "together; ours make dQ in one kernel and dK, dV in another.",
        "",
    ]
    peers = report["peers"].get("rows", [])
    cells = []
    for case in dict.fromkeys(row["case"] for row in peers):
        group = [row for row in report["rows"] if row["case"] == case] + [row for row in peers if row["case"] == case]
        for target in gpu_code.TARGETS:
            cells += [
                [case, target, row["op"] if row in peers else "ours", row["kernel"], row["tile"], *_resources(row)]
                for row in group
                if row["target"] == target
            ]
    if cells:
        lines += [*_table(["case", "target", "by", "kernel", "tile", *_RESOURCES], cells, 5), ""]
    return lines + [f"- {name}: {reason}" for name, reason in report["peers"].get("missing", {}).items()]


# --- command line -----------------------------------------------------------------------------------------------------


def load() -> dict[str, Any]:
    """The committed report; an empty one where there is none."""
    path = RESULTS / "compile_report.json"
    report = json.loads(path.read_text()) if path.exists() else {}
    return {"triton": triton.__version__, "versions": {}, "rows": [], "peers": {}} | report


def save(report: dict[str, Any]) -> None:
    """Write both files."""
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "compile_report.md").write_text(markdown(report))
    (RESULTS / "compile_report.json").write_text(json.dumps(report, indent=1, allow_nan=False) + "\n")


def merged(report: dict[str, Any], rows: list[dict[str, Any]], replaced: set[str]) -> dict[str, Any]:
    """``report`` with ``rows``; those it has of the ops in ``replaced`` go, as do those of ops that are no more.

    Raises:
        SystemExit: rows of two Triton versions would stand side by side.
    """
    kept = [row for row in report["rows"] if row["op"] in set(ops()) - replaced and _key(row) not in map(_key, rows)]
    if kept and report["triton"] != triton.__version__:
        raise SystemExit(f"the report is of Triton {report['triton']}, this is {triton.__version__}: run it whole")
    rows = _sorted(kept + rows)
    versions = report["versions"] | {triton.__version__: {"compiled": len(rows), "problems": problems(rows)}}
    return report | {"triton": triton.__version__, "versions": versions, "rows": rows}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--op", action="append", choices=ops(), help="ops to compile (default: all)")
    parser.add_argument("--arch", action="append", choices=list(gpu_code.TARGETS), help="targets (default: all)")
    parser.add_argument(
        "--filter", default="", help="only cases where this regular expression is found in 'kernel: case'"
    )
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    parser.add_argument("--quick", action="store_true", help="of each kernel the first case only")
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--peers", action="store_true", help="compile the peers' kernels")
    mode.add_argument("--check", action="store_true", help="compare with the committed report")
    mode.add_argument("--tried", action="store_true", help="record what this version of Triton compiles, no more")
    parser.add_argument("--no-write", action="store_true", help="print the report instead of writing it")
    options = parser.parse_args()

    sources = ["peers"] if options.peers else options.op or ops()
    narrowed = bool(options.arch or options.filter or options.quick)
    archs = options.arch or list(gpu_code.TARGETS)
    if not options.check:
        os.environ["TRITON_ALWAYS_COMPILE"] = "1"  # a row from Triton's cache would report no seconds
    rows = compile_all(sources, archs, options.filter, options.quick, options.jobs)
    found = [] if options.peers else problems(rows)
    report = load()
    if options.check:
        found += differences(rows, report, complete=not narrowed and not options.op)
        print(f"{len(rows)} launches compiled with Triton {triton.__version__}, {len(found)} problems")
    elif options.tried:
        if narrowed or options.op:
            parser.error("--tried takes every op, case and target")
        report["versions"][triton.__version__] = {"compiled": len(rows), "problems": problems(rows)}
        save(report)
    elif options.no_write:
        print(markdown(report | {"triton": triton.__version__, "versions": {}, "rows": rows, "peers": {}}))
    elif options.peers:
        if narrowed:
            parser.error("--peers with --arch or --filter takes --no-write")
        import torch

        save(report | {"peers": {"torch": torch.__version__, "rows": rows, "missing": compile_peers.missing()}})
    else:
        save(merged(report, rows, set() if narrowed else set(sources)))
    print("\n".join(found), end="\n" if found else "", file=sys.stderr)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
