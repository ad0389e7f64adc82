"""What users get: a source archive that builds, wheels with the right tag, a package that works with torch alone, plain
words where kernels or packages are missing."""

import ast
import importlib
import importlib.metadata
import inspect
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
import torch
from commands import TRAIN, environment, python
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import fused_attn
from fused_attn import _extension, _extras, modules
from fused_attn.cli import EXTRA_OF

ROOT = Path(__file__).parents[1]
BUILT = ROOT / "fused_attn" / "_C.so"
HOOK = "import sys, build_backend; print(build_backend.{}(sys.argv[1]))"
CALL = """
import torch, fused_attn
from fused_attn import _extension, rel_attention_2d
x = torch.randn(1, 2, 4, 4, 8, generator=torch.Generator().manual_seed(0))
print(fused_attn.__file__)
print(_extension.available(), _extension.reason())
compiled = torch.compile(lambda x: rel_attention_2d(x, x, x), fullgraph=True, backend="eager")
for function in (compiled, lambda x: rel_attention_2d(x, x, x)):
    print(torch.allclose(function(x), rel_attention_2d(x, x, x, impl="reference"), atol=1e-6))
"""

# Where no build is there to reuse, every kernel is compiled.
pytestmark = pytest.mark.long


def run(*command, cwd=ROOT.parent, check=True, **environment):
    variables = {name: value for name, value in os.environ.items() if not name.startswith("FUSED_ATTN_")}
    return subprocess.run(
        command,
        check=check,
        capture_output=True,
        text=True,
        cwd=cwd,
        env={**variables, **environment},
        start_new_session=True,  # a build's warning goes to the terminal, if there is one
    )


def build(source: Path, to: Path, what: str = "wheel", check=True, **environment):
    """What pip does without isolation, but its own start: the build back-end's hook, in ``source``."""
    to.mkdir(exist_ok=True)
    return run(sys.executable, "-c", HOOK.format(f"build_{what}"), str(to), cwd=source, check=check, **environment)


def copy_sources(to: Path) -> Path:
    files = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True
    ).stdout.split()
    if not files:
        pytest.skip("not a git checkout: the list of source files is unknown")
    for name in files:
        if name.startswith(("csrc/", "fused_attn/", "tests/")) or "/" not in name:
            (to / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, to / name)
    return to


def tree(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def sdist(tmp_path_factory) -> Path:
    """The source archive, made where there is no compiler: that must not leave the kernels' sources out."""
    folder = tmp_path_factory.mktemp("sdist")
    build(copy_sources(folder / "source"), folder, "sdist", CXX="no-compiler")
    return next(folder.glob("*.tar.gz"))


@pytest.fixture
def unpacked(sdist, tmp_path) -> Path:
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path / "unpacked", filter="data")
    return next((tmp_path / "unpacked").iterdir())


@pytest.fixture(scope="module")
def pure(sdist, tmp_path_factory) -> Path:
    """The wheel that a machine without a compiler builds."""
    folder = tmp_path_factory.mktemp("pure")
    with tarfile.open(sdist) as archive:
        archive.extractall(folder, filter="data")
    build(next(folder.iterdir()), folder / "wheel", CXX="no-compiler")
    return next((folder / "wheel").iterdir())


def script(path: Path, body: str) -> str:
    """A compiler made of shell commands; what these leave goes to the real one."""
    path.write_text(f'#!/bin/sh\n{body}\nexec {os.environ.get("CXX") or "c++"} "$@"\n')
    path.chmod(0o755)
    return str(path)


def earlier_build(source: Path, to: Path) -> dict[str, str]:
    """Environment in which ``source`` links to what ``make`` built from the same files, and compiles nothing.

    Empty, so that every kernel is compiled, where there is no such build or a file is newer than it.
    """
    used = [path.relative_to(source) for path in (source / "csrc").rglob("*") if path.is_file()]
    newest = max((ROOT / path).stat().st_mtime for path in (*used, "setup.py"))
    if not BUILT.exists() or BUILT.stat().st_mtime < newest:
        return {}
    body = f"""
for argument in "$@"; do
  if [ "$before" = -o ]; then out=$argument; fi
  before=$argument
done
case " $* " in
*" -c "*) : > "$out"; exit;;
*" -shared "*) cp "{BUILT}" "$out"; exit;;
esac"""
    return {"CXX": script(to / "c++", body)}


def import_from(wheel: Path, site: Path, code: str = CALL) -> subprocess.CompletedProcess:
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    return run(sys.executable, "-c", code, PYTHONPATH=str(site))


def versions(library) -> dict[str, tuple[int, ...]]:
    """The newest symbol versions of the system's libraries that the loader must find."""
    found = {}
    for name, number in re.findall(r"\b(GLIBC|GLIBCXX|CXXABI)_([\d.]+)", run("objdump", "-T", str(library)).stdout):
        found[name] = max(found.get(name, ()), tuple(map(int, number.split("."))))
    return found


# --- the source archive -----------------------------------------------------------------------------------------


def test_source_archive_holds_what_the_checkout_holds(unpacked, tmp_path):
    checkout = copy_sources(tmp_path / "checkout")
    for folder in ("csrc", "fused_attn"):
        assert tree(unpacked / folder) == tree(checkout / folder)
    assert not (unpacked / "tests").exists()


def test_kernels_of_the_source_archive_find_their_headers(unpacked):
    compiler = shutil.which(os.environ.get("CXX") or "c++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    sources = sorted(unpacked.glob("csrc/*/*.cpp"))
    assert sources
    torch_headers = str(Path(torch.__file__).parent / "include")
    found = run(compiler, "-std=c++20", "-M", "-I", str(unpacked / "csrc"), "-isystem", torch_headers, *sources).stdout
    assert str(unpacked / "csrc" / "common" / "simd.h") in found
    assert str(ROOT / "csrc") not in found


# --- wheels -----------------------------------------------------------------------------------------------------


def test_wheel_serves_every_python_and_torch_from_its_lowest(unpacked, tmp_path):
    environment = earlier_build(unpacked, tmp_path)
    build(unpacked, tmp_path / "wheel", FUSED_ATTN_REQUIRE_EXTENSION="1", **environment)
    wheel = next((tmp_path / "wheel").iterdir())
    assert wheel.name.endswith("-cp310-abi3-linux_x86_64.whl")
    with zipfile.ZipFile(wheel) as archive:
        library = archive.extract("fused_attn/_C.so", tmp_path)
    # The stable ABI is a C interface: no C++ symbol of torch or c10 may be left for the loader to find.
    symbols = run("nm", "-D", "--undefined-only", library).stdout
    assert "aoti_torch" in symbols
    assert not [line for line in symbols.splitlines() if "_ZN2at" in line or "_ZN3c10" in line or "_ZN5torch" in line]
    assert not [line for line in symbols.splitlines() if " Py" in line or " _Py" in line]

    result = import_from(wheel, tmp_path / "site")
    location, available, *agrees = result.stdout.splitlines()
    assert location.startswith(str(tmp_path / "site"))
    assert available == "True None"
    assert agrees == ["True", "True"]
    assert "UserWarning" not in result.stderr


@pytest.mark.skipif(not BUILT.exists(), reason="the kernels are not built")
def test_library_loads_on_every_system_that_torch_loads_on():
    floor = {}
    for library in ("libtorch_cpu.so", "libtorch_python.so", "libc10.so"):
        for name, number in versions(Path(torch.__file__).parent / "lib" / library).items():
            floor[name] = max(floor.get(name, ()), number)
    assert floor.keys() == {"GLIBC", "GLIBCXX", "CXXABI"}
    for name, number in versions(BUILT).items():
        assert number <= floor[name], f"{name}_{'.'.join(map(str, number))} is newer than what torch needs"


def test_wheel_without_a_compiler_is_pure_and_says_so_once_and_in_info(pure, tmp_path):
    assert pure.name.endswith("-py3-none-any.whl")
    result = import_from(pure, tmp_path / "site", f"{CALL}\nfrom fused_attn.cli.info import report; print(report())")
    _, available, *rest = result.stdout.splitlines()
    assert available.startswith("False it was not built")
    assert rest[:2] == ["True", "True"]
    assert result.stderr.count("UserWarning") == 1
    assert "fused_attn runs the PyTorch reference" in result.stderr
    assert "pip install --no-deps --force-reinstall --no-cache-dir" in result.stderr

    # What info says blames no compiler.
    info = rest[2:]
    (line,) = (line for line in info if line.startswith("C++ kernels:"))
    assert line == f"C++ kernels: not available: {_extension.NOT_BUILT}"
    assert "\n".join(info).count("pip install --no-deps --force-reinstall --no-cache-dir SOURCE") == 1
    assert "rel_attention_2d: auto runs 'reference'" in "\n".join(info)


def test_warning_comes_with_the_first_call_that_wants_a_kernel(pure, tmp_path):
    calls = """
import torch
from fused_attn import row_col_softmax
row_col_softmax(torch.ones(1, 1, 2, 2), impl="reference")
row_col_softmax(torch.ones(1, 1, 2, 2, dtype=torch.float64))
row_col_softmax(torch.ones(1, 1, 2, 2, device="meta"))
print("before", flush=True)
row_col_softmax(torch.ones(1, 1, 2, 2))
"""
    code = f"import sys; sys.stderr = sys.stdout\n{calls}"
    before, after = import_from(pure, tmp_path / "site", code).stdout.split("before\n")
    assert before == ""
    assert "fused_attn runs the PyTorch reference" in after


# --- builds that fail -------------------------------------------------------------------------------------------


@pytest.fixture
def broken_compiler(tmp_path) -> str:
    """Is there and says its version, but compiles nothing."""
    return script(tmp_path / "broken-c++", 'case " $* " in *" -c "*) echo "internal compiler error" >&2; exit 1;; esac')


def test_failed_compilation_is_an_error_that_says_how_to_install_without(unpacked, tmp_path, broken_compiler):
    result = build(unpacked, tmp_path / "wheel", check=False, CXX=broken_compiler)
    assert result.returncode != 0
    last = result.stderr.strip().splitlines()[-1]
    assert last.startswith(f"error: fused-attn: the C++ kernels could not be built with {broken_compiler}")
    assert "set FUSED_ATTN_NO_EXTENSION=1" in last
    assert "internal compiler error" in result.stdout + result.stderr
    assert not list((tmp_path / "wheel").iterdir())

    build(unpacked, tmp_path / "wheel", CXX=broken_compiler, FUSED_ATTN_NO_EXTENSION="1")
    assert next((tmp_path / "wheel").iterdir()).name.endswith("-py3-none-any.whl")


@pytest.mark.parametrize(
    ("environment", "why"),
    [
        ({"CXX": "no-compiler"}, "there is no C++ compiler: no-compiler not found"),
        ({"FUSED_ATTN_NO_EXTENSION": "1"}, "FUSED_ATTN_NO_EXTENSION=1 is set"),
    ],
)
def test_required_kernels_that_cannot_be_built_are_an_error(unpacked, environment, why):
    command = (sys.executable, "setup.py", "--name")
    result = run(*command, cwd=unpacked, check=False, FUSED_ATTN_REQUIRE_EXTENSION="1", **environment)
    assert result.returncode == 1
    assert result.stderr.strip() == f"fused-attn: FUSED_ATTN_REQUIRE_EXTENSION=1 is set, but {why}"


def test_reinstalling_as_told_does_not_take_the_wheel_that_pip_kept(sdist, tmp_path, broken_compiler):
    """pip keeps a wheel built from an archive.  A broken compiler shows whether anything was built anew."""
    pip = (sys.executable, "-m", "pip", "wheel", "--no-build-isolation", "--no-deps", "--wheel-dir", str(tmp_path))
    environment = {"PIP_CACHE_DIR": str(tmp_path / "cache"), "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    run(*pip, str(sdist), CXX="no-compiler", **environment)
    (kept,) = (tmp_path / "cache").rglob("*.whl")
    assert kept.name.endswith("-py3-none-any.whl")
    anew = run(*pip, "--no-cache-dir", str(sdist), check=False, CXX=broken_compiler, **environment)
    assert anew.returncode != 0
    assert "FUSED_ATTN_NO_EXTENSION=1" in anew.stderr


# --- builds in an environment of their own ----------------------------------------------------------------------


#: Leaves of the installed packages what a build asks for, as pip's isolation does.
ISOLATE = """
import sys
sys.path[:] = [path for path in sys.path if not path.endswith(("site-packages", "dist-packages"))]
"""
NO_TORCH = "import site; site.getsitepackages = lambda: []; site.getusersitepackages = lambda: ''; "


@pytest.fixture
def isolated(tmp_path) -> dict[str, str]:
    """Environment of a process that finds no installed package but setuptools."""
    overlay = tmp_path / "overlay"
    overlay.mkdir()
    (overlay / "sitecustomize.py").write_text(ISOLATE)
    distribution = importlib.metadata.distribution("setuptools")
    for name in {path.parts[0] for path in distribution.files} - {"..", "distutils-precedence.pth"}:
        (overlay / name).symlink_to(distribution.locate_file(name))
    return {"PYTHONPATH": str(overlay)}


def test_isolated_build_takes_the_torch_of_the_environment(unpacked, tmp_path, isolated):
    assert run(sys.executable, "-c", "import torch", check=False, **isolated).returncode != 0
    code = "import build_backend; print(build_backend.get_requires_for_build_wheel())"
    assert run(sys.executable, "-c", code, cwd=unpacked, **isolated).stdout == "[]\n"
    build(
        unpacked, tmp_path / "wheel", FUSED_ATTN_REQUIRE_EXTENSION="1", **isolated, **earlier_build(unpacked, tmp_path)
    )
    (wheel,) = (tmp_path / "wheel").iterdir()
    assert wheel.name.endswith("-cp310-abi3-linux_x86_64.whl")


def test_isolated_build_asks_for_torch_where_there_is_none(unpacked, isolated):
    hooks = ("get_requires_for_build_wheel", "get_requires_for_build_editable", "get_requires_for_build_sdist")
    code = f"{NO_TORCH}import build_backend; print(*(getattr(build_backend, hook)() for hook in {hooks}))"
    result = run(sys.executable, "-c", code, cwd=unpacked, **isolated)
    assert result.stdout == "['torch>=2.11'] ['torch>=2.11'] []\n"
    result = run(sys.executable, "-c", code, cwd=unpacked, FUSED_ATTN_NO_EXTENSION="1", **isolated)
    assert result.stdout == "[] [] []\n"


def test_source_archive_takes_no_torch(unpacked, tmp_path, isolated):
    run(sys.executable, "-c", NO_TORCH + HOOK.format("build_sdist"), str(tmp_path), cwd=unpacked, **isolated)
    with tarfile.open(next(tmp_path.glob("*.tar.gz"))) as archive:
        assert any(name.endswith("/csrc/common/simd.h") for name in archive.getnames())


def test_kernels_without_torch_are_an_error_of_one_line(unpacked, tmp_path, isolated):
    command = (sys.executable, "-c", NO_TORCH + HOOK.format("build_wheel"), str(tmp_path))
    result = run(*command, cwd=unpacked, check=False, **isolated, **earlier_build(unpacked, tmp_path))
    assert result.returncode == 1
    assert result.stderr.splitlines() == [
        "fused-attn: building the C++ kernels takes torch>=2.11, and here is none: pip install 'torch>=2.11' first, or "
        "leave out --no-build-isolation. FUSED_ATTN_NO_EXTENSION=1 installs without the kernels."
    ]


def test_build_without_kernels_warns_on_the_terminal_although_pip_hides_its_output(unpacked, tmp_path):
    command = f"exec {sys.executable} -c '{HOOK.format('build_wheel')}' {tmp_path} > {tmp_path}/hidden 2>&1"
    code = f"import pty; pty.spawn(['/bin/sh', '-c', {command!r}])"
    result = run(sys.executable, "-c", code, cwd=unpacked, CXX="no-compiler")
    warning = "fused-attn: the C++ kernels are left out: there is no C++ compiler: no-compiler not found; "
    assert result.stdout.count(warning) == 1
    assert warning in (tmp_path / "hidden").read_text()


# --- torch alone, and extras ------------------------------------------------------------------------------------


#: Makes this process one where the modules of its first argument, separated by commas, are not installed.
HIDE = """
import sys
from importlib.machinery import PathFinder

hidden = set(sys.argv.pop(1).split(","))

class Finder(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.partition(".")[0] in hidden else super().find_spec(name, path, target)

sys.meta_path[sys.meta_path.index(PathFinder)] = Finder
"""


def hidden_beside(*requirements: str) -> str:
    """The installed modules that belong to none of the packages and none of what these need."""
    kept, waiting = {"fused-attn"}, [Requirement(text) for text in requirements]
    while waiting:
        name = canonicalize_name(waiting.pop().name)
        if name not in kept:
            kept.add(name)
            needs = map(Requirement, importlib.metadata.requires(name) or ())
            waiting += [need for need in needs if need.marker is None or need.marker.evaluate({"extra": ""})]
    packages = importlib.metadata.packages_distributions().items()
    return ",".join(name for name, owners in packages if kept.isdisjoint(map(canonicalize_name, owners)))


def with_only(packages: tuple[str, ...], code: str, *arguments: str, cwd: Path, check=True):
    command = (sys.executable, "-c", HIDE + code, hidden_beside(*packages), *arguments)
    return run(*command, cwd=cwd, check=check, PYTHONPATH=str(ROOT), OMP_NUM_THREADS="1")


def metadata() -> dict:
    """The table [project] of pyproject.toml."""
    tomllib = pytest.importorskip("tomllib", reason="Python 3.11 reads TOML")
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def test_metadata_agree_and_travel_with_the_wheel(pure):
    about = metadata()
    assert about["version"] == fused_attn.__version__
    assert f"\nversion: {fused_attn.__version__}\nlicense: {about['license']}\n" in (ROOT / "CITATION.cff").read_text()
    assert f"\n## {fused_attn.__version__}, " in (ROOT / "CHANGELOG.md").read_text()
    with zipfile.ZipFile(pure) as archive:
        names = archive.namelist()
        (text,) = (archive.read(name).decode() for name in names if name.endswith("/METADATA"))
    data = {"py.typed", "reproduce/tables.yaml", "reproduce/costs.json", "bench/probe.cpp"}
    assert {f"fused_attn/{name}" for name in data} <= {*names}
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in names)
    assert {"License-Expression: Apache-2.0", "Requires-Dist: torch>=2.11"} <= {*text.splitlines()}


@pytest.mark.parametrize("module", [fused_attn, modules], ids=lambda module: module.__name__)
def test_public_functions_and_modules_are_annotated(module):
    """mypy, of ``make lint``, then looks at what they say."""
    for name in module.__all__:
        public = getattr(module, name)
        methods = [getattr(public, each) for each in ("__init__", "forward") if each in vars(public)]
        for function in methods if inspect.isclass(public) else [public]:
            signature = inspect.signature(function)
            parameters = [each for each in signature.parameters.values() if each.name != "self"]
            assert signature.return_annotation is not signature.empty, name
            assert all(each.annotation is not each.empty for each in parameters), name


COMMAND = "from fused_attn import cli; sys.exit(cli.main(sys.argv[1:]))"


def test_ops_modules_models_and_info_work_with_torch_alone(tmp_path):
    assert metadata()["dependencies"] == ["torch>=2.11"]
    code = f"import runpy; runpy.run_path({str(ROOT / 'tests/torch_only.py')!r}, run_name='__main__')"
    result = with_only(("torch",), code, cwd=tmp_path)
    assert "rel_attention_2d: auto runs" in result.stdout


def test_a_command_that_lacks_an_extra_says_what_to_type(tmp_path):
    code = """
from fused_attn import cli
print(*(cli.main([command]) for command in sys.argv[1:]))
from fused_attn.train import train
"""
    result = with_only(("torch",), code, *EXTRA_OF, cwd=tmp_path, check=False)
    assert result.stdout.split() == ["2"] * len(EXTRA_OF)
    lines = [line for line in result.stderr.splitlines() if line.startswith("fused-attn: ")]
    for line, (command, extra) in zip(lines, EXTRA_OF.items(), strict=True):
        missing = ", ".join(_extras.EXTRAS[extra])
        hint = f"pip install 'fused-attn[{extra}]', or '.[{extra}]' in a clone"
        assert line == f"fused-attn: error: fused-attn {command} needs {missing}: {hint}"
    last = result.stderr.splitlines()[-1]
    assert last.startswith("fused_attn._extras.MissingExtraError: fused_attn.train needs accelerate, ")


@pytest.mark.parametrize(
    ("files", "imported", "reason"),
    [
        ({"__init__.py": "raise AttributeError('no such thing')"}, "broken", "AttributeError: no such thing"),
        ({"__init__.py": "import lacking"}, "broken", "ModuleNotFoundError: No module named 'lacking'"),
        (
            {"__init__.py": "", "sub.py": "open('/none/lib')"},
            "broken.sub",
            "FileNotFoundError: .*/none/lib'",
        ),
        ({"__init__.py": ""}, "broken.sub", "ModuleNotFoundError: No module named 'broken.sub'"),
    ],
)
def test_a_package_that_is_there_but_broken_is_named(tmp_path, monkeypatch, files, imported, reason):
    (tmp_path / "broken").mkdir()
    for name, text in files.items():
        (tmp_path / "broken" / name).write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(_extras.EXTRAS, "train", ("broken",))
    expected = "here needs broken, which is installed but cannot be imported "
    expected += rf"\({reason}\): pip install --force-reinstall broken$"
    with pytest.raises(_extras.MissingExtraError, match=expected) as caught, _extras.needs("train", "here"):
        importlib.import_module(imported)
    assert type(caught.value.__cause__).__name__ == reason.partition(":")[0]
    sys.modules.pop("broken", None)


def test_other_errors_of_a_command_stay_what_they_are():
    for error in (ValueError("no import"), ModuleNotFoundError("No module named 'ours'", name="ours")):
        with pytest.raises(type(error)) as caught, _extras.needs("bench", "here"):
            raise error
        assert caught.value is error


def test_a_command_with_a_broken_package_ends_in_one_line(tmp_path):
    (tmp_path / "tyro.py").write_text("raise RuntimeError('not made for this Python')")
    env = environment(PYTHONPATH=os.pathsep.join((str(tmp_path), str(ROOT))))
    result = python("-m", "fused_attn.cli", "bench", "--help", env=env)
    assert result.returncode == 2
    assert result.stderr == (
        "fused-attn: error: fused-attn bench needs tyro, which is installed but cannot be imported "
        "(RuntimeError: not made for this Python): pip install --force-reinstall tyro\n"
    )


def test_extras_are_those_of_the_metadata():
    names = {"pillow": "PIL", "pyyaml": "yaml", "scikit-learn": "sklearn"}
    optional = metadata()["optional-dependencies"]
    for extra, expected in _extras.EXTRAS.items():
        assert [names.get(package, package) for package in optional[extra]] == [*expected]
    assert optional["all"] == [f"fused-attn[{','.join(_extras.EXTRAS)}]"]


BENCH = ["bench", "squeeze_excite", "--shape", "B=1,C=8,H=2,W=2,hidden=2"]


@pytest.mark.parametrize(
    ("extra", "command"),
    [
        ("train", [*TRAIN, "--max-steps", "1", "--model", "wrn_10_1", "--out", "run"]),
        ("bench", [*BENCH, "--providers", "cpu", "--seconds", "0", "--out", "."]),
    ],
)
def test_extra_has_all_that_a_command_needs(tmp_path, extra, command):
    packages = ("torch", *metadata()["optional-dependencies"][extra])
    with_only(packages, COMMAND, *command, cwd=tmp_path)
    assert list(tmp_path.rglob("*.png"))


def third_party(folder: str) -> set[str]:
    """Packages that the modules of a folder of fused_attn import, within functions too."""
    found = set()
    for path in (ROOT / "fused_attn").glob(folder):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                found |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                found.add(node.module.partition(".")[0])
    return found - sys.stdlib_module_names - {"torch", "fused_attn"}


def test_nothing_is_imported_that_no_extra_has():
    extras = {extra: {*modules} for extra, modules in _extras.EXTRAS.items()}
    assert third_party("modules.py") == third_party("testing/*.py") == set()
    assert third_party("models/*.py") == {"safetensors"}  # for files of that kind; the error says what to install
    # Peers name what they need themselves.
    assert third_party("ops/**/*.py") - third_party("ops/*/peers.py") == {"triton"}
    assert third_party("cli/*.py") | third_party("train/*.py") | third_party("reproduce/*.py") == extras["train"]
    assert third_party("bench/*.py") == extras["bench"]
