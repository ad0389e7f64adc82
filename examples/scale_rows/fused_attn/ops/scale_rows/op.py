"""The operators: schemas, allocation, kernels."""

from .._floor.operators import Operators, cpp
from . import reference

operators = Operators(
    "scale_rows",
    "(Tensor x, Tensor scale) -> Tensor out",
    "(Tensor grad_out, Tensor x, Tensor scale) -> (Tensor grad_x, Tensor grad_scale)",
    allocate=lambda x, scale: (x.new_empty(x.shape),),
    kernels={"cpu": (cpp("scale_rows_forward", dense=True), cpp("scale_rows_backward", dense=True))},
    reference=reference.scale_rows,
)
