"""Augmentation is drawn per image; what it does is checked image by image."""

import pytest
import torch
import torch.nn.functional as F

from fused_attn.train import TrainConfig, augment, data

BATCH = 48


@pytest.fixture(scope="module")
def digits():
    return data.load("digits", image_size=8)


@pytest.fixture(scope="module")
def images(digits):
    return digits.train.images[:BATCH].float() / 255.0


def transforms(digits, **changes):
    settings = {"crop_padding": 0, "flip": False, "rotate": 0.0, **changes}
    return augment.build(TrainConfig(model="wrn_10_1", dataset="digits", out="out", **settings), digits)


def normalized(x, digits):
    return (x - digits.mean.view(1, -1, 1, 1)) / digits.std.view(1, -1, 1, 1)


def matching(x, candidates):
    """Index of the candidate (n, C, H, W) that each image of ``x`` equals."""
    distance = (x[:, None] - candidates).abs().amax((2, 3, 4))
    assert bool((distance.min(1).values < 1e-5).all())
    return distance.argmin(1)


def test_evaluation_only_normalizes(digits, images):
    train, evaluation = transforms(digits)
    torch.testing.assert_close(evaluation(images), normalized(images, digits))
    torch.testing.assert_close(train(images), normalized(images, digits))
    everything = evaluation(digits.train.images.float() / 255.0)
    assert everything.mean().abs() < 1e-4
    assert (everything.std() - 1).abs() < 1e-4


def test_flip_mirrors_some_images_and_not_others(digits, images):
    train, _ = transforms(digits, flip=True)
    candidates = torch.stack([normalized(images, digits), normalized(images.flip(3), digits)], dim=1)
    chosen = matching(train(images), candidates)
    assert 0.25 * BATCH < chosen.sum() < 0.75 * BATCH


def test_crop_is_a_window_of_the_padded_image_drawn_per_image(digits, images):
    train, _ = transforms(digits, crop_padding=2)
    padded = F.pad(images, (2, 2, 2, 2))
    windows = [padded[:, :, y : y + 8, x : x + 8] for y in range(5) for x in range(5)]
    chosen = matching(train(images), torch.stack([normalized(window, digits) for window in windows], dim=1))
    assert len(chosen.unique()) > 10
    torch.manual_seed(1)
    again = matching(train(images), torch.stack([normalized(window, digits) for window in windows], dim=1))
    assert not torch.equal(chosen, again)


def test_rotation_differs_per_image(digits):
    train, _ = transforms(digits, rotate=30.0)
    same = (digits.train.images[:1].float() / 255.0).expand(BATCH, -1, -1, -1)
    rotated = train(same)
    distances = (rotated[:, None] - rotated[None]).abs().amax((2, 3, 4))
    assert bool((distances[~torch.eye(BATCH, dtype=torch.bool)] > 1e-4).all())
