"""Parameters and FLOPs of a network, counted without computing anything."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from ..models import create_model


def of_network(name: str, *, num_classes: int, image_size: int, in_chans: int = 3, **options: Any) -> dict[str, int]:
    """Count what a network has, on the reference implementation, for one image.

    Args:
        name: of the model.
        num_classes, image_size, in_chans, options: as for :func:`~fused_attn.create_model`.

    Returns:
        ``parameters``; ``flops`` of a forward pass, two per multiply-add, as ``torch.utils.flop_counter`` finds them;
        and of these ``attention_flops``, as only the attention multiplies batches of matrices.
    """
    options |= {"num_classes": num_classes, "image_size": image_size, "in_chans": in_chans}
    with torch.device("meta"):
        model = create_model(name, impl="reference", **options).eval()
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model(torch.empty(1, in_chans, image_size, image_size))
    return {
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "flops": counter.get_total_flops(),
        "attention_flops": counter.get_flop_counts()["Global"].get(torch.ops.aten.bmm, 0),
    }
