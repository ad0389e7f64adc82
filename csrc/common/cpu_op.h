// What the registrations of the CPU kernels share: LibTorch tensors to plain views, threads.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <stdexcept>

#include "common/glibc_floor.h"
#include "common/tensor_view.h"

namespace fused_attn {

inline DType dtype_of(const torch::stable::Tensor& tensor) {
  using torch::headeronly::ScalarType;
  switch (tensor.scalar_type()) {
    case ScalarType::Float: return DType::float32;
    case ScalarType::Half: return DType::float16;
    case ScalarType::BFloat16: return DType::bfloat16;
    default: throw std::runtime_error("the CPU kernels take float32, float16 and bfloat16");
  }
}

inline TensorView view_of(const torch::stable::Tensor& tensor) {
  TensorView view{tensor.data_ptr(), dtype_of(tensor), {}};
  for (int64_t i = 0; i < tensor.dim(); ++i) view.stride[i] = tensor.stride(i);
  return view;
}

inline TensorView view_of(const std::optional<torch::stable::Tensor>& tensor) {
  return tensor ? view_of(*tensor) : TensorView{};
}

inline float* floats_of(const torch::stable::Tensor& tensor) { return static_cast<float*>(tensor.data_ptr()); }

// More than this does not stay in the caches until somebody reads it.
constexpr int64_t kLargeBytes = int64_t{8} << 20;

template <class Run>
void parallel(int64_t count, const Run& run, int64_t grain = 1) {
  if (count > 0) torch::stable::parallel_for(0, count, grain, run);
}

// A kernel over all its tasks.
template <class P>
void parallel(int64_t count, void (*kernel)(const P&, int64_t, int64_t), const P& p, int64_t grain = 1) {
  parallel(count, [&](int64_t begin, int64_t end) { kernel(p, begin, end); }, grain);
}

}  // namespace fused_attn
