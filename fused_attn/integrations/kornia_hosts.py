"""kornia's matching layers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..ops.elementwise_attention.api import row_col_softmax
from .host import Host

VERSIONS = ("0.9.0", "1")


class CoarseMatching(nn.Module):
    """``kornia.feature.loftr.utils.coarse_matching.CoarseMatching`` by dual softmax, masked or not."""

    can_torch_compile = True
    has_backward = True

    def forward(
        self: Any,
        feat_c0: Tensor,
        feat_c1: Tensor,
        data: dict[str, Tensor],
        mask_c0: Tensor | None = None,
        mask_c1: Tensor | None = None,
    ) -> None:
        feat_c0, feat_c1 = (feat / feat.shape[-1] ** 0.5 for feat in (feat_c0, feat_c1))
        similarity = torch.einsum("nlc,nsc->nls", feat_c0, feat_c1)
        row_mask, col_mask = (None if mask is None else mask.bool() for mask in (mask_c0, mask_c1))
        confidence = row_col_softmax(
            similarity.unsqueeze(1), row_mask=row_mask, col_mask=col_mask, temperature=self.temperature
        ).squeeze(1)
        data.update({"conf_matrix": confidence})
        data.update(**self.get_coarse_match(confidence, data))


def _coarse_reason(module: Any) -> str | None:
    if module.match_type != "dual_softmax":
        return f"matching by {module.match_type} is not computed"
    return None


HOSTS: dict[str, Host] = {
    "kornia.feature.loftr.utils.coarse_matching:CoarseMatching": Host(
        "row_col_softmax", CoarseMatching, _coarse_reason
    ),
}
