"""The papers' training settings, by name: ``fused-attn train --recipe NAME``."""

from __future__ import annotations

from typing import Any

_ATTENTION_WISE = {
    "epochs": 10, "optimizer": "adam", "lr": 1e-3, "weight_decay": 0.0, "schedule": "constant", "crop_padding": 0,
    "flip": False, "normalize": False, "channels_last": False, "eval_batch_size": 1000,
}  # fmt: skip
_WRN = {
    "batch_size": 128, "optimizer": "sgd", "lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 5e-4,
    "schedule": "step", "gamma": 0.2,
}  # fmt: skip

_SWIN = {
    "epochs": 300, "optimizer": "adamw", "weight_decay": 0.05, "schedule": "cosine", "warmup_epochs": 20.0,
    "label_smoothing": 0.1, "clip_norm": 5.0,
}  # fmt: skip

#: name -> (what it is, settings)
RECIPES: dict[str, tuple[str, dict[str, Any]]] = {
    "wrn": (
        "Zagoruyko and Komodakis 2016, section 3: SGD-Nesterov, times 0.2 at epochs 60, 120 and 160 of 200",
        {**_WRN, "epochs": 200, "milestones": (60, 120, 160)},
    ),
    "replication-wrn": (
        "Demartis et al., section 5: 60 epochs, 45,000 + 5,000 images; the schedule's values are not given, these are "
        "the Wide ResNet paper's at the same fractions of the run",
        {
            **_WRN, "model": "aa_wrn_28_10_replication", "dataset": "cifar10", "epochs": 60, "milestones": (18, 36, 48),
            "validation": 5000,
        },
    ),
    "replication-resnet34": (
        "Demartis et al., section 5: 220 epochs with Adam and a step schedule, 45,000 + 5,000 images; its values are "
        "not given, these are those of the Keras CIFAR-10 example",
        {
            "model": "aa_resnet34", "dataset": "cifar10", "epochs": 220, "batch_size": 128, "optimizer": "adam",
            "lr": 1e-3, "weight_decay": 0.0, "schedule": "step", "milestones": (80, 120, 160), "gamma": 0.1,
            "validation": 5000,
        },
    ),
    "aa-wrn": (
        "Bello et al. 2019: warm-up over 5 % of 500 epochs to 0.2*B/256, then cosine (as quoted by Demartis et al., "
        "section 5); batch 256 and weight decay 5e-4",
        {
            "model": "aa_wrn_28_10", "dataset": "cifar100", "epochs": 500, "batch_size": 256, "optimizer": "sgd",
            "lr": 0.2, "momentum": 0.9, "nesterov": False, "weight_decay": 5e-4, "schedule": "cosine",
            "warmup_epochs": 25.0,
        },
    ),
    "sa-resnet": (
        "Luo, Self-Attentive Layer Aggregation, section 3: 64,000 steps, divided by 10 at 32,000 and 48,000 (here: the "
        "nearest ends of epochs); the mean of every pixel subtracted",
        {
            "model": "sa_resnet20", "dataset": "cifar10", "epochs": 165, "max_steps": 64000, "batch_size": 128,
            "optimizer": "sgd", "lr": 0.1, "momentum": 0.9, "nesterov": False, "weight_decay": 1e-4, "schedule": "step",
            "milestones": (82, 123), "gamma": 0.1, "crop_padding": 4, "flip": True, "pixel_mean": True,
        },
    ),
    "mrla": (
        "Fang et al. 2023, ResNets on ImageNet: 100 epochs, divided by 10 every 30, 3 epochs of warm-up, drop-path 0.2",
        {
            "model": "mrla_light_resnet50", "dataset": "imagefolder", "image_size": 224, "epochs": 100,
            "batch_size": 256, "optimizer": "sgd", "lr": 0.1, "momentum": 0.9, "nesterov": False, "weight_decay": 1e-4,
            "schedule": "step", "milestones": (30, 60, 90), "gamma": 0.1, "warmup_epochs": 3.0,
            "model_options": ("drop_path=0.2",),
        },
    ),
    "attention-wise": (
        "Araujo Bacochina and de Souza 2023, section 2.3, Fashion-MNIST: Adam, 10 epochs; the paper names no "
        "augmentation, and its pictures have a background of 0",
        {**_ATTENTION_WISE, "model": "attention_wise_b", "dataset": "fashion_mnist", "batch_size": 4096},
    ),
    "attention-wise-cifar10": (
        "Araujo Bacochina and de Souza 2023, section 2.3 and appendix, CIFAR-10: batch 1024; with attention_lr=0.1 the "
        "appendix's second experiment",
        {**_ATTENTION_WISE, "model": "attention_wise_cifar", "dataset": "cifar10", "batch_size": 1024},
    ),
    "result-attention": (
        "Ye, Introduce the Result Into Self-Attention, section 4: SGD-Nesterov, divided by 5 at epochs 60, 120 and 160 "
        "of 200, one epoch of warm-up; the auxiliary losses' weights are table 3's for 34 layers (0.3 0.3 for 50, "
        "0.3 0.2 for 101)",
        {
            **_WRN, "model": "se_r_resnet34", "dataset": "cifar100", "epochs": 200, "milestones": (60, 120, 160),
            "warmup_epochs": 1.0, "crop_padding": 4, "flip": True, "rotate": 15.0, "aux_weights": (0.4, 0.4),
        },
    ),
    "swin": (
        "Liu et al. 2021, Swin-T on ImageNet: AdamW, 300 epochs, 20 of warm-up, drop-path 0.2; without the paper's "
        "mixup, random erasing and RandAugment, and with its weight decay on every parameter",
        {
            **_SWIN, "model": "swin_tiny", "dataset": "imagefolder", "image_size": 224, "batch_size": 1024, "lr": 1e-3,
            "model_options": ("drop_path=0.2",),
        },
    ),
    "swin-cifar10": (
        "the same for a small Swin on CIFAR-10, batch 128 and the rate in proportion to the root of the batch",
        {
            **_SWIN, "model": "swin_cifar", "dataset": "cifar10", "batch_size": 128, "lr": 3.5e-4,
            "model_options": ("drop_path=0.1",),
        },
    ),
}  # fmt: skip
