// The CPU kernels of the weighted sum over layers; see the op's README.md for the method.
//
// Included by kernel_<isa>.cpp only, once each.  Every value is read once and every result written once: what an
// element needs from all layers is gathered in registers.

namespace fused_attn::layer_attention::FUSED_ATTN_ISA {
namespace {

#include "common/simd.h"
#include "common/simd_half.h"

constexpr int CHUNK = 8;  // vectors held in registers while the layers pass by

FA_INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

template <class T>
FA_INLINE const T* at(const void* base, int64_t offset) {
  return static_cast<const T*>(base) + offset;
}
template <class T>
FA_INLINE T* at(void* base, int64_t offset) {
  return static_cast<T*>(base) + offset;
}

template <class T>
struct Buffer {
  T* data;
  explicit Buffer(int64_t count)
      : data(static_cast<T*>(std::aligned_alloc(64, (count * sizeof(T) + 63) / 64 * 64 + 64))) {
    if (data == nullptr) throw std::bad_alloc();
  }
  Buffer(const Buffer&) = delete;
  ~Buffer() { std::free(data); }
};

// --- one weight for a whole run of elements (channels first) ------------------------------------------------------

// out[i] = sum over layers of weights[l] * values[l][i], for N vectors.
template <int N, class T>
FA_INLINE void sum_chunk(const Forward& p, const float* weights, int64_t b, int64_t offset, T* out) {
  vf acc[N] = {};
  for (int64_t l = 0; l < p.layers; ++l) {
    const T* value = at<T>(p.values[l], b * p.value_strides[l] + offset);
    const vf weight = broadcast(weights[l]);
#pragma GCC unroll 8
    for (int n = 0; n < N; ++n) acc[n] += weight * load_as_float(value + n * L);
  }
#pragma GCC unroll 8
  for (int n = 0; n < N; ++n) store_rounded(out + n * L, acc[n]);
}

template <class T>
FA_INLINE void sum_run(const Forward& p, const float* weights, int64_t b, int64_t offset, int64_t count) {
  T* out = at<T>(p.out, b * p.out_stride + offset);
  int64_t i = 0;
  for (; i + CHUNK * L <= count; i += CHUNK * L) sum_chunk<CHUNK>(p, weights, b, offset + i, out + i);
  for (; i + L <= count; i += L) sum_chunk<1>(p, weights, b, offset + i, out + i);
  for (; i < count; ++i) {
    float sum = 0.0f;
    for (int64_t l = 0; l < p.layers; ++l)
      sum += weights[l] * static_cast<float>(*at<T>(p.values[l], b * p.value_strides[l] + offset + i));
    out[i] = static_cast<T>(sum);
  }
}

template <class T>
void forward_runs(const Forward& p, int64_t begin, int64_t end) {
  const int64_t parts = parts_of_row(p), row = p.row();
  for (int64_t task = begin; task < end; ++task) {
    const int64_t part = task % parts, bg = task / parts, b = bg / p.groups, g = bg % p.groups;
    const int64_t first = part * kPart, offset = g * row + first, count = smaller(kPart, row - first);
    const float* weights = p.weights + bg * p.layers;
    sum_run<T>(p, weights, b, offset, count);
  }
}

// sums[l] += grad_out . values[l], and grad_values[l] = weights[l] * grad_out (or added to it), for N vectors.
template <int N, bool Values, bool Dots, class T>
FA_INLINE void backward_chunk(const Backward& p, const float* weights, int64_t b, int64_t offset, const T* grad_out,
                              vf* sums) {
  vf grad[N];
#pragma GCC unroll 8
  for (int n = 0; n < N; ++n) grad[n] = load_as_float(grad_out + n * L);
  for (int64_t l = 0; l < p.layers; ++l) {
    if constexpr (Dots) {
      const T* value = at<T>(p.values[l], b * p.value_strides[l] + offset);
      vf sum = grad[0] * load_as_float(value);
#pragma GCC unroll 8
      for (int n = 1; n < N; ++n) sum += grad[n] * load_as_float(value + n * L);
      sums[l] += sum;
    }
    if constexpr (Values) {
      T* to = at<T>(p.grad_values[l], b * p.grad_value_strides[l] + offset);
      const vf weight = broadcast(weights[l]);
      if (p.accumulate) {
#pragma GCC unroll 8
        for (int n = 0; n < N; ++n) store_rounded(to + n * L, weight * grad[n] + load_as_float(to + n * L));
      } else {
#pragma GCC unroll 8
        for (int n = 0; n < N; ++n) store_rounded(to + n * L, weight * grad[n]);
      }
    }
  }
}

template <bool Values, bool Dots, class T>
FA_INLINE void backward_run(const Backward& p, const float* weights, int64_t b, int64_t offset, int64_t count, vf* sums,
                            float* partial) {
  const T* grad_out = at<T>(p.grad_out, b * p.grad_out_stride + offset);
  if constexpr (Dots)
    for (int64_t l = 0; l < p.layers; ++l) sums[l] = vf{};
  int64_t i = 0;
  for (; i + CHUNK * L <= count; i += CHUNK * L)
    backward_chunk<CHUNK, Values, Dots>(p, weights, b, offset + i, grad_out + i, sums);
  for (; i + L <= count; i += L) backward_chunk<1, Values, Dots>(p, weights, b, offset + i, grad_out + i, sums);
  for (int64_t l = 0; l < p.layers; ++l) {
    float tail = 0.0f;
    for (int64_t j = i; j < count; ++j) {
      const float grad = static_cast<float>(grad_out[j]);
      if constexpr (Dots) tail += grad * static_cast<float>(*at<T>(p.values[l], b * p.value_strides[l] + offset + j));
      if constexpr (Values) {
        T* to = at<T>(p.grad_values[l], b * p.grad_value_strides[l] + offset + j);
        *to = static_cast<T>(p.accumulate ? weights[l] * grad + static_cast<float>(*to) : weights[l] * grad);
      }
    }
    if constexpr (Dots) partial[l] = sum_lanes(sums[l]) + tail;
  }
}

template <bool Values, bool Dots, class T>
void backward_runs(const Backward& p, int64_t begin, int64_t end) {
  const int64_t parts = parts_of_row(p), row = p.row();
  Buffer<vf> sums(p.layers);
  for (int64_t task = begin; task < end; ++task) {
    const int64_t part = task % parts, bg = task / parts, b = bg / p.groups, g = bg % p.groups;
    const int64_t first = part * kPart, offset = g * row + first, count = smaller(kPart, row - first);
    const float* weights = p.weights + bg * p.layers;
    float* partial = p.partials + task * p.layers;
    backward_run<Values, Dots, T>(p, weights, b, offset, count, sums.data, partial);
  }
}

// --- a weight per channel (channels last) -------------------------------------------------------------------------

constexpr int64_t BLOCK = 256;  // channels: weights and sums of a block of all layers stay in the first-level cache

// The weights of `count` channels from `first` on, layer by layer, BLOCK apart.
FA_INLINE void spread_weights(const Sum& p, int64_t b, int64_t first, int64_t count, float* to) {
  const int64_t per_group = p.channels / p.groups;
  for (int64_t c = 0; c < count; ++c)
    for (int64_t l = 0; l < p.layers; ++l)
      to[l * BLOCK + c] = p.weights[(b * p.groups + (first + c) / per_group) * p.layers + l];
}

template <class T>
void forward_rows(const Forward& p, int64_t begin, int64_t end) {
  const int64_t parts = parts_of_image(p), per_part = positions_per_part(p);
  Buffer<float> weights(p.layers * BLOCK);
  for (int64_t task = begin; task < end; ++task) {
    const int64_t b = task / parts, from = task % parts * per_part, to = smaller(from + per_part, p.positions);
    for (int64_t c0 = 0; c0 < p.channels; c0 += BLOCK) {
      const int64_t count = smaller(BLOCK, p.channels - c0);
      spread_weights(p, b, c0, count, weights.data);
      for (int64_t position = from; position < to; ++position) {
        const int64_t offset = position * p.channels + c0;
        T* out = at<T>(p.out, b * p.out_stride + offset);
        int64_t c = 0;
        for (; c + L <= count; c += L) {
          vf acc{};
          for (int64_t l = 0; l < p.layers; ++l)
            acc += load(weights.data + l * BLOCK + c) *
                   load_as_float(at<T>(p.values[l], b * p.value_strides[l] + offset + c));
          store_rounded(out + c, acc);
        }
        for (; c < count; ++c) {
          float sum = 0.0f;
          for (int64_t l = 0; l < p.layers; ++l)
            sum += weights.data[l * BLOCK + c] *
                   static_cast<float>(*at<T>(p.values[l], b * p.value_strides[l] + offset + c));
          out[c] = static_cast<T>(sum);
        }
      }
    }
  }
}

template <bool Values, bool Dots, class T>
void backward_rows(const Backward& p, int64_t begin, int64_t end) {
  const int64_t parts = parts_of_image(p), per_part = positions_per_part(p), per_group = p.channels / p.groups;
  Buffer<float> weights(p.layers * BLOCK), sums(p.layers * BLOCK);
  for (int64_t task = begin; task < end; ++task) {
    const int64_t b = task / parts, from = task % parts * per_part, to = smaller(from + per_part, p.positions);
    float* partial = p.partials + task * p.groups * p.layers;
    if constexpr (Dots)
      for (int64_t i = 0; i < p.groups * p.layers; ++i) partial[i] = 0.0f;
    for (int64_t c0 = 0; c0 < p.channels; c0 += BLOCK) {
      const int64_t count = smaller(BLOCK, p.channels - c0);
      spread_weights(p, b, c0, count, weights.data);
      if constexpr (Dots)
        for (int64_t i = 0; i < p.layers * BLOCK; ++i) sums.data[i] = 0.0f;
      for (int64_t position = from; position < to; ++position) {
        const int64_t offset = position * p.channels + c0;
        const T* grad_out = at<T>(p.grad_out, b * p.grad_out_stride + offset);
        for (int64_t l = 0; l < p.layers; ++l) {
          const T* value = at<T>(p.values[l], b * p.value_strides[l] + offset);
          const float* weight = weights.data + l * BLOCK;
          float* sum = sums.data + l * BLOCK;
          T* grad_value = nullptr;
          if constexpr (Values) {
            grad_value = at<T>(p.grad_values[l], b * p.grad_value_strides[l] + offset);
          }
          int64_t c = 0;
          for (; c + L <= count; c += L) {
            const vf grad = load_as_float(grad_out + c);
            if constexpr (Dots) store(sum + c, load(sum + c) + grad * load_as_float(value + c));
            if constexpr (Values) {
              vf result = load(weight + c) * grad;
              if (p.accumulate) result += load_as_float(grad_value + c);
              store_rounded(grad_value + c, result);
            }
          }
          for (; c < count; ++c) {
            const float grad = static_cast<float>(grad_out[c]);
            if constexpr (Dots) sum[c] += grad * static_cast<float>(value[c]);
            if constexpr (Values)
              grad_value[c] =
                  static_cast<T>(weight[c] * grad + (p.accumulate ? static_cast<float>(grad_value[c]) : 0.0f));
          }
        }
      }
      if constexpr (Dots)
        for (int64_t c = 0; c < count; ++c)
          for (int64_t l = 0; l < p.layers; ++l)
            partial[(c0 + c) / per_group * p.layers + l] += sums.data[l * BLOCK + c];
    }
  }
}

// --- choice of element type and memory order ----------------------------------------------------------------------

template <class T>
void forward_of(const Forward& p, int64_t begin, int64_t end) {
  p.channels_last ? forward_rows<T>(p, begin, end) : forward_runs<T>(p, begin, end);
}

template <class T>
void backward_of(const Backward& p, int64_t begin, int64_t end) {
  if (p.grad_values && p.partials)
    p.channels_last ? backward_rows<true, true, T>(p, begin, end) : backward_runs<true, true, T>(p, begin, end);
  else if (p.grad_values)
    p.channels_last ? backward_rows<true, false, T>(p, begin, end) : backward_runs<true, false, T>(p, begin, end);
  else
    p.channels_last ? backward_rows<false, true, T>(p, begin, end) : backward_runs<false, true, T>(p, begin, end);
}

void forward(const Forward& p, int64_t begin, int64_t end) {
  switch (p.dtype) {
    case DType::float32: return forward_of<float>(p, begin, end);
    case DType::float16: return forward_of<c10::Half>(p, begin, end);
    case DType::bfloat16: return forward_of<c10::BFloat16>(p, begin, end);
  }
}

void backward(const Backward& p, int64_t begin, int64_t end) {
  switch (p.dtype) {
    case DType::float32: return backward_of<float>(p, begin, end);
    case DType::float16: return backward_of<c10::Half>(p, begin, end);
    case DType::bfloat16: return backward_of<c10::BFloat16>(p, begin, end);
  }
}

}  // namespace

extern const Kernels kernels = {forward, backward};

}  // namespace fused_attn::layer_attention::FUSED_ATTN_ISA
