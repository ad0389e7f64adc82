"""What bounds a loop on one multiprocessor, from its instructions, bytes and matrix products.

Every unit is taken to run at its peak and to overlap the others perfectly: the largest of the numbers is a time no
schedule of that code beats, not a prediction.

Sources: [1] CUDA C++ Best Practices Guide 13, "Throughput of Native Arithmetic Instructions" (results per clock and
multiprocessor, columns 8.0, 9.0 and 10.0); [2] NVIDIA A100 architecture whitepaper; [3] NVIDIA H100 architecture
whitepaper; [4] data sheets of A100 80 GB SXM, H200 SXM and HGX B200.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Multiprocessor:
    """Peak rates of one multiprocessor, per clock."""

    #: the part whose memory and clock are used
    part: str
    #: lanes of 32-bit multiply-add, add, multiply [1]
    fma: int
    #: lanes of compare, minimum, maximum [1]
    minmax: int
    #: floating-point operations of dense products with 16-bit operands [2, 3, 4]; half as many with tf32 ones
    tensor: int
    #: bytes of device memory: bandwidth over multiprocessors and boost clock [4]
    memory: float
    #: lanes of every instruction together: four schedulers issue one warp instruction each [2, 3]
    issue: int = 128
    #: lanes of exponential, logarithm, reciprocal, square root [1]
    special: int = 16
    #: lanes of integer addition, logic and shift, of conversions and selection [1]
    alu: int = 64
    #: lanes of warp shuffle [1]
    shuffle: int = 32
    #: bytes from L2: 5,120 per clock over 108 multiprocessors on A100 [2]; no figure is published for later parts
    l2: float = 5120 / 108


MULTIPROCESSORS = {
    "sm_80": Multiprocessor("A100 80 GB SXM", 64, 64, 2048, 2039e9 / (108 * 1.41e9)),
    "sm_90": Multiprocessor("H200 SXM", 128, 64, 4096, 4800e9 / (132 * 1.98e9)),
    "sm_100": Multiprocessor("B200", 128, 128, 8192, 8000e9 / (148 * 1.965e9)),
}

#: Bounds are clocks of one multiprocessor for so many scores or bytes.
WORK = 1024

UNITS = {
    "tensor": "matrix products on the tensor cores",
    "exp": "exponentials and other special functions",
    "fma": "32-bit multiply-add pipe",
    "alu": "comparisons, integers, conversions, selections",
    "issue": "issue slots: all instructions",
    "shuffle": "warp shuffles",
    "shared": "shared memory without bank conflicts, loads one clock per warp (lanes may share a word); operands that "
    "the tensor cores fetch themselves do not count",
    "global": "loads through L1, one clock per warp at least; copies and stores through L2; per byte of work also "
    "device memory, each byte once",
}


def bounds(
    arch: str,
    unit: str,
    classes: dict[str, float],
    elsewhere: float,
    shared: float,
    l1: float,
    l2: float,
    products: dict[str, float],
) -> dict[str, float]:
    """Clocks of one multiprocessor for 1,024 scores or bytes, by what would bound them.

    Args:
        arch: one of :data:`MULTIPROCESSORS`.
        unit: "score" or "byte".
        classes: thread instructions per score or byte, by class (``gpu_code.CLASSES``).
        elsewhere: those of the classes "integer" and "move" that do not run on the integer pipe.
        shared: clocks of shared memory per score or byte.
        l1: clocks of the L1 cache per score or byte.
        l2: bytes that pass the L2 cache per score or byte.
        products: floating-point operations on tensor cores per score or byte, by operand kind ("16-bit", "tf32").
    """
    rates = MULTIPROCESSORS[arch]

    def count(*names: str) -> float:
        return sum(classes.get(name, 0.0) for name in names)

    clocks = {
        "tensor": products.get("16-bit", 0.0) / rates.tensor + products.get("tf32", 0.0) / (rates.tensor / 2),
        "exp": count("exp") / rates.special,
        "fma": count("fp32") / rates.fma,
        "alu": count("max") / rates.minmax + max(0.0, count("convert", "integer", "move") - elsewhere) / rates.alu,
        "issue": sum(classes.values()) / rates.issue,
        "shuffle": count("shuffle") / rates.shuffle,
        "shared": shared,
        "global": max(l1, l2 / rates.l2) if unit == "score" else max(l1, l2 / rates.l2, 1.0 / rates.memory),
    }
    return {name: WORK * value for name, value in clocks.items()}
