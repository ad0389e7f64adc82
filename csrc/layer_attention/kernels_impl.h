// The CPU kernels of the weighted sum over layers; see the op's README.md for the method.
//
// Included once per instruction set, see common/for_each_instruction_set.h.  Every value is read once and every result
// written once: what a block of elements needs from all layers is gathered in the first-level cache.  Layer after
// layer, so that few streams are open at a time: maps of one size start at the same offset of their pages, and more of
// them than the cache has ways would evict each other.

namespace fused_attn::layer_attention::FUSED_ATTN_ISA {
namespace {

#include "common/simd.h"

constexpr int CHUNK = 32;             // vectors whose products are summed before they join the block's
constexpr int MOST = 8;               // layers that are summed at once
constexpr int POSITIONS = 4;          // taken together where each channel has weights of its own
constexpr int64_t kBlock = 4096;      // elements that stay in the first-level cache while the layers pass by
constexpr int64_t kTogether = 65536;  // the same of the second-level cache, in the backward pass

// How results are written; where they are streamed, can_stream said that they can be.
enum class Write { plain, add, stream };

template <Write how, class AnyLanes, class T>
FA_INLINE void write(AnyLanes lanes, T* to, vf x) {
  if constexpr (how == Write::add) x += lanes.load(to);
  lanes.store(to, x, how == Write::stream);
}
template <Write how, class T>
FA_INLINE void write(T* to, vf x) {
  write<how>(Lanes<true>{0, L}, to, x);
}

// --- one weight for a whole run of elements (channels first) ------------------------------------------------------

// What N layers from l on add to the sum of those before, of whole vectors: to `acc`, or rounded to `out`.
template <int N, bool Last, Write how, class T>
FA_INLINE void add_layers(const Forward& p, const float* weights, int64_t l, int64_t b, int64_t offset, int64_t vectors,
                          float* acc, T* out) {
  const T* value[N];
  vf weight[N];
#pragma GCC unroll 8
  for (int n = 0; n < N; ++n) {
    value[n] = at<T>(p.values[l + n], b * p.value_strides[l + n] + offset);
    weight[n] = broadcast(weights[l + n]);
  }
  for (int64_t i = 0; i < vectors * L; i += L) {
    vf sum = l == 0 ? vf{} : load(acc + i);
#pragma GCC unroll 8
    for (int n = 0; n < N; ++n) sum += weight[n] * load_as_float(value[n] + i);
    if constexpr (Last)
      write<how>(out + i, sum);
    else
      store(acc + i, sum);
  }
}

template <Write how, class T>
FA_INLINE void sum_block(const Forward& p, const float* weights, int64_t b, int64_t offset, int64_t vectors, float* acc,
                         T* out) {
  int64_t l = 0;
  for (; l + MOST < p.layers; l += 4) add_layers<4, false, how>(p, weights, l, b, offset, vectors, acc, out);
  switch (p.layers - l) {
    case 8: return add_layers<8, true, how>(p, weights, l, b, offset, vectors, acc, out);
    case 7: return add_layers<7, true, how>(p, weights, l, b, offset, vectors, acc, out);
    case 6: return add_layers<6, true, how>(p, weights, l, b, offset, vectors, acc, out);
    case 5: return add_layers<5, true, how>(p, weights, l, b, offset, vectors, acc, out);
    case 4: return add_layers<4, true, how>(p, weights, l, b, offset, vectors, acc, out);
    case 3: return add_layers<3, true, how>(p, weights, l, b, offset, vectors, acc, out);
    case 2: return add_layers<2, true, how>(p, weights, l, b, offset, vectors, acc, out);
    case 1: return add_layers<1, true, how>(p, weights, l, b, offset, vectors, acc, out);
  }
}

template <class T>
FA_INLINE void sum_run(const Forward& p, const float* weights, int64_t b, int64_t offset, int64_t count, float* acc) {
  T* out = at<T>(p.out, b * p.out_stride + offset);
  const int64_t whole = count / L * L;
  for (int64_t i = 0; i < whole; i += kBlock) {
    const int64_t vectors = smaller(kBlock, whole - i) / L;
    if (p.large && can_stream(out + i))
      sum_block<Write::stream>(p, weights, b, offset + i, vectors, acc, out + i);
    else
      sum_block<Write::plain>(p, weights, b, offset + i, vectors, acc, out + i);
  }
  if (whole == count) return;
  const Lanes<false> rest{whole, count - whole};
  vf sum{};
  for (int64_t l = 0; l < p.layers; ++l)
    sum += weights[l] * rest.load(at<T>(p.values[l], b * p.value_strides[l] + offset));
  rest.store(out, sum);
}

template <class T>
void forward_runs(const Forward& p, int64_t begin, int64_t end) {
  const int64_t parts = parts_of_row(p), row = p.row();
  Scratch<float> acc(p.layers > MOST ? kBlock : 0);
  for (int64_t task = begin; task < end; ++task) {
    const int64_t part = task % parts, bg = task / parts, b = bg / p.groups, g = bg % p.groups;
    const int64_t first = part * kPart, offset = g * row + first, count = smaller(kPart, row - first);
    const float* weights = p.weights + bg * p.layers;
    sum_run<T>(p, weights, b, offset, count, acc.data);
  }
  end_of_streams();
}

// sum += grad_out . value, and grad_value = weight * grad_out (or added to it), for N vectors.
template <int N, bool Values, bool Dots, Write how, class T>
FA_INLINE void backward_chunk(const T* grad_out, const T* value, T* grad_value, vf weight, vf& sum) {
  vf dot{};
#pragma GCC unroll 8
  for (int n = 0; n < N; ++n) {
    const vf grad = load_as_float(grad_out + n * L);
    if constexpr (Dots) dot += grad * load_as_float(value + n * L);
    if constexpr (Values) write<how>(grad_value + n * L, weight * grad);
  }
  if constexpr (Dots) sum += dot;
}

// One layer's share of one task.
template <bool Values, bool Dots, Write how, class T>
FA_INLINE void backward_run(const T* grad, const T* value, T* to, float weight, int64_t count, float* partial) {
  const vf weights = broadcast(weight);
  vf sum{};
  int64_t i = 0;
  for (int64_t stop = 0; i + L <= count;) {  // sums of chunks, of blocks, of the run: none is long
    stop = smaller(stop + kBlock, count);
    vf block{};
    for (; i + CHUNK * L <= stop; i += CHUNK * L)
      backward_chunk<CHUNK, Values, Dots, how>(grad + i, value + i, to + i, weights, block);
    for (; i + L <= stop; i += L) backward_chunk<1, Values, Dots, how>(grad + i, value + i, to + i, weights, block);
    sum += block;
  }
  float rest = 0.0f;
  for (; i < count; ++i) {
    const float g = static_cast<float>(grad[i]);
    if constexpr (Dots) rest += g * static_cast<float>(value[i]);
    if constexpr (Values)
      to[i] = static_cast<T>(how == Write::add ? weight * g + static_cast<float>(to[i]) : weight * g);
  }
  if constexpr (Dots) *partial = sum_lanes(sum) + rest;
}

// Layer after layer over the tasks [begin, end) of image b, which lie one after the other in memory.
template <bool Values, bool Dots, Write how, class T>
FA_INLINE void backward_tasks(const Backward& p, int64_t b, int64_t begin, int64_t end) {
  const int64_t parts = parts_of_row(p), row = p.row();
  for (int64_t l = 0; l < p.layers; ++l)
    for (int64_t task = begin; task < end; ++task) {
      const int64_t part = task % parts, bg = task / parts;
      const int64_t first = part * kPart, offset = bg % p.groups * row + first;
      const T* value = nullptr;
      T* to = nullptr;
      if constexpr (Dots) value = at<T>(p.values[l], b * p.value_strides[l] + offset);
      if constexpr (Values) to = at<T>(p.grad_values[l], b * p.grad_value_strides[l] + offset);
      backward_run<Values, Dots, how>(at<T>(p.grad_out, b * p.grad_out_stride + offset), value, to,
                                      p.weights[bg * p.layers + l], smaller(kPart, row - first),
                                      p.partials + task * p.layers + l);
    }
}

template <bool Values, bool Dots, class T>
void backward_runs(const Backward& p, int64_t begin, int64_t end) {
  const int64_t tasks = p.groups * parts_of_row(p), together = kTogether / smaller(p.row() > 0 ? p.row() : 1, kPart);
  for (int64_t task = begin, stop; task < end; task = stop) {
    const int64_t b = task / tasks;
    stop = smaller(smaller(task + (together > 0 ? together : 1), end), (b + 1) * tasks);
    bool streams = p.large && !p.accumulate && p.row() % L == 0;
    if constexpr (Values)
      for (int64_t l = 0; l < p.layers; ++l)
        streams &= can_stream(at<T>(p.grad_values[l], b * p.grad_value_strides[l]));
    if (p.accumulate)
      backward_tasks<Values, Dots, Write::add, T>(p, b, task, stop);
    else if (streams)
      backward_tasks<Values, Dots, Write::stream, T>(p, b, task, stop);
    else
      backward_tasks<Values, Dots, Write::plain, T>(p, b, task, stop);
  }
  end_of_streams();
}

// --- a weight per channel (channels last) -------------------------------------------------------------------------

// Channels whose weights and sums, of all layers, are held at a time: all if they fit the second-level cache, so that a
// position is read from end to end.
FA_INLINE int64_t channels_at_a_time(const Problem& p) {
  constexpr int64_t kRoom = 32768, kStep = 256;
  return smaller(p.channels, p.layers > kRoom / kStep ? kStep : kRoom / p.layers / kStep * kStep);
}

// The weights of `count` channels from `first` on, layer by layer, `block` apart.
FA_INLINE void spread_weights(const Problem& p, int64_t b, int64_t first, int64_t count, int64_t block, float* to) {
  const int64_t per_group = p.channels / p.groups;
  for (int64_t c = 0, g = first / per_group; c < count; ++g) {
    const int64_t stop = smaller(count, (g + 1) * per_group - first);
    for (int64_t l = 0; l < p.layers; ++l) {
      const float weight = p.weights[(b * p.groups + g) * p.layers + l];
      for (int64_t i = c; i < stop; ++i) to[l * block + i] = weight;
    }
    c = stop;
  }
}

// partial[g, l] += the sums of the group's channels, from `first` on.
FA_INLINE void gather_sums(const Problem& p, int64_t first, int64_t count, int64_t block, const float* sums,
                           float* partial) {
  const int64_t per_group = p.channels / p.groups;
  for (int64_t c = 0, g = first / per_group; c < count; ++g) {
    const int64_t stop = smaller(count, (g + 1) * per_group - first);
    for (int64_t l = 0; l < p.layers; ++l) {
      const float* from = sums + l * block;
      vf lanes{};
      int64_t i = c;
      for (; i + L <= stop; i += L) lanes += load(from + i);
      float sum = sum_lanes(lanes);
      for (; i < stop; ++i) sum += from[i];
      partial[g * p.layers + l] += sum;
    }
    c = stop;
  }
}

// The sums of P positions from `offset` on, of `count` channels.
template <int P, Write how, class T>
FA_INLINE void forward_positions(const Forward& p, int64_t b, int64_t offset, int64_t count, const float* weights,
                                 int64_t block) {
  const int64_t apart = p.channels;
  T* out = at<T>(p.out, b * p.out_stride + offset);
  each(count, [&](auto lanes) FA_INLINE_CALL {
    vf acc[P]{};
    for (int64_t l = 0; l < p.layers; ++l) {
      const vf weight = lanes.load(weights + l * block);
      const T* value = at<T>(p.values[l], b * p.value_strides[l] + offset);
#pragma GCC unroll 4
      for (int n = 0; n < P; ++n) acc[n] += weight * lanes.load(value + n * apart);
    }
#pragma GCC unroll 4
    for (int n = 0; n < P; ++n) write<how>(lanes, out + n * apart, acc[n]);
  });
}

template <Write how, class T>
void forward_rows_as(const Forward& p, int64_t begin, int64_t end) {
  const int64_t parts = parts_of_image(p), per_part = positions_per_part(p);
  const int64_t block = channels_at_a_time(p);
  Scratch<float> weights(p.layers * block);
  for (int64_t task = begin; task < end; ++task) {
    const int64_t b = task / parts, from = task % parts * per_part, to = smaller(from + per_part, p.positions);
    for (int64_t c0 = 0; c0 < p.channels; c0 += block) {
      const int64_t count = smaller(block, p.channels - c0);
      spread_weights(p, b, c0, count, block, weights.data);
      int64_t position = from;
      for (; position + POSITIONS <= to; position += POSITIONS)
        forward_positions<POSITIONS, how, T>(p, b, position * p.channels + c0, count, weights.data, block);
      for (; position < to; ++position)
        forward_positions<1, how, T>(p, b, position * p.channels + c0, count, weights.data, block);
    }
  }
  end_of_streams();
}

template <class T>
void forward_rows(const Forward& p, int64_t begin, int64_t end) {
  if (p.large && p.channels % L == 0 && p.out_stride % L == 0 && can_stream(at<T>(p.out, 0)))
    forward_rows_as<Write::stream, T>(p, begin, end);
  else
    forward_rows_as<Write::plain, T>(p, begin, end);
}

// P positions from `offset` on, of `count` channels of one layer: sum += grad_out * value, and grad_value = weight *
// grad_out (or added to it).  Weights and sums do not fit the first-level cache: each is loaded once for P positions.
template <int P, bool Values, bool Dots, Write how, class T>
FA_INLINE void backward_positions(const Backward& p, int64_t l, int64_t b, int64_t offset, int64_t count,
                                  const float* weight, float* sum) {
  const int64_t apart = p.channels;
  const T *grad_out = at<T>(p.grad_out, b * p.grad_out_stride + offset), *value = nullptr;
  T* grad_value = nullptr;
  if constexpr (Dots) value = at<T>(p.values[l], b * p.value_strides[l] + offset);
  if constexpr (Values) grad_value = at<T>(p.grad_values[l], b * p.grad_value_strides[l] + offset);
  int64_t c = 0;
  for (; c + L <= count; c += L) {
    const vf w = load(weight + c);
    vf dot{};
    if constexpr (Dots) dot = load(sum + c);
#pragma GCC unroll 4
    for (int n = 0; n < P; ++n) {
      const vf grad = load_as_float(grad_out + n * apart + c);
      if constexpr (Dots) dot += grad * load_as_float(value + n * apart + c);
      if constexpr (Values) write<how>(grad_value + n * apart + c, w * grad);
    }
    if constexpr (Dots) store(sum + c, dot);
  }
  for (; c < count; ++c)
    for (int n = 0; n < P; ++n) {
      const float grad = static_cast<float>(grad_out[n * apart + c]);
      if constexpr (Dots) sum[c] += grad * static_cast<float>(value[n * apart + c]);
      if constexpr (Values) {
        T& to = grad_value[n * apart + c];
        to = static_cast<T>(weight[c] * grad + (how == Write::add ? static_cast<float>(to) : 0.0f));
      }
    }
}

template <bool Values, bool Dots, Write how, class T>
void backward_rows_as(const Backward& p, int64_t begin, int64_t end) {
  const int64_t parts = parts_of_image(p), per_part = positions_per_part(p);
  const int64_t block = channels_at_a_time(p);
  Scratch<float> weights(p.layers * block), sums(p.layers * block);
  for (int64_t task = begin; task < end; ++task) {
    const int64_t b = task / parts, from = task % parts * per_part, to = smaller(from + per_part, p.positions);
    float* partial = p.partials + task * p.groups * p.layers;
    if constexpr (Dots)
      for (int64_t i = 0; i < p.groups * p.layers; ++i) partial[i] = 0.0f;
    for (int64_t c0 = 0; c0 < p.channels; c0 += block) {
      const int64_t count = smaller(block, p.channels - c0);
      spread_weights(p, b, c0, count, block, weights.data);
      if constexpr (Dots)
        for (int64_t i = 0; i < p.layers * block; ++i) sums.data[i] = 0.0f;
      for (int64_t position = from; position < to;) {
        const int64_t offset = position * p.channels + c0;
        const bool several = position + POSITIONS <= to;
        for (int64_t l = 0; l < p.layers; ++l) {
          const float* weight = weights.data + l * block;
          float* sum = sums.data + l * block;
          if (several)
            backward_positions<POSITIONS, Values, Dots, how, T>(p, l, b, offset, count, weight, sum);
          else
            backward_positions<1, Values, Dots, how, T>(p, l, b, offset, count, weight, sum);
        }
        position += several ? POSITIONS : 1;
      }
      if constexpr (Dots) gather_sums(p, c0, count, block, sums.data, partial);
    }
  }
}

template <bool Values, bool Dots, class T>
void backward_rows(const Backward& p, int64_t begin, int64_t end) {
  bool streams = p.large && p.channels % L == 0;
  if constexpr (Values)
    for (int64_t l = 0; l < p.layers; ++l)
      streams &= can_stream(at<T>(p.grad_values[l], 0)) && p.grad_value_strides[l] % L == 0;
  if (p.accumulate)
    backward_rows_as<Values, Dots, Write::add, T>(p, begin, end);
  else if (streams)
    backward_rows_as<Values, Dots, Write::stream, T>(p, begin, end);
  else
    backward_rows_as<Values, Dots, Write::plain, T>(p, begin, end);
  end_of_streams();
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
  with_element(p.dtype, [&](auto element) { forward_of<decltype(element)>(p, begin, end); });
}

void backward(const Backward& p, int64_t begin, int64_t end) {
  with_element(p.dtype, [&](auto element) { backward_of<decltype(element)>(p, begin, end); });
}

}  // namespace

extern const Kernels kernels = {.forward = forward, .backward = backward};

}  // namespace fused_attn::layer_attention::FUSED_ATTN_ISA
