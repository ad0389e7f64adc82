"""Fine-tuning only what a network attends with: relative position tables and squeeze-excite gates.

A network learns digits, then meets the same digits turned by 90 degrees.  All convolutions, norms and the classifier
stay as they are.

Run: ``python examples/tune_tables_and_gates.py``
"""

import argparse

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn

from fused_attn.modules import RelPosAttention2d, SqueezeExcite


class Network(nn.Module):
    def __init__(self, channels: int = 32) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, channels, 3, padding=1), nn.GroupNorm(4, channels), nn.ReLU())
        self.attentions = nn.ModuleList(
            RelPosAttention2d(channels, key_channels=64, value_channels=channels, heads=4, size=(8, 8))
            for _ in range(3)
        )
        self.norms = nn.ModuleList(nn.GroupNorm(1, channels) for _ in range(3))
        self.convs = nn.ModuleList(nn.Conv2d(channels, channels, 3, padding=1) for _ in range(3))
        self.gates = nn.ModuleList(SqueezeExcite(channels, reduction=2) for _ in range(3))
        self.head = nn.Linear(channels, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for attention, norm, conv, gate in zip(self.attentions, self.norms, self.convs, self.gates, strict=True):
            x = x + attention(x)
            x = gate(conv(norm(x)), residual=x, activation="relu")
        return self.head(x.mean((2, 3)))


def is_table_or_gate(name: str) -> bool:
    return name.endswith((".rel_h", ".rel_w")) or name.startswith("gates.")


def train(model: nn.Module, images: Tensor, labels: Tensor, steps: int, rate: float) -> None:
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.Adam(trained, lr=rate)
    for _ in range(steps):
        batch = torch.randint(0, 1300, (64,))
        loss = F.cross_entropy(model(images[batch]), labels[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


@torch.no_grad()
def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    return float((model(images[1300:]).argmax(1) == labels[1300:]).float().mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=150)
    steps = parser.parse_args().steps

    torch.manual_seed(0)
    digits = load_digits()
    upright = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16
    turned, labels = upright.rot90(1, (2, 3)), torch.tensor(digits.target)

    model = Network()
    train(model, upright, labels, steps, rate=5e-3)
    print(f"upright digits: {accuracy(model, upright, labels):.1%}; turned ones: {accuracy(model, turned, labels):.1%}")

    for name, parameter in model.named_parameters():
        parameter.requires_grad_(is_table_or_gate(name))
    frozen = {name: each.clone() for name, each in model.named_parameters() if not each.requires_grad}
    tuned = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    total = sum(parameter.numel() for parameter in model.parameters())

    train(model, turned, labels, steps, rate=2e-2)
    assert all(torch.equal(dict(model.named_parameters())[name], each) for name, each in frozen.items())
    print(f"turned ones after tuning {tuned:,} of {total:,} parameters: {accuracy(model, turned, labels):.1%}")


if __name__ == "__main__":
    main()
