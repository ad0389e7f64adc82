// The CPU kernels of small grids.  Lane i of every vector belongs to the i-th of a group of L (image, head) pairs, so
// that one computation on vectors does L pairs: no lane is idle whatever the size of the grid, no sum runs over lanes
// but those of tables, and keys need no padding.  See the op's README.md.
//
// Included once per instruction set, see common/for_each_instruction_set.h.

namespace fused_attn::rel_attention_2d::small_grids::FUSED_ATTN_ISA {
namespace {

#include "common/simd.h"
// clang-format off: the order counts
#include "rel_attention_2d/shared_impl.h"
#include "rel_attention_2d/unsplit_impl.h"
#include "rel_attention_2d/small_grids/matrices_impl.h"
// clang-format on

// A group of pairs, and a block of whole rows of its queries: what both passes hold.
struct Group {
  const Problem& p;
  const int64_t grid, keys;  // keys: of the grid, then of the prefix
  int64_t most_rows;         // of a block
  Pairs pairs{};
  Matrix key, value;
  Scratch<float> bias_table;                      // (bias_rows, bias_columns, L): key positions count up
  Matrix row_table, col_table;                    // (positions, dk): likewise
  Scratch<int32_t> query_segments, key_segments;  // (positions, L)
  bool masks = false;                             // some query must leave out some key of the grid

  int64_t y0 = 0, rows = 0, queries = 0;  // the block
  Matrix query, score, relative_query;    // relative_query: with the scale of the tables
  Matrix row, col;                        // (queries, hk), (queries, wk): logits

  explicit Group(const Problem& problem) : p(problem), grid(p.hk * p.wk), keys(grid + p.prefix) {
    // The logits of a block, and their gradients, stay in the second-level cache.
    constexpr int64_t kScores = 5600;
    const int64_t wanted = larger(kScores / larger(keys * p.wq, 1), 1), blocks = (p.hq + wanted - 1) / wanted;
    most_rows = (p.hq + blocks - 1) / blocks;
    const int64_t most = most_rows * p.wq;
    key.allocate(keys, p.dk);
    value.allocate(keys, p.dv);
    query.allocate(most, p.dk);
    score.allocate(most, keys);
    if (p.bias_table) bias_table.allocate(p.bias_rows() * p.bias_columns() * L);
    if (p.row_term) row.allocate(most, p.hk);
    if (p.col_term) col.allocate(most, p.wk);
    if (p.tables) relative_query.allocate(most, p.dk);
    if (p.row_length() > 0) row_table.allocate(p.row_length(), p.dk);
    if (p.col_length() > 0) col_table.allocate(p.col_length(), p.dk);
    if (p.query_segments) query_segments.allocate(p.queries() * L), key_segments.allocate(grid * L);
  }

  Lines query_lines(const TensorView& view, int64_t depth) const { return {view, y0, rows, p.wq, depth}; }
  Lines key_lines(const TensorView& view, int64_t depth) const { return {view, 0, p.hk, p.wk, depth}; }

  void pack_keys(const TensorView& view, const TensorView& prefix, const Matrix& to) const {
    pack(key_lines(view, to.depth), pairs, 1.0f, to);
    const TensorView prefix_grid = as_grid(prefix);
    if (p.prefix > 0) pack({prefix_grid, 0, p.prefix, 1, to.depth}, pairs, 1.0f, to, grid);
  }
  void unpack_keys(const TensorView& view, const TensorView& prefix, const Matrix& from) const {
    unpack(key_lines(view, from.depth), pairs, 1.0f, from);
    const TensorView prefix_grid = as_grid(prefix);
    if (p.prefix > 0) unpack({prefix_grid, 0, p.prefix, 1, from.depth}, pairs, 1.0f, from, grid);
  }

  void pack_tables() {
    for (int64_t lane = 0; lane < L; ++lane) {
      const int64_t h = pairs.head[lane];
      if (p.bias_table) pack_bias_table(p, h, p.bias_columns() * L, bias_table + lane, L);
      auto pack_table = [&](const TensorView& view, int64_t length, const Matrix& to) {
        for (int64_t i = 0; i < length; ++i) {
          const int64_t position = p.key_minus_query ? i : length - 1 - i;
          gather(view, h * view.stride[0] + position * view.stride[1], view.stride[2], p.dk, 1.0f, to.at(i) + lane, L);
        }
      };
      pack_table(p.row_term, p.row_length(), row_table);
      pack_table(p.col_term, p.col_length(), col_table);
    }
  }

  void pack_segments() {
    masks = false;
    if (!p.query_segments || grid == 0) return;
    for (int64_t lane = 0; lane < pairs.count; ++lane)
      if (lane == 0 || pairs.set[lane] != pairs.set[lane - 1]) masks |= is_masked(pairs.set[lane]);
    if (!masks) return;
    for (int64_t lane = 0; lane < L; ++lane) {
      const int64_t set = pairs.set[lane];
      const int32_t *of_query = p.query_segments + set * p.queries(), *of_key = p.key_segments + set * grid;
      for (int64_t k = 0; k < grid; ++k) key_segments[k * L + lane] = of_key[k] < 0 ? -1 : of_key[k];
      for (int64_t q = 0; q < p.queries(); ++q)  // -2, which is no key's: a query of a negative segment
        query_segments[q * L + lane] = of_query[q] < 0 ? -2 : of_query[q];
    }
  }

  // Whether some query of a set must leave out some key.
  bool is_masked(int64_t set) const {
    const int32_t *of_query = p.query_segments + set * p.queries(), *of_key = p.key_segments + set * grid;
    bool masked = of_key[0] < 0;
    for (int64_t k = 0; k < grid; ++k) masked |= of_key[k] != of_key[0];
    for (int64_t q = 0; q < p.queries(); ++q) masked |= of_query[q] != of_key[0];
    return masked;
  }

  void start(const Pairs& next) {
    const bool same_heads = pairs.count == L && pairs.head[0] == next.head[0];  // or fewer of them
    pairs = next;
    if (!same_heads) pack_tables();
    pack_segments();
    pack_keys(p.key, p.prefix_key, key);
    pack_keys(p.value, p.prefix_value, value);
  }

  // The logits of rows [y, y + count) of the queries, but for what each_logit adds.
  void start_block(int64_t y, int64_t count) {
    y0 = y, rows = count, queries = count * p.wq;
    pack(query_lines(p.query, p.dk), pairs, p.scale, query);
    if (p.tables) pack(query_lines(p.query, p.dk), pairs, p.rel_scale, relative_query);
    auto fill = [&](const TensorView& term, const Matrix& table, bool of_rows, const Matrix& to) {
      if (!term) return;
      if (!p.tables) return pack(query_lines(term, to.depth), pairs, 1.0f, to);
      each_window(of_rows, [&](int64_t first, int64_t step, int64_t n, int64_t position) {
        product(to.depth, n, p.dk, over_depth(table, position), over_depth(relative_query, first, step),
                to_depth(to, first, step));
      });
    };
    fill(p.row_term, row_table, true, row);
    fill(p.col_term, col_table, false, col);
    product(keys, queries, p.dk, over_depth(key), over_depth(query), to_depth(score));
  }

  template <class Body>
  void each_block(const Body& body) {
    const int64_t blocks = (p.hq + most_rows - 1) / most_rows;
    for (int64_t i = 0; i < blocks; ++i) {
      const int64_t y = split_begin(p.hq, blocks, i);
      start_block(y, split_begin(p.hq, blocks, i + 1) - y);
      body();
    }
  }

  // The queries of the block that see the same part of a table, those of an image row for the rows' and of a column for
  // the columns': body(first, step to the next, how many, table position of their first key).
  template <class Body>
  void each_window(bool of_rows, const Body& body) const {
    if (of_rows)
      for (int64_t y = 0; y < rows; ++y) body(y * p.wq, 1, p.wq, p.hq - 1 - y0 - y);
    else
      for (int64_t x = 0; x < p.wq; ++x) body(x, p.wq, rows, p.wq - 1 - x);
  }

  // First number of a query's biases: for key row y, bias_columns() further each.
  int64_t bias_start(int64_t q) const { return (p.hq - 1 - y0 - q / p.wq) * p.bias_columns() + p.wq - 1 - q % p.wq; }

  // body(key, logit, whether the queries attend to it) for every key of query q of the block.  What loops need is
  // copied first, here and below: a store of a vector may alias anything, and members would be read again after each.
  template <Bias B, bool Masks, class Body>
  FA_INLINE void each_logit(int64_t q, const Body& body) const {
    const int64_t height = p.hk, width = p.wk, all_keys = keys, bias_row = p.bias_columns() * L;
    const float* from = score.at(q);
    const float* bias = B == Bias::table ? bias_table + bias_start(q) * L : nullptr;
    const float *of_rows = nullptr, *of_columns = nullptr;
    if (B == Bias::axes) of_rows = p.row_term ? row.at(q) : nullptr, of_columns = p.col_term ? col.at(q) : nullptr;
    const int32_t* segments = key_segments.data;
    const vi own = Masks ? load(query_segments + (y0 * p.wq + q) * L) : vi{}, all = vi{} == vi{};
    int64_t k = 0;
    for (int64_t y = 0; y < height; ++y) {
      const vf of_row = of_rows ? load(of_rows + y * L) : vf{};
      for (int64_t x = 0; x < width; ++x, ++k) {
        // Added last: starting the sum from a large bias would round every term of it at the bias's magnitude.
        vf logit = load(from + k * L);
        if constexpr (B == Bias::table) logit += load(bias + y * bias_row + x * L);
        if constexpr (B == Bias::axes) logit += of_columns ? load(of_columns + x * L) + of_row : of_row;
        vi attended = all;
        if constexpr (Masks) {
          attended = load(segments + k * L) == own;
          logit = select(attended, logit, broadcast(-kInfinity));
        }
        body(k, logit, attended);
      }
    }
    for (; k < all_keys; ++k) body(k, load(from + k * L), all);
  }

  // Of a query of the block, among all queries.
  int64_t row_of(int64_t q, int64_t lane) const { return pairs.of[lane] * p.queries() + y0 * p.wq + q; }
};

// What of the weights of a query of each pair is not dropped.
template <bool Dropout>
struct Kept {
  vu key0, key1;
  uint32_t drop_below;

  Kept(const Group& group, int64_t q) : drop_below(group.p.drop_below) {
    for (int lane = 0; Dropout && lane < L; ++lane) {
      const DropoutKeys keys(group.p.seed, group.row_of(q, lane));
      key0[lane] = keys.key0, key1[lane] = keys.key1;
    }
  }
  FA_INLINE vf of(int64_t k, vf x) const {
    if constexpr (!Dropout) return x;
    return select(kept(vu{} + static_cast<uint32_t>(k) * 0x9E3779B1u, key0, key1, drop_below), x, vf{});
  }
};

// --- forward -------------------------------------------------------------------------------------------------------

struct GroupForward : Group {
  const Forward& p;
  Matrix out;

  explicit GroupForward(const Forward& problem) : Group(problem), p(problem) { out.allocate(most_rows * p.wq, p.dv); }

  // Weights in place of the logits of a query, but for the division by their sum, and the query's statistics; what
  // remains to multiply its output with is returned.
  template <Bias B, bool Dropout, bool Masks>
  vf softmax(int64_t q) {
    float* weights = score.at(q);
    vf max = broadcast(-kInfinity);
    each_logit<B, Masks>(q, [&](int64_t k, vf logit, vi) FA_INLINE_CALL {
      store(weights + k * L, logit);
      max = maximum(logit, max);
    });
    const vf shift = select(max == broadcast(-kInfinity), vf{}, max);  // every key masked: weights of exactly 0
    const Kept<Dropout> kept(*this, q);
    const int64_t all_keys = keys;
    Sum sum;
    for (int64_t k = 0; k < all_keys; ++k) {
      const vf weight = exp_nonpositive(load(weights + k * L) - shift);
      sum.add(weight);
      store(weights + k * L, kept.of(k, weight));
    }
    const vf total = sum.total();
    for (int64_t lane = 0; lane < pairs.count; ++lane) {
      float* statistics = p.statistics + 2 * row_of(q, lane);
      statistics[0] = max[lane], statistics[1] = total[lane];
    }
    return select((max == broadcast(-kInfinity)) & (total == vf{}), vf{}, p.keep_scale / total);
  }

  void run(const Pairs& next) {
    start(next);
    each_block([&] {
      Scratch<float> factor(queries * L);
      with_options(p, masks, [&]<Bias B, bool Dropout, bool Masks>() {
        for (int64_t q = 0; q < queries; ++q) store(factor + q * L, softmax<B, Dropout, Masks>(q));
      });
      product(queries, p.dv, keys, over_depth(score), over_positions(value), to_positions(out));
      for (int64_t q = 0; q < queries; ++q)
        for (int64_t d = 0; d < p.dv; ++d) store(out.at(q) + d * L, load(out.at(q) + d * L) * load(factor + q * L));
      unpack(query_lines(p.out, p.dv), pairs, 1.0f, out);
    });
  }
};

Pairs pairs_of(const Problem& p, int64_t group) { return {p.batch, p.heads, p.segment_sets, group}; }

void forward(const Forward& p, int64_t begin, int64_t end) {
  GroupForward group(p);
  for (int64_t task = begin; task < end; ++task) group.run(pairs_of(p, task));
}

// --- backward ------------------------------------------------------------------------------------------------------

struct GroupBackward : Group {
  const Backward& p;
  Matrix grad_out, grad_score, grad_query, grad_key, grad_value;
  Matrix grad_relative, grad_row_table, grad_col_table;
  Scratch<float> grad_block, grad_bias;  // (bias_rows, bias_columns, L): of a block of queries, of all
  Scratch<float> bias_sum;               // (bias_rows, bias_columns)

  explicit GroupBackward(const Backward& problem) : Group(problem), p(problem) {
    const int64_t most = most_rows * p.wq;
    grad_out.allocate(most, p.dv);
    grad_score.allocate(most, keys);
    grad_query.allocate(most, p.dk);
    grad_key.allocate(keys, p.dk);
    grad_value.allocate(keys, p.dv);
    if (p.tables) grad_relative.allocate(most, p.dk);
    if (p.row_length() > 0) grad_row_table.allocate(p.row_length(), p.dk);
    if (p.col_length() > 0) grad_col_table.allocate(p.col_length(), p.dk);
    if (!p.bias_table) return;
    grad_block.allocate(p.bias_rows() * p.bias_columns() * L);
    grad_block.fill(0.0f);
    grad_bias.allocate(p.bias_rows() * p.bias_columns() * L);
    bias_sum.allocate(p.bias_rows() * p.bias_columns());
  }

  // From the logits and the gradients of the weights of a query to its weights and the gradients of the logits, in
  // place, with their sums by row, column or table position.
  template <Bias B, bool Dropout, bool Masks>
  void softmax(int64_t q) {
    vf max, normalize;
    for (int lane = 0; lane < L; ++lane) {
      const float* statistics = p.statistics + 2 * row_of(q, lane);
      const bool masked = statistics[1] == 0.0f;
      max[lane] = masked ? kInfinity : statistics[0];  // weights of exactly 0
      normalize[lane] = masked ? 0.0f : 1.0f / statistics[1];
    }
    float *weights = score.at(q), *grad = grad_score.at(q);
    const Kept<Dropout> kept(*this, q);
    Sum sum;  // equals out.grad_out, but lacks the rounding of out, an error that all gradients of a row would share
    each_logit<B, Masks>(q, [&](int64_t k, vf logit, vi attended) FA_INLINE_CALL {
      vf weight = exp_nonpositive(logit - max) * normalize, grad_weight = kept.of(k, load(grad + k * L));
      if constexpr (Masks)  // a hidden key has no part, also where the query or its own value is NaN
        weight = select(attended, weight, vf{}), grad_weight = select(attended, grad_weight, vf{});
      store(weights + k * L, weight);
      if constexpr (Dropout || Masks) store(grad + k * L, grad_weight);
      sum.add(weight * grad_weight);
    });
    const vf delta = sum.total();
    auto grad_of_logit = [&](int64_t k, vi attended) FA_INLINE_CALL {
      const vf weight = load(weights + k * L);
      vf grad_logit = weight * (load(grad + k * L) - delta);
      if constexpr (Masks) grad_logit = select(attended, grad_logit, vf{});
      if constexpr (Dropout) store(weights + k * L, kept.of(k, weight));
      store(grad + k * L, grad_logit);
      return grad_logit;
    };
    const int64_t height = p.hk, width = p.wk, all_keys = keys, bias_row = p.bias_columns() * L;
    const int32_t* segments = key_segments.data;
    const vi own = Masks ? load(query_segments + (y0 * p.wq + q) * L) : vi{}, all = vi{} == vi{};
    float* to_bias = B == Bias::table ? grad_block + bias_start(q) * L : nullptr;
    float *to_rows = nullptr, *to_columns = nullptr;  // in the place of the logits
    if (B == Bias::axes) to_rows = p.row_term ? row.at(q) : nullptr, to_columns = p.col_term ? col.at(q) : nullptr;
    for (int64_t x = 0; to_columns && x < width; ++x) store(to_columns + x * L, vf{});
    int64_t k = 0;
    for (int64_t y = 0; y < height; ++y) {
      vf of_row{};
      for (int64_t x = 0; x < width; ++x, ++k) {
        const vf grad_logit = grad_of_logit(k, Masks ? load(segments + k * L) == own : all);
        if constexpr (B == Bias::table) add_to(to_bias + y * bias_row + x * L, grad_logit);
        if constexpr (B == Bias::axes) {
          of_row += grad_logit;
          if (to_columns) add_to(to_columns + x * L, grad_logit);
        }
      }
      if (to_rows) store(to_rows + y * L, of_row);
    }
    for (; k < all_keys; ++k) grad_of_logit(k, all);
  }

  // Gradients of a table and, through it, of the queries, from those of the logits.
  void backward_of_table(bool of_rows, const Matrix& grad_logits, const Matrix& table, const Matrix& grad_table) {
    each_window(of_rows, [&](int64_t first, int64_t step, int64_t n, int64_t position) {
      product(n, p.dk, grad_logits.depth, over_depth(grad_logits, first, step), over_positions(table, position),
              to_positions(grad_relative, first, step), true);
      product(grad_logits.depth, p.dk, n, over_positions(grad_logits, first, step),
              over_positions(relative_query, first, step), to_positions(grad_table, position), true);
    });
  }

  void run_block() {
    pack(query_lines(p.grad_out, p.dv), pairs, p.keep_scale, grad_out);
    product(keys, queries, p.dv, over_depth(value), over_depth(grad_out), to_depth(grad_score));
    with_options(p, masks, [&]<Bias B, bool Dropout, bool Masks>() {
      for (int64_t q = 0; q < queries; ++q) softmax<B, Dropout, Masks>(q);
    });
    const bool add = y0 > 0;  // to what the blocks before contributed
    product(keys, p.dv, queries, over_positions(score), over_positions(grad_out), to_positions(grad_value), add);
    product(keys, p.dk, queries, over_positions(grad_score), over_positions(query), to_positions(grad_key), add);
    product(queries, p.dk, keys, over_depth(grad_score), over_positions(key), to_positions(grad_query));
    if (p.tables) {
      grad_relative.data.fill(0.0f);
      if (p.row_term) backward_of_table(true, row, row_table, grad_row_table);
      if (p.col_term) backward_of_table(false, col, col_table, grad_col_table);
      for (int64_t i = 0; i < queries * grad_query.stride; i += L) {
        const vf of_products = load(grad_query.at(0) + i) * p.scale;
        store(grad_query.at(0) + i, of_products + load(grad_relative.at(0) + i) * p.rel_scale);
      }
    }
    unpack(query_lines(p.grad_query, p.dk), pairs, p.tables ? 1.0f : p.scale, grad_query);
    if (!p.tables && p.row_term) unpack(query_lines(p.grad_row_term, p.hk), pairs, 1.0f, row);
    if (!p.tables && p.col_term) unpack(query_lines(p.grad_col_term, p.wk), pairs, 1.0f, col);
    for (int64_t i = 0; p.bias_table && i < grad_bias.size; i += L) {  // sums of a block first: no long chains
      add_to(grad_bias + i, load(grad_block + i));
      store(grad_block + i, vf{});
    }
  }

  void run(const Pairs& next, int64_t group) {
    start(next);
    grad_row_table.data.fill(0.0f);
    grad_col_table.data.fill(0.0f);
    grad_bias.fill(0.0f);
    each_block([&] { run_block(); });
    unpack_keys(p.grad_key, p.grad_prefix_key, grad_key);  // the packed query carries the scale
    unpack_keys(p.grad_value, p.grad_prefix_value, grad_value);

    // A group has pairs of every head, or of at most one image with each.
    if (p.heads <= L)
      for (int64_t head = 0; head < p.heads; ++head) sum_tables(head, p.part(head, group, 0));
    else
      for (int64_t lane = 0; lane < pairs.count; ++lane)
        sum_tables(pairs.head[lane], p.part(pairs.head[lane], pairs.image[lane], 0));
  }

  // The gradients of a head's tables, as a part of their sums.
  void sum_tables(int64_t head, int64_t part) {
    vi used{};
    for (int64_t lane = 0; lane < pairs.count; ++lane) used[lane] = pairs.head[lane] == head ? -1 : 0;
    float* to = p.table_partials + part * (p.row_length() + p.col_length()) * p.dk;
    auto sum = [&](const Matrix& from, int64_t length) {
      for (int64_t i = 0; i < length; ++i)
        sum_lanes_of(from.at(i), p.dk, used, to + (p.key_minus_query ? i : length - 1 - i) * p.dk);
      to += length * p.dk;
    };
    sum(grad_row_table, p.row_length());
    sum(grad_col_table, p.col_length());
    if (!p.bias_table) return;
    const int64_t size = p.bias_rows() * p.bias_columns();
    sum_lanes_of(grad_bias.data, size, used, bias_sum.data);
    unpack_bias_table(p, bias_sum.data, p.bias_columns(), p.bias_partials + part * size);
  }
};

void backward(const Backward& p, int64_t begin, int64_t end) {
  GroupBackward group(p);
  for (int64_t task = begin; task < end; ++task) group.run(pairs_of(p, task), task);
}

}  // namespace

extern const Kernels kernels = {.lanes = L, .forward = forward, .backward = backward};

}  // namespace fused_attn::rel_attention_2d::small_grids::FUSED_ATTN_ISA
