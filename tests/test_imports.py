"""Imports in ``fused_attn`` run one way: no circle between modules, and no arrow from a lower floor to a higher one.

Imports within functions count; those under ``if TYPE_CHECKING`` do not.
"""

import ast
import functools
import graphlib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
#: Lowest first; the innermost that is named holds a module.  "ops.OP" is any op, which stands beside the others.
FLOORS = (
    ("_extension", "_extras", "options"),
    ("ops._floor",),
    ("ops.OP",),
    ("ops",),
    ("modules", "integrations", "maps"),
    ("models",),
    ("",),
    ("train",),
    ("bench", "testing"),
    ("cli", "reproduce"),
    ("__main__",),
)
#: Arrows between ops: where its layers must be called, squeeze-excite is a weighted sum of maps; bias_attention_2d runs
#: the operators of rel_attention_2d.
BETWEEN_OPS = {
    ("ops.squeeze_excite.module", "ops.layer_attention"),
    ("ops.bias_attention_2d.api", "ops.rel_attention_2d.api"),
    ("ops.bias_attention_2d.module", "ops.rel_attention_2d.op"),
    ("ops.bias_attention_2d.peers", "ops.rel_attention_2d.reference"),
    ("ops.bias_attention_2d.spec", "ops.rel_attention_2d.op"),
    ("ops.bias_attention_2d.spec", "ops.rel_attention_2d.spec"),
}

Arrows = dict[str, set[str]]


def sources() -> dict[str, str]:
    """Text by name, without the package's own: "" is its ``__init__``, "ops" that of its ops."""
    package = ROOT / "fused_attn"
    names = {path: path.relative_to(package).with_suffix("").parts for path in package.rglob("*.py")}
    return {".".join(part for part in parts if part != "__init__"): path.read_text() for path, parts in names.items()}


def arrows(texts: dict[str, str]) -> Arrows:
    """Modules that each one imports."""
    names = frozenset(texts)
    return {name: _targets(name, text, names) for name, text in texts.items()}


@functools.cache
def _targets(name: str, text: str, names: frozenset[str]) -> set[str]:
    return set(_imported(name, ast.parse(text), names))


def _imported(name: str, tree: ast.AST, names: frozenset[str]):
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
            yield from (target for child in node.orelse for target in _imported(name, child, names))
        elif isinstance(node, ast.Import):
            yield from (_inside(alias.name) for alias in node.names if alias.name.split(".")[0] == "fused_attn")
        elif isinstance(node, ast.ImportFrom):
            base = _base(name, node, names)
            if base is not None:
                inside = [f"{base}.{alias.name}".lstrip(".") for alias in node.names]
                yield from (target if target in names else base for target in inside)
        else:
            yield from _imported(name, node, names)


def _inside(full: str) -> str:
    return full.removeprefix("fused_attn").lstrip(".")


def _base(name: str, node: ast.ImportFrom, names: frozenset[str]) -> str | None:
    """What names are imported from; None: nothing of ours."""
    if node.level == 0:
        return _inside(node.module) if node.module.split(".")[0] == "fused_attn" else None
    parts = name.split(".") if name else []
    is_package = not name or any(other.startswith(f"{name}.") for other in names)
    parts = parts[: len(parts) + is_package - node.level]
    return ".".join(parts + ([node.module] if node.module else []))


def circle(graph: Arrows) -> list[str] | None:
    """The modules of one, each imported by the next."""
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        return error.args[1]
    return None


def floor(name: str) -> int:
    parts = name.split(".")
    if parts[0] == "ops" and parts[1:] and parts[1] != "_floor":
        parts[1] = "OP"
    holders = [".".join(parts[:length]) for length in range(len(parts), -1, -1)]
    return next(level for holder in holders for level, names in enumerate(FLOORS) if holder in names)


def upward(graph: Arrows) -> list[tuple[str, str]]:
    """Arrows to a higher floor, or from one op to another."""
    found = []
    for name, targets in graph.items():
        for target in targets:
            op, other = (".".join(each.split(".")[:2]) for each in (name, target))
            beside = floor(name) == floor(target) == floor("ops.OP") and op != other
            if floor(target) > floor(name) or beside:
                found.append((name, target))
    return sorted(found)


def test_no_circles():
    graph = arrows(sources())
    found = circle(graph)
    assert found is None, " -> ".join(reversed(found))


def test_no_arrow_points_upward():
    assert {*upward(arrows(sources()))} == BETWEEN_OPS


def test_every_floor_is_there_and_arrows_are_found():
    graph = arrows(sources())
    assert {floor(name) for name in graph} == {*range(len(FLOORS))}
    assert {target for targets in graph.values() for target in targets} <= graph.keys()
    assert graph["ops._floor.dispatch"] == {"_extension", "ops._floor.tracing"}
    assert "" in graph["train.loop"]  # from .. import create_model
    assert "train.loop" in graph["cli"]  # in a function


@pytest.mark.parametrize(
    ("name", "text", "target"),
    [
        ("ops._floor.checks", "from ..layer_attention import op", "ops.layer_attention.op"),
        ("ops._floor.checks", "def f():\n    from ... import create_model", ""),
        ("ops.layer_attention.op", "if True:\n    import fused_attn.ops.squeeze_excite.op", "ops.squeeze_excite.op"),
        ("ops.layer_attention.op", "from ... import modules", "modules"),
        ("options", "from .train.errors import reason", "train.errors"),
        ("models", "from fused_attn.bench import measure", "bench.measure"),
        ("train.loop", "try:\n    from ..testing import checks\nexcept ImportError:\n    pass", "testing.checks"),
    ],
)
def test_an_arrow_that_points_upward_is_found(name, text, target):
    texts = sources()
    before = upward(arrows(texts))
    assert {*upward(arrows(texts | {name: f"{texts[name]}\n{text}"}))} - {*before} == {(name, target)}
    unseen = f"{texts[name]}\nif TYPE_CHECKING:\n" + "".join(f"    {line}\n" for line in text.splitlines())
    assert upward(arrows(texts | {name: unseen})) == before


def test_a_circle_is_found_and_named():
    texts = {
        "a": "from . import b",
        "b": "def f():\n    from .c import x",
        "c": "from . import a",
        "d": "from . import a",
    }
    assert set(circle(arrows(texts | {"": ""}))) == {"a", "b", "c"}
    assert circle(arrows(texts | {"": "", "c": ""})) is None
