"""Renders the committed results (``make bench``): Markdown and pictures from JSON, and from those the tables of the
README and of ``docs/``.

Nothing is measured here, so no figure of a page can differ from its source: a block between
``<!-- from benchmarks/results/NAME.md -->`` and ``<!-- end -->`` is replaced by that file.

Run from the repository root: ``python benchmarks/report/readme.py`` (``--check``: change nothing, fail if it would
change a page or a table).
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# Runs from a clone without installation too.
sys.path.insert(0, str(Path(__file__).parents[2]))
sys.path.insert(0, str(Path(__file__).parent))

import command_line
import integrations
import links
import picture

from fused_attn.bench import networks, report

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results"
BLOCK = re.compile(r"(<!-- from (?P<source>benchmarks/results/\S+\.md) -->\n).*?(<!-- end -->)", re.DOTALL)


def results(folder: Path = RESULTS) -> Iterator[tuple[Path, dict[str, Any], Any]]:
    """What ``fused-attn bench`` wrote: (JSON file, its content, the module that renders it)."""
    for path in sorted([*folder.glob("*.json"), *folder.glob("*/networks.json")]):
        result = json.loads(path.read_text())
        if isinstance(result, dict) and "interrupted" in result:
            yield path, result, report if "op" in result else networks


def summaries(folder: Path = RESULTS) -> dict[str, str]:
    """Tables of all ops on the CPU in float32, by file name: one for each allocator."""
    reports: dict[str, list[report.Report]] = {"": [], "_default_allocator": []}
    for _, result, kind in results(folder):
        if kind is report and report.stem(result).startswith(result["op"]):
            suffix = report.stem(result).removeprefix(result["op"])
            if suffix in reports or suffix == f"_{report.allocator(result)}":
                reports.setdefault(suffix, []).append(result)
    return {f"summary{suffix}.md": report.summary(each) for suffix, each in reports.items()}


#: What people write today, what takes its place, and the op that was measured.
REPLACEMENTS = (
    (
        "[relative position logits of AA-Conv and BoTNet](../../docs/migrate/aa_conv_botnet.md) "
        "([timm's differ](../../docs/migrate/timm.md)): skew, softmax, `@ value`",
        "rel_attention_2d(query, key, value, rel_h, rel_w)",
        "rel_attention_2d",
        "docs/migrate/aa_conv_botnet.md",
    ),
    (
        "`add_decomposed_rel_pos` of SAM, ViTDet, MViTv2, softmax, `@ value`",
        "decomposed_bias_attention(query, key, value, bias_h, bias_w)",
        "decomposed_bias_attention",
        "docs/migrate/sam_vitdet_mvitv2.md",
    ),
    (
        "`relative_position_bias_table[index]` of Swin, MaxViT, CoAtNet, LeViT, the mask of shifted windows, softmax, "
        "`@ value`",
        "bias_attention_2d(query, key, value, bias_table, ...)",
        "bias_attention_2d",
        "docs/ops/bias_attention_2d.md",
    ),
    (
        "MRLA's keys and values, concatenated at every layer",
        "layer_attention(query, keys, values)",
        "layer_attention",
        "docs/migrate/mrla.md",
    ),
    (
        "`torch.stack` of earlier layers, softmax per token, weighted sum",
        "attention_residual(values, query)",
        "attention_residual",
        "docs/ops/attention_residual.md",
    ),
    (
        "`x.softmax(-1) * x.softmax(-2)`, the dual softmax of LoFTR",
        "DualSoftmax()(scores)",
        "row_col_softmax",
        "docs/migrate/loftr.md",
    ),
    (
        "the same with weights, batch norm, `* x`: element-wise attention",
        "elementwise_attention(x, weight_row, weight_col, ...)",
        "elementwise_attention",
        "docs/ops/elementwise_attention.md",
    ),
    (
        "`relu(x * gate(x) + residual)` of SE-ResNet",
        'squeeze_excite(x, ..., residual=residual, activation="relu")',
        "squeeze_excite",
        "docs/migrate/squeeze_excite.md",
    ),
)


def replacements(folder: Path = RESULTS) -> str:
    """One line for each op that was measured: what it replaces, and time and memory of the fastest peer over the fused
    op's.
    """
    lines = []
    there = [each for each in REPLACEMENTS if (folder / f"{each[2]}.json").exists()]
    results = [json.loads((folder / f"{op}.json").read_text()) for _, _, op, _ in there]
    days = report.dates(results)
    for (old, new, _, page), result in zip(there, results, strict=True):
        steps = [row for row in result["rows"] if (row["kind"], row["pass"], row["status"]) == ("shape", "both", "ok")]
        speed, memory = [], []
        for mine in (row for row in steps if row["fused"]):
            peer = next(row for row in steps if (row["shape"], row["provider"]) == (mine["shape"], mine["best_peer"]))
            speed.append(mine["best_peer_over_this"])
            memory.append(peer["extra_bytes"] / mine["extra_bytes"])
        if not lines:
            environment = result["environment"]
            lines = [
                f"{environment['threads']} cores of {report.processors(results)}, torch {environment['torch']}, "
                f"{days}, float32, forward + backward: time and peak extra memory of the fastest of eager PyTorch, "
                "`torch.compile` and SDPA, over the fused op's; least and most of the benchmark's shapes. With an "
                "allocator that keeps freed memory: "
                "[with the default one](../../docs/results/default_allocator.md) the ratios are others.",
                "",
                "| replace this | by that | time | memory |",
                "| --- | --- | ---: | ---: |",
            ]
        text = old if "](" in old else f"[{old}](../../{page})"
        lines.append(f"| {text} | `{new}` | {_between(speed)} | {_between(memory)} |")
    return "\n".join(lines) + "\n"


def _between(ratios: list[float]) -> str:
    least, most = (f"{ratio:.0f}x" if ratio >= 10 else f"{ratio:.1f}x" for ratio in (min(ratios), max(ratios)))
    return least if least == most else f"{least} – {most}"


def headline(folder: Path = RESULTS) -> str:
    """A training step of AA-WRN-28-10 with attention in every block, beside the plain network's."""
    result = json.loads((folder / "wrn_28_10_batch8" / "networks.json").read_text())
    rows = {(row["coverage"], row["impl"]): row for row in result["rows"]}
    plain = rows["none", "fused"]
    times, memory = (
        [rows["all stages, all blocks", impl][key] / plain[key] for impl in ("fused", "reference")]
        for key in ("p50_ms", "peak_bytes")
    )
    return (
        f"**AA-WRN-28-10 with attention in every residual block**, batch {result['batch_size']}, on "
        f"{result['environment']['threads']} cores: a training step takes {times[0]:.2f} times as long as that of the "
        f"plain network and {memory[0]:.2f} times its memory. With attention in plain PyTorch it takes {times[1]:.1f} "
        f"times as long and {memory[1]:.1f} times the memory. [Every coverage](../../docs/results/networks.md).\n"
    )


def pages(root: Path = ROOT) -> list[Path]:
    """What holds tables: the README and every page of the documentation."""
    return [root / "README.md", *sorted((root / "docs").rglob("*.md"))]


def fill(text: str, page: Path = ROOT / "README.md", root: Path = ROOT) -> str:
    """A page with every block as its source file has it."""
    folder = page.parent.relative_to(root).as_posix()

    def block(match: re.Match) -> str:
        source = root / match["source"]
        table = links.relocate(source.read_text().strip(), source.parent.relative_to(root).as_posix(), folder)
        return f"{match[1]}{table}\n{match[3]}"

    return BLOCK.sub(block, text)


def tables() -> dict[str, str]:
    """Those of several results, by file name."""
    return {**summaries(), "replacements.md": replacements(), "headline.md": headline(), **integrations.tables()}


def main() -> int:
    if "--check" in sys.argv[1:]:
        current = all(path.with_suffix(".md").read_text() == kind.markdown(result) for path, result, kind in results())
        current = current and all((RESULTS / name).read_text() == text for name, text in tables().items())
        current = current and all(fill(page.read_text(), page) == page.read_text() for page in pages())
        return int(not current)
    for path, result, kind in results():
        kind.render(result, path.parent)
    for name, text in tables().items():
        (RESULTS / name).write_text(text)
    picture.draw()
    command_line.PAGE.write_text(command_line.render())
    for page in pages():
        page.write_text(fill(page.read_text(), page))
    return 0


if __name__ == "__main__":
    sys.exit(main())
