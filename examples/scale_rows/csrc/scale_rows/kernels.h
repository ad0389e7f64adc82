#pragma once

#include "common/kernels.h"

namespace fused_attn::scale_rows {

// Dense, of one element type: x, out and their gradients (rows, depth), scale and its gradient (rows,).
struct Problem {
  int64_t depth;
  TensorView grad_out, x, scale, out, grad_x, grad_scale;
};

using Kernels = KernelPair<Problem>;  // of rows
FUSED_ATTN_DECLARE_KERNELS()

}  // namespace fused_attn::scale_rows
