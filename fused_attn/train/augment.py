"""Augmentation and normalisation of a batch, per image and on its device."""

from __future__ import annotations

from torch import nn

from .config import TrainConfig
from .data import Dataset, source
from .errors import TrainError


def build(config: TrainConfig, dataset: Dataset) -> tuple[nn.Module, nn.Module]:
    """(training, evaluation) transforms of float images (B, C, H, W) in [0, 1].

    Raises:
        TrainError: ``crop_padding`` exceeds the images, so that crops would hold nothing of them.
    """
    import kornia.augmentation as K

    custom = source(config.dataset, config.image_size)
    padding = custom.crop_padding if config.crop_padding is None else config.crop_padding
    if config.crop_padding is not None and padding > (largest := min(dataset.image_size)):
        raise TrainError(f"crop_padding must be at most {largest}, the size of the images, got {padding}")
    flip = custom.flip if config.flip is None else config.flip
    transforms: list[nn.Module] = []
    if dataset.crop is not None:
        scale = custom.crop_scale if config.crop_scale is None else config.crop_scale
        transforms.append(K.RandomResizedCrop(dataset.image_size, scale=(scale, 1.0)))
    elif padding > 0:
        transforms.append(K.RandomCrop(dataset.image_size, padding=padding))
    if flip:
        transforms.append(K.RandomHorizontalFlip(p=0.5))
    if config.rotate > 0:
        transforms.append(K.RandomRotation(config.rotate, p=1.0))
    normalize = K.Normalize(dataset.mean, dataset.std) if config.normalize else nn.Identity()
    centre = nn.Identity() if dataset.crop is None else K.CenterCrop(dataset.image_size)
    return nn.Sequential(*transforms, normalize), nn.Sequential(centre, normalize)
