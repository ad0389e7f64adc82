"""The papers' training settings, by name: ``fused-attn train --recipe NAME``."""

from __future__ import annotations

from typing import Any

#: name -> (what it is, settings)
RECIPES: dict[str, tuple[str, dict[str, Any]]] = {
    "wrn": (
        "Zagoruyko and Komodakis 2016, and the Wide ResNets of the replication report: SGD-Nesterov, step schedule",
        {
            "epochs": 200, "batch_size": 128, "optimizer": "sgd", "lr": 0.1, "momentum": 0.9, "nesterov": True,
            "weight_decay": 5e-4, "schedule": "step", "milestones": (60, 120, 160), "gamma": 0.2,
        },
    ),
    "replication-wrn": (
        "Demartis et al., section 5: 60 epochs of the Wide ResNet, 45,000 + 5,000 images",
        {
            "model": "aa_wrn_28_10_replication", "dataset": "cifar10", "epochs": 60, "batch_size": 128,
            "optimizer": "sgd", "lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 5e-4,
            "schedule": "step", "milestones": (20, 40, 50), "gamma": 0.2, "validation": 5000,
        },
    ),
    "replication-resnet34": (
        "Demartis et al., section 5: 220 epochs of ResNet-34 with Adam and a step schedule, 45,000 + 5,000 images",
        {
            "model": "aa_resnet34", "dataset": "cifar10", "epochs": 220, "batch_size": 128, "optimizer": "adam",
            "lr": 1e-3, "weight_decay": 0.0, "schedule": "step", "milestones": (80, 120, 160), "gamma": 0.1,
            "validation": 5000,
        },
    ),
    "aa-wrn": (
        "Bello et al. 2019, appendix: warm-up over 5 % of 500 epochs to 0.2*B/256, cosine, weight decay 5e-4",
        {
            "model": "aa_wrn_28_10", "dataset": "cifar100", "epochs": 500, "batch_size": 1024, "optimizer": "sgd",
            "lr": 0.8, "momentum": 0.9, "nesterov": True, "weight_decay": 5e-4, "schedule": "cosine",
            "warmup_epochs": 25.0,
        },
    ),
}  # fmt: skip
