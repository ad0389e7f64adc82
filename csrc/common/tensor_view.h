// A strided tensor as the kernels see it: address, element type and strides, free of any LibTorch type.
#pragma once

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <cstdint>

namespace fused_attn {

enum class DType : int { float32, float16, bfloat16 };

struct TensorView {
  void* data = nullptr;
  DType dtype = DType::float32;
  int64_t stride[5] = {0, 0, 0, 0, 0};  // in elements

  explicit operator bool() const { return data != nullptr; }
};

template <class T>
inline void gather_as(const T* from, int64_t stride, int64_t count, float factor, float* to, int64_t to_stride) {
  for (int64_t i = 0; i < count; ++i) to[i * to_stride] = factor * static_cast<float>(from[i * stride]);
}

// to[i * to_stride] = factor * view[offset + i * stride], i < count, in float32.
inline void gather(const TensorView& view, int64_t offset, int64_t stride, int64_t count, float factor, float* to,
                   int64_t to_stride = 1) {
  switch (view.dtype) {
    case DType::float32:
      return gather_as(static_cast<const float*>(view.data) + offset, stride, count, factor, to, to_stride);
    case DType::float16:
      return gather_as(static_cast<const c10::Half*>(view.data) + offset, stride, count, factor, to, to_stride);
    case DType::bfloat16:
      return gather_as(static_cast<const c10::BFloat16*>(view.data) + offset, stride, count, factor, to, to_stride);
  }
}

template <class T>
inline void scatter_as(T* to, int64_t stride, int64_t count, float factor, const float* from, int64_t from_stride) {
  for (int64_t i = 0; i < count; ++i) to[i * stride] = static_cast<T>(factor * from[i * from_stride]);
}

// view[offset + i * stride] = factor * from[i * from_stride], i < count, rounded to the view's element type.
inline void scatter(const TensorView& view, int64_t offset, int64_t stride, int64_t count, float factor,
                    const float* from, int64_t from_stride = 1) {
  switch (view.dtype) {
    case DType::float32:
      return scatter_as(static_cast<float*>(view.data) + offset, stride, count, factor, from, from_stride);
    case DType::float16:
      return scatter_as(static_cast<c10::Half*>(view.data) + offset, stride, count, factor, from, from_stride);
    case DType::bfloat16:
      return scatter_as(static_cast<c10::BFloat16*>(view.data) + offset, stride, count, factor, from, from_stride);
  }
}

}  // namespace fused_attn
