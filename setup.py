"""Builds the C++ kernels against the LibTorch stable ABI, so that one wheel serves torch 2.11 and everything after it.

Build with ``pip install --no-build-isolation .`` in an environment that has torch: an isolated build would fetch
another one.  Without a C++ compiler the Python part is installed alone; ``fused-attn info`` then says so.
Setting FUSED_ATTN_REQUIRE_EXTENSION=1 makes a failed compilation an error instead.
"""

import os
import sys
from pathlib import Path

from setuptools import setup
from torch.utils.cpp_extension import BuildExtension, CppExtension

REQUIRE_EXTENSION = os.environ.get("FUSED_ATTN_REQUIRE_EXTENSION") == "1"
TORCH_2_11 = "0x020b000000000000"
SOURCES = sorted(str(path) for path in Path("csrc").rglob("*.cpp"))

FLAGS = [
    "-O3",
    "-std=c++20",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-fvisibility=hidden",
    "-Wall",
    "-Wno-psabi",
    "-Wno-unknown-pragmas",
    f"-DTORCH_TARGET_VERSION={TORCH_2_11}",
]


class OptionalBuildExtension(BuildExtension):
    """Compiles where a compiler is there; otherwise says so and goes on."""

    def run(self) -> None:
        try:
            super().run()
        except Exception as error:
            if REQUIRE_EXTENSION:
                raise
            print(f"fused-attn: the C++ kernels were not built ({error}); installing without them", file=sys.stderr)
            self.extensions = []


setup(
    ext_modules=[
        CppExtension(
            "fused_attn._C",
            SOURCES,
            include_dirs=[str(Path("csrc").resolve())],
            extra_compile_args={"cxx": FLAGS},
            extra_link_args=["-s"],
            py_limited_api=True,
        )
    ],
    cmdclass={"build_ext": OptionalBuildExtension.with_options(no_python_abi_suffix=True)},
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)
