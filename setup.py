"""Builds the C++ kernels against the LibTorch stable ABI, so that one wheel serves torch 2.11 and everything after it.

``pip install .`` builds with the torch that is installed, or with one that pip fetches: see build_backend.py.  Where
no C++ compiler is there, or with FUSED_ATTN_NO_EXTENSION=1, the Python part is built alone, as a pure wheel; the build,
the first call that wants a kernel and ``fused-attn info`` say so.  FUSED_ATTN_REQUIRE_EXTENSION=1 makes that an error;
a compiler that fails always is one.
"""

import contextlib
import copy
import os
import shlex
import shutil
import sys
from pathlib import Path

from setuptools import setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

TORCH_2_11 = "0x020b000000000000"
SOURCES = sorted(str(path) for path in Path("csrc").rglob("*.cpp"))
HEADERS = sorted(str(path) for path in Path("csrc").rglob("*.h"))
#: Floats to a vector of the instruction sets that every kernels.cpp is compiled for.
LANES = {"generic": 4, "avx2": 8, "avx512": 16}

FLAGS = [
    "-O3",
    "-g0",  # Python's own flags have -g, a fifth of the time, for what the linker strips
    "-std=c++20",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-fvisibility=hidden",
    "-Wall",
    "-Wno-psabi",
    "-Wno-unknown-pragmas",
    f"-DTORCH_TARGET_VERSION={TORCH_2_11}",
]


def asked(variable: str) -> bool:
    return os.environ.get(variable) == "1"


def use_compiler() -> str | None:
    """Have one C++ compiler compile and link; without one, say why the kernels are left out."""
    if asked("FUSED_ATTN_NO_EXTENSION"):
        return "FUSED_ATTN_NO_EXTENSION=1 is set"
    named = os.environ.get("CXX")
    candidates = [named] if named else ["c++", "g++", "clang++"]
    for command in candidates:
        if shutil.which(shlex.split(command)[0]):
            os.environ["CXX"] = command
            if sys.platform == "linux":
                # setuptools links with the compiler that Python was built with, which need not be there.
                os.environ.setdefault("LDCXXSHARED", f"{command} -shared")
            return None
    return f"there is no C++ compiler: {', '.join(candidates)} not found"


LEFT_OUT = use_compiler()
torch_version, BuildExtension, CppExtension = None, build_ext, None
if LEFT_OUT is None and "sdist" not in sys.argv:  # importing torch takes seconds
    with contextlib.suppress(ImportError):
        from torch import __version__ as torch_version
        from torch.utils.cpp_extension import BuildExtension, CppExtension


class BuildKernels(BuildExtension):
    """Compiles every kernels.cpp once per instruction set.  A failed build says how to install without the kernels."""

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, no_python_abi_suffix=True, **kwargs)

    def build_extension(self, extension) -> None:
        whole = copy.copy(extension)
        whole.depends = [*extension.depends, *extension.sources]
        whole.sources = [part for source in extension.sources for part in self.parts(Path(source))]
        super().build_extension(whole)

    def parts(self, source: Path) -> list[str]:
        """``source`` itself or, for kernels, a file per instruction set that includes it: objects of their own."""
        if source.name != "kernels.cpp":
            return [str(source)]
        folder = Path(self.build_temp, source.parent)
        folder.mkdir(parents=True, exist_ok=True)
        found = []
        for name, lanes in LANES.items():
            part = folder / f"kernels_{name}.cpp"
            text = f'#define FUSED_ATTN_ONLY_LANES {lanes}\n#include "{source.relative_to("csrc").as_posix()}"\n'
            if not part.exists() or part.read_text() != text:
                part.write_text(text)
            found.append(str(part))
        return found

    def run(self) -> None:
        try:
            super().run()
        except Exception as error:
            raise CompileError(
                f"fused-attn: the C++ kernels could not be built with {os.environ['CXX']} ({error}). Its messages are "
                "above. To install without the kernels, so that the plain PyTorch reference runs on the CPU, set "
                "FUSED_ATTN_NO_EXTENSION=1."
            ) from error


def kernels() -> list:
    """The extension; none where it cannot or shall not be built, which makes the wheel a pure one."""
    if "sdist" in sys.argv:  # MANIFEST.in has the sources: neither torch nor a compiler is needed
        return []
    if LEFT_OUT is None:
        if torch_version is None or [*map(int, torch_version.split(".")[:2])] < [2, 11]:
            sys.exit(
                f"fused-attn: building the C++ kernels takes torch>=2.11, and here is {torch_version or 'none'}: "
                "pip install 'torch>=2.11' first, or leave out --no-build-isolation. FUSED_ATTN_NO_EXTENSION=1 "
                "installs without the kernels."
            )
        return [
            CppExtension(
                "fused_attn._C",
                SOURCES,
                depends=HEADERS,
                include_dirs=[str(Path("csrc").resolve())],
                extra_compile_args={"cxx": FLAGS},
                extra_link_args=["-s"],
                py_limited_api=True,
            )
        ]
    if asked("FUSED_ATTN_REQUIRE_EXTENSION"):
        sys.exit(f"fused-attn: FUSED_ATTN_REQUIRE_EXTENSION=1 is set, but {LEFT_OUT}")
    warn(f"fused-attn: the C++ kernels are left out: {LEFT_OUT}; on the CPU, ops run the slower PyTorch reference")
    return []


def warn(text: str) -> None:
    print(text, file=sys.stderr)
    if not sys.stderr.isatty() and {"bdist_wheel", "editable_wheel"} & {*sys.argv}:
        # pip shows what a build prints only with -v, but it does not hide the terminal.
        with contextlib.suppress(OSError), open("/dev/tty", "w") as terminal:
            print(f"\n{text}", file=terminal)


setup(
    ext_modules=kernels(),
    cmdclass={"build_ext": BuildKernels},
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)
