// The CPU kernels of attention residuals; see the op's README.md for the method.
//
// Included once per instruction set, see common/for_each_instruction_set.h.  The rows of one token's values are walked
// twice: the first time they come from memory, the second time from the cache, which holds them (36 KiB for 9 float32
// rows of 1,024).

namespace fused_attn::attention_residual::FUSED_ATTN_ISA {
namespace {

#include "common/simd.h"

// Vectors walked together, each with a sum of its own.
constexpr int U = 4;

template <class T>
FA_INLINE T* row_of(const TensorView& view, int64_t outer, int64_t inner) {
  return static_cast<T*>(view.data) + outer * view.stride[0] + inner * view.stride[1];
}
template <class T>
FA_INLINE T* row_of(const Problem& p, const TensorView& view, int64_t token) {
  return row_of<T>(view, token / p.inner, token % p.inner);
}

// Walks a row of `dim` elements, as many as U vectors at once: step<N>(lanes) for N vectors from lanes on.
template <class Step>
FA_INLINE void walk(int64_t dim, const Step& step) {
  int64_t d = 0;
  for (; d + U * L <= dim; d += U * L) step.template operator()<U>(Lanes<true>{d, L});
  for (; d + L <= dim; d += L) step.template operator()<1>(Lanes<true>{d, L});
  if (d < dim) step.template operator()<1>(Lanes<false>{d, dim - d});
}

// Sums over a row of up to N quantities, in chains of at most kLongestChain additions.
template <int N>
struct RowSums {
  vf part[N][U] = {}, whole[N] = {};
  int64_t chain = 0;

  template <class Term>
  FA_INLINE void add(int n, int u, Term x) {
    part[n][u] = plus(part[n][u], x);
  }
  FA_INLINE void flush() {
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n) {
      whole[n] += (part[n][0] + part[n][1]) + (part[n][2] + part[n][3]);
#pragma GCC unroll 4
      for (int u = 0; u < U; ++u) part[n][u] = vf{};
    }
  }
  FA_INLINE void advance() {
    if (++chain == kLongestChain) flush(), chain = 0;
  }
  FA_INLINE float total(int n) { return sum_lanes(whole[n]); }
};

// query * norm_weight.
void score_vector(const Problem& p, float* to) {
  gather(p.query, 0, p.query.stride[0], p.dim, 1.0f, to);
  if (!p.norm_weight) return;
  Scratch<float> weight(p.dim);
  gather(p.norm_weight, 0, p.norm_weight.stride[0], p.dim, 1.0f, weight.data);
  for (int64_t d = 0; d < p.dim; ++d) to[d] *= weight[d];
}

// Divides the score vector by the power of two below its largest number, which is returned.  That changes no digit, but
// keeps its product with a value finite wherever the logit is: only the root mean square, applied later, makes the
// value small.
float take_unit(float* score, int64_t dim) {
  float largest = 0.0f;
  for (int64_t d = 0; d < dim; ++d) largest = __builtin_fabsf(score[d]) > largest ? __builtin_fabsf(score[d]) : largest;
  if (largest == 0.0f || largest == kInfinity) return 1.0f;
  int exponent;
  __builtin_frexpf(largest, &exponent);
  const float unit = __builtin_ldexpf(1.0f, exponent - 1);
  for (int64_t d = 0; d < dim; ++d) score[d] /= unit;
  return unit;
}

// Weights of one token from its logits, at statistics[2 * l].
FA_INLINE void softmax(const float* statistics, int64_t count, float* weights) {
  float largest = -kInfinity, sum = 0.0f;
  for (int64_t l = 0; l < count; ++l) largest = statistics[2 * l] > largest ? statistics[2 * l] : largest;
  for (int64_t l = 0; l < count; ++l) sum += weights[l] = __builtin_expf(statistics[2 * l] - largest);
  for (int64_t l = 0; l < count; ++l) weights[l] /= sum;
}

// --- forward -------------------------------------------------------------------------------------------------------

template <class T>
void forward(const Forward& p, int64_t begin, int64_t end) {
  Scratch<float> score(p.dim), weights(p.count);
  score_vector(p, score.data);
  const float unit = take_unit(score.data, p.dim);
  Scratch<const T*> rows(p.count);
  const int64_t last = smaller(end * kTaskTokens, p.tokens());
  for (int64_t token = begin * kTaskTokens; token < last; ++token) {
    const int64_t outer = token / p.inner, inner = token % p.inner;
    float* statistics = p.statistics + token * p.count * 2;
    for (int64_t l = 0; l < p.count; ++l) {
      const T* row = rows[l] = row_of<const T>(p.values[l], outer, inner);
      // No hardware prefetcher follows from one value to the next.
      const T* next = token + 1 < last ? row_of<const T>(p, p.values[l], token + 1) : row;
      RowSums<2> sums;
      walk(p.dim, [&]<int N>(auto lanes) FA_INLINE_CALL {
#pragma GCC unroll 4
        for (int u = 0; u < N; ++u) {
          __builtin_prefetch(next + lanes.begin + u * L);
          const vf x = lanes.load(row + u * L);
          sums.add(0, u, Product{x, x});
          sums.add(1, u, lanes.template product<T>(x, lanes.load(score + u * L)));
        }
        sums.advance();
      });
      sums.flush();
      const float rms = 1.0f / __builtin_sqrtf(sums.total(0) / float(p.dim) + p.eps);
      statistics[2 * l] = sums.total(1) * rms * unit;
      statistics[2 * l + 1] = rms;
    }
    softmax(statistics, p.count, weights.data);
    T* out = row_of<T>(p.out, outer, inner);
    walk(p.dim, [&]<int N>(auto lanes) FA_INLINE_CALL {
      vf acc[N] = {};
      for (int64_t l = 0; l < p.count; ++l) {
        const vf weight = broadcast(weights[l]);
#pragma GCC unroll 4
        for (int u = 0; u < N; ++u) acc[u] += weight * lanes.load(rows[l] + u * L);
      }
#pragma GCC unroll 4
      for (int u = 0; u < N; ++u) lanes.store(out + u * L, acc[u]);
    });
  }
}

// --- backward ------------------------------------------------------------------------------------------------------

// With a the weights, s the logits, r = 1 / root mean square, u = query * norm_weight and g the gradient of out:
// ds_l = a_l (g.v_l - sum_k a_k g.v_k), dv_l = a_l g + ds_l r_l u - (ds_l s_l r_l^2 / dim) v_l,
// du = sum over tokens and values of ds_l r_l v_l.
struct Coefficients {
  float weight, score, value;
};

template <class T>
void backward(const Backward& p, int64_t begin, int64_t end) {
  Scratch<float> score(p.dim), grad(p.dim), weights(p.count), products(p.count);
  score_vector(p, score.data);
  Scratch<const T*> rows(p.count);
  Scratch<T*> grad_rows(p.count);
  Scratch<Coefficients> coefficients(p.count);
  for (int64_t task = begin; task < end; ++task) {
    float* partial = p.partials + task * p.dim;
    const int64_t first = task * kTaskTokens;
    const int64_t last = smaller(first + kTaskTokens, p.tokens());
    for (int64_t token = first; token < last; ++token) {
      const int64_t outer = token / p.inner, inner = token % p.inner;
      const float* statistics = p.statistics + token * p.count * 2;
      const T* grad_out = row_of<const T>(p.grad_out, outer, inner);
      const bool more = token + 1 < last;
      bool streams = p.large;
      walk(p.dim, [&]<int N>(auto lanes) FA_INLINE_CALL {
        for (int u = 0; u < N; ++u) lanes.store(grad + u * L, lanes.load(grad_out + u * L));
      });
      softmax(statistics, p.count, weights.data);
      float delta = 0.0f;
      for (int64_t l = 0; l < p.count; ++l) {
        const T* row = rows[l] = row_of<const T>(p.values[l], outer, inner);
        const T* next = more ? row_of<const T>(p, p.values[l], token + 1) : row;
        grad_rows[l] = row_of<T>(p.grad_values[l], outer, inner);
        streams &= can_stream(grad_rows[l]);
        RowSums<1> sums;
        walk(p.dim, [&]<int N>(auto lanes) FA_INLINE_CALL {
#pragma GCC unroll 4
          for (int u = 0; u < N; ++u) {
            __builtin_prefetch(next + lanes.begin + u * L);
            sums.add(0, u, lanes.template product<T>(lanes.load(row + u * L), lanes.load(grad + u * L)));
          }
          sums.advance();
        });
        sums.flush();
        products[l] = sums.total(0);
        delta += weights[l] * products[l];
      }
      for (int64_t l = 0; l < p.count; ++l) {
        const float logit = statistics[2 * l], rms = statistics[2 * l + 1];
        const float scaled = weights[l] * (products[l] - delta) * rms;
        coefficients[l] = {weights[l], scaled, -scaled * logit * rms / float(p.dim)};
      }
      walk(p.dim, [&]<int N>(auto lanes) FA_INLINE_CALL {
        vf g[N], s[N], acc[N] = {};
#pragma GCC unroll 4
        for (int u = 0; u < N; ++u) {
          g[u] = lanes.load(grad + u * L);
          s[u] = lanes.load(score + u * L);
        }
        for (int64_t l = 0; l < p.count; ++l) {
          const vf a = broadcast(coefficients[l].weight), b = broadcast(coefficients[l].score),
                   c = broadcast(coefficients[l].value);
#pragma GCC unroll 4
          for (int u = 0; u < N; ++u) {
            const vf x = lanes.load(rows[l] + u * L);
            acc[u] += b * x;
            const vf grad_value = a * g[u] + b * s[u] + c * x;
            lanes.store(grad_rows[l] + u * L, grad_value, streams);
          }
        }
#pragma GCC unroll 4
        for (int u = 0; u < N; ++u) {
          float* to = partial + u * L;
          lanes.store(to, acc[u] + lanes.load(to));
        }
      });
    }
  }
  end_of_streams();
}

// grad_query and grad_norm_weight of elements [begin, end), from the partial sums of the tasks.
void sum_partials(const Backward& p, int64_t begin, int64_t end) {
  const int64_t count = end - begin, tasks = p.tasks();
  Scratch<float> total(count), part(count), factor(count);
  for (int64_t i = 0; i < count; ++i) total[i] = part[i] = 0.0f;
  for (int64_t task = 0; task < tasks; ++task) {
    for (int64_t i = 0; i < count; ++i) part[i] += p.partials[task * p.dim + begin + i];
    if ((task + 1) % kLongestChain == 0 || task + 1 == tasks)
      for (int64_t i = 0; i < count; ++i) total[i] += part[i], part[i] = 0.0f;
  }
  auto write = [&](const TensorView& to, const TensorView& other) {
    if (other) {
      gather(other, begin * other.stride[0], other.stride[0], count, 1.0f, factor.data);
    } else {
      for (int64_t i = 0; i < count; ++i) factor[i] = 1.0f;
    }
    for (int64_t i = 0; i < count; ++i) factor[i] *= total[i];
    scatter(to, begin * to.stride[0], to.stride[0], count, 1.0f, factor.data);
  };
  write(p.grad_query, p.norm_weight);
  if (p.norm_weight) write(p.grad_norm_weight, p.query);
}

void forward_any(const Forward& p, int64_t begin, int64_t end) {
  with_element(p.dtype, [&](auto element) { forward<decltype(element)>(p, begin, end); });
}

void backward_any(const Backward& p, int64_t begin, int64_t end) {
  with_element(p.dtype, [&](auto element) { backward<decltype(element)>(p, begin, end); });
}

}  // namespace

extern const Kernels kernels = {.forward = forward_any, .backward = backward_any, .sum_partials = sum_partials};

}  // namespace fused_attn::attention_residual::FUSED_ATTN_ISA
