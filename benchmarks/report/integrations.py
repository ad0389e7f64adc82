"""What ``fused_attn.integrations`` serves of its hosts: results/integrations.{json,md}.

    python benchmarks/report/integrations.py PACKAGE [--folder FOLDER] [--stand-in]

builds every architecture of a host on meta, with its default settings, converts it with all ops, and writes down what
was replaced and what was left alone, why.  ``--folder`` is where the host lies, if it is not installed; ``--stand-in``
puts an empty torchvision in the place of one that does not import.  The Markdown is rendered by ``make bench``.
"""

from __future__ import annotations

import argparse
import datetime
import importlib
import json
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

# Runs from a clone without installation too.
sys.path.insert(0, str(Path(__file__).parents[2]))
sys.path.insert(0, str(Path(__file__).parent))

import host_times

from fused_attn import integrations
from fused_attn.integrations.convert import HOSTS, OPS
from fused_attn.integrations.host import version_of

ROOT = Path(__file__).parents[2]
RESULT = ROOT / "benchmarks" / "results" / "integrations.json"


# --- what is served ---------------------------------------------------------------------------------------------------


def timm_models() -> Iterator[tuple[str, Callable[[], nn.Module]]]:
    import timm

    for name in timm.list_models():
        yield name, lambda name=name: timm.create_model(name)


def transformers_models() -> Iterator[tuple[str, Callable[[], nn.Module]]]:
    """One for each type of configuration that an automatic class for key points, features or backbones builds."""
    from transformers import AutoBackbone, AutoConfig, AutoModel, AutoModelForKeypointMatching
    from transformers.models.auto import modeling_auto as names

    autos = {
        **dict.fromkeys(names.MODEL_FOR_BACKBONE_MAPPING_NAMES, AutoBackbone),
        **dict.fromkeys(names.MODEL_MAPPING_NAMES, AutoModel),
        **dict.fromkeys(names.MODEL_FOR_KEYPOINT_MATCHING_MAPPING_NAMES, AutoModelForKeypointMatching),
    }
    for kind in sorted(autos):
        yield kind, lambda kind=kind: autos[kind].from_config(AutoConfig.for_model(kind))


def kornia_models() -> Iterator[tuple[str, Callable[[], nn.Module]]]:
    from kornia.feature import LoFTR

    yield "LoFTR", lambda: LoFTR(pretrained=None)


def lucidrains_models() -> Iterator[tuple[str, Callable[[], nn.Module]]]:
    """With the sizes of its own example, and positions of both kinds."""
    from bottleneck_transformer_pytorch import BottleStack

    for relative in (True, False):
        yield (
            f"BottleStack {relative}",
            lambda relative=relative: BottleStack(dim=256, fmap_size=64, dim_out=2048, rel_pos_emb=relative),
        )


HOST_MODELS = {
    "timm": timm_models,
    "transformers": transformers_models,
    "kornia": kornia_models,
    "bottleneck_transformer_pytorch": lucidrains_models,
}


def survey(models: Iterator[tuple[str, Callable[[], nn.Module]]]) -> dict[str, Any]:
    """Architectures by what was replaced in them, and modules of every class of the registry."""
    architectures, classes, built, failed = Counter(), {}, 0, {}
    for name, build in models:
        try:
            with torch.device("meta"):
                report = integrations.convert(build(), ops=OPS)
        except Exception as error:
            failed[name] = f"{type(error).__name__}: {error}".splitlines()[0][:120]
            continue
        built += 1
        for op in {candidate.op for candidate in report}:
            fused = {candidate.fused for candidate in report if candidate.op == op}
            architectures[op, "all" if fused == {True} else "none" if fused == {False} else "some"] += 1
        architectures["any", "all"] += any(candidate.fused for candidate in report)
        for host in {candidate.host for candidate in report}:
            row = classes.setdefault(host, {"architectures": 0, "replaced": 0, "left": Counter()})
            row["architectures"] += 1
            for candidate in (each for each in report if each.host == host):
                row["replaced"] += candidate.fused
                row["left"][candidate.outcome] += not candidate.fused
    for row in classes.values():
        row["left"] = {reason: count for reason, count in row["left"].items() if count}
    served = architectures.pop(("any", "all"))
    by_op = {op: {how: architectures[op, how] for how in ("all", "some", "none")} for op in OPS}
    return {"built": built, "failed": failed, "served": served, "by_op": by_op, "classes": classes}


# --- pages ------------------------------------------------------------------------------------------------------------


def markdown(result: dict[str, Any] | None = None) -> str:
    """Counts, and the table of the registry's classes."""
    result = json.loads(RESULT.read_text()) if result is None else result
    lines = ["| | built | with a layer that an op replaces | " + " | ".join(f"`{op}`" for op in OPS) + " |"]
    lines.append("| --- | ---: | ---: |" + " ---: |" * len(OPS))
    for package in HOST_MODELS:
        found = result[package]
        ways = [found["by_op"].get(op, {"all": 0, "some": 0}) for op in OPS]  # an op that no class was of at that time
        cells = [f"{way['all'] + way['some']}" for way in ways]
        lines.append(
            f"| {package} {found['version']}, {found['date']} | {found['built']} of "
            f"{found['built'] + len(found['failed'])} | {found['served']} | {' | '.join(cells)} |"
        )
    lines += ["", "| class | op | architectures | layers replaced | layers left alone, and why |"]
    lines.append("| --- | --- | ---: | ---: | --- |")
    for path, host in HOSTS.items():
        row = result[path.partition(".")[0]]["classes"].get(path, {"architectures": 0, "replaced": 0, "left": {}})
        left = "; ".join(f"{count}: {reason}" for reason, count in sorted(row["left"].items()))
        lines.append(f"| `{path}` | `{host.op}` | {row['architectures']} | {row['replaced']} | {left or '-'} |")
    return "\n".join(lines) + "\n"


def timings() -> str:
    """What ``host_times.py`` measured, a model to a row; ``*``: what ``convert`` leaves alone on the CPU by default."""
    lines = ["| model | replaced | outputs, gradients | forward, ms | forward + backward, ms | peak memory, MiB |"]
    lines.append("| --- | --- | --- | ---: | ---: | ---: |")
    places = set()
    for file in sorted((RESULT.parent / "convert").glob("*.json")):
        found = json.loads(file.read_text())
        where = found["environment"]
        places.add(f"{where['cpu']}, {where['threads']} threads, torch {where['torch']}, {where['date']}")
        ops = Counter(each["op"] for each in found["candidates"] if each["outcome"] == "replaced")
        name = " ".join([f"`{found['model']}`", *found["options"]])
        name += ", " + "x".join(map(str, (*found["images"][:-3], *found["images"][-2:])))
        star = "" if host_times.by_default(found) else "*"
        cells = [name, ", ".join(f"{count} `{op}`{star}" for op, count in ops.items())]
        cells.append(", ".join(f"{found['difference'][what]:.0e}" for what in ("outputs", "gradients")))
        for part in ("forward", "forward + backward"):
            before, after = (found["seconds"][when][part] for when in ("before", "after"))
            cells.append(f"{before * 1e3:,.0f} → {after * 1e3:,.0f} ({before / after:.2f}x)")
        before, after = (found["peak_bytes"][when]["forward + backward"] / 2**20 for when in ("before", "after"))
        cells.append(f"{before:,.0f} → {after:,.0f}")
        lines.append(f"| {' | '.join(cells)} |")
    lines += ["", "\\* `convert` leaves these alone on the CPU by default."]
    if untimed := host_times.untimed():
        names = ", ".join(f"`{path.partition(':')[2]}`" for path in untimed)
        lines += ["", f"Not timed: {names}."]
    return "\n".join([*lines, "", f"{'; '.join(sorted(places))}.", ""])


def tables() -> dict[str, str]:
    """By file name."""
    return {"integrations.md": markdown(), "integrations_cpu.md": timings()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("host", choices=HOST_MODELS)
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--stand-in", action="store_true")
    options = parser.parse_args()
    if options.folder is not None:
        sys.path.append(str(options.folder))
    if options.stand_in:
        sys.path.append(str(ROOT / "tests"))
        from hosts import stand_in_for_torchvision

        stand_in_for_torchvision()
    warnings.simplefilter("ignore")
    importlib.import_module(options.host)
    found = survey(HOST_MODELS[options.host]())
    result = json.loads(RESULT.read_text()) if RESULT.exists() else {}
    result[options.host] = {"version": version_of(options.host), "date": str(datetime.date.today()), **found}
    RESULT.write_text(json.dumps(result, indent=1, sort_keys=True, allow_nan=False) + "\n")


if __name__ == "__main__":
    main()
