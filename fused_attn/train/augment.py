"""Augmentation and normalisation of a batch, per image and on its device."""

from __future__ import annotations

from torch import Tensor, nn

from . import data
from .config import TrainConfig
from .data import Dataset, source
from .errors import TrainError


class SubtractPixelMean(nn.Module):
    """Subtract the (C, H, W) mean of the training images."""

    def __init__(self, mean: Tensor) -> None:
        super().__init__()
        self.register_buffer("mean", mean)

    def forward(self, images: Tensor) -> Tensor:
        return images - self.mean.to(images.device)


def build(config: TrainConfig, dataset: Dataset) -> tuple[nn.Module, nn.Module]:
    """(training, evaluation) transforms of float images (B, C, H, W) in [0, 1].

    Raises:
        TrainError: ``crop_padding`` exceeds the images, so that crops would hold nothing of them; or there is no
            ``pixel_mean``, as the images are in their files, of all sizes.
    """
    import kornia.augmentation as K

    custom = source(config.dataset, config.image_size)
    padding = custom.crop_padding if config.crop_padding is None else config.crop_padding
    if config.crop_padding is not None and padding > (largest := min(dataset.image_size)):
        raise TrainError(f"crop_padding must be at most {largest}, the size of the images, got {padding}")
    flip = custom.flip if config.flip is None else config.flip
    transforms: list[nn.Module] = []
    centred: list[nn.Module] = []
    if config.pixel_mean:
        if dataset.crop is not None:
            raise TrainError(f"pixel_mean: it is for images in memory; those of {config.dataset} stay in their files")
        centred = [SubtractPixelMean(data.pixel_mean(dataset.train))]
    if dataset.crop is not None:
        scale = custom.crop_scale if config.crop_scale is None else config.crop_scale
        transforms.append(K.RandomResizedCrop(dataset.image_size, scale=(scale, 1.0)))
    elif padding > 0:
        transforms.append(K.RandomCrop(dataset.image_size, padding=padding))
    if flip:
        transforms.append(K.RandomHorizontalFlip(p=0.5))
    if config.rotate > 0:
        transforms.append(K.RandomRotation(config.rotate, p=1.0))
    normalize = K.Normalize(dataset.mean, dataset.std) if config.normalize and not config.pixel_mean else nn.Identity()
    centre = nn.Identity() if dataset.crop is None else K.CenterCrop(dataset.image_size)
    # The pixels' mean belongs to their places: it goes before an image is moved.
    return nn.Sequential(*centred, *transforms, normalize), nn.Sequential(centre, *centred, normalize)
