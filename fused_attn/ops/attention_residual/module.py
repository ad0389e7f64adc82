"""Modules: residual connections that attend over depth."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from .._floor import checks
from .._floor.dispatch import IMPLEMENTATIONS
from .api import attention_residual


class AttentionResidual(nn.Module):
    """The input of a layer as attention over the outputs of all earlier ones, in place of their sum.

    ``out = sum_l softmax_l(query . RMSNorm(values[l])) values[l]`` per token, with a learned query and norm weight.
    The query starts at zero: all values then weigh the same.

    Args:
        dim: D, size of the last dimension.
        eps: of the RMSNorm.
        impl: implementation of the op; not part of the state dict.

    Shapes: input L tensors (..., dim), of any L >= 1, output (..., dim).

    Raises:
        ValueError: ``dim`` is not positive, or ``impl`` is unknown.

    Source: Kimi Team 2026, "Attention Residuals" (arXiv:2603.15031).
    """

    def __init__(
        self,
        dim: int,
        *,
        eps: float = 1e-6,
        impl: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        checks.positive(dim=dim)
        checks.one_of("impl", impl, IMPLEMENTATIONS)
        self.eps, self.impl = eps, impl
        self.query = nn.Parameter(torch.empty(dim, device=device, dtype=dtype))
        self.norm_weight = nn.Parameter(torch.empty(dim, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set the query to zero and the norm's weight to one."""
        nn.init.zeros_(self.query)
        nn.init.ones_(self.norm_weight)

    def forward(self, values: Sequence[Tensor]) -> Tensor:
        """Attend over ``values``, a list or a :class:`BlockSums`."""
        return attention_residual(list(values), self.query, norm_weight=self.norm_weight, eps=self.eps, impl=self.impl)

    def extra_repr(self) -> str:
        return f"{self.query.shape[0]}, eps={self.eps}, impl={self.impl!r}"


class BlockSums:
    """What the block form attends over: sums of ``size`` layer outputs each, and the current partial sum.

    The first tensor, the embedding, is a block of its own.  Iterating gives the completed sums, then the partial one::

        values = BlockSums(embedding, size=8)
        for layer, residual in zip(layers, residuals):
            values.append(layer(residual(values)))

    Memory and time grow with the number of blocks, not of layers.

    Args:
        first: (..., D).
        size: layers to a block, at least 1; 1 is the full form.

    Raises:
        ValueError: ``size`` is not positive.

    Source: Kimi Team 2026, "Attention Residuals", the block form.
    """

    def __init__(self, first: Tensor, size: int) -> None:
        checks.positive(size=size)
        self.size = size
        self._sums, self._layers = [first], size

    def append(self, output: Tensor) -> None:
        """Add the output of the next layer."""
        if self._layers == self.size:
            self._sums.append(output)
            self._layers = 1
        else:
            self._sums[-1] = self._sums[-1] + output
            self._layers += 1

    def __iter__(self) -> Iterator[Tensor]:
        return iter(self._sums)

    def __len__(self) -> int:
        return len(self._sums)
