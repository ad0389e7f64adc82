"""First two steps of a round on a GPU machine: what is installed, and what is there.  See ``gpu_round.py``.

python benchmarks/gpu/gpu_setup.py install OUT [--no-build]    into OUT/site, from files carried along; no network
python benchmarks/gpu/gpu_setup.py environment OUT             writes OUT/machine.json
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
#: Where CUDA's tools are when they are not on the path.
CUDA_FOLDERS = ("/usr/local/cuda/bin", "/usr/local/cuda/compute-sanitizer", "/opt/cuda/bin")


def find_tool(name: str) -> str | None:
    """Path of a program: on the path, under CUDA_HOME or where CUDA installs itself."""
    folders = [os.path.join(home, "bin") for home in [os.environ.get("CUDA_HOME")] if home]
    return shutil.which(name) or shutil.which(name, path=os.pathsep.join([*folders, *CUDA_FOLDERS]))


def search_path(out: Path) -> str:
    """PYTHONPATH of every step: what was installed, then the source tree."""
    inherited = os.environ.get("PYTHONPATH", "")
    return os.pathsep.join(filter(None, (str(out / "site"), str(ROOT), inherited)))


# --- install ----------------------------------------------------------------------------------------------------------


def install(out: Path, *, build: bool = True) -> None:
    """The wheels of ``wheels/`` and the newest wheel of this package in ``dist/``; else what was built in place before;
    else, with ``build``, a build in place; else nothing.

    Raises:
        SystemExit: the wheel was built from other sources, does not install, or the sources do not build.
    """
    site = out / "site"
    shutil.rmtree(site, ignore_errors=True)
    site.mkdir(parents=True)
    carried = sorted(ROOT.glob("wheels/*.whl"))
    if carried:
        _pip(site, *carried)
    own = sorted(ROOT.glob("dist/fused_attn-*.whl"), key=lambda path: path.stat().st_mtime)
    built = bool(list((ROOT / "fused_attn").glob("_C*.so")))
    compiler = next(filter(None, map(shutil.which, (os.environ.get("CXX") or "c++", "g++", "clang++"))), None)
    if own:
        changed = differing(own[-1])
        if changed:
            raise SystemExit(f"{own[-1].name} was built from other sources: {', '.join(changed)}")
        _pip(site, own[-1])
        how = f"installed {own[-1].name}"
    elif built:
        how = "used as it is, built before"
    elif compiler and build:
        environment = {**os.environ, "FUSED_ATTN_REQUIRE_EXTENSION": "1"}
        subprocess.run([sys.executable, "setup.py", "build_ext", "--inplace"], cwd=ROOT, env=environment, check=True)
        how = f"built in place with {compiler}"
    else:
        how = "used as it is: no wheel in dist/, " + ("no C++ compiler" if build else "told not to build")
    code = "from fused_attn import _extension as e; print(e.__file__, e.available(), e.reason())"
    environment = {**os.environ, "PYTHONPATH": search_path(out)}
    # Outside the source tree, which the interpreter would put first on its path.
    where = subprocess.run([sys.executable, "-c", code], cwd=out, env=environment, capture_output=True, text=True)
    if where.returncode:
        raise SystemExit(f"{how}, but the package does not import:\n{where.stderr}")
    text = f"{how}; {len(carried)} wheels of dependencies; {where.stdout.strip()}"
    (out / "install.txt").write_text(text + "\n")
    print(text)


def _pip(site: Path, *wheels: Path) -> None:
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--no-cache-dir"]
    subprocess.run([*command, "--upgrade", "--target", str(site), *map(str, wheels)], check=True)


def differing(wheel: Path) -> list[str]:
    """Python files of this package that the wheel holds otherwise than the source tree, or that one of them lacks."""
    with zipfile.ZipFile(wheel) as archive:
        packed = {name: archive.read(name) for name in archive.namelist() if re.match(r"fused_attn/.*\.py$", name)}
    sources = {str(path.relative_to(ROOT)): path.read_bytes() for path in (ROOT / "fused_attn").rglob("*.py")}
    return sorted(name for name in packed.keys() | sources.keys() if packed.get(name) != sources.get(name))


# --- environment ------------------------------------------------------------------------------------------------------


def environment(out: Path) -> None:
    """Versions, the GPU, the tools found, and which dependencies are missing."""
    import torch

    found = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "triton": _version("triton"),
        "gpu": _gpu(),
        "driver": _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        "nvcc": (_output("nvcc", "--version") or "").splitlines()[-1:],
        "tools": {name: find_tool(name) is not None for name in ("nvcc", "compute-sanitizer", "ncu", "nvidia-smi")},
        "dependencies": dependencies(),
        "installed": (out / "install.txt").read_text().strip() if (out / "install.txt").exists() else None,
    }
    found["missing"] = [name for name, version in found["dependencies"].items() if version is None]
    (out / "machine.json").write_text(json.dumps(found, indent=1, allow_nan=False) + "\n")
    print(json.dumps(found, indent=1, allow_nan=False))
    code = "from fused_attn.cli.info import report; print(report())"
    print(subprocess.run([sys.executable, "-c", code], cwd=out, capture_output=True, text=True).stdout)


def dependencies() -> dict[str, str | None]:
    """Each package that pyproject.toml names, for running and for the tests -> version; None where it is missing."""
    text = (ROOT / "pyproject.toml").read_text()
    lists = re.findall(r"^(?:dependencies|train|bench|triton|test) = \[(.*?)\]$", text, re.DOTALL | re.MULTILINE)
    names = re.findall(r'"([A-Za-z0-9_-]+)', "".join(lists))
    return {name: _version(name) for name in dict.fromkeys(names) if name != "fused-attn"}


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _gpu() -> dict[str, object] | None:
    import torch

    if not torch.cuda.is_available():
        return None
    properties = torch.cuda.get_device_properties(0)
    return {
        "name": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "memory_gib": round(properties.total_memory / 2**30, 1),
        "multiprocessors": properties.multi_processor_count,
    }


def _output(tool: str, *arguments: str) -> str | None:
    path = find_tool(tool)
    if path is None:
        return None
    return subprocess.run([path, *arguments], capture_output=True, text=True).stdout.strip()


if __name__ == "__main__":
    command, folder, *rest = sys.argv[1:]
    if command == "install":
        install(Path(folder).resolve(), build=rest != ["--no-build"])
    else:
        environment(Path(folder).resolve())
