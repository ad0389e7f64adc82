// The CPU kernels, included once per instruction set, with its own width of a vector `vf` of float32.
namespace fused_attn::scale_rows::FUSED_ATTN_ISA {
namespace {

#include "common/simd.h"

void forward(const Problem& p, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row)
    with_element(p.x.dtype, [&]<class T>(T) {
      const vf scale = broadcast(*at<T>(p.scale, row));
      const T* x = at<T>(p.x, row * p.depth);
      T* out = at<T>(p.out, row * p.depth);
      each(p.depth, [&](auto lanes) FA_INLINE_CALL { lanes.store(out, scale * lanes.load(x)); });
    });
}

void backward(const Problem& p, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row)
    with_element(p.x.dtype, [&]<class T>(T) {
      const vf scale = broadcast(*at<T>(p.scale, row));
      const T *grad_out = at<T>(p.grad_out, row * p.depth), *x = at<T>(p.x, row * p.depth);
      T* grad_x = at<T>(p.grad_x, row * p.depth);
      Sum grad_scale;
      each(p.depth, [&](auto lanes) FA_INLINE_CALL {
        const vf grad = lanes.load(grad_out);
        lanes.store(grad_x, scale * grad);
        grad_scale.add(Product{grad, lanes.load(x)});
      });
      *at<T>(p.grad_scale, row) = static_cast<T>(sum_lanes(grad_scale.total()));
    });
}

}  // namespace
extern const Kernels kernels = {.forward = forward, .backward = backward};
}  // namespace fused_attn::scale_rows::FUSED_ATTN_ISA
