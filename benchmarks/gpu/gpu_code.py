"""Ahead-of-time compilation of one Triton launch, with no GPU, and what its machine code holds.

A launch is anything with

- ``kernel``: the ``triton.jit`` function,
- ``arguments``: by parameter name; meta tensors for pointers, tuples for tuples, plain values for the rest,
- ``options``: ``num_warps``, ``num_stages`` and other compiler options,
- ``tile``: its shape in words,
- ``scores_per_tile`` or ``bytes_per_tile``: the work of one iteration of its innermost loop, and by the name of the
  field the unit that instructions are counted per.  Bytes are those that have to cross global memory; a kernel without
  such a loop counts the bytes of one program.
- optionally ``loops``: how many innermost loops each score passes through (default 1).
"""

from __future__ import annotations

import collections
import functools
import os
import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from gpu_bounds import bounds
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}

#: Instruction class -> SASS mnemonics it covers; the first match counts, anything else is "other".
CLASSES = {
    "exp": r"MUFU",
    "max": r"FMNMX",
    "fp32": r"FFMA|FADD|FMUL|FSETP|FSEL|FFMA2|FADD2|FMUL2",
    "convert": r"F2FP|F2F|I2F|F2I|HADD|HMUL|HFMA",
    "tensor": r"HMMA|HGMMA|WARPGROUP|UTC|LDT|STT|R2UR|UR2R",
    "shuffle": r"SHFL|REDUX",
    "shared": r"LDS|STS|LDSM|STSM|ATOMS|LDGSTS|MATRIX|MOVM",
    "global": r"LDG|STG|LD|ST|LDC|ULDC|RED|ATOMG",
    "move": r"MOV|SEL|PRMT|UMOV|CS2R|PLOP3|R2P|P2R|VOTE",
    "integer": r"U?(IADD|IMAD|LEA|LOP3|SHF|ISETP|SEL|PRMT|F2FP)|IMNMX|VIADD|VIMNMX|IABS|POPC|USGXT",
    "control": r"BRA|BAR|DEPBAR|LDGDEPBAR|SYNCS|BSSY|BSYNC|WARPSYNC|NOP|EXIT|ELECT|FENCE|MEMBAR|YIELD|BREAK|ERRBAR",
}

_POINTERS = {
    torch.float32: "*fp32",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.float64: "*fp64",
    torch.int64: "*i64",
    torch.int32: "*i32",
    torch.int8: "*i8",
    torch.uint8: "*u8",
    torch.bool: "*i1",
}

Code = list[tuple[int, str]]


def unit(launch: Any) -> str:
    """What the work of a launch is counted in: "score" or "byte"."""
    return "score" if hasattr(launch, "scores_per_tile") else "byte"


def work_per_tile(launch: Any) -> int:
    """Scores or bytes of one iteration."""
    return launch.scores_per_tile if unit(launch) == "score" else launch.bytes_per_tile


# --- compilation ------------------------------------------------------------------------------------------------------


def compile_launch(launch: Any, target: GPUTarget) -> Any:
    """Compile a launch ahead of time for ``target``, specialised as the just-in-time compiler would specialise it."""
    signature: dict[str, Any] = {}
    constants: dict[tuple[int, ...], Any] = {}
    attributes: dict[tuple[int, ...], list] = {}

    def specialise(value: Any, path: tuple[int, ...], free: bool) -> Any:
        if isinstance(value, tuple):
            return tuple(specialise(item, (*path, i), free) for i, item in enumerate(value))
        if isinstance(value, torch.Tensor):
            attributes[path] = [["tt.divisibility", 16]]
            return _POINTERS[value.dtype]
        if value is None or isinstance(value, bool | str) or (value == 1 and not free):
            constants[path] = value
            return "constexpr"
        if isinstance(value, float):
            return "fp32"
        if value % 16 == 0 and not free:
            attributes[path] = [["tt.divisibility", 16]]
        return "i32" if value < 2**31 else "i64"

    for index, parameter in enumerate(launch.kernel.params):
        value = launch.arguments[parameter.name]
        if parameter.is_constexpr:
            constants[(index,)], signature[parameter.name] = value, "constexpr"
        else:
            signature[parameter.name] = specialise(value, (index,), parameter.do_not_specialize)
    source = ASTSource(fn=launch.kernel, signature=signature, constexprs=constants, attrs=attributes)
    return triton.compile(source, target=target, options=dict(launch.options))


# --- machine code -----------------------------------------------------------------------------------------------------


@functools.cache
def _tool(name: str) -> str:
    return str(Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name)


def disassemble(cubin: bytes) -> tuple[Code, dict[str, int]]:
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


class Access(NamedTuple):
    """What one memory instruction of a warp asks of the memories, at least."""

    #: clocks of shared memory; of a load one, as its lanes may read the same word
    shared: float = 0.0
    #: clocks of the L1 cache, likewise
    l1: float = 0.0
    #: bytes that pass the L2 cache: copies to shared memory and stores, whose lanes do not coincide
    l2: int = 0
    #: bytes of global memory that the lanes ask for together, masked ones too
    asked: int = 0


def access(instruction: str) -> Access:
    """:class:`Access` of an instruction; zeros where it is none."""
    opcode, *modifiers = mnemonic(instruction).split(".")
    if opcode in ("LDSM", "STSM"):
        return Access(shared=next((int(m) for m in modifiers if m in ("2", "4")), 1))
    widths = {"256": 32, "128": 16, "64": 8, "U16": 2, "S16": 2, "U8": 1, "S8": 1}
    width = 32 * next((widths[m] for m in modifiers if m in widths), 4)
    if opcode in ("LDS", "ATOMS"):
        return Access(shared=1)
    if opcode == "STS":
        return Access(shared=max(1.0, width / 128))
    if opcode == "LDGSTS":
        return Access(shared=max(1.0, width / 128), l2=width, asked=width)
    if opcode == "LDG":
        return Access(l1=1, asked=width)
    if opcode in ("STG", "RED", "ATOMG"):
        return Access(l2=width, asked=width)
    return Access()


def exponentials(body: list[str]) -> int:
    """Base-2 exponentials: one per score."""
    return sum("MUFU.EX2" in text for text in body)


def global_bytes(body: list[str]) -> int:
    """Bytes of global memory that a warp asks for."""
    return sum(access(text).asked for text in body)


def innermost_loops(code: Code) -> list[list[str]]:
    """Instructions of every loop that holds no other loop."""
    spans = []
    for address, text in code:
        match = re.search(r"\bBRA\b.*?0x([0-9a-f]+)", text)
        if match and int(match.group(1), 16) < address:
            spans.append((int(match.group(1), 16), address))
    innermost = [s for s in spans if not any(o != s and s[0] <= o[0] and o[1] <= s[1] for o in spans)]
    return [[text for address, text in code if start <= address <= end] for start, end in innermost]


def working_code(code: Code, launch: Any) -> list[str]:
    """The instructions that do the work: the loops over score tiles, or what moves the most memory."""
    measure = exponentials if unit(launch) == "score" else global_bytes
    loops = sorted(innermost_loops(code), key=measure, reverse=True)[: getattr(launch, "loops", 1)]
    body = [text for loop in loops for text in loop]
    if not body or (unit(launch) == "byte" and not measure(body)):
        body = [text for _, text in code]
        while body and mnemonic(body[-1]).split(".")[0] in ("NOP", "BRA"):  # padding after the last EXIT
            body.pop()
    return body


def classify(body: list[str]) -> dict[str, int]:
    """Instructions of each of :data:`CLASSES`."""
    counts: collections.Counter[str] = collections.Counter()
    for text in body:
        name = mnemonic(text)
        counts[next((c for c, pattern in CLASSES.items() if re.match(rf"({pattern})(\b|\.|\d)", name)), "other")] += 1
    return dict(counts)


# --- products ---------------------------------------------------------------------------------------------------------


class Product(NamedTuple):
    """One product of Triton's IR that runs on the tensor cores."""

    rows: int
    inner: int
    columns: int
    #: "16-bit" or "tf32" operands
    kind: str

    @property
    def flops(self) -> int:
        return 2 * self.rows * self.inner * self.columns


def products(ttir: str) -> list[Product]:
    """The products in that loop of Triton's IR that has the most of them, one iteration.

    The IR knows their shapes on every target; the machine code of sm_100 does not name them.  IEEE float32 products
    run on the vector units and do not count.
    """
    found: dict[int, list[Product]] = collections.defaultdict(list)
    regions, loops = [0], 0
    pattern = re.compile(r"tt\.dot (.*): tensor<(\d+)x(\d+)x(\w+)> \* tensor<\d+x(\d+)x\w+>")
    for line in ttir.splitlines():
        text = re.sub(r"loc\(.*?\)", "", line).strip()
        if text.startswith("}") and len(regions) > 1:
            regions.pop()
        if match := pattern.search(text):
            attributes, rows, inner, dtype, columns = match.groups()
            if dtype != "f32" or "= tf32" in attributes:
                kind = "tf32" if dtype == "f32" else "16-bit"
                found[regions[-1]].append(Product(int(rows), int(inner), int(columns), kind))
        if text.endswith("{"):
            opens_loop = "scf.for" in text or "scf.while" in text
            loops += opens_loop
            regions.append(loops if opens_loop else regions[-1])
    return max(found.values(), key=lambda group: sum(product.flops for product in group), default=[])


def issued_products(body: list[str]) -> tuple[int, int]:
    """(floating-point operations of one warp's matrix instructions, instructions that name no shape)."""
    flops = unnamed = 0
    for text in body:
        name = mnemonic(text)
        if match := re.match(r"HMMA\.(16|8)(8)(\d+)\b", name):
            flops += 2 * int(match[1]) * int(match[2]) * int(match[3])
        elif match := re.match(r"HGMMA\.(\d+)x(\d+)x(\d+)\b", name):  # four warps together
            flops += 2 * int(match[1]) * int(match[2]) * int(match[3]) // 4
        elif re.match(r"UTC\w*MMA", name):
            unnamed += 1
    return flops, unnamed


# --- measurement ------------------------------------------------------------------------------------------------------


def tiles_in(body: list[str], launch: Any, on_tensor_cores: list[Product]) -> int:
    """How many iterations one pass over ``body`` does: the compilers may unroll the loop.

    Products tell, where there are any: an exponential may be computed twice, in two layouts.
    """
    loops, threads = getattr(launch, "loops", 1), 32 * launch.options["num_warps"]
    if any(mnemonic(text) == "EXIT" for text in body):  # the whole program
        return 1
    flops, unnamed = issued_products(body)
    if flops:
        found, expected = flops, sum(product.flops for product in on_tensor_cores) * loops * 32 / threads
    elif unnamed:
        # One instruction takes up to 128 rows, 256 columns and 32 bytes of depth.
        depths = {"16-bit": 16, "tf32": 8}
        found, expected = (
            unnamed,
            loops * sum(-(-p.rows // 128) * -(-p.columns // 256) * p.inner // depths[p.kind] for p in on_tensor_cores),
        )
    elif unit(launch) == "score":
        found, expected = exponentials(body), loops * work_per_tile(launch) / threads
    else:
        found, expected = global_bytes(body), 32 * work_per_tile(launch) / threads
    return max(1, round(found / expected)) if expected else 1


def measure_nvidia(compiled: Any, launch: Any, arch: str) -> dict[str, Any]:
    """Resources, instructions per score or byte, and the bounds that follow from them."""
    code, resources = disassemble(compiled.asm["cubin"])
    body = working_code(code, launch)
    on_tensor_cores = products(compiled.asm["ttir"])
    per_thread = work_per_tile(launch) / (32 * launch.options["num_warps"])
    work = per_thread * tiles_in(body, launch, on_tensor_cores)
    classes = {name: count / work for name, count in sorted(classify(body).items())}
    shared, l1, l2, asked = (sum(column) / (32 * work) for column in zip(*map(access, body), strict=True))
    flops: collections.Counter[str] = collections.Counter()
    for product in on_tensor_cores:
        flops[product.kind] += product.flops * getattr(launch, "loops", 1) / work_per_tile(launch)
    # IMAD runs on the multiply-add pipe, uniform instructions once per warp on a pipe of their own.
    elsewhere = sum(re.match(r"IMAD|U[A-Z]", mnemonic(text)) is not None for text in body) / work
    clocks = bounds(arch, unit(launch), classes, elsewhere, shared, l1, l2, flops)
    return {
        "registers": resources["REG"],
        "spills": sum(mnemonic(text).split(".")[0] in ("LDL", "STL") for _, text in code),
        "shared": compiled.metadata.shared,
        "instructions": round(len(body) / work, 3),
        "bytes_asked": round(asked, 3),
        "classes": {name: round(count, 4) for name, count in classes.items()},
        "clocks": {name: round(value, 2) for name, value in clocks.items()},
        "bound": max(clocks, key=clocks.get),
    }


def measure_amd(compiled: Any) -> dict[str, Any]:
    """Resources alone: the code is not disassembled."""
    text = compiled.asm["amdgcn"]

    def number(field: str) -> int:
        return int(re.search(rf"\.{field}:\s*(\d+)", text).group(1))

    return {
        "registers": number("vgpr_count"),
        "spills": number("vgpr_spill_count") + number("sgpr_spill_count"),
        "shared": compiled.metadata.shared,
    }


def _cpu_seconds() -> float:
    """CPU time of this process and of the assemblers that it waited for."""
    return sum(os.times()[:4])


def measure_launch(launch: Any, arch: str) -> dict[str, Any]:
    """Compile for ``arch`` and measure; ``{"error": text}`` where it does not compile."""
    row = {
        "kernel": launch.kernel.__name__,
        "target": arch,
        "unit": unit(launch),
        "tile": str(launch.tile),
        "warps": launch.options["num_warps"],
        "stages": launch.options["num_stages"],
    }
    began = _cpu_seconds()
    try:
        compiled = compile_launch(launch, TARGETS[arch])
    except Exception as error:
        last = (str(error).strip() or repr(error)).splitlines()[-1]
        return row | {"error": f"{type(error).__name__}: {last}"}
    row["seconds"] = round(_cpu_seconds() - began, 1)
    return row | (measure_amd(compiled) if arch.startswith("gfx") else measure_nvidia(compiled, launch, arch))
