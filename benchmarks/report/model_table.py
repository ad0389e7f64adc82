"""Parameters and FLOPs of the models, in results/: model_table.md (by attention coverage), layer_models.md (networks
with attention over their layers), window_models.md (attention with free relative biases), attention_wise_models.md
(element-wise attention, beside the paper's counts) and excite_models.md (squeeze-excite networks), each with its .json.

FLOPs are those of one forward pass of one image, two per multiply-add, counted by ``torch.utils.flop_counter`` on the
reference implementation with meta tensors: nothing is computed, so the table is the same on every machine.

Run from the repository root: ``python benchmarks/report/model_table.py``.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

# Runs from a clone without installation too.
sys.path.insert(0, str(Path(__file__).parents[2]))

from fused_attn.reproduce.counts import of_network

NUM_CLASSES = 100
IMAGE_SIZE = 32
RESULTS = Path(__file__).parents[1] / "results"

#: (stages, blocks) -> what the table calls them
COVERAGES = {
    ((), "all"): "none",
    ((3,), "first"): "stage 3, first block",
    ((3,), "all"): "stage 3, all blocks",
    ((2, 3), "all"): "stages 2, 3, all blocks",
    ((1, 2, 3), "first"): "all stages, first block",
    ((1, 2, 3), "all"): "all stages, all blocks",
}
ROWS = [
    (f"aa_{name}" if stages else name, label, {"attention_stages": stages, "attention_blocks": blocks})
    for name in ("wrn_28_10", "wrn_16_2")
    for (stages, blocks), label in COVERAGES.items()
] + [
    ("resnet34", "none", {}),
    ("aa_resnet34", "last convolution", {}),
    ("aa_resnet34", "stages 2, 3, 4, all blocks", {"attention_stages": (2, 3, 4), "attention_blocks": "all"}),
]
#: Networks with attention over their layers, each below the network that it was added to: (classes, image size), names.
LAYER_ROWS = [
    ((10, 32), [f"{prefix}resnet{depth}" for depth in (20, 32, 44, 56, 110) for prefix in ("", "sa_")]),
    ((1000, 224), [f"{prefix}resnet{depth}" for depth in (50, 101) for prefix in ("", "mrla_base_", "mrla_light_")]),
    (
        (1000, 224),
        [f"{prefix}deit_{size}" for size in ("tiny", "small", "base") for prefix in ("", "mrla_base_", "mrla_light_")],
    ),
]
#: Attention with free relative biases: (classes, image size), names.
WINDOW_ROWS = [
    ((1000, 224), ["swin_tiny", "swin_small", "swin_base", "coatnet_0_rw"]),
    ((10, 32), ["swin_cifar"]),
]
#: Element-wise attention: (model, channels, image size, parameters in the paper's sections 2.1 and 2.2 and appendix).
ATTENTION_WISE_ROWS = [
    ("vgg_control", 1, 28, 929_510),
    ("attention_wise_a", 1, 28, 33_104),
    ("attention_wise_b", 1, 28, 33_084),
    ("attention_wise_c", 1, 28, 58_208),
    ("attention_wise_d", 1, 28, 58_172),
    ("attention_wise_e", 1, 28, 58_342),
    ("attention_wise_f", 1, 28, 58_318),
    ("attention_wise_g", 1, 28, 108_534),
    ("attention_wise_h", 1, 28, 108_494),
    ("attention_wise_one_head", 1, 28, 11_132),
    ("vgg_control", 3, 32, 961_310),
    ("attention_wise_cifar", 3, 32, 506_560),
]


#: Squeeze-excite networks -> parameters (millions) and multiply-adds (10^9) of the paper's tables 1 and 2.
EXCITE_PUBLISHED = {
    "se_resnet34": (21.655, 1.163),
    "se_a_resnet34": None,
    "se_r_resnet34": (26.145, 1.169),
    "se_resnet50": (28.779, 1.315),
    "se_a_resnet50": None,
    "se_r_resnet50": (33.531, 1.323),
    "se_resnet101": (52.273, 2.538),
    "se_a_resnet101": None,
    "se_r_resnet101": (57.243, 2.546),
    "se_m_resnet50": None,
}


def measure(name: str, num_classes: int = NUM_CLASSES, image_size: int = IMAGE_SIZE, **options) -> dict[str, int]:
    """Count parameters and FLOPs of one model."""
    return of_network(name, num_classes=num_classes, image_size=image_size, **options)


def measure_rows(groups) -> list[dict[str, int | str]]:
    """Rows of layer_models.json and window_models.json, from ``LAYER_ROWS`` and ``WINDOW_ROWS``."""
    return [
        {"model": name, "num_classes": classes, "image_size": size}
        | {key: count for key, count in measure(name, classes, size).items() if key != "attention_flops"}
        for (classes, size), names in groups
        for name in names
    ]


def measure_excite_models() -> list[dict[str, int | str]]:
    """Rows of excite_models.json."""
    return [
        {"model": name} | {key: count for key, count in measure(name).items() if key != "attention_flops"}
        for name in EXCITE_PUBLISHED
    ]


def measure_attention_wise() -> list[dict[str, int | str]]:
    """Rows of attention_wise_models.json."""
    return [
        {
            "model": name,
            "in_chans": channels,
            "image_size": size,
            "parameters": measure(name, 10, size, in_chans=channels)["parameters"],
            "paper_parameters": paper,
        }
        for name, channels, size, paper in ATTENTION_WISE_ROWS
    ]


def write(name: str, rows: list[dict], lines: list[str]) -> None:
    table = "\n".join(lines) + "\n"
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.md").write_text(table)
    (RESULTS / f"{name}.json").write_text(json.dumps(rows, indent=1, allow_nan=False) + "\n")
    print(table)


def main() -> None:
    rows = [{"model": name, "attention_in": label, **measure(name, **options)} for name, label, options in ROWS]
    lines = [
        f"| {NUM_CLASSES} classes, {IMAGE_SIZE}x{IMAGE_SIZE} | attention in | parameters | GFLOPs | of it attention |",
        "| --- | --- | ---: | ---: | ---: |",
    ]
    for row in rows:
        lines.append(
            f"| {row['model']} | {row['attention_in']} | {row['parameters']:,} | {row['flops'] / 1e9:.3f} "
            f"| {row['attention_flops'] / row['flops']:.1%} |"
        )
    write("model_table", rows, lines)

    for file, groups in (("layer_models", LAYER_ROWS), ("window_models", WINDOW_ROWS)):
        rows = measure_rows(groups)
        lines = ["| model | classes | image | parameters | GFLOPs |", "| --- | ---: | ---: | ---: | ---: |"]
        for row in rows:
            size = f"{row['image_size']}x{row['image_size']}"
            count = f"{row['parameters']:,} | {row['flops'] / 1e9:.3f}"
            lines.append(f"| {row['model']} | {row['num_classes']:,} | {size} | {count} |")
        write(file, rows, lines)

    rows = measure_excite_models()
    lines = [
        "| 100 classes, 32x32, reduction 8 | parameters | published | GFLOPs | GMACs | published |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for row in rows:
        published = EXCITE_PUBLISHED[row["model"]]
        parameters, macs = (f"{published[0]:.3f} M", f"{published[1]:.3f}") if published else ("-", "-")
        lines.append(
            f"| {row['model']} | {row['parameters']:,} | {parameters} | {row['flops'] / 1e9:.3f} "
            f"| {row['flops'] / 2e9:.3f} | {macs} |"
        )
    write("excite_models", rows, lines)

    rows = measure_attention_wise()
    lines = [
        "| model | image | parameters | in the paper | difference |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    for row in rows:
        size = f"{row['image_size']}x{row['image_size']}x{row['in_chans']}"
        difference = row["parameters"] - row["paper_parameters"]
        lines.append(
            f"| {row['model']} | {size} | {row['parameters']:,} | {row['paper_parameters']:,} "
            f"| {difference:+,} |".replace("+0 |", "0 |")
        )
    write("attention_wise_models", rows, lines)


if __name__ == "__main__":
    main()
