"""Time and memory of a model of every host before and after ``convert``: results/convert/*.json.

    python benchmarks/report/host_times.py [WORD ...] [--folder FOLDER] [--stand-in] [--seconds SECONDS] [--out FOLDER]

runs ``fused-attn convert`` for every case whose model has one of the words in its name, or for all where none is given,
and says where the default of the registry is not what was measured.  ``--missing`` leaves out what was measured before,
``--list`` runs nothing and prints the commands.  ``--folder`` is where the hosts lie, if they are not installed;
``--stand-in`` puts an empty torchvision in the place of one that does not import, for timm alone.  The table is
rendered by ``make bench``.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# Runs from a clone without installation too.
sys.path.insert(0, str(Path(__file__).parents[2]))

from fused_attn.integrations.convert import HOSTS

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results" / "convert"

#: Four of SAM's twelve layers, on a quarter of its positions: two with windows, two over the whole grid.
_SAM = ("--options", "image_size=512", "num_hidden_layers=4", "global_attn_indexes=[1,3]")
#: What PPOCRV6SmallDet's neck needs, maps that halve from stage to stage; its default backbone returns one.
_MAPS = {"model_type": "pp_lcnet_v3", "scale": 0.75, "divisor": 16, "out_features": [f"stage{i}" for i in range(2, 6)]}
_B0 = ("width_coefficient=1.0", "depth_coefficient=1.0")
_SE = ("--ops", "squeeze_excite")
#: model -> the other arguments of the command; ops that ``convert`` leaves alone by default are named
CASES: dict[str, tuple[str, ...]] = {
    "timm:samvit_base_patch16_224": (),
    "timm:botnet26t_256": ("--ops", "rel_attention_2d"),
    "timm:halonet26t": (),
    "timm:mvitv2_tiny": ("--ops", "rel_attention_2d"),
    "timm:mvitv2_small_cls": ("--ops", "rel_attention_2d"),
    "timm:swin_tiny_patch4_window7_224": (),
    "timm:maxvit_tiny_tf_224": (),
    "timm:coatnet_0_rw_224": (),
    "timm:levit_256": ("--ops", "bias_attention_2d"),
    "timm:seresnet50": _SE,
    "timm:legacy_seresnet50": _SE,
    "timm:ese_vovnet19b_dw": _SE,
    "timm:efficientnet_b0": _SE,
    "transformers:SamVisionConfig": _SAM,
    "transformers:SamHQVisionConfig": _SAM,
    "transformers:GotOcr2VisionConfig": _SAM,
    "transformers:DeepseekOcr2SamVisionConfig": _SAM,
    "transformers:UnlimitedOcrSamVisionConfig": _SAM,
    "transformers:PPFormulaNetVisionConfig": _SAM,
    "transformers:SLANeXtVisionConfig": _SAM,
    "transformers:VitDetConfig": (
        "--options", "image_size=512", "use_relative_position_embeddings=True", "num_hidden_layers=4",
        "window_block_indices=[0,2]", "window_size=14",
    ),
    "transformers:SegGptConfig": (
        "--options", "image_size=[448,224]", "num_hidden_layers=4", "merge_index=1",
        "intermediate_hidden_state_indices=[1,2,3]",
    ),
    "transformers:SwinConfig": (),
    "transformers:DonutSwinConfig": (),
    "transformers:MaskFormerSwinConfig": (),
    "transformers:ClapAudioConfig": (),
    "transformers:Swinv2Config": (),
    "transformers:Swin2SRConfig": ("--options", "depths=[2,2]", "num_heads=[6,6]"),
    "transformers:RegNetConfig": (*_SE, "--image-size", "224"),
    "transformers:EfficientNetConfig": (*_SE, "--image-size", "224", "--options", *_B0, "hidden_dim=1280"),
    "transformers:AlignVisionConfig": (*_SE, "--image-size", "224", "--options", *_B0),
    "transformers:PPLCNetConfig": (*_SE, "--image-size", "224"),
    "transformers:PPLCNetV3Config": (*_SE, "--image-size", "224"),
    "transformers:PPLCNetV4Config": (*_SE, "--image-size", "224"),
    "transformers:PPOCRV5MobileDetConfig": (*_SE, "--image-size", "320"),
    "transformers:PPOCRV6SmallDetConfig": (
        *_SE, "--image-size", "320",
        "--options", f"backbone_config={_MAPS}".replace(" ", ""), "layer_list_out_channels=[48,96,192,384]",
    ),
    "transformers:EfficientLoFTRConfig": (
        "--ops", "row_col_softmax", "--image-size", "320",
        "--options", "coarse_matching_threshold=0.0", "coarse_matching_border_removal=0",
    ),
    "transformers:LightGlueConfig": ("--image-size", "320", "--options", "filter_threshold=0.0"),
    "kornia:LoFTR": ("--image-size", "320"),
    "bottleneck_transformer_pytorch:BottleStack": (
        "--options", "dim=256", "fmap_size=32", "dim_out=1024", "rel_pos_emb=True",
    ),
}  # fmt: skip


def file_of(model: str, folder: Path = RESULTS) -> Path:
    return folder / f"convert_{model.replace(':', '_')}.json"


def untimed(folder: Path = RESULTS) -> list[str]:
    """Classes of the registry of which no result holds a replaced layer."""
    timed = set()
    for path in folder.glob("*.json"):
        timed |= {each["host"] for each in json.loads(path.read_text())["candidates"] if each["outcome"] == "replaced"}
    return [host for host in HOSTS if host not in timed]


def by_default(found: dict[str, Any]) -> bool:
    """Whether ``convert`` replaces on the CPU, without being asked to, what it replaced in a result."""
    return all(HOSTS[each["host"]].faster_on_cpu for each in found["candidates"] if each["outcome"] == "replaced")


def doubts(folder: Path = RESULTS, margin: float = 0.02) -> Iterator[str]:
    """Results that do not bear out the default: replaced though neither time nor memory gains, or left alone though the
    times do; by less than ``margin`` is neither."""
    for path in sorted(folder.glob("*.json")):
        found = json.loads(path.read_text())
        if "seconds" not in found or "peak_bytes" not in found:
            continue
        kinds = {"seconds": ("forward", "forward + backward"), "peak_bytes": ("forward + backward",)}
        forward, step, memory = (
            found[kind]["before"][name] / max(found[kind]["after"][name], 1e-9)
            for kind, names in kinds.items()
            for name in names
        )
        figures = f"forward {forward:.2f}x, forward + backward {step:.2f}x, memory {memory:.2f}x"
        if by_default(found) and max(forward, step, memory) < 1 + margin:
            yield f"{found['model']} is replaced by default, and gains nothing: {figures}"
        elif by_default(found) and step < 1 - margin:
            yield f"{found['model']} is replaced by default, and its step takes longer: {figures}"
        elif not by_default(found) and min(forward, step) > 1 - margin and max(forward, step) > 1 + margin:
            yield f"{found['model']} is left alone by default, and gains: {figures}"


def _environment(options: argparse.Namespace, model: str, folder: str) -> dict[str, str]:
    paths = [str(ROOT), *([str(options.folder)] if options.folder else []), os.environ.get("PYTHONPATH", "")]
    if options.stand_in and model.startswith("timm:"):  # for the process that measures memory too
        Path(folder, "sitecustomize.py").write_text("import hosts\n\nhosts.stand_in_for_torchvision()\n")
        paths = [folder, str(ROOT / "tests"), *paths]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("words", nargs="*", metavar="WORD")
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--stand-in", action="store_true")
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--missing", action="store_true")
    parser.add_argument("--list", action="store_true")
    options = parser.parse_args()
    failed = []
    for model, arguments in CASES.items():
        if options.words and not any(word in model for word in options.words):
            continue
        if options.missing and file_of(model, options.out).exists():
            continue
        command = ["convert", "--model", model, *arguments, "--seconds", f"{options.seconds:g}"]
        command += ["--out", str(options.out)]
        if options.threads is not None:
            command += ["--threads", str(options.threads)]
        print(f"\n$ fused-attn {shlex.join(command)}", flush=True)
        if options.list:
            continue
        with tempfile.TemporaryDirectory() as folder:
            environment = _environment(options, model, folder)
            if subprocess.run([sys.executable, "-m", "fused_attn", *command], env=environment).returncode:
                failed.append(model)
    if options.list:
        return
    for title, lines in (("failed", failed), ("not timed", untimed(options.out)), ("defaults", doubts(options.out))):
        print(f"\n{title}:", *lines, sep="\n  ")
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
