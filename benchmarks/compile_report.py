"""Compile every Triton kernel in its shipped configurations, with no GPU, and tabulate what the compilers made of them.

    python benchmarks/compile_report.py [--arch sm_90] [--filter REGEX] [--jobs 2] [--no-write]

For each kernel, case and target: registers, spills and shared memory; on NVIDIA also the instructions of the
innermost loop per score element, by class, read from the disassembly.  Writes ``results/compile_report.{md,json}``
beside this file and exits with status 1 when anything spills on an NVIDIA target.

An op takes part by a ``triton_launch`` module with ``compile_cases(arch) -> iterator of (case name, launch)``, where
a launch has ``kernel``, ``arguments`` (by parameter name, meta tensors for pointers, tuples of integers for strides),
``options``, ``tile`` (its shape in words) and ``scores_per_tile`` (scores of one loop iteration).  Its optional
``COMPILE_NOTES`` is appended to the report.
"""

from __future__ import annotations

import argparse
import collections
import concurrent.futures
import importlib
import json
import os
import pathlib
import re
import subprocess
import sys
import tempfile
from typing import Any

os.environ.pop("TRITON_INTERPRET", None)
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

OPS = ("rel_attention_2d",)
TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
RESULTS = pathlib.Path(__file__).resolve().parent / "results"

#: Instruction class -> SASS mnemonics it covers; the first match counts, anything else is "other".
CLASSES = {
    "exp": r"MUFU",
    "max": r"FMNMX",
    "fp32": r"FFMA|FADD|FMUL|FSETP|FSEL|FFMA2|FADD2|FMUL2",
    "convert": r"F2FP|F2F|I2F|F2I|HADD|HMUL|HFMA",
    "tensor": r"HMMA|HGMMA|WARPGROUP|UTC|LDT|STT|R2UR|UR2R",
    "shuffle": r"SHFL|REDUX",
    "shared": r"LDS|STS|LDSM|STSM|ATOMS|LDGSTS|MATRIX|MOVM",
    "global": r"LDG|STG|LD|ST|LDC|ULDC",
    "move": r"MOV|SEL|PRMT|UMOV|CS2R|PLOP3|R2P|P2R|VOTE",
    "integer": r"U?(IADD|IMAD|LEA|LOP3|SHF|ISETP|SEL|PRMT|F2FP)|IMNMX|VIADD|VIMNMX|IABS|POPC|USGXT",
    "control": r"BRA|BAR|DEPBAR|LDGDEPBAR|SYNCS|BSSY|BSYNC|WARPSYNC|NOP|EXIT|ELECT|FENCE|MEMBAR|YIELD|BREAK|ERRBAR",
}


def compile_launch(launch: Any, target: GPUTarget) -> Any:
    """Compile a launch ahead of time for ``target``, specialised as the just-in-time compiler would specialise it."""
    names = launch.kernel.arg_names
    signature: dict[str, Any] = {}
    constants: dict[tuple[int, ...], Any] = {}
    attributes: dict[tuple[int, ...], list] = {}

    def specialise(value: Any, path: tuple[int, ...]) -> Any:
        if isinstance(value, tuple):
            return tuple(specialise(item, (*path, i)) for i, item in enumerate(value))
        if isinstance(value, torch.Tensor):
            attributes[path] = [["tt.divisibility", 16]]
            return (
                "*" + {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16", "int64": "i64"}[str(value.dtype)[6:]]
            )
        if value is None or isinstance(value, bool | str) or value == 1:
            constants[path] = value
            return "constexpr"
        if isinstance(value, float):
            return "fp32"
        if value % 16 == 0:
            attributes[path] = [["tt.divisibility", 16]]
        return "i32" if value < 2**31 else "i64"

    for index, name in enumerate(names):
        value = launch.arguments[name]
        if launch.kernel.params[index].is_constexpr:
            constants[(index,)], signature[name] = value, "constexpr"
        else:
            signature[name] = specialise(value, (index,))
    source = ASTSource(fn=launch.kernel, signature=signature, constexprs=constants, attrs=attributes)
    return triton.compile(source, target=target, options=dict(launch.options))


def _tool(name: str) -> str:
    return str(pathlib.Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name)


def disassemble(cubin: bytes) -> tuple[list[tuple[int, str]], dict[str, int]]:
    """(address, instruction) of the kernel in a cubin, and its resources as cuobjdump names them."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = subprocess.run(
            [_tool("cuobjdump"), "--dump-resource-usage", file.name], capture_output=True, text=True, check=True
        )
        sass = subprocess.run([_tool("cuobjdump"), "-sass", file.name], capture_output=True, text=True, check=True)
    resources = {name: int(number) for name, number in re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", usage.stdout)}
    return [(int(a, 16), text) for a, text in re.findall(r"/\*([0-9a-f]{4,})\*/\s+(\S[^;]*);", sass.stdout)], resources


def mnemonic(instruction: str) -> str:
    """Opcode with its modifiers, without the predicate."""
    return re.sub(r"^@!?U?P\w+\s+", "", instruction).split()[0]


def innermost_loop(code: list[tuple[int, str]]) -> list[str]:
    """Instructions of the innermost loop with the most exponentials: the loop over score tiles."""
    spans = []
    for address, text in code:
        match = re.search(r"\bBRA\b.*?0x([0-9a-f]+)", text)
        if match and int(match.group(1), 16) < address:
            spans.append((int(match.group(1), 16), address))
    innermost = [s for s in spans if not any(o != s and s[0] <= o[0] and o[1] <= s[1] for o in spans)]
    bodies = [[text for address, text in code if start <= address <= end] for start, end in innermost]
    return max(bodies, key=lambda body: sum("MUFU.EX2" in text for text in body), default=[])


def classify(body: list[str]) -> dict[str, int]:
    counts: collections.Counter[str] = collections.Counter()
    for text in body:
        name = mnemonic(text)
        counts[next((c for c, pattern in CLASSES.items() if re.match(rf"({pattern})(\b|\.|\d)", name)), "other")] += 1
    return dict(counts)


def report_nvidia(compiled: Any, launch: Any) -> dict[str, Any]:
    code, resources = disassemble(compiled.asm["cubin"])
    body = innermost_loop(code)
    scores_per_thread = launch.scores_per_tile / (32 * launch.options["num_warps"])
    # The compiler may unroll the loop; the exponentials say how many tiles one pass holds.
    exponentials = sum("MUFU.EX2" in text for text in body)
    scores = scores_per_thread * max(1, round(exponentials / scores_per_thread))
    return {
        "registers": resources["REG"],
        "spills": sum(mnemonic(text).split(".")[0] in ("LDL", "STL") for _, text in code),
        "shared": compiled.metadata.shared,
        "instructions_per_score": round(len(body) / scores, 2),
        "classes_per_score": {name: round(count / scores, 3) for name, count in sorted(classify(body).items())},
    }


def report_amd(compiled: Any) -> dict[str, Any]:
    text = compiled.asm["amdgcn"]

    def number(field: str) -> int:
        return int(re.search(rf"\.{field}:\s*(\d+)", text).group(1))

    return {
        "registers": number("vgpr_count"),
        "spills": number("vgpr_spill_count") + number("sgpr_spill_count"),
        "shared": compiled.metadata.shared,
    }


def _cases(arch: str, pattern: str) -> list[tuple[str, str, Any]]:
    found = []
    for op in OPS:
        module = importlib.import_module(f"fused_attn.ops.{op}.triton_launch")
        found += [(op, case, launch) for case, launch in module.compile_cases(arch)]
    return [c for c in found if re.search(pattern, f"{c[2].kernel.__name__}: {c[1]}")]


def report_one(arch: str, index: int, pattern: str) -> dict[str, Any]:
    """Compile and measure case ``index`` of ``arch``."""
    op, case, launch = _cases(arch, pattern)[index]
    compiled = compile_launch(launch, TARGETS[arch])
    row = {
        "op": op,
        "kernel": launch.kernel.__name__,
        "case": case,
        "target": arch,
        "tile": launch.tile,
        "warps": launch.options["num_warps"],
        "stages": launch.options["num_stages"],
    }
    return row | (report_amd(compiled) if arch.startswith("gfx") else report_nvidia(compiled, launch))


def markdown(rows: list[dict[str, Any]]) -> str:
    lines = [
        "# Compile report",
        "",
        f"Written by `python benchmarks/compile_report.py` with Triton {triton.__version__}; no GPU involved.",
        "Tile: queries x (key rows x key columns); (query rows x query columns) where the loop is over queries.",
        "Spills: local loads and stores in the code (NVIDIA), spilled registers (AMD).",
        "Instructions per score: thread instructions of the innermost loop divided by the scores it computes.",
        "",
    ]
    for kernel in dict.fromkeys(row["kernel"] for row in rows):
        lines += [
            f"## {kernel}",
            "",
            "| case | target | tile | warps | stages | registers | spills | shared (bytes) | instructions per score |",
            "| --- | --- | --- | ---: | ---: | ---: | ---: | ---: | ---: |",
        ]
        for row in (r for r in rows if r["kernel"] == kernel):
            lines.append(
                f"| {row['case']} | {row['target']} | {row['tile']} | {row['warps']} | {row['stages']} "
                f"| {row['registers']} | {row['spills']} | {row['shared']} | {row.get('instructions_per_score', '')} |"
            )
        lines.append("")
    nvidia = [row for row in rows if row["target"] == "sm_90"]
    names = [name for name in (*CLASSES, "other") if any(name in row["classes_per_score"] for row in nvidia)]
    lines += ["## Instructions per score by class, sm_90", "", "| kernel | case | " + " | ".join(names) + " |"]
    lines.append("| --- | --- |" + " ---: |" * len(names))
    for row in nvidia:
        cells = " | ".join(f"{row['classes_per_score'].get(name, 0):.2f}" for name in names)
        lines.append(f"| {row['kernel']} | {row['case']} | {cells} |")
    for op in dict.fromkeys(row["op"] for row in rows):
        notes = getattr(importlib.import_module(f"fused_attn.ops.{op}.triton_launch"), "COMPILE_NOTES", "")
        lines += ["", f"## Notes on {op}", notes.rstrip()] if notes else []
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", action="append", choices=list(TARGETS), help="targets to compile for (default: all)")
    parser.add_argument(
        "--filter", default="", help="only cases where this regular expression is found in 'kernel: case'"
    )
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    parser.add_argument("--no-write", action="store_true", help="print the report instead of writing it")
    options = parser.parse_args()

    work = [
        (arch, i, options.filter) for arch in options.arch or TARGETS for i in range(len(_cases(arch, options.filter)))
    ]
    with concurrent.futures.ProcessPoolExecutor(options.jobs) as pool:
        rows = list(pool.map(report_one, *zip(*work, strict=True)))
    rows.sort(key=lambda row: (row["kernel"], row["case"]))
    if options.no_write:
        print(markdown(rows))
    else:
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / "compile_report.md").write_text(markdown(rows))
        (RESULTS / "compile_report.json").write_text(
            json.dumps({"triton": triton.__version__, "rows": rows}, indent=1) + "\n"
        )
    spilled = [row for row in rows if row["spills"] and not row["target"].startswith("gfx")]
    for row in spilled:
        print(f"spills: {row['kernel']}, {row['case']}, {row['target']}: {row['spills']}", file=sys.stderr)
    return 1 if spilled else 0


if __name__ == "__main__":
    sys.exit(main())
