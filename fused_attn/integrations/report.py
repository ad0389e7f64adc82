"""What ``convert`` found and did."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

REPLACED, ALREADY = "replaced", "already"


@dataclass(frozen=True)
class Candidate:
    """A module whose class is in the registry.

    Attributes:
        path: of the module in the model; "" is the model itself.
        host: its class, as ``module:Class``, or ``module:Class.method`` where that is replaced and not its forward.
        op: the op that computes the class.
        outcome: ``"replaced"``, ``"already"`` (an earlier call replaced it), or why it was left alone.
    """

    path: str
    host: str
    op: str
    outcome: str

    @property
    def fused(self) -> bool:
        """Whether the op runs in its place."""
        return self.outcome in (REPLACED, ALREADY)


@dataclass(frozen=True)
class Report:
    """All candidates of a model, in the order of its modules.  Iterable; as a text, a table."""

    candidates: tuple[Candidate, ...]

    @property
    def replaced(self) -> int:
        """How many modules this call replaced."""
        return sum(candidate.outcome == REPLACED for candidate in self.candidates)

    @property
    def fused(self) -> int:
        """How many modules run an op now."""
        return sum(candidate.fused for candidate in self.candidates)

    def __iter__(self) -> Iterator[Candidate]:
        return iter(self.candidates)

    def __len__(self) -> int:
        return len(self.candidates)

    def __str__(self) -> str:
        if not self.candidates:
            return "no module of a class that fused-attn knows"
        rows = [("module", "class", "op", "outcome")]
        rows += [(each.path or "(model)", each.host.split(":")[1], each.op, each.outcome) for each in self.candidates]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]
        return "\n".join([*lines, f"{self.fused} of {len(self)} run a fused op, {self.replaced} replaced now"])
