"""The wheel that users get: its tag, what it holds, and that it works away from the source tree."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
CALL = """
import torch, fused_attn
from fused_attn import _extension, rel_attention_2d
x = torch.randn(1, 2, 4, 4, 8, generator=torch.Generator().manual_seed(0))
print(fused_attn.__file__)
print(_extension.available(), _extension.reason())
print(torch.allclose(rel_attention_2d(x, x, x), rel_attention_2d(x, x, x, impl="reference"), atol=1e-6))
"""


def run(*command, **environment):
    return subprocess.run(
        command, check=True, capture_output=True, text=True, cwd=ROOT.parent, env={**os.environ, **environment}
    ).stdout


def build_wheel(source: Path, to: Path, **environment) -> Path:
    pip = (sys.executable, "-m", "pip", "wheel", "--quiet", "--no-build-isolation", "--no-deps")
    run(*pip, "--wheel-dir", str(to), str(source), **environment)
    return next(to.glob("*.whl"))


def copy_sources(to: Path) -> Path:
    files = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True
    ).stdout.split()
    if not files:
        pytest.skip("not a git checkout: the list of source files is unknown")
    for name in files:
        if name.startswith(("csrc/", "fused_attn/")) or name in ("setup.py", "pyproject.toml", "README.md"):
            (to / name).parent.mkdir(parents=True, exist_ok=True)
            (to / name).write_bytes((ROOT / name).read_bytes())
    return to


def import_from(wheel: Path, site: Path) -> list[str]:
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    return run(sys.executable, "-c", CALL, PYTHONPATH=str(site)).splitlines()


def test_wheel_serves_every_python_and_torch_from_its_lowest(tmp_path):
    wheel = build_wheel(copy_sources(tmp_path / "source"), tmp_path, FUSED_ATTN_REQUIRE_EXTENSION="1")
    assert wheel.name.endswith("-cp310-abi3-linux_x86_64.whl")
    with zipfile.ZipFile(wheel) as archive:
        library = archive.extract("fused_attn/_C.so", tmp_path)
    # The stable ABI is a C interface: no C++ symbol of torch or c10 may be left for the loader to find.
    symbols = run("nm", "-D", "--undefined-only", library)
    assert "aoti_torch" in symbols
    assert not [line for line in symbols.splitlines() if "_ZN2at" in line or "_ZN3c10" in line or "_ZN5torch" in line]
    assert not [line for line in symbols.splitlines() if " Py" in line or " _Py" in line]

    location, available, agrees = import_from(wheel, tmp_path / "site")
    assert location.startswith(str(tmp_path / "site"))
    assert available == "True None"
    assert agrees == "True"


def test_installs_without_a_compiler_and_says_so(tmp_path):
    wheel = build_wheel(copy_sources(tmp_path / "source"), tmp_path, CXX=str(tmp_path / "no-compiler"))
    _, available, agrees = import_from(wheel, tmp_path / "site")
    assert available.startswith("False it was not built")
    assert agrees == "True"
