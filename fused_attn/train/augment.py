"""Augmentation and normalisation of a batch, per image and on its device."""

from __future__ import annotations

from torch import nn

from .config import TrainConfig
from .data import SOURCES, Dataset


def build(config: TrainConfig, dataset: Dataset) -> tuple[nn.Module, nn.Module]:
    """(training, evaluation) transforms of float images (B, C, H, W) in [0, 1]."""
    import kornia.augmentation as K

    source = SOURCES[config.dataset]
    padding = source.crop_padding if config.crop_padding is None else config.crop_padding
    flip = source.flip if config.flip is None else config.flip
    transforms: list[nn.Module] = []
    if padding > 0:
        transforms.append(K.RandomCrop(dataset.image_size, padding=padding))
    if flip:
        transforms.append(K.RandomHorizontalFlip(p=0.5))
    if config.rotate > 0:
        transforms.append(K.RandomRotation(config.rotate, p=1.0))
    normalize = K.Normalize(dataset.mean, dataset.std)
    return nn.Sequential(*transforms, normalize), normalize
