// The CPU kernels of small grids whose keys and depths fill whole vectors.  A pair of an image and a head is done at a
// time, all of it in the first two levels of cache: keys lie along the lanes for the logits, depths for all else, and
// the biases of a block of queries are a matrix as the logits are.  Rows are read and written where they are if they
// can be, and those of the next pair are fetched meanwhile.  See the op's README.md.
//
// Included once per instruction set, see common/for_each_instruction_set.h.

namespace fused_attn::rel_attention_2d::whole_pairs::FUSED_ATTN_ISA {
namespace {

#include "common/simd.h"
// clang-format off: the order counts
#include "rel_attention_2d/shared_impl.h"
#include "rel_attention_2d/unsplit_impl.h"
#include "rel_attention_2d/whole_pairs/ahead_impl.h"
#include "rel_attention_2d/whole_pairs/product_impl.h"
#include "rel_attention_2d/whole_pairs/pair_impl.h"
// clang-format on

// --- forward -------------------------------------------------------------------------------------------------------

struct PairForward : Pair {
  static constexpr int64_t kScores = 12000;  // of a block: a part of the second-level cache

  const Forward& p;
  Rows out;
  Scratch<float> factor;  // of each query of a block: what remains to multiply its output with

  explicit PairForward(const Forward& problem) : Pair(problem, kScores), p(problem), factor(round_up(most, L)) {
    ahead.add(p.out, p.hq, p.wq, p.dv);
    out.allocate(most, p.dv);
  }

  // Weights in place of the logits of L queries or fewer, but for the division by their sum, and their statistics.
  template <Bias B, bool Dropout, bool Masks>
  void softmax(int64_t first, int64_t count) {
    const int64_t all = vectors;
    vf part[L];
    for (int64_t i = 0; i < L; ++i) part[i] = broadcast(-kInfinity);
    for (int64_t i = 0; i < count; ++i) {
      float* logits = score + (first + i) * stride;
      const Attended attended = attended_by(first + i);
      vf max = part[i];
      for (int64_t v = 0; v < all; ++v) {
        vf x = logit<B>(first + i, v);
        if constexpr (Masks) x = select(attended.of(v), x, broadcast(-kInfinity));
        if constexpr (B != Bias::none || Masks) store(logits + v * L, x);
        max = maximum(x, max);
      }
      part[i] = max;
    }
    const vf max = combine_lanes_of_each(part, kLarger);
    alignas(64) float shift[L];
    store(shift, select(max == broadcast(-kInfinity), vf{}, max));  // every key masked: weights of exactly 0
    for (int64_t i = 0; i < L; ++i) part[i] = vf{};
    for (int64_t i = 0; i < count; ++i) {
      float* weights = score + (first + i) * stride;
      const Kept<Dropout> kept(*this, first + i);
      const vf own = broadcast(shift[i]);
      vf sum{};
      for (int64_t v = 0; v < all; ++v) {
        const vf weight = exp_nonpositive(load(weights + v * L) - own);
        sum += weight;
        store(weights + v * L, kept.of(v, weight));
      }
      part[i] = sum;
    }
    const vf total = sum_lanes_of_each(part);
    store(factor + first, select((max == broadcast(-kInfinity)) & (total == vf{}), vf{}, p.keep_scale / total));
    float* statistics = p.statistics + 2 * row_of(first);
    for (int64_t i = 0; i < count; ++i) statistics[2 * i] = max[i], statistics[2 * i + 1] = total[i];
  }

  void run(Place place, Place next) {
    start(place, next);
    each_block([&] {
      with_options(p, masks, [&]<Bias B, bool Dropout, bool Masks>() {
        for (int64_t i = 0; i < queries; i += L) softmax<B, Dropout, Masks>(i, smaller(L, queries - i));
      });
      lend_queries(p.out, out);
      product(ahead, queries, out.vectors, keys, {score.data, stride, 1}, value.first, value.stride, out.first,
              out.stride, nullptr, {factor.data, 1});
      write_queries(p.out, out);
    });
  }
};

void forward(const Forward& p, int64_t begin, int64_t end) {
  PairForward pair(p);
  auto place = [&](int64_t task) -> Place {
    return p.head_by_head ? Place{task % p.batch, task / p.batch} : Place{task / p.heads, task % p.heads};
  };
  for (int64_t task = begin; task < end; ++task) pair.run(place(task), place(smaller(task + 1, end - 1)));
}

// --- backward ------------------------------------------------------------------------------------------------------

// Gradients of an axis: of its logits, of its table.
struct AxisGradient {
  Rows logits, table;

  void allocate(const Axis& axis, int64_t queries) {
    logits.allocate(queries, axis.logits.depth);
    if (axis.length > 0) table.allocate(axis.length, axis.table.depth);
  }
};

struct PairBackward : Pair {
  static constexpr int64_t kScores = 9000;  // of a block, and as many gradients

  const Backward& p;
  Rows grad_out, grad_query, grad_key, grad_value, grad_relative;
  Scratch<float> turned_value, grad_score;
  Scratch<float> grad_bias,
      grad_table;          // (heads or 1, queries, stride): of some images; (heads, bias_rows, bias_columns)
  bool adds_bias = false;  // to those of images before
  AxisGradient grad_row, grad_col;

  explicit PairBackward(const Backward& problem) : Pair(problem, kScores), p(problem) {
    ahead.add(p.grad_out, p.hq, p.wq, p.dv);
    ahead.add(p.grad_query, p.hq, p.wq, p.dk);
    ahead.add(p.grad_key, p.hk, p.wk, p.dk);
    ahead.add(p.grad_value, p.hk, p.wk, p.dv);
    grad_out.allocate(most, p.dv);
    grad_query.allocate(most, p.dk);
    grad_key.allocate(keys, p.dk);
    grad_value.allocate(keys, p.dv);
    turned_value.allocate(value.own_stride * stride);
    grad_score.allocate(most * stride);
    if (p.row_term) grad_row.allocate(row, most);
    if (p.col_term) grad_col.allocate(col, most);
    if (p.tables) grad_relative.allocate(most, p.dk);
    if (!p.bias_table) return;
    grad_bias.allocate((p.keeps_biases ? p.heads : 1) * p.queries() * stride);
    grad_table.allocate(p.heads * p.bias_rows() * p.bias_columns());
  }

  // From the products of L queries or fewer and the gradients of their weights to the weights and the gradients of the
  // logits, in place.
  template <Bias B, bool Dropout, bool Masks>
  void softmax(int64_t first, int64_t count) {
    const int64_t all = vectors;
    const bool add = adds_bias;
    alignas(64) float delta[L];
    const float* statistics = p.statistics + 2 * row_of(first);
    vf part[L];
    for (int64_t i = 0; i < L; ++i) part[i] = vf{};
    for (int64_t i = 0; i < count; ++i) {
      float *weights = score + (first + i) * stride, *grad = grad_score + (first + i) * stride;
      const Kept<Dropout> kept(*this, first + i);
      const Attended attended = attended_by(first + i);
      const bool masked = statistics[2 * i + 1] == 0.0f;  // weights of exactly 0
      const vf max = broadcast(masked ? kInfinity : statistics[2 * i]);
      const vf normalize = broadcast(masked ? 0.0f : 1.0f / statistics[2 * i + 1]);
      vf sum{};  // equals out.grad_out, but lacks the rounding of out, an error that all gradients of a row would share
      for (int64_t v = 0; v < all; ++v) {
        vf weight = exp_nonpositive(logit<B>(first + i, v) - max) * normalize;
        vf grad_weight = kept.of(v, load(grad + v * L));
        if constexpr (Masks) {  // a hidden key has no part, also where the query or its own value is NaN
          const vi seen = attended.of(v);
          weight = select(seen, weight, vf{}), grad_weight = select(seen, grad_weight, vf{});
        }
        store(weights + v * L, weight);
        if constexpr (Dropout || Masks) store(grad + v * L, grad_weight);
        sum += weight * grad_weight;
      }
      part[i] = sum;
    }
    store(delta, sum_lanes_of_each(part));
    for (int64_t i = 0; i < count; ++i) {
      float *weights = score + (first + i) * stride, *grad = grad_score + (first + i) * stride;
      float* to_bias = B == Bias::table ? grad_bias + expanded(head) + (q0 + first + i) * stride : nullptr;
      const Kept<Dropout> kept(*this, first + i);
      const Attended attended = attended_by(first + i);
      const vf own = broadcast(delta[i]);
      for (int64_t v = 0; v < all; ++v) {
        const vf weight = load(weights + v * L);
        vf grad_logit = weight * (load(grad + v * L) - own);
        if constexpr (Masks) grad_logit = select(attended.of(v), grad_logit, vf{});
        if constexpr (Dropout) store(weights + v * L, kept.of(v, weight));
        store(grad + v * L, grad_logit);
        if constexpr (B == Bias::table) store(to_bias + v * L, add ? load(to_bias + v * L) + grad_logit : grad_logit);
      }
    }
  }

  // Gradients of the row and column logits of the block: sums over the columns and rows of the keys.
  void sum_axes() {
    for (int64_t i = 0; i < queries; ++i)
      for (int64_t x = 0; x < p.wk; x += L) {
        const float* from = grad_score + i * stride + x;
        const vi real = first_lanes(p.wk - x);
        vf column{};
        for (int64_t y0 = 0; y0 < p.hk; y0 += L) {
          vf part[L];
          for (int64_t j = 0; j < L; ++j) {
            part[j] = y0 + j < p.hk ? (vf)((vi)load(from + (y0 + j) * p.wk) & real) : vf{};
            column += part[j];
          }
          if (!p.row_term) continue;
          float* to = grad_row.logits.at(i) + y0;
          const vf sums = sum_lanes_of_each(part);
          store(to, x > 0 ? load(to) + sums : sums);
        }
        if (p.col_term) store(grad_col.logits.at(i) + x, column);
      }
  }

  // Gradients of a table and, through it, of the queries, from those of the logits.
  void backward_of_table(bool of_rows, const Axis& axis, const AxisGradient& grad) {
    each_window(of_rows, [&](int64_t first, int64_t step, int64_t count, int64_t position) {
      float *to_query = grad_relative.at(first), *to_table = grad.table.at(position);
      product(ahead, count, grad_relative.vectors, grad.logits.depth, grad.logits.over_depth(first, step),
              axis.table.at(position), axis.table.stride, to_query, step * grad_relative.stride, to_query);
      product(ahead, grad.logits.depth, grad.table.vectors, count, grad.logits.over_rows(first, step),
              relative_query.at(first), step * relative_query.stride, to_table, grad.table.stride, to_table);
    });
  }

  void finish_axes() {
    sum_axes();
    if (!p.tables) {
      if (p.row_term) write_queries(p.grad_row_term, grad_row.logits);
      if (p.col_term) write_queries(p.grad_col_term, grad_col.logits);
      return;
    }
    grad_relative.own.fill(0.0f);
    if (p.row_term) backward_of_table(true, row, grad_row);
    if (p.col_term) backward_of_table(false, col, grad_col);
  }

  void run_block() {
    read_queries(p.grad_out, p.keep_scale, grad_out);
    product(ahead, queries, vectors, p.dv, grad_out.over_depth(), turned_value.data, stride, grad_score.data, stride);
    with_options(p, masks, [&]<Bias B, bool Dropout, bool Masks>() {
      for (int64_t i = 0; i < queries; i += L) softmax<B, Dropout, Masks>(i, smaller(L, queries - i));
    });
    const bool last = q0 + queries == p.queries();
    auto to_keys = [&](const Scratch<float>& weights, const Rows& from, const Rows& to, Factors factors) {
      product(ahead, keys, to.vectors, queries, {weights.data, 1, stride}, from.first, from.stride, to.first, to.stride,
              q0 > 0 ? to.first : nullptr, last ? factors : Factors{});  // on top of what the blocks before contributed
    };
    const Factors scale = {&p.scale, 0};
    to_keys(score, grad_out, grad_value, {});
    to_keys(grad_score, query, grad_key, scale);
    if (!p.tables) lend_queries(p.grad_query, grad_query);
    product(ahead, queries, grad_query.vectors, keys, {grad_score.data, stride, 1}, key.first, key.stride,
            grad_query.first, grad_query.stride, nullptr, scale);
    if (p.row_term || p.col_term) finish_axes();
    for (int64_t i = 0; p.tables && i < queries * grad_query.stride; i += L)
      add_to(grad_query.first + i, load(grad_relative.first + i) * p.rel_scale);
    write_queries(p.grad_query, grad_query);
  }

  float* grad_table_of(int64_t h) const { return grad_table + h * p.bias_rows() * p.bias_columns(); }
  // The gradients of the head's free table, with those of its logits.
  void add_biases() {
    const float* const from = grad_bias + expanded(head);
    for (int64_t x = 0; x < p.wq; ++x)
      for (int64_t i = 0; i < p.bias_rows(); ++i) {
        const int64_t begin = larger(p.hq - 1 - i, 0), end = smaller(p.hk + p.hq - 1 - i, p.hq);  // query rows
        float* to = grad_table_of(head) + i * p.bias_columns() + p.wq - 1 - x;
        for (int64_t xk = 0; xk < p.wk; xk += L) {
          vf sum{};
          for (int64_t y = begin; y < end; ++y)
            sum += load(from + (y * p.wq + x) * stride + (i - p.hq + 1 + y) * p.wk + xk);
          add_to(to + xk, (vf)((vi)sum & first_lanes(p.wk - xk)));
        }
      }
  }

  void run(Place place, Place next) {
    start(place, next);
    turn(value, keys, stride, turned_value.data);
    lend_keys(p.grad_key, grad_key);
    lend_keys(p.grad_value, grad_value);
    each_block([&] { run_block(); });
    write_keys(p.grad_key, p.grad_prefix_key, grad_key);
    write_keys(p.grad_value, p.grad_prefix_value, grad_value);
  }

  // The gradients of tables, as a part of their sums.
  void write_tables(int64_t h, int64_t part) {
    if (p.bias_table)
      return unpack_bias_table(p, grad_table_of(h), p.bias_columns(),
                               p.bias_partials + part * p.bias_rows() * p.bias_columns());
    float* to = p.table_partials + part * (p.row_length() + p.col_length()) * p.dk;
    auto write = [&](const Axis& axis, const AxisGradient& grad) {
      for (int64_t i = 0; i < axis.length; ++i)
        __builtin_memcpy(to + axis.position(p, i) * p.dk, grad.table.at(i), p.dk * sizeof(float));
      to += axis.length * p.dk;
    };
    write(row, grad_row);
    write(col, grad_col);
  }
};

void backward(const Backward& p, int64_t begin, int64_t end) {
  PairBackward pair(p);
  auto image_run = [&](int64_t task) { return p.head_by_head ? task % p.image_runs : task / p.head_runs; };
  auto head_run = [&](int64_t task) { return p.head_by_head ? task / p.image_runs : task % p.head_runs; };
  auto images = [&](int64_t run) { return split_begin(p.batch, p.image_runs, run); };
  auto heads = [&](int64_t run) { return split_begin(p.heads, p.head_runs, run); };
  constexpr int64_t kMostImages = 16;  // whose gradients of biases are summed before these are: no long chains
  const int64_t most_images = p.keeps_biases || p.head_by_head ? kMostImages : 1;
  for (int64_t task = begin; task < end; ++task) {
    pair.grad_table.fill(0.0f);
    pair.grad_row.table.own.fill(0.0f);
    pair.grad_col.table.own.fill(0.0f);
    const int64_t run = image_run(task), b0 = images(run), b1 = images(run + 1);
    const int64_t h0 = heads(head_run(task)), h1 = heads(head_run(task) + 1);
    const int64_t following = smaller(task + 1, end - 1);
    for (int64_t b = b0; b < b1; ++b)
      for (int64_t h = h0; h < h1; ++h) {
        const Place next = h + 1 < h1   ? Place{b, h + 1}
                           : b + 1 < b1 ? Place{b + 1, h0}
                                        : Place{images(image_run(following)), heads(head_run(following))};
        pair.adds_bias = (b - b0) % most_images > 0;
        pair.run({b, h}, next);
        if (p.bias_table && (b + 1 == b1 || (b + 1 - b0) % most_images == 0)) pair.add_biases();
      }
    for (int64_t h = h0; h < h1; ++h) pair.write_tables(h, p.part(h, run, 0));
  }
}

}  // namespace

extern const Kernels kernels = {
    .lanes = L, .forward = L >= 8 ? forward : nullptr, .backward = L >= 8 ? backward : nullptr};

}  // namespace fused_attn::rel_attention_2d::whole_pairs::FUSED_ATTN_ISA
