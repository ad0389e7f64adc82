"""Parameters and FLOPs of the models by attention coverage: writes results/model_table.md and .json.

FLOPs are those of one forward pass of one image, two per multiply-add, counted by ``torch.utils.flop_counter`` on the
reference implementation with fake tensors: nothing is computed, so the table is the same on every machine.

Run from the repository root: ``python -m benchmarks.model_table``.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

import fused_attn

NUM_CLASSES = 100
IMAGE_SIZE = 32
RESULTS = Path(__file__).parent / "results"

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


def measure(name: str, **options) -> dict[str, int]:
    """Count parameters and FLOPs of one model."""
    with FakeTensorMode():
        options = {"num_classes": NUM_CLASSES, "image_size": IMAGE_SIZE, "impl": "reference", **options}
        model = fused_attn.create_model(name, **options).eval()
        counter = FlopCounterMode(display=False)
        with counter, torch.no_grad():
            model(torch.empty(1, 3, IMAGE_SIZE, IMAGE_SIZE))
    by_operator = counter.get_flop_counts()["Global"]
    return {
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "flops": counter.get_total_flops(),
        # Only the attention multiplies batches of matrices.
        "attention_flops": by_operator.get(torch.ops.aten.bmm, 0),
    }


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
    table = "\n".join(lines) + "\n"
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "model_table.md").write_text(table)
    (RESULTS / "model_table.json").write_text(json.dumps(rows, indent=1) + "\n")
    print(table, end="")


if __name__ == "__main__":
    main()
