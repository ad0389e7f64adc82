"""Everything that is written as JSON is JSON: a number that is not finite is null, or an error."""

import ast
import json
import math
from pathlib import Path

import pytest

from fused_attn.train.json_files import dumps, loads

ROOT = Path(__file__).parents[1]
FILES = sorted([*(ROOT / "fused_attn").rglob("*.py"), *(ROOT / "benchmarks").rglob("*.py")])


def test_numbers_that_are_not_finite_are_null():
    value = {"a": [1, math.nan, (2.5, -math.inf)], "b": {"c": math.inf, "d": "NaN"}, "e": None, "f": True}
    written = dumps(value)
    assert "Infinity" not in written
    assert json.loads(written) == {"a": [1, None, [2.5, None]], "b": {"c": None, "d": "NaN"}, "e": None, "f": True}
    assert loads('{"a": NaN, "b": [-Infinity]}') == {"a": None, "b": [None]}


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_call_writes_what_is_not_json(path):
    """``json.dumps`` and ``json.dump`` write a bare NaN unless they are told not to."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call) and ast.unparse(node.func) in ("json.dumps", "json.dump"):
            strict = [keyword for keyword in node.keywords if keyword.arg == "allow_nan"]
            assert strict, f"{path}:{node.lineno}"
            assert ast.literal_eval(strict[0].value) is False
