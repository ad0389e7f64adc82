// Registration of the CPU kernels: LibTorch tensors in, plain pointers to the kernels, rows split over threads.
#include "common/cpu_op.h"
#include "scale_rows/kernels.h"

namespace fused_attn::scale_rows {
namespace {

void scale_rows_forward(Tensor x, Tensor scale, Tensor out) {
  const Problem p{.depth = x.size(-1), .x = view_of(x), .scale = view_of(scale), .out = view_of(out)};
  parallel(scale.numel(), best_kernels().forward, p);
}

void scale_rows_backward(Tensor grad_out, Tensor x, Tensor scale, Tensor grad_x, Tensor grad_scale) {
  Problem p{.depth = x.size(-1), .grad_out = view_of(grad_out), .x = view_of(x), .scale = view_of(scale)};
  p.grad_x = view_of(grad_x), p.grad_scale = view_of(grad_scale);
  parallel(scale.numel(), best_kernels().backward, p);
}

}  // namespace

FUSED_ATTN_REGISTER(scale_rows, "(Tensor x, Tensor scale, Tensor(a!) out)",
                    "(Tensor grad_out, Tensor x, Tensor scale, Tensor(a!) grad_x, Tensor(b!) grad_scale)")

}  // namespace fused_attn::scale_rows
