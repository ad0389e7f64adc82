// What the registrations of the CPU kernels share: LibTorch tensors to plain views, threads.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <optional>
#include <stdexcept>

#include "common/glibc_floor.h"
#include "common/kernels.h"
#include "common/tensor_view.h"

namespace fused_attn {

using torch::stable::Tensor;

inline DType dtype_of(const Tensor& tensor) {
  using torch::headeronly::ScalarType;
  switch (tensor.scalar_type()) {
    case ScalarType::Float: return DType::float32;
    case ScalarType::Half: return DType::float16;
    case ScalarType::BFloat16: return DType::bfloat16;
    default: throw std::runtime_error("the CPU kernels take float32, float16 and bfloat16");
  }
}

inline TensorView view_of(const Tensor& tensor) {
  TensorView view{tensor.data_ptr(), dtype_of(tensor), {}};
  for (int64_t i = 0; i < std::min(tensor.dim(), kMostStrides); ++i) view.stride[i] = tensor.stride(i);
  return view;
}

inline TensorView view_of(const std::optional<Tensor>& tensor) { return tensor ? view_of(*tensor) : TensorView{}; }

inline float* floats_of(const Tensor& tensor) { return static_cast<float*>(tensor.data_ptr()); }

// More than this does not stay in the caches until somebody reads it.
constexpr int64_t kLargeBytes = int64_t{8} << 20;

template <class Run>
void parallel(int64_t count, const Run& run, int64_t grain = 1) {
  if (count > 0) torch::stable::parallel_for(0, count, grain, run);
}

// A kernel over all its tasks.
template <class P>
void parallel(int64_t count, Kernel<P> kernel, const P& p, int64_t grain = 1) {
  parallel(count, [&](int64_t begin, int64_t end) { kernel(p, begin, end); }, grain);
}

}  // namespace fused_attn

// In the namespace of an op: registers its functions <name>_forward and <name>_backward as operators of fused_attn_cpu.
// Arguments as in a schema; nothing is returned.
#define FUSED_ATTN_REGISTER(name, forward_arguments, backward_arguments) \
  STABLE_TORCH_LIBRARY_FRAGMENT(fused_attn_cpu, m) {                     \
    m.def(#name "_forward" forward_arguments " -> ()");                  \
    m.def(#name "_backward" backward_arguments " -> ()");                \
  }                                                                      \
  STABLE_TORCH_LIBRARY_IMPL(fused_attn_cpu, CPU, m) {                    \
    m.impl(#name "_forward", TORCH_BOX(&name##_forward));                \
    m.impl(#name "_backward", TORCH_BOX(&name##_backward));              \
  }
