"""The worked example of docs/adding_an_op.md: short, and an op as soon as its two folders are in place."""

import ast
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "examples" / "scale_rows"
#: Lines that are the same in every op, but for names: imports and includes, namespaces, tables, registration.
BOILERPLATE = re.compile(
    r"(from|import) |__all__|\w+ = operators\.Operators\(|SPECS = |op\.\w+\.spec\(|\),?$"
    r"|#(pragma|include|define) |namespace |}  // namespace|using Kernels |extern const Kernels |FUSED_ATTN_\w+\("
)


def lines() -> list[str]:
    """All that are not blank: comments count."""
    files = [path for path in EXAMPLE.rglob("*") if path.suffix in (".py", ".h", ".cpp")]
    return [line.strip() for path in files for line in path.read_text().splitlines() if line.strip()]


def test_example_is_short_and_the_page_says_how_short():
    whole, boilerplate = len(lines()), sum(bool(BOILERPLATE.match(line)) for line in lines())
    assert whole <= 120
    assert boilerplate <= 40
    page = (ROOT / "docs" / "adding_an_op.md").read_text()
    assert f"{whole} lines" in page
    assert f"{boilerplate} of them" in page
    for path in EXAMPLE.rglob("*.*"):
        if "__pycache__" not in path.parts:
            assert f"(../{path.relative_to(ROOT)})" in page


def run(*command, cwd: Path, check: bool = True) -> subprocess.CompletedProcess:
    variables = {name: text for name, text in os.environ.items() if not name.startswith(("PYTEST_", "FUSED_ATTN_"))}
    result = subprocess.run(
        [sys.executable, *command], cwd=cwd, env={**variables, "PYTHONPATH": str(cwd)}, capture_output=True, text=True
    )
    assert not check or result.returncode == 0, result.stdout + result.stderr
    return result


def build(tree: Path) -> None:
    run("setup.py", "build_ext", "--inplace", cwd=tree)


def contract(tree: Path, *options: str, check: bool) -> str:
    options = ("-n0", "-v", "--tb=short", "-o", "addopts=--import-mode=importlib", *options)
    result = run("-m", "pytest", "tests/test_op_contract.py", *options, cwd=tree, check=check)
    assert check or result.returncode == pytest.ExitCode.TESTS_FAILED, result.stdout + result.stderr
    return result.stdout


@pytest.mark.long
@pytest.mark.skipif(
    not any(map(shutil.which, ((os.environ.get("CXX") or "c++").split()[0], "g++", "clang++"))), reason="no compiler"
)
def test_example_is_an_op_once_its_folders_are_in_place(tmp_path):
    """Of csrc, the tree holds no other op: setup.py compiles what is there."""
    for name in ("setup.py", "pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, tmp_path)
    for name in ("fused_attn", "tests", "csrc/common"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    shutil.copytree(EXAMPLE, tmp_path, dirs_exist_ok=True, ignore=shutil.ignore_patterns("__pycache__"))
    build(tmp_path)

    passed = contract(tmp_path, "-k", "scale_rows or extension_is_loaded", check=True)
    tree = ast.parse((tmp_path / "tests" / "test_op_contract.py").read_text())
    functions = {node.name for node in tree.body if isinstance(node, ast.FunctionDef) and node.name[:5] == "test_"}
    assert set(re.findall(r"::(\w+)(?:\[.*\])? PASSED", passed)) == functions

    kernels = tmp_path / "csrc" / "scale_rows" / "kernels_impl.h"
    right = "lanes.store(grad_x, scale * grad);"
    assert right in kernels.read_text()
    kernels.write_text(kernels.read_text().replace(right, right.replace("scale", "-scale")))
    build(tmp_path)
    failed = contract(tmp_path, "-k", "scale_rows and test_numerics", "--maxfail=1", check=False)
    assert re.search(r"grad_x: error .* exceeds", failed)
    assert "grad_scale: " not in failed
