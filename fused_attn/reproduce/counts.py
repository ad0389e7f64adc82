"""Parameters and multiply-adds of a network, counted without computing anything."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from ..models import create_model
from ..train.config import TrainConfig


def of_network(config: TrainConfig, image: Mapping[str, int]) -> dict[str, Any]:
    """Count what the network of a row has, on the reference implementation, for one image.

    Args:
        config: of the row: its model and the model's options.
        image: ``num_classes``, ``in_chans`` and ``image_size``, as for :func:`~fused_attn.create_model`.

    Returns:
        ``parameters``, and ``macs``: half the FLOPs that ``torch.utils.flop_counter`` finds in a forward pass.
    """
    with torch.device("meta"):
        network = create_model(config.model, impl="reference", **image, **config.parsed_model_options()).eval()
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            network(torch.empty(1, image["in_chans"], image["image_size"], image["image_size"]))
    return {
        "parameters": sum(parameter.numel() for parameter in network.parameters()),
        "macs": counter.get_total_flops() / 2,
    }
