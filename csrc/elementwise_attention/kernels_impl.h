// The CPU kernels of row/column softmax and element-wise attention; see the op's README.md for the method.
//
// Included once per instruction set, see common/for_each_instruction_set.h.  A row of a plane lies along the lanes,
// padded to whole vectors.  The padding of the row logits is -inf and that of the column statistics (0, 0), so that it
// holds a product of exactly 0.

namespace fused_attn::elementwise_attention::FUSED_ATTN_ISA {
namespace {

#include "common/simd.h"
#include "elementwise_attention/rows.h"

// e^x for x <= 88: 0 for -inf, NaN stays NaN.  What the multiple of ln 2 leaves is taken from x itself, in one
// rounding, so that none grows with x.
FA_INLINE vf exp_of(vf x) {
#if FUSED_ATTN_LANES == 16
  // The larger of a number and NaN is the second operand.  scalef rounds e^-104 to 0.
  x = (vf)_mm512_maskz_max_ps(0xffff, (__m512)broadcast(-104.0f), (__m512)x);
  const vf n = (vf)_mm512_maskz_roundscale_ps(0xffff, (__m512)(x * kLog2e), 0);
  // Not x * kLog2e - n: GCC fuses no product that has another use.
  const vf r = (vf)_mm512_fmsub_ps((__m512)x, (__m512)broadcast(kLog2e), (__m512)n);
  return (vf)_mm512_maskz_scalef_ps(0xffff, (__m512)exp2_polynomial(r), (__m512)n);
#else
  return exp_nonpositive(x);
#endif
}

// A shift other than the maximum serves a row or column if its sum of e^(x - shift) stays within these bounds: no
// element is then more than 16 above it, and what underflows is no part of the sum.  NaN is not near.
FA_INLINE vi is_near(vf sum) { return (sum > 1e-7f) & (sum < 1e7f); }
FA_INLINE bool all_near(const float* sums, int64_t count) {
  vi near = vi{} - 1;
  int64_t i = 0;
  for (; i + L <= count; i += L) near &= is_near(load(sums + i));
  if (i < count) near &= is_near(load_part(sums + i, count - i, 1.0f));
  bool all = true;
  for (int j = 0; j < L; ++j) all &= near[j] != 0;
  return all;
}

// For long rows that are read once: no hardware prefetcher follows them over the end of a page.
FA_INLINE void prefetch_on(const float* p) { __builtin_prefetch(p + 1024); }

// Where a task stands: a block of rows, some images and a head.
struct Block {
  int64_t task, group, range, c, y0, rows, b0, images, h;
  bool first_rows, last_rows, first_images;
};

// What the kernels read, in float32.
struct Operands {
  const Problem& p;
  int64_t vectors, stride, plane;
  Scratch<float> x_memory, row_memory, col_memory;
  Rows x[kMostImagesAtOnce], weight_row, weight_col;
  // Of one image and head, rows from y0 on.  inverse + rest is 1 / sum to twice the precision: the rounding of a
  // reciprocal alone would be shared by a whole row or column, and not cancel in the gradients of its logits.
  const float* row_max;
  Scratch<float> col_max, row_inverse, row_rest, col_inverse, col_rest;
  Scratch<float> row_log, col_log;  // logarithms of the sums
  int64_t columns_of = -1;          // the plane of the column statistics
  bool columns_share = false;       // one shift
  // Where logits are not x itself, 1 for what takes part and 0 for what does not: columns of every image of the block,
  // and a row of nothing.
  Scratch<float> kept_columns, nothing;
  int64_t kept_of = -1;  // the first of the images

  explicit Operands(const Problem& problem)
      : p(problem),
        vectors(vectors_of(p.width)),
        stride(vectors * L),
        plane(p.block_rows * stride),
        // x pads with 1 next to weights of -inf and 0, and with -inf itself without weights.
        x_memory(p.images_at_once * plane, p.weighted ? 1.0f : -kInfinity),
        row_memory(p.weighted ? plane : 0, -kInfinity),
        col_memory(p.weighted ? plane : 0, 0.0f),
        col_max(stride, 0.0f),
        row_inverse(p.block_rows, 0.0f),
        row_rest(p.block_rows, 0.0f),
        col_inverse(stride, 0.0f),
        col_rest(stride, 0.0f) {
    if (p.log || !p.logits_are_x()) allocate_for_options();
  }

  __attribute__((noinline)) void allocate_for_options() {
    row_log.allocate(p.block_rows), col_log.allocate(stride), col_log.fill(0.0f);
    kept_columns.allocate(p.images_at_once * stride), kept_columns.fill(0.0f);
    nothing.allocate(stride), nothing.fill(0.0f);
  }

  __attribute__((noinline)) void load_masks(const Block& k) {
    if (kept_of == k.b0) return;
    kept_of = k.b0;
    for (int64_t i = 0; i < k.images; ++i)
      for (int64_t x = 0; x < p.width; ++x) kept_columns[i * stride + x] = p.col_mask(k.b0 + i, x);
  }
  // What of row y of the plane takes part in image i of the block.
  FA_INLINE const float* kept(const Block& k, int64_t i, int64_t y) const {
    return p.row_mask(k.b0 + i, y) ? kept_columns + i * stride : nothing.data;
  }
  // Another number where `kept` says that an element takes no part.
  FA_INLINE static vf where_kept(const float* kept, int64_t v, vf value, float otherwise) {
    return select(load(kept + v * L) > 0.0f, value, broadcast(otherwise));
  }
  // A row of x becomes one of logits.
  FA_INLINE void scale_and_mask(float* row, const float* kept) const {
    for (int64_t v = 0; v < vectors; ++v)
      store(row + v * L, where_kept(kept, v, load(row + v * L) * p.factor, -kInfinity));
  }
  __attribute__((noinline)) void load_logits(const Block& k) {
    const int64_t* from = p.x.stride;
    const float factor = p.factor;
    for (int64_t i = 0; i < k.images; ++i) {
      x[i] = {x_memory + i * plane, stride};
      for (int64_t y = 0; y < k.rows; ++y) {
        float* to = x_memory + i * plane + y * stride;
        const float* taken = kept(k, i, k.y0 + y);
        const int64_t offset = (k.b0 + i) * from[0] + k.c * from[1] + (k.y0 + y) * from[2];
        if (p.x.dtype == DType::float32 && from[3] == 1 && p.width % L == 0) {
          const float* row = at<float>(p.x, offset);
          for (int64_t v = 0; v < vectors; ++v) {
            prefetch_on(row + v * L);
            store(to + v * L, where_kept(taken, v, load(row + v * L) * factor, -kInfinity));
          }
          continue;
        }
        load_row(p.x, offset, from[3], p.width, -kInfinity, to);
        scale_and_mask(to, taken);
      }
    }
  }
  void load_images(const Block& k) {
    if (!p.logits_are_x()) return load_logits(k);
    for (int64_t i = 0; i < k.images; ++i)
      x[i] = rows_of(p.x, 2, (k.b0 + i) * p.x.stride[0] + k.c * p.x.stride[1] + k.y0 * p.x.stride[2], k.rows, p.width,
                     p.weighted ? 1.0f : -kInfinity, x_memory + i * plane, stride);
  }
  void load_weights(const Block& k) {
    if (!p.weighted) return;
    const TensorView &r = p.weight_row, &c = p.weight_col;
    weight_row = rows_of(r, 2, k.h * r.stride[0] + k.c * r.stride[1] + k.y0 * r.stride[2], k.rows, p.width, -kInfinity,
                         row_memory.data, stride);
    weight_col = rows_of(c, 2, k.h * c.stride[0] + k.c * c.stride[1] + k.y0 * c.stride[2], k.rows, p.width, 0.0f,
                         col_memory.data, stride);
  }
  // Without `rest` where only the product of the softmaxes is formed.  With `Log`, logarithms of the sums in its place.
  template <bool Rest, bool Log = false>
  FA_INLINE void load_statistics(const Block& k, int64_t plane_index) {
    row_max = p.row_statistics + plane_index * 2 * p.height + k.y0;
    if constexpr (Log)
      logarithms(row_max + p.height, k.rows, row_log.data);
    else
      invert<Rest>(row_max + p.height, k.rows, row_inverse.data, row_rest.data);
    if (plane_index == columns_of) return;
    columns_of = plane_index;
    const float* statistics = p.col_statistics + plane_index * 2 * p.width;
    load_row_as(statistics, 1, p.width, 0.0f, col_max.data);
    if constexpr (Log)
      logarithms(statistics + p.width, p.width, col_log.data);
    else
      invert<Rest>(statistics + p.width, p.width, col_inverse.data, col_rest.data);
    columns_share = !p.weighted && all_are(statistics, p.width, statistics[0]);
  }
  // Whether every row of the block and every column of its plane is shifted by one number.
  bool shares(const Block& k) const { return columns_share && all_are(row_max, k.rows, col_max.data[0]); }
  static bool all_are(const float* numbers, int64_t count, float number) {
    bool all = true;
    for (int64_t i = 0; i < count; ++i) all &= numbers[i] == number;
    return all;
  }
  FA_INLINE static void logarithms(const float* sums, int64_t count, float* to) {
    for (int64_t i = 0; i < count; ++i) to[i] = __builtin_logf(sums[i]);
  }
  // 0 beyond `count`.
  template <bool Rest>
  FA_INLINE static void invert(const float* sums, int64_t count, float* inverse, float* rest) {
    for (int64_t i = 0; i < count; i += L) {
      const vf sum = i + L <= count ? load(sums + i) : load_part(sums + i, count - i, 1.0f), first = 1.0f / sum;
      store(inverse + i, first);
      // One rounding where there are fused products, else about 0.
      if constexpr (Rest) store(rest + i, (1.0f - sum * first) * first);
    }
    for (int64_t i = count; i < round_up(count, L); ++i) inverse[i] = rest[i] = 0.0f;
  }
};

// Of the next image of a whole plane: they lie heads planes on, where no hardware prefetcher looks.
FA_INLINE void prefetch_statistics(const Problem& p, int64_t plane) {
  if (!p.whole()) return;
  const float *rows = p.row_statistics + plane * 2 * p.height, *columns = p.col_statistics + plane * 2 * p.width;
  for (int64_t i = 0; i < 2 * p.height; i += 16) __builtin_prefetch(rows + i);
  for (int64_t i = 0; i < 2 * p.width; i += 16) __builtin_prefetch(columns + i);
}

// Visits every block of a task: images(), then for every head head(), image() each, head_done(), then images_done().
template <class Visitor, class P>
void walk(const P& p, int64_t begin, int64_t end) {
  Operands o(p);
  Visitor visitor(p, o);
  for (int64_t task = begin; task < end; ++task) {
    Block k{};
    k.task = task, k.c = task % p.channels, k.group = task / p.channels % p.groups;
    k.range = task / p.channels / p.groups;
    const int64_t b_begin = p.batch * k.group / p.groups, b_end = p.batch * (k.group + 1) / p.groups;
    const int64_t y_begin = p.height * k.range / p.ranges, y_end = p.height * (k.range + 1) / p.ranges;
    for (k.y0 = y_begin; k.y0 < y_end; k.y0 += p.block_rows) {
      k.rows = smaller(p.block_rows, y_end - k.y0);
      k.first_rows = k.y0 == y_begin, k.last_rows = k.y0 + k.rows == y_end;
      for (k.b0 = b_begin; k.b0 < b_end; k.b0 += p.images_at_once) {
        k.images = smaller(p.images_at_once, b_end - k.b0);
        k.first_images = k.b0 == b_begin;
        if (!p.logits_are_x()) o.load_masks(k);
        if constexpr (Visitor::kReadsX) o.load_images(k);
        visitor.images(k);
        for (k.h = 0; k.h < p.heads; ++k.h) {
          o.load_weights(k);
          visitor.head(k);
          for (int64_t i = 0; i < k.images; ++i) {
            if (i + 1 < k.images) prefetch_statistics(p, p.plane(k.b0 + i + 1, k.h, k.c));
            visitor.image(k, i, p.plane(k.b0 + i, k.h, k.c));
          }
          visitor.head_done(k);
        }
        visitor.images_done(k);
      }
    }
  }
}

// run<Weighted, Normalise, Log>().
template <class Run>
void with_options(const Problem& p, const Run& run) {
  if (p.log) return run.template operator()<false, false, true>();
  if (!p.weighted) return run.template operator()<false, false, false>();
  p.mean ? run.template operator()<true, true, false>() : run.template operator()<true, false, false>();
}

struct Visitor {
  static constexpr bool kReadsX = true;
  Operands& o;
  void images(const Block&) {}
  void head(const Block&) {}
  void head_done(const Block&) {}
  void images_done(const Block&) {}
};

// One row of a block; local copies, which stores to gradients cannot alias.  Logits are rounded before a maximum of
// such is subtracted: of an exact product it would leave up to half an ulp, more than the exponents of float32 from
// 2^31 on.
template <bool Weighted>
struct Row {
  const float *x, *weight_row, *weight_col;

  FA_INLINE Row(const Operands& o, const Rows& image, int64_t y)
      : x(image[y]), weight_row(Weighted ? o.weight_row[y] : x), weight_col(Weighted ? o.weight_col[y] : x) {}
  FA_INLINE vf value(int64_t v) const { return load(x + v * L); }
  FA_INLINE vf row_logit(int64_t v) const {
    if constexpr (Weighted) return rounded(value(v) * load(weight_row + v * L));
    return value(v);
  }
  FA_INLINE vf col_logit(int64_t v) const {
    if constexpr (Weighted) return rounded(value(v) * load(weight_col + v * L));
    return value(v);
  }
};

// One row of the two softmaxes and of their product, from the statistics.
template <bool Weighted>
struct Softmaxes : Row<Weighted> {
  float row_max, row_inverse, row_rest;
  const float *col_max, *col_inverse, *col_rest;

  FA_INLINE Softmaxes(const Operands& o, const Rows& image, int64_t y)
      : Row<Weighted>(o, image, y),
        row_max(o.row_max[y]),
        row_inverse(o.row_inverse.data[y]),
        row_rest(o.row_rest.data[y]),
        col_max(o.col_max.data),
        col_inverse(o.col_inverse.data),
        col_rest(o.col_rest.data) {}
  FA_INLINE vf row_exponent(int64_t v) const { return this->row_logit(v) - row_max; }
  FA_INLINE vf col_exponent(int64_t v) const { return this->col_logit(v) - load(col_max + v * L); }
  FA_INLINE vf row(int64_t v) const {
    const vf e = exp_of(row_exponent(v));
    return e * row_inverse + rounded(e * row_rest);
  }
  FA_INLINE vf col(int64_t v) const {
    const vf e = exp_of(col_exponent(v));
    return e * load(col_inverse + v * L) + rounded(e * load(col_rest + v * L));
  }
  // With one exponential.  With weights the exponents are at most 0, the shifts being maxima: what rounding x log2(e)
  // adds grows only where the product gets small.  Without, they may be 32, see is_near.
  FA_INLINE vf product(int64_t v) const {
    const vf exponent = row_exponent(v) + col_exponent(v);
    vf exponential;
    if constexpr (Weighted)
      exponential = exp_nonpositive(exponent);
    else
      exponential = exp_of(exponent);
    return exponential * (row_inverse * load(col_inverse + v * L));
  }
};

// One row of the logarithms of both softmaxes, added up.
struct LogSoftmaxes : Row<false> {
  float row_max, row_log;
  const float *col_max, *col_log;

  FA_INLINE LogSoftmaxes(const Operands& o, const Rows& image, int64_t y)
      : Row<false>(o, image, y),
        row_max(o.row_max[y]),
        row_log(o.row_log.data[y]),
        col_max(o.col_max.data),
        col_log(o.col_log.data) {}
  FA_INLINE vf operator()(int64_t v) const {
    const int64_t lane = v * L;
    return (value(v) - row_max - row_log) + (value(v) - load(col_max + lane) - load(col_log + lane));
  }
};

// combine over v < vectors of at(v), in four chains where there are as many.
template <class At, class Combine>
FA_INLINE vf over_vectors(int64_t vectors, vf start, const At& at, const Combine& combine) {
  if (vectors <= 2) {
    const vf first = combine(at(0), start);
    return vectors == 2 ? combine(at(1), first) : first;
  }
  vf a = start, b = start, c = start, d = start;
  int64_t v = 0;
  for (; v + 4 <= vectors; v += 4) {
    a = combine(at(v), a), b = combine(at(v + 1), b);
    c = combine(at(v + 2), c), d = combine(at(v + 3), d);
  }
  for (; v < vectors; ++v) a = combine(at(v), a);
  return combine(combine(a, b), combine(c, d));
}

// clang-format off: the order counts
#include "elementwise_attention/forward_impl.h"
#include "elementwise_attention/backward_impl.h"
#include "elementwise_attention/tiled_impl.h"
#include "elementwise_attention/whole_impl.h"
// clang-format on

}  // namespace

extern const Kernels kernels = {
    .whole = {.statistics = whole_statistics, .gradients = whole_gradients},
    .tiled = {.statistics = tiled_statistics,
              .combine_columns = combine_columns,
              .moments = moments,
              .sums = sums,
              .combine_sums = combine_sums,
              .gradients = tiled_gradients},
    .output = output,
    .grad_moments = grad_moments,
    .sum_weights = sum_weights,
};

}  // namespace fused_attn::elementwise_attention::FUSED_ATTN_ISA
