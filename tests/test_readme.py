"""The README's figures are those of the committed result files, and its examples run."""

import importlib.util
import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def load(name: str):
    spec = importlib.util.spec_from_file_location(name, ROOT / "benchmarks" / "report" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_tables_are_those_of_the_result_files():
    readme = load("readme")
    assert len(readme.BLOCK.findall(README)) == README.count("<!-- from ")
    assert readme.fill(README) == README


def test_tables_of_benchmarks_are_those_of_their_json():
    found = 0
    for path, result, kind in load("readme").results():
        assert path.with_suffix(".md").read_text() == kind.markdown(result), f"make bench renders {path.name} anew"
        found += 1
    assert found
    for name, text in load("readme").summaries().items():
        assert "|" in text
        assert (ROOT / "benchmarks/results" / name).read_text() == text


def test_a_changed_figure_is_noticed():
    readme = load("readme")
    block = next(block[0] for block in readme.BLOCK.finditer(README) if "|" in block[0])
    digit = re.search(r"\d(?=[^\n]*\|\n)", block.partition("\n")[2])[0]
    head, line, rest = block.partition("\n")
    changed = README.replace(block, head + line + rest.replace(digit, str((int(digit) + 1) % 10), 1))
    assert changed != README
    assert readme.fill(changed) != changed


def test_python_examples_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    examples = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert examples
    namespace: dict = {}
    for example in examples:
        exec(compile(example, "README.md", "exec"), namespace)


def test_no_number_is_quoted_outside_the_tables_without_a_source():
    prose = load("readme").BLOCK.sub("", README)
    assert not re.search(r"\d(\.\d+)?\s?(ms|MiB|GiB|images/s)\b", prose)
