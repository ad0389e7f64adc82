// The CPU kernels of squeeze-excite; see the op's README.md for the method.
//
// Included once per instruction set, see common/for_each_instruction_set.h.  A chunk of samples is squeezed, sent
// through the two small layers and scaled before the next one is touched, so that the second read of a map comes from
// the cache.

namespace fused_attn::squeeze_excite::FUSED_ATTN_ISA {
namespace {

#include "common/simd.h"

constexpr int kRows = 8;            // positions whose channels are added in registers (channels last)
constexpr int64_t kBlockRows = 32;  // such groups to a partial sum

// Sum of term(lanes) over `count` elements; lanes past the end must come as 0.
template <class Term>
FA_INLINE float sum_each(int64_t count, const Term& term) {
  constexpr int64_t Unroll = 4 * L, Block = kLongestChain * Unroll;
  vf total{};
  int64_t i = 0;
  while (i + L <= count) {
    vf sum[4] = {};
    const int64_t end = smaller(i + Block, count);
    for (; i + Unroll <= end; i += Unroll)
#pragma GCC unroll 4
      for (int n = 0; n < 4; ++n) sum[n] = plus(sum[n], term(Lanes<true>{i + n * L, L}));
    for (; i + L <= end; i += L) sum[0] = plus(sum[0], term(Lanes<true>{i, L}));
    total += (sum[0] + sum[1]) + (sum[2] + sum[3]);
  }
  if (i < count) total = plus(total, term(Lanes<false>{i, count - i}));
  return sum_lanes(total);
}

// Contiguous channels of fewer positions are taken as many at a time as there are lanes: by themselves they would be
// ends of vectors to a large part.
constexpr int64_t kShortRow = 64;

// --- maps of a sample -----------------------------------------------------------------------------------------------

// Those a task takes.  `begin` is a multiple of kRowGroup: no channel's lane depends on where the range ends.
struct Channels {
  int64_t begin, count;
};

// sums[c] = factor * sum over the positions of one sample of term(offset of the row, lanes), c in `channels`.  A row is
// a channel's positions or, channels last, a position's channels.  `partial` holds as many floats as channels, padded.
template <class Term>
FA_INLINE void sum_map(const Problem& p, Channels channels, float factor, float* sums, float* partial,
                       const Term& term) {
  sums += channels.begin;
  if (!p.channels_last && p.positions < kShortRow) {
    alignas(64) float terms[L * kShortRow];
    each(channels.count, [&](auto group) FA_INLINE_CALL {
      const int64_t first = (channels.begin + group.begin) * p.positions;
      each(group.count * p.positions,
           [&](auto lanes) FA_INLINE_CALL { lanes.store(terms, value_of(term(first, lanes))); });
      vf sum[L];
      for (int64_t c = 0; c < L; ++c) {
        sum[c] = vf{};
        if (c < group.count)
          each(p.positions, [&](auto lanes) FA_INLINE_CALL { sum[c] += lanes.load(terms + c * p.positions); });
      }
      group.store(sums, factor * sum_lanes_of_each(sum));
    });
    return;
  }
  if (!p.channels_last) {
    for (int64_t c = 0; c < channels.count; ++c)
      sums[c] = factor * sum_each(p.positions, [&](auto lanes) FA_INLINE_CALL {
                  return term((channels.begin + c) * p.positions, lanes);
                });
    return;
  }
  auto add_rows = [&]<int N>(int64_t row, bool first) FA_INLINE_CALL {
    each(channels.count, [&](auto lanes) FA_INLINE_CALL {
      decltype(term(row, lanes)) part[N];
#pragma GCC unroll 8
      for (int n = 0; n < N; ++n) part[n] = term((row + n) * p.channels + channels.begin, lanes);
      float* to = partial + lanes.begin;
      if constexpr (N == 1) return store(to, first ? value_of(part[0]) : plus(load(to), part[0]));
      vf sum[N];
#pragma GCC unroll 8
      for (int n = 0; n < N / 2; ++n) sum[n] = plus(value_of(part[n + N / 2]), part[n]);
#pragma GCC unroll 8
      for (int step = N / 4; step > 0; step /= 2)
#pragma GCC unroll 8
        for (int n = 0; n < step; ++n) sum[n] += sum[n + step];
      store(to, first ? sum[0] : load(to) + sum[0]);
    });
  };
  for (int64_t block = 0; block < p.positions; block += kBlockRows * kRows) {
    const int64_t end = smaller(block + kBlockRows * kRows, p.positions);
    int64_t row = block;
    for (; row + kRows <= end; row += kRows) add_rows.template operator()<kRows>(row, row == block);
    for (; row < end; ++row) add_rows.template operator()<1>(row, row == block);
    each(channels.count, [&](auto lanes) FA_INLINE_CALL {
      const vf sum = load(partial + lanes.begin);
      lanes.store(sums, block == 0 ? sum : lanes.load(sums) + sum);
    });
  }
  each(channels.count, [&](auto lanes) FA_INLINE_CALL { lanes.store(sums, factor * lanes.load(sums)); });
}

// to = value(offset of the row, lanes, a of the lanes, b of the lanes) over one sample; a and b hold one float per
// channel. A large result is streamed.
template <class T, class Value>
FA_INLINE void write_map(const Problem& p, Channels channels, T* to, const float* a, const float* b,
                         const Value& value) {
  a += channels.begin, b += channels.begin;
  auto rows = [&]<bool Streamed>() FA_INLINE_CALL {
    auto row = [&](int64_t offset, int64_t count, const auto& write) FA_INLINE_CALL {
      if constexpr (Streamed)
        each_aligned(to + offset, count,
                     [&](auto lanes) FA_INLINE_CALL { lanes.store(to + offset, write(lanes), true); });
      else
        each(count, [&](auto lanes) FA_INLINE_CALL { lanes.store(to + offset, write(lanes)); });
    };
    if (!p.channels_last && p.positions < kShortRow) {
      alignas(64) float a_of[(L + 1) * kShortRow], b_of[(L + 1) * kShortRow];  // of each position
      each(channels.count, [&](auto group) FA_INLINE_CALL {
        for (int64_t c = 0; c < group.count; ++c)
          for (int64_t i = 0; i < p.positions; i += L) {  // what lies over the end belongs to the next channel
            store(a_of + c * p.positions + i, broadcast(a[group.begin + c]));
            if (a != b) store(b_of + c * p.positions + i, broadcast(b[group.begin + c]));
          }
        const int64_t first = (channels.begin + group.begin) * p.positions;
        row(first, group.count * p.positions, [&, b_from = a == b ? a_of : b_of](auto lanes) FA_INLINE_CALL {
          return value(first, lanes, lanes.load(a_of), lanes.load(b_from));
        });
      });
    } else if (!p.channels_last) {
      for (int64_t c = 0; c < channels.count; ++c) {
        const int64_t offset = (channels.begin + c) * p.positions;
        row(offset, p.positions, [&, of_a = broadcast(a[c]), of_b = broadcast(b[c])](auto lanes) FA_INLINE_CALL {
          return value(offset, lanes, of_a, of_b);
        });
      }
    } else {
      for (int64_t y = 0; y < p.positions; ++y) {
        const int64_t offset = y * p.channels + channels.begin;
        row(offset, channels.count,
            [&](auto lanes) FA_INLINE_CALL { return value(offset, lanes, lanes.load(a), lanes.load(b)); });
      }
    }
  };
  if constexpr (std::is_same_v<T, float>)
    if (p.large) return rows.template operator()<true>();
  rows.template operator()<false>();
}

// --- the small layers -----------------------------------------------------------------------------------------------

// to[k * PANEL + lane] = view[offset + lane * column_stride + k * depth_stride], lane < lanes, k < depth.
void pack_lanes(const TensorView& view, int64_t offset, int64_t column_stride, int64_t depth_stride, int64_t lanes,
                int64_t depth, float* to) {
  with_element(view.dtype, [&](auto element) {
    const auto* from = at<decltype(element)>(view, offset);
    if (column_stride == 1) {
      for (int64_t k = 0; k < depth; ++k)
        each(lanes, [&](auto row) FA_INLINE_CALL { row.store(to + k * PANEL, row.load(from + k * depth_stride)); });
    } else if (depth_stride == 1) {
      each(lanes, [&](auto columns) FA_INLINE_CALL {
        each(depth, [&](auto rows) FA_INLINE_CALL {
          vf x[L];
          for (int64_t i = 0; i < L; ++i)
            x[i] = i < columns.count ? rows.load(from + (columns.begin + i) * column_stride) : vf{};
          transpose(x);
          for (int64_t k = 0; k < rows.count; ++k) columns.store(to + (rows.begin + k) * PANEL, x[k]);
        });
      });
    } else {
      for (int64_t lane = 0; lane < lanes; ++lane)
        for (int64_t k = 0; k < depth; ++k)
          to[k * PANEL + lane] = static_cast<float>(from[lane * column_stride + k * depth_stride]);
    }
  });
}

void pack(const Pack& p, int64_t begin, int64_t end) {
  for (int64_t panel = begin; panel < end; ++panel) {
    const int64_t first = panel * PANEL, count = smaller(PANEL, p.columns - first);
    const int64_t split = smaller(larger(p.split - first, 0), count);  // lanes before it come from `from`
    float* to = p.to + first * p.depth;
    if (split > 0) pack_lanes(p.from, first * p.column_stride, p.column_stride, p.depth_stride, split, p.depth, to);
    if (split < count)
      pack_lanes(p.tail, (first + split - p.split) * p.tail_column_stride, p.tail_column_stride, p.tail_depth_stride,
                 count - split, p.depth, to + split);
    for (int64_t k = 0; k < p.depth; ++k)
      for (int64_t lane = count; lane < PANEL; ++lane) to[k * PANEL + lane] = 0.0f;
  }
}

// finish(row, first column, product) with product = a (rows x depth) times panels (depth x columns).
template <class Finish>
FA_INLINE void multiply(int64_t rows, const float* a, int64_t a_row, int64_t a_depth, int64_t depth,
                        const float* panels, int64_t columns, const Finish& finish) {
  for (int64_t v = 0; v < vectors_of(columns); v += NR)
    outer_product(rows, static_cast<int>(smaller(NR, vectors_of(columns) - v)), a, a_row, a_depth, depth,
                  panels + v * L * depth, PANEL,
                  [&](int64_t m, int n, vf x) FA_INLINE_CALL { finish(m, (v + n) * L, x); });
}

FA_INLINE vf sigmoid(vf x) {
  const vf small = exp_nonpositive(select(x < 0.0f, x, -x));  // e^-|x|
  return select(x < 0.0f, small, broadcast(1.0f)) / (small + 1.0f);
}

// Zero where x <= 0, as in torch.relu: NaN stays.
FA_INLINE vf relu(vf x) { return select(x <= 0.0f, vf{}, x); }

// A hidden unit and the gradient of its argument.
struct Unit {
  vf value, grad;
};

FA_INLINE Unit silu(vf x, vf grad) {
  const vf s = sigmoid(x);
  return {x * s, grad * (s * (1.0f + x * (1.0f - s)))};
}

// x Phi(x), with Phi of the normal distribution.  Phi(-|x|) = e^(-x^2 / 2) P(t), t = 1 / (1 + 0.35 |x|): P fits to a
// relative error of 3.2e-8.  At infinity, NaN, as from PyTorch on the CPU.
FA_INLINE Unit gelu(vf x, vf grad) {
  const vf t = 1.0f / (1.0f + 0.35f * select(x < 0.0f, -x, x)), e = exp_nonpositive(-0.5f * x * x);
  vf p = broadcast(-0.02914594f);
  p = p * t + 0.14397174f;
  p = p * t - 0.25571436f;
  p = p * t + 0.15917426f;
  p = p * t - 0.023109904f;
  p = p * t + 0.10550803f;
  p = p * t + 0.11983286f;
  p = p * t + 0.13986187f;
  p = p * t + 0.1396214f;
  const vf tail = e * (p * t), cdf = select(x < 0.0f, tail, 1.0f - tail);
  return {select(x < 0.0f, x * tail, x - x * tail), grad * (cdf + x * (0.3989422804f * e))};
}

// Between 0 and 6; NaN stays.
FA_INLINE vf relu6(vf x) { return select(x < 0.0f, vf{}, select(x > 6.0f, broadcast(6.0f), x)); }

FA_INLINE Unit hardswish(vf x, vf grad) {
  const vf inside = select(x < 3.0f, grad * (x / 3.0f + 0.5f), grad);
  return {x * relu6(x + 3.0f) / 6.0f, select(x <= -3.0f, vf{}, inside)};
}

// Below 1 wherever x < 3, though x + 3 may round to 6: the scale alone then says where the gate has a slope.
FA_INLINE vf hardsigmoid(vf x) {
  const vf y = relu6(x + 3.0f) / 6.0f;
  return select((x < 3.0f) & (y >= 1.0f), broadcast(0x1.fffffep-1f), y);
}

// Rows of the small layers, in functions that are compiled once for all element types, with a loop for each function:
// GCC leaves such a choice inside a common one.

template <class Run>
FA_INLINE void with_activation(Activation activation, const Run& run) {
  switch (activation) {
    case Activation::relu:
      return run([](vf x, vf grad) FA_INLINE_CALL { return Unit{relu(x), select(x <= 0.0f, vf{}, grad)}; });
    case Activation::silu: return run([](vf x, vf grad) FA_INLINE_CALL { return silu(x, grad); });
    case Activation::gelu: return run([](vf x, vf grad) FA_INLINE_CALL { return gelu(x, grad); });
    case Activation::hardswish: return run([](vf x, vf grad) FA_INLINE_CALL { return hardswish(x, grad); });
  }
}

// The hidden units of the first layer's outputs x.
__attribute__((noinline)) void activate(const Problem& p, const float* x, float* units) {
  with_activation(p.activation, [&](const auto& unit_of) FA_INLINE_CALL {
    each(p.hidden, [&](auto lanes) FA_INLINE_CALL { lanes.store(units, unit_of(lanes.load(x), vf{}).value); });
  });
}

// Also turns gradients of the units into those of x.
__attribute__((noinline)) void activate_backward(const Problem& p, const float* x, float* units, float* grads) {
  with_activation(p.activation, [&](const auto& unit_of) FA_INLINE_CALL {
    each(p.hidden, [&](auto lanes) FA_INLINE_CALL {
      const Unit unit = unit_of(lanes.load(x), lanes.load(grads));
      lanes.store(units, unit.value);
      lanes.store(grads, unit.grad);
    });
  });
}

__attribute__((noinline)) void gate(const Problem& p, const float* x, float* scale) {
  if (p.gate == Gate::sigmoid)
    each(p.channels, [&](auto lanes) FA_INLINE_CALL { lanes.store(scale, sigmoid(lanes.load(x))); });
  else
    each(p.channels, [&](auto lanes) FA_INLINE_CALL { lanes.store(scale, hardsigmoid(lanes.load(x))); });
}

// Turns gradients of the gates' values into those of their arguments.
__attribute__((noinline)) void gate_backward(const Problem& p, const float* scale, float* grads) {
  if (p.gate == Gate::sigmoid)
    each(p.channels, [&](auto lanes) FA_INLINE_CALL {
      const vf s = lanes.load(scale);
      lanes.store(grads, lanes.load(grads) * (s * (1.0f - s)));
    });
  else
    each(p.channels, [&](auto lanes) FA_INLINE_CALL {
      const vf s = lanes.load(scale);
      lanes.store(grads, select((s > 0.0f) & (s < 1.0f), lanes.load(grads) * (1.0f / 6.0f), vf{}));
    });
}

void gather_padded(const TensorView& view, int64_t count, float* to) {
  for (int64_t i = 0; i < padded(count); ++i) to[i] = 0.0f;
  if (view) gather(view, 0, view.stride[0], count, 1.0f, to);
}

// --- forward --------------------------------------------------------------------------------------------------------
//
// A pass in three steps, `sum`, `layers` and `write`, which have these names in backward too.

// Means.
template <class T>
void sum(const Forward& p, int64_t b, Channels channels, float* partial) {
  const T* x = at<T>(p.x, b * p.map());
  sum_map(p, channels, 1.0f / p.positions, p.z + b * p.channels, partial,
          [&](int64_t offset, auto lanes) FA_INLINE_CALL { return lanes.load_on(x + offset); });
}

// What the layers of a chunk need, held for many of them.  Backward's is held for the whole batch, see cpu.cpp.
struct LayerMemory {
  Scratch<float> input, hidden, logits, bias1, bias2;

  explicit LayerMemory(const Forward& p)
      : input(p.chunk * padded(p.columns())),
        hidden(p.chunk * padded(p.hidden)),
        logits(p.chunk * padded(p.channels)),
        bias1(padded(p.hidden)),
        bias2(padded(p.channels)) {
    gather_padded(p.bias1, p.hidden, bias1.data);
    gather_padded(p.bias2, p.channels, bias2.data);
  }
  explicit LayerMemory(const Backward&) {}
};

// Scales of samples [first, first + count).
template <class T>
void layers(const Forward& p, const LayerMemory& memory, int64_t first, int64_t count) {
  const int64_t inputs = padded(p.columns()), units = padded(p.hidden), channels = padded(p.channels);
  float *input = memory.input.data, *hidden = memory.hidden.data, *logits = memory.logits.data;
  const float *bias1 = memory.bias1.data, *bias2 = memory.bias2.data;
  for (int64_t i = 0; i < count; ++i) {
    const int64_t b = first + i;
    if (p.features > 0)
      gather(p.result, b * p.result.stride[0], p.result.stride[1], p.features, 1.0f, input + i * inputs);
    for (int64_t c = 0; c < p.channels; ++c) input[i * inputs + p.features + c] = p.z[b * p.channels + c];
  }
  multiply(count, input, inputs, 1, p.columns(), p.fc1, p.hidden,
           [&](int64_t i, int64_t j, vf x) FA_INLINE_CALL { store(hidden + i * units + j, x + load(bias1 + j)); });
  for (int64_t i = 0; i < count; ++i) {
    const int64_t b = first + i;
    float* outputs = hidden + i * units;
    if (p.share) {
      float share[L];
      each(p.hidden, [&](auto lanes) FA_INLINE_CALL {
        gather(p.share, b * p.share.stride[0] + lanes.begin * p.share.stride[1], p.share.stride[1], lanes.count, 1.0f,
               share);
        lanes.store(outputs, lanes.load(outputs) + load(share));
      });
    }
    if (p.one_layer) continue;
    each(p.hidden,
         [&](auto lanes) FA_INLINE_CALL { lanes.store(p.preactivation + b * p.hidden, lanes.load(outputs)); });
    activate(p, outputs, outputs);
  }
  if (!p.one_layer)
    multiply(count, hidden, units, 1, p.hidden, p.fc2, p.channels,
             [&](int64_t i, int64_t c, vf x) FA_INLINE_CALL { store(logits + i * channels + c, x + load(bias2 + c)); });
  const float* gate_inputs = p.one_layer ? hidden : logits;
  for (int64_t i = 0; i < count; ++i) gate(p, gate_inputs + i * channels, p.scale + (first + i) * p.channels);
}

template <bool Residual, class T>
void scale_map(const Forward& p, int64_t b, Channels channels) {
  const T* x = at<T>(p.x, b * p.map());
  const T* residual = Residual ? at<T>(p.residual, b * p.map()) : nullptr;
  T* out = at<T>(p.out, b * p.map());
  const float* scale = p.scale + b * p.channels;
  auto run = [&]<bool Relu>() FA_INLINE_CALL {
    write_map(p, channels, out, scale, scale, [&](int64_t offset, auto lanes, vf s, vf) FA_INLINE_CALL {
      const Product scaled{lanes.load(x + offset), s};
      vf y;
      if constexpr (Residual)
        y = plus(lanes.load_on(residual + offset), scaled);
      else
        y = value_of(scaled);
      return Relu ? relu(y) : y;
    });
  };
  return p.relu ? run.template operator()<true>() : run.template operator()<false>();
}

template <class T>
void write(const Forward& p, int64_t b, Channels channels) {
  p.residual != nullptr ? scale_map<true, T>(p, b, channels) : scale_map<false, T>(p, b, channels);
}

// --- backward -------------------------------------------------------------------------------------------------------

// The gradient that reaches x * scale + residual.
template <bool Relu, class T, class AnyLanes>
FA_INLINE vf active(const T* grad_out, const T* out, int64_t offset, AnyLanes lanes) {
  const vf grad = lanes.load_on(grad_out + offset);
  if constexpr (Relu) return select(lanes.load_on(out + offset) <= 0.0f, vf{}, grad);
  return grad;
}

// grad_scale[c] = sum of grad * x; writes grad_residual.
template <bool Relu, bool Residual, class T>
void reduce_map(const Backward& p, int64_t b, Channels channels, float* grad_scale, float* partial) {
  const T *x = at<T>(p.x, b * p.map()), *grad_out = at<T>(p.grad_out, b * p.map());
  const T* out = Relu ? at<T>(p.out, b * p.map()) : nullptr;
  T* grad_residual = Residual ? at<T>(p.grad_residual, b * p.map()) : nullptr;
  sum_map(p, channels, 1.0f, grad_scale, partial, [&](int64_t offset, auto lanes) FA_INLINE_CALL {
    const vf grad = active<Relu>(grad_out, out, offset, lanes);
    if constexpr (Residual) lanes.store(grad_residual + offset, grad);
    return lanes.template product<T>(grad, lanes.load_on(x + offset));
  });
}

// Gradients of the scales.
template <class T>
void sum(const Backward& p, int64_t b, Channels channels, float* partial) {
  float* grad_scale = p.grad_logits + b * padded(p.channels);
  if (p.out == nullptr)
    reduce_map<false, false, T>(p, b, channels, grad_scale, partial);
  else if (p.grad_residual != nullptr)
    reduce_map<true, true, T>(p, b, channels, grad_scale, partial);
  else
    reduce_map<true, false, T>(p, b, channels, grad_scale, partial);
}

// Gradients of the means, over the positions, of samples [first, first + count), and of what else enters the layers.
template <class T>
void layers(const Backward& p, const LayerMemory&, int64_t first, int64_t count) {
  const int64_t inputs = padded(p.columns()), units = padded(p.hidden), channels = padded(p.channels);
  const float mean = 1.0f / p.positions;
  for (int64_t b = first; b < first + count; ++b)
    gate_backward(p, p.scale + b * p.channels, p.grad_logits + b * channels);
  if (!p.one_layer)
    multiply(count, p.grad_logits + first * channels, channels, 1, p.channels, p.fc2, p.hidden,
             [&](int64_t i, int64_t j, vf x) FA_INLINE_CALL { store(p.grad_first + (first + i) * units + j, x); });
  for (int64_t b = first; b < first + count; ++b) {
    float* grads = p.grad_first + b * units;
    for (int64_t j = p.hidden; j < units; ++j) grads[j] = 0.0f;
    if (!p.one_layer) activate_backward(p, p.preactivation + b * p.hidden, p.units + b * p.hidden, grads);
    if (p.grad_share != nullptr)
      each(p.hidden,
           [&](auto lanes) FA_INLINE_CALL { lanes.store(at<T>(p.grad_share, b * p.hidden), lanes.load(grads)); });
  }
  multiply(count, p.grad_first + first * units, units, 1, p.hidden, p.fc1, p.columns(),
           [&](int64_t i, int64_t k, vf x) FA_INLINE_CALL { store(p.grad_input + (first + i) * inputs + k, x); });
  for (int64_t b = first; b < first + count; ++b) {
    float* grad = p.grad_input + b * inputs;
    if (p.grad_result != nullptr)
      each(p.features,
           [&](auto lanes) FA_INLINE_CALL { lanes.store(at<T>(p.grad_result, b * p.features), lanes.load(grad)); });
    grad += p.features;
    each(p.channels, [&](auto lanes) FA_INLINE_CALL { lanes.store(grad, mean * lanes.load(grad)); });
  }
}

// grad_x = grad * scale + grad_mean.
template <bool Relu, class T>
void spread_map(const Backward& p, int64_t b, Channels channels, const void* grad) {
  const T* grad_out = at<T>(grad, b * p.map());
  const T* out = Relu ? at<T>(p.out, b * p.map()) : nullptr;
  const float* grad_mean = p.grad_input + b * padded(p.columns()) + p.features;
  write_map(p, channels, at<T>(p.grad_x, b * p.map()), p.scale + b * p.channels, grad_mean,
            [&](int64_t offset, auto lanes, vf s, vf mean)
                FA_INLINE_CALL { return fused(active<Relu>(grad_out, out, offset, lanes), s, mean); });
}

template <class T>
void write(const Backward& p, int64_t b, Channels channels) {
  if (p.grad_residual != nullptr)
    spread_map<false, T>(p, b, channels, p.grad_residual);  // just written, and one map instead of two
  else if (p.out != nullptr)
    spread_map<true, T>(p, b, channels, p.grad_out);
  else
    spread_map<false, T>(p, b, channels, p.grad_out);
}

// One layer's gradients, rows [row, row + kRowGroup): grads (batch, stride) times panels (batch x columns).
template <class T>
void weight_grad_rows(const Problem& p, int64_t row, int64_t rows, const float* grads, int64_t stride,
                      const float* panels, int64_t columns, void* grad_weight, void* grad_bias) {
  const int64_t count = smaller(kRowGroup, rows - row);
  multiply(count, grads + row, 1, stride, p.batch, panels, columns, [&](int64_t m, int64_t k, vf x) FA_INLINE_CALL {
    T* to = at<T>(grad_weight, (row + m) * columns + k);
    k + L <= columns ? store_rounded(to, x) : store_part(to, columns - k, x);
  });
  each(count, [&](auto lanes) FA_INLINE_CALL {
    vf total{};
    for (int64_t b = 0; b < p.batch;) {
      vf sum{};
      for (const int64_t end = smaller(b + kLongestChain, p.batch); b < end; ++b)
        sum += load(grads + b * stride + row + lanes.begin);
      total += sum;
    }
    lanes.store(at<T>(grad_bias, row), total);
  });
}

template <class T>
void weight_grad_groups(const Backward& p, int64_t begin, int64_t end) {
  const int64_t groups1 = padded(p.hidden) / kRowGroup;
  for (int64_t group = begin; group < end; ++group) {
    if (group < groups1)
      weight_grad_rows<T>(p, group * kRowGroup, p.hidden, p.grad_first, padded(p.hidden), p.input_panels, p.columns(),
                          p.grad_fc1, p.grad_bias1);
    else
      weight_grad_rows<T>(p, (group - groups1) * kRowGroup, p.channels, p.grad_logits, padded(p.channels),
                          p.unit_panels, p.hidden, p.grad_fc2, p.grad_bias2);
  }
}

// --- tasks ----------------------------------------------------------------------------------------------------------

// Chunks of samples: all steps of one before the next.
template <class P>
void run_chunks(const P& p, int64_t begin, int64_t end) {
  const Channels all{0, p.channels};
  Scratch<float> partial(padded(p.channels));
  const LayerMemory memory(p);
  with_element(p.dtype, [&](auto element) {
    using T = decltype(element);
    for (int64_t chunk = begin; chunk < end; ++chunk) {
      const int64_t first = chunk * p.chunk, last = smaller(first + p.chunk, p.batch);
      for (int64_t b = first; b < last; ++b) sum<T>(p, b, all, partial.data);
      layers<T>(p, memory, first, last - first);
      // Backwards: the sample that was summed last is the one most of which is still in the cache.
      for (int64_t b = last - 1; b >= first; --b) write<T>(p, b, all);
    }
  });
  end_of_streams();
}

// step(sample, channels) for groups of kRowGroup channels, those of a sample together.
template <class Step>
FA_INLINE void each_sample(const Problem& p, int64_t begin, int64_t end, const Step& step) {
  for (int64_t b = begin / p.groups(); b * p.groups() < end; ++b) {
    const int64_t first = larger(begin - b * p.groups(), 0) * kRowGroup;
    const int64_t last = smaller((end - b * p.groups()) * kRowGroup, p.channels);
    step(b, Channels{first, last - first});
  }
}

template <class P>
void run_sums(const P& p, int64_t begin, int64_t end) {
  Scratch<float> partial(padded(p.channels));
  with_element(p.dtype, [&](auto element) {
    each_sample(p, begin, end,
                [&](int64_t b, Channels channels) { sum<decltype(element)>(p, b, channels, partial.data); });
  });
}

template <class P>
void run_layers(const P& p, int64_t begin, int64_t end) {
  const LayerMemory memory(p);
  with_element(p.dtype, [&](auto element) {
    for (int64_t chunk = begin; chunk < end; ++chunk)
      layers<decltype(element)>(p, memory, chunk * p.chunk, smaller(p.chunk, p.batch - chunk * p.chunk));
  });
}

template <class P>
void run_writes(const P& p, int64_t begin, int64_t end) {
  with_element(p.dtype, [&](auto element) {
    each_sample(p, begin, end, [&](int64_t b, Channels channels) { write<decltype(element)>(p, b, channels); });
  });
  end_of_streams();
}

void weight_grads(const Backward& p, int64_t begin, int64_t end) {
  with_element(p.dtype, [&](auto element) { weight_grad_groups<decltype(element)>(p, begin, end); });
}

}  // namespace

extern const Kernels kernels = {.panel = PANEL,
                                .pack = pack,
                                .forward = {run_chunks, run_sums, run_layers, run_writes},
                                .backward = {run_chunks, run_sums, run_layers, run_writes},
                                .weight_grads = weight_grads};

}  // namespace fused_attn::squeeze_excite::FUSED_ATTN_ISA
