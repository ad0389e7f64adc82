"""Attention over the layers of a vision transformer: every layer chooses, per token, among the outputs of earlier ones.

The residual connections of the plain transformer are their sum.  Run: ``python examples/layers_of_a_vit.py``
"""

import argparse

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn

from fused_attn.modules import AttentionResidual, BlockSums


class Attention(nn.Module):
    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm = nn.LayerNorm(dim)
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.qkv(self.norm(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return self.proj(F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2))


def mlp(dim: int) -> nn.Module:
    return nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, 2 * dim), nn.GELU(), nn.Linear(2 * dim, dim))


class VisionTransformer(nn.Module):
    """Patches of 2x2 of an 8x8 image; ``block`` layers to a sum, or plain residual connections when None."""

    def __init__(self, dim: int = 32, depth: int = 3, block: int | None = 1) -> None:
        super().__init__()
        self.embed = nn.Conv2d(1, dim, 2, stride=2)
        self.position = nn.Parameter(0.1 * torch.randn(16, dim))
        self.layers = nn.ModuleList(layer for _ in range(depth) for layer in (Attention(dim, 4), mlp(dim)))
        self.block = block
        if block is not None:
            self.residuals = nn.ModuleList(AttentionResidual(dim) for _ in range(2 * depth + 1))
        self.head = nn.Sequential(nn.LayerNorm(16 * dim), nn.Linear(16 * dim, 10))

    def forward(self, images: Tensor) -> Tensor:
        x = self.embed(images).flatten(2).transpose(1, 2) + self.position
        if self.block is None:
            for layer in self.layers:
                x = x + layer(x)
        else:
            values = BlockSums(x, size=self.block)
            for layer, residual in zip(self.layers, self.residuals[:-1], strict=True):
                values.append(layer(residual(values)))
            x = self.residuals[-1](values)
        return self.head(x.flatten(1))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=150)
    steps = parser.parse_args().steps

    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16
    labels = torch.tensor(digits.target)
    for name, block in (("sums of all layers", None), ("attention over layers", 1), ("attention over pairs", 2)):
        torch.manual_seed(0)
        model = VisionTransformer(block=block)
        optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3)
        for _ in range(steps):
            batch = torch.randint(0, 1300, (64,))
            loss = F.cross_entropy(model(images[batch]), labels[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        with torch.no_grad():
            accuracy = (model(images[1300:]).argmax(1) == labels[1300:]).float().mean()
        print(f"{name}: test accuracy {accuracy:.1%} after {steps} steps")


if __name__ == "__main__":
    main()
