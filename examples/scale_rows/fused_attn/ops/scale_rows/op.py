"""The operators: schemas, allocation, kernels, autocast."""

from .._floor import dispatch, operators
from . import reference

scale_rows = operators.Operators(
    "scale_rows",
    "(Tensor x, Tensor scale) -> Tensor out",
    "(Tensor grad_out, Tensor x, Tensor scale) -> (Tensor grad_x, Tensor grad_scale)",
    allocate=lambda x, scale: (x.new_empty(x.shape),),
    kernels={
        "cpu": (operators.cpp("scale_rows_forward", dense=True), operators.cpp("scale_rows_backward", dense=True))
    },
    reference=reference.scale_rows,
    autocast=lambda *maps: dispatch.autocast_maps(maps),
)
