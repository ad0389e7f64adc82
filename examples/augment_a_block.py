"""An attention-augmented ResNet block in a network of your own, trained on scikit-learn's handwritten digits.

Run: ``python examples/augment_a_block.py``
"""

import argparse

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn

from fused_attn.modules import AttentionAugmentedConv2d


class Block(nn.Module):
    """A residual block whose second convolution attends over the whole map."""

    def __init__(self, channels: int, size: tuple[int, int], attention: bool) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(channels)
        if attention:
            # In place of nn.Conv2d(channels, channels, 3, padding=1, bias=False):
            self.conv2 = AttentionAugmentedConv2d(channels, channels, kernel_size=3, stride=1, size=size, heads=4)
        else:
            self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        out = self.norm1(self.conv1(x)).relu()
        return (x + self.norm2(self.conv2(out))).relu()


def network(attention: bool) -> nn.Module:
    blocks = (Block(40, (8, 8), attention) for _ in range(2))
    return nn.Sequential(
        nn.Conv2d(1, 40, 3, padding=1), *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(40, 10)
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=150)
    steps = parser.parse_args().steps

    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16
    labels = torch.tensor(digits.target)
    for attention in (False, True):
        torch.manual_seed(0)
        model = network(attention)
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
        for _ in range(steps):
            batch = torch.randint(0, 1300, (32,))
            loss = F.cross_entropy(model(images[batch]), labels[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        model.eval()
        with torch.no_grad():
            accuracy = (model(images[1300:]).argmax(1) == labels[1300:]).float().mean()
        parameters = sum(parameter.numel() for parameter in model.parameters())
        name = "with attention" if attention else "plain"
        print(f"{name}: {parameters:,} parameters, test accuracy {accuracy:.1%} after {steps} steps")


if __name__ == "__main__":
    main()
