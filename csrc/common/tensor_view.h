// A strided tensor as the kernels see it: address, element type and strides, free of any LibTorch type.
#pragma once

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <cstdint>

namespace fused_attn {

enum class DType : int { float32, float16, bfloat16 };

// In a namespace of its own: kernels, which have theirs, must not find this one by their argument.
namespace portable {
#include "common/with_element.h"
}

constexpr int64_t kMostStrides = 5;

// Of a tensor of more dimensions, which is dense, the data alone count.
struct TensorView {
  void* data = nullptr;
  DType dtype = DType::float32;
  int64_t stride[kMostStrides] = {};  // in elements

  explicit operator bool() const { return data != nullptr; }
};

// to[i * to_stride] = factor * view[offset + i * stride], i < count, in float32.
inline void gather(const TensorView& view, int64_t offset, int64_t stride, int64_t count, float factor, float* to,
                   int64_t to_stride = 1) {
  portable::with_element(view.dtype, [&](auto element) {
    const auto* from = static_cast<const decltype(element)*>(view.data) + offset;
    for (int64_t i = 0; i < count; ++i) to[i * to_stride] = factor * static_cast<float>(from[i * stride]);
  });
}

// view[offset + i * stride] = factor * from[i * from_stride], i < count, rounded to the view's element type.
inline void scatter(const TensorView& view, int64_t offset, int64_t stride, int64_t count, float factor,
                    const float* from, int64_t from_stride = 1) {
  portable::with_element(view.dtype, [&](auto element) {
    auto* to = static_cast<decltype(element)*>(view.data) + offset;
    for (int64_t i = 0; i < count; ++i) to[i * stride] = static_cast<decltype(element)>(factor * from[i * from_stride]);
  });
}

}  // namespace fused_attn
