"""The operators: schemas, allocation, kernels, autocast."""

from .._floor import dispatch, operators
from . import reference

scale_rows = operators.Operators(
    "scale_rows",
    "(Tensor x, Tensor scale) -> Tensor out",
    "(Tensor grad_out, Tensor x, Tensor scale) -> (Tensor grad_x, Tensor grad_scale)",
    allocate=lambda x, scale: (x.new_empty(x.shape),),
    kernels={"cpu": tuple(operators.cpp(f"scale_rows_{way}", dense=True) for way in ("forward", "backward"))},
    reference=reference.scale_rows,
    autocast=lambda *maps: dispatch.autocast_maps(maps),
)
