import torch

from fused_attn.testing.checks import BadInput

_SHAPE = BadInput("shape", lambda: {"x": torch.ones(2, 3), "scale": torch.ones(3)}, ValueError, r"scale .* got \(3,\)")
BAD_INPUTS = {"scale_rows": (_SHAPE,)}
