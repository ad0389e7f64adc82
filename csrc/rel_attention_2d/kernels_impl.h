// The CPU kernels of relative-position 2D attention; see the op's README.md for the method.
//
// Included once per instruction set, see common/for_each_instruction_set.h.  Keys lie along the lanes; a block of QB
// queries meets a tile of key vectors at a time, so that nothing larger than QB x tile exists of the N x N map.

namespace fused_attn::rel_attention_2d::FUSED_ATTN_ISA {
namespace {

#include "common/simd.h"
#include "rel_attention_2d/shared_impl.h"

constexpr int QB = 32;  // queries to a block
// Key vectors to a tile: up to 32x32 keys in one, so that forward never rescales and backward sees whole rows; fewer in
// three parts, of which all has to be in the second-level cache.  As many blocks meet a tile while it is there.
constexpr int kTile = (FUSED_ATTN_TILES == 3 ? 512 : 1024) / L;
constexpr int kBlocks = FUSED_ATTN_TILES == 3 ? 8 : 4;
constexpr int64_t kKeyChunk = 64;  // keys whose rows stay in the first-level cache while the queries pass by

// Row and column of every query.
struct QueryGrid {
  Scratch<int32_t> y, x;

  explicit QueryGrid(const Problem& p) : y(p.queries()), x(p.queries()) {
    for (int64_t q = 0; q < p.queries(); ++q) y[q] = q / p.wq, x[q] = q % p.wq;
  }
  FA_INLINE int64_t offset(const TensorView& view, int64_t b, int64_t h, int64_t q) const {
    return head_offset(view, b, h) + y[q] * view.stride[2] + x[q] * view.stride[3];
  }
};

FA_INLINE void set_zero(float* to, int64_t count) {
  for (int64_t i = 0; i < count; ++i) to[i] = 0.0f;
}

FA_INLINE void copy(const float* from, int64_t count, float* to) {
  for (int64_t i = 0; i < count; ++i) to[i] = from[i];
}

// How the logits get their position terms: rows of one number and columns, where a vector of keys lies in one image
// row; the same where it holds parts of several; or a free table.
enum class Bias { one_row, several_rows, table };

// How keys map to vectors.  A group is `rows` whole image rows padded to `vectors` vectors, so that the column
// logits are the same for every group and a group has a fixed lane -> (row of the group, column) pattern.
struct KeyLayout {
  int64_t wk, rows, groups, vectors;

  explicit KeyLayout(const Problem& p) : wk(p.wk) {
    // Several rows to a group waste fewer lanes on narrow images; each vector then holds parts of a few rows.
    constexpr int64_t kMostRows = 16;
    // Instructions for a vector of keys, roughly: to each number of a query or value, for the softmax, and for picking
    // row logits where the rows of a vector differ, to each of them.
    constexpr int64_t kProduct = 2, kSoftmax = 20, kPick = 4, kPickRow = 2;
    double best = kInfinity;
    for (int64_t candidate = 1; candidate <= kMostRows && candidate <= (p.hk > 1 ? p.hk : 1); ++candidate) {
      const int64_t groups_ = (p.hk + candidate - 1) / candidate, vectors_ = vectors_of(candidate * wk);
      const int64_t pick = candidate > 1 ? kPick + kPickRow * (L / (wk > 0 ? wk : 1)) : 0;
      const double cost = double(groups_ * vectors_) * (kProduct * (p.dk + p.dv) + kSoftmax + pick);
      if (cost < best) best = cost, rows = candidate, groups = groups_, vectors = vectors_;
    }
  }
};

// The key vectors of a task: those of groups [group0, group0 + groups), then from the start of a panel on those of the
// prefix keys.
struct KeyRange {
  int64_t group0, groups, prefix;
  int64_t grid_vectors, prefix_begin, vectors;
  int64_t lanes;  // up to the last that holds a key

  KeyRange(const KeyLayout& keys, int64_t first, int64_t end, int64_t prefix_)
      : group0(first), groups(end - first), prefix(prefix_), grid_vectors(groups * keys.vectors) {
    prefix_begin = prefix > 0 ? round_up(grid_vectors, NR) : grid_vectors;
    vectors = prefix_begin + vectors_of(prefix);
    lanes = prefix > 0 ? prefix_begin * L + prefix
                       : smaller(groups, 1) * ((groups - 1) * keys.vectors * L + keys.rows * keys.wk);
  }
  // How many of `count` vectors from v0 on are the grid's.
  int64_t grid_part(int64_t v0, int64_t count) const { return smaller(count, larger(grid_vectors - v0, 0)); }
};

// Where the heads of a position lie side by side, a row is a few cache lines a large stride away from the next, which
// no hardware follows: fetches what the next task reads (or writes) instead of the row at `offset`.
template <bool Write = false>
FA_INLINE void prefetch_next(const Problem& p, const TensorView& view, int64_t offset, int64_t depth) {
  const int64_t size = view.dtype == DType::float32 ? 4 : 2;
  if (view.stride[4] != 1 || view.stride[1] >= view.stride[3] || depth * size < 64) return;
  const int64_t next = offset + (p.bias_table ? view.stride[0] : view.stride[1]);
  const char* at = static_cast<const char*>(view.data) + next * size;
  for (int64_t i = 0; i < depth * size; i += 64) __builtin_prefetch(at + i, Write);
}

// One row of a (batch, heads, y, x, depth) tensor.
FA_INLINE void gather_row(const Problem& p, const TensorView& view, int64_t offset, int64_t depth, float factor,
                          float* to) {
  prefetch_next(p, view, offset, depth);
  if (view.stride[4] != 1) return gather(view, offset, view.stride[4], depth, factor, to);
  with_element(view.dtype, [&](auto element) FA_INLINE_CALL {
    const auto* from = at<decltype(element)>(view, offset);
    each(depth, [&](auto lanes) FA_INLINE_CALL { lanes.store(to, lanes.load(from) * factor); });
  });
}
FA_INLINE void scatter_row(const Problem& p, const TensorView& view, int64_t offset, int64_t depth, float factor,
                           const float* from, int64_t step = 1) {
  prefetch_next<true>(p, view, offset, depth);
  if (view.stride[4] != 1 || step != 1) return scatter(view, offset, view.stride[4], depth, factor, from, step);
  with_element(view.dtype, [&](auto element) FA_INLINE_CALL {
    auto* to = at<decltype(element)>(view, offset);
    each(depth, [&](auto lanes) FA_INLINE_CALL { lanes.store(to, lanes.load(from) * factor); });
  });
}

#include "rel_attention_2d/matrices_impl.h"
#if FUSED_ATTN_TILES
#include "rel_attention_2d/tiles_impl.h"
#endif

// What the rows of a block are multiplied with before a product or, as those of 16 bits stay exact, after it: one of
// the two is the constant 1.
constexpr bool kScalesAfter = kTiles && kParts < 3;
FA_INLINE float factor_before(float factor) { return kScalesAfter ? 1.0f : factor; }
FA_INLINE float factor_after(float factor) { return kScalesAfter ? factor : 1.0f; }

#if FUSED_ATTN_TILES > 1
// The largest of rows x columns x depth numbers, without its sign; an infinity or NaN if there is one.
float largest_number(const TensorView& view, int64_t offset, int64_t rows, int64_t row, int64_t columns, int64_t column,
                     int64_t depth, int64_t step) {
  vi most{};
  auto add = [&](vf x) FA_INLINE_CALL {
    const vi bits = (vi)x & INT32_MAX;
    most = bits > most ? bits : most;
  };
  for (int64_t i = 0; view && i < rows * columns; ++i)
    with_element(view.dtype, [&](auto element) FA_INLINE_CALL {
      const auto* from = at<decltype(element)>(view, offset + i / columns * row + i % columns * column);
      if (step == 1) return each(depth, [&](auto lanes) FA_INLINE_CALL { add(lanes.load_on(from)); });
      for (int64_t d = 0; d < depth; ++d) add(broadcast(static_cast<float>(from[d * step])));
    });
  int32_t largest = 0;
  for (int i = 0; i < L; ++i) largest = largest > most[i] ? largest : most[i];
  return __builtin_bit_cast(float, largest);
}

// Whether parts of bfloat16 serve for one image and head, in the backward pass if there is a `grad_out`.  An infinity
// has no parts, nor has a number that is rounded to one; tiles take for zero what is not a normal number, such as small
// parts of a small number, if none beside it is larger.
bool fit_parts(const Problem& p, const TensorView& grad_out, int64_t b, int64_t h) {
  constexpr double kLeast = 0x1p-60, kMost = 0x1p120;
  auto grid = [&](const TensorView& view, int64_t height, int64_t width, int64_t depth) {
    return largest_number(view, head_offset(view, b, h), height, view.stride[2], width, view.stride[3], depth,
                          view.stride[4]);
  };
  auto prefix = [&](const TensorView& view, int64_t depth) {
    return largest_number(view, head_offset(view, b, h), p.prefix, view.stride[2], 1, 0, depth, view.stride[3]);
  };
  auto table = [&](const TensorView& view, int64_t length) {
    return largest_number(view, h * view.stride[0], length, view.stride[1], 1, 0, p.dk, view.stride[2]);
  };
  auto holds = [](double x) { return x == 0.0 || (x >= kLeast && x < kMost); };
  auto hold = [&](double a, double b) { return holds(a) && holds(b); };
  auto most_of = [](double a, double b) { return a > b ? a : b; };
  const double query = grid(p.query, p.hq, p.wq, p.dk), scaled = query * __builtin_fabs(p.scale);
  const double key = grid(p.key, p.hk, p.wk, p.dk), prefix_key = prefix(p.prefix_key, p.dk);
  const double value = grid(p.value, p.hk, p.wk, p.dv), prefix_value = prefix(p.prefix_value, p.dv);
  const double most_key = most_of(key, prefix_key), most_value = most_of(value, prefix_value);
  double most = most_of(scaled, most_key);  // that gradients of logits are multiplied with
  bool fit = holds(scaled) && hold(key, prefix_key) && hold(value, prefix_value) && scaled * most_key * p.dk < kMost;
  if (p.tables) {
    const double row = table(p.row_term, p.row_length()), col = table(p.col_term, p.col_length());
    const double relative = query * __builtin_fabs(p.rel_scale), most_table = most_of(row, col);
    fit = fit && holds(relative) && hold(row, col) && relative * most_table * p.dk < kMost;
    most = most_of(most, most_of(relative, most_table));
  }
  if (!grad_out || !fit) return fit;
  const double grad = grid(grad_out, p.hq, p.wq, p.dv) * p.keep_scale, grad_weight = grad * most_value * p.dv;
  return hold(grad, grad_weight) && grad_weight * most * p.queries() < kMost;
}
#endif

// Packs the keys of one image and head.  Lanes without a key repeat the last key when `repeat` (their logits are then
// as finite as a real key's) and are zero otherwise.
void pack_keys(const TensorView& view, const TensorView& prefix, int64_t b, int64_t h, const Problem& p,
               const KeyLayout& keys, const KeyRange& range, bool repeat, Keys& to) {
  const int64_t base = head_offset(view, b, h), prefix_base = head_offset(prefix, b, h);
  int64_t y_group = range.group0 * keys.rows, y = y_group, row_of_group = 0, x = 0,
          lane = 0;  // of the lane that comes next
  to.pack(0, range.grid_vectors, [&](int64_t, float* row) {
    const bool real = row_of_group < keys.rows && y < p.hk;
    if (real || repeat) {
      const bool padding = row_of_group == keys.rows;  // behind the last row: its last key
      const int64_t from = smaller(padding ? y - 1 : y, p.hk - 1), column = padding ? p.wk - 1 : x;
      gather_row(p, view, base + from * view.stride[2] + column * view.stride[3], to.depth, 1.0f, row);
    } else {
      set_zero(row, to.depth);
    }
    if (++lane == keys.vectors * L) {
      lane = row_of_group = x = 0, y = (y_group += keys.rows);
    } else if (row_of_group < keys.rows && ++x == p.wk) {
      x = 0, ++row_of_group, ++y;
    }
  });
  to.pack(range.prefix_begin, range.vectors - range.prefix_begin, [&](int64_t i, float* row) {
    if (i >= range.prefix && !repeat) return set_zero(row, to.depth);
    const int64_t position = smaller(i, range.prefix - 1);
    gather(prefix, prefix_base + position * prefix.stride[2], prefix.stride[3], to.depth, 1.0f, row);
  });
}

// The inverse of pack_keys for gradients: real lanes only.
void unpack_keys(const TensorView& view, const TensorView& prefix, int64_t b, int64_t h, const Problem& p,
                 const KeyLayout& keys, const KeyRange& range, float factor, KeySums& from) {
  const int64_t base = head_offset(view, b, h), prefix_base = head_offset(prefix, b, h);
  from.turn();
  for (int64_t i = 0; i < range.prefix; ++i)
    scatter(prefix, prefix_base + i * prefix.stride[2], prefix.stride[3], from.depth, factor,
            from.at(range.prefix_begin * L + i), from.step());
  for (int64_t g = range.group0; g < range.group0 + range.groups; ++g) {
    int64_t lane = (g - range.group0) * keys.vectors * L;
    for (int64_t y = g * keys.rows; y < smaller(p.hk, (g + 1) * keys.rows); ++y)
      for (int64_t x = 0; x < p.wk; ++x, ++lane)
        scatter_row(p, view, base + y * view.stride[2] + x * view.stride[3], from.depth, factor, from.at(lane),
                    from.step());
  }
}

// choose<B>() for the way in which a problem's logits get their position terms.
template <class Choose>
auto with_bias(const Problem& p, const KeyLayout& keys, const Choose& choose) {
  if (p.bias_table) return choose.template operator()<Bias::table>();
  return keys.rows == 1 ? choose.template operator()<Bias::one_row>()
                        : choose.template operator()<Bias::several_rows>();
}

#include "rel_attention_2d/free_table_impl.h"
#include "rel_attention_2d/segments_impl.h"

// The logits of one block of queries that do not depend on the key's content.
struct BiasBlock {
  Scratch<float> col_logits;  // (QB, keys.vectors * L): column logit per lane of a group, -inf on padding
  Scratch<float> row_logits;  // (QB, bias_rows): row logit per key row, -inf past the image
  BlockRows query;            // times rel_scale
};

struct BiasTerms {
  const Problem& p;
  const KeyLayout& keys;
  const QueryGrid& queries;
  int64_t bias_rows;  // key rows with room for the last group
  int64_t row_vectors = 0, col_vectors = 0, table_vectors = 0;
  Scratch<int32_t> row_mask;  // (keys.rows, keys.vectors * L): all ones where the lane lies in that row
  Scratch<int32_t> row_of;    // (keys.vectors * L): the lane's row, counted from the first row of its vector
  Scratch<int32_t> row_span;  // (keys.vectors, 2): first and last row of each vector
  Keys table;                 // row table, then column table
  Scratch<float> product;     // (QB, table_vectors * L): query times every table row
  int64_t col_stride, product_stride, packed_head = 0;
  bool finite_tables = true;
  FreeTable free;

  BiasTerms(const Problem& problem, const KeyLayout& layout, const QueryGrid& grid, bool backward)
      : p(problem),
        keys(layout),
        queries(grid),
        bias_rows(layout.groups * layout.rows),
        col_stride(layout.vectors * L),
        free(problem, layout, grid) {
    if (p.bias_table) return;
    row_mask.allocate(keys.rows * col_stride);
    for (int64_t r = 0; r < keys.rows; ++r)
      for (int64_t lane = 0; lane < col_stride; ++lane) row_mask[r * col_stride + lane] = lane / p.wk == r ? -1 : 0;
    row_of.allocate(col_stride);
    row_span.allocate(2 * keys.vectors);
    for (int64_t lane = 0; lane < col_stride; ++lane) {
      const int64_t v = lane / L, r = smaller(lane / p.wk, keys.rows - 1);
      if (lane % L == 0) row_span[2 * v] = r;
      row_span[2 * v + 1] = r;
      row_of[lane] = r - row_span[2 * v];
    }
    if (p.tables) {
      row_vectors = vectors_of(p.row_length());
      col_vectors = vectors_of(p.col_length());
      table_vectors = row_vectors + col_vectors;
      product_stride = panels_of(table_vectors) * PANEL + L;
      table.allocate(p.dk, table_vectors, true, backward);
      product.allocate(QB * product_stride);
    }
  }
  void allocate(BiasBlock& block, bool backward) const {
    if (p.bias_table) return;
    block.col_logits.allocate(QB * col_stride);
    block.row_logits.allocate(QB * bias_rows);
    if (p.tables) block.query.allocate(p.dk, backward);
  }

  bool from_tables() const { return table_vectors > 0; }

  // Position of a query's first key in the product; the tables are packed so that the key position counts up.
  int64_t row_start(int64_t q) const { return p.hq - 1 - queries.y[q]; }
  int64_t col_start(int64_t q) const { return row_vectors * L + p.wq - 1 - queries.x[q]; }

  static bool finite_queries(const BiasBlock& block) {
    return all_finite(block.query.rows.data, QB * block.query.stride);
  }

  static bool all_finite(const float* x, int64_t count) {  // count: a multiple of L
    vf sum{};                                              // of zeros, or NaN
    for (int64_t i = 0; i < count; i += L) sum += load(x + i) * 0.0f;
    return sum_lanes(sum) == 0.0f;
  }

  void pack_tables(int64_t head) {
    if (p.bias_table) return free.pack(head);
    if (!from_tables()) return;
    packed_head = head;
    finite_tables = true;
    table.pack(0, table_vectors, [&](int64_t i, float* to) {
      table_row(i, to);
      for (int64_t d = 0; d < p.dk; ++d) finite_tables &= to[d] * 0.0f == 0.0f;
    });
  }

  // Position i of the packed tables, zeros between them.
  void table_row(int64_t i, float* to) const {
    const bool in_col = i >= row_vectors * L;
    const TensorView& view = in_col ? p.col_term : p.row_term;
    const int64_t length = in_col ? p.col_length() : p.row_length();
    if (in_col) i -= row_vectors * L;
    if (i >= length) return set_zero(to, p.dk);
    const int64_t position = p.key_minus_query ? i : length - 1 - i;
    gather(view, packed_head * view.stride[0] + position * view.stride[1], view.stride[2], p.dk, 1.0f, to);
  }

  // Fills a block for queries [q0, q0 + count) of head (b, h).
  void prepare(int64_t b, int64_t h, int64_t q0, int64_t count, BiasBlock& block) {
    if (p.bias_table) return;
    BlockRows& query = block.query;
    if (from_tables()) {
      for (int64_t i = 0; i < count; ++i)
        gather_row(p, p.query, queries.offset(p.query, b, h, q0 + i), p.dk, factor_before(p.rel_scale), query.row(i));
      for (int64_t i = count; i < QB; ++i) set_zero(query.row(i), p.dk);
      query.seal();
      const float factor = factor_after(p.rel_scale);
      float* to = nullptr;
      table.products(
          round_up(count, MR), query, 0, table_vectors,
          [&](int64_t first, int64_t) FA_INLINE_CALL { to = product + first * L; },
          [&](int64_t m, int n, vf x) FA_INLINE_CALL { store(to + m * product_stride + n * L, x * factor); });
    }
    for (int64_t i = 0; i < QB; ++i) {
      auto fill = [&](const TensorView& term, int64_t start, int64_t length, float* to) {
        if (i >= count || !term)
          set_zero(to, length);
        else if (p.tables)
          copy(product + i * product_stride + start, length, to);
        else
          gather(term, queries.offset(term, b, h, q0 + i), term.stride[4], length, 1.0f, to);
      };
      float* to_col = block.col_logits + i * col_stride;
      fill(p.col_term, col_start(q0 + i), p.wk, to_col);
      for (int64_t r = 1; r < keys.rows; ++r) copy(to_col, p.wk, to_col + r * p.wk);
      for (int64_t lane = keys.rows * p.wk; lane < col_stride; ++lane) to_col[lane] = -kInfinity;

      float* to_row = block.row_logits + i * bias_rows;
      fill(p.row_term, row_start(q0 + i), p.hk, to_row);
      for (int64_t y = p.hk; y < bias_rows; ++y) to_row[y] = -kInfinity;
    }
  }

  // Where the logit terms of a tile lie, by value: what is stored meanwhile cannot change it.
  template <Bias B>
  struct Tile {
    const float *row_logits, *col_logits;  // (QB, row_stride), (QB, col_stride); of a free table all in col_logits
    int64_t row_stride, col_stride;
    const int32_t *row_span, *row_of;

    // Terms of block row i from number `row` and vector `vector` on; `offset` is the vector's of its group.
    FA_INLINE vf at(int64_t i, int64_t row, int64_t vector, int64_t offset) const {
      const vf col = load(col_logits + i * col_stride + vector * L);
      if constexpr (B == Bias::table) return col;
      const float* logits = row_logits + i * row_stride + row;
      if constexpr (B == Bias::one_row) return col + logits[0];
      return col + permute_lanes(load(logits + row_span[2 * offset]), load(row_of + offset * L));
    }
  };
  template <Bias B>
  FA_INLINE Tile<B> tile(const BiasBlock& block) const {
    if constexpr (B == Bias::table) return {nullptr, free.first(), 0, free.logit_stride, nullptr, nullptr};
    return {block.row_logits.data, block.col_logits.data, bias_rows, col_stride, row_span.data, row_of.data};
  }
};

// Of every lane of all groups, then of the prefix.
void hash_columns(const Problem& p, const KeyLayout& keys, Scratch<uint32_t>& to) {
  const KeyRange all(keys, 0, keys.groups, p.prefix);
  to.allocate(all.vectors * L);
  for (int64_t i = 0; i < all.grid_vectors * L; ++i) {
    const int64_t g = i / (keys.vectors * L), lane = i % (keys.vectors * L);
    to[i] = static_cast<uint32_t>((g * keys.rows + lane / p.wk) * p.wk + lane % p.wk) * 0x9E3779B1u;
  }
  for (int64_t i = all.grid_vectors * L; i < all.prefix_begin * L; ++i) to[i] = 0;
  for (int64_t i = all.prefix_begin * L; i < all.vectors * L; ++i)
    to[i] = static_cast<uint32_t>(p.hk * p.wk + i - all.prefix_begin * L) * 0x9E3779B1u;
}

// to[m][vector] = row m of a, whose factor this is, times key vectors [v0, v0 + count), the vector counted from v0.
void products(int64_t rows, const BlockRows& a, const Keys& keys, int64_t v0, int64_t count, float factor,
              const Weights& to) {
  float* const found = to.rows.data;
  const int64_t stride = to.stride;
  const float after = factor_after(factor);
  float* at = nullptr;
  keys.products(
      rows, a, v0, count, [&](int64_t first, int64_t) FA_INLINE_CALL { at = found + first * L; },
      [&](int64_t m, int n, vf x) FA_INLINE_CALL { store(at + m * stride + n * L, x * after); });
}

// Logits of `rows` queries against key vectors [v0, v0 + count) of a range to `to`, the vector counted from v0, each
// handed to seen(query, logits) too.
template <Bias B, class Seen>
FA_INLINE void score_tile(int64_t rows, int64_t v0, int64_t count, const BlockRows& query, const Keys& key,
                          const BiasTerms& bias, const BiasBlock& block, const KeyRange& range, const Weights& to,
                          const Seen& seen) {
  const int64_t per_group = bias.keys.vectors, group_rows = bias.keys.rows, stride = to.stride;
  const float scale = factor_after(bias.p.scale);
  const auto terms = bias.template tile<B>(block);
  float* const scores = to.rows.data;
  const int64_t grid = range.grid_part(v0, count);
  int64_t row[NR], vector[NR], offset[NR];
  float* at = nullptr;
  key.products(
      rows, query, v0, grid,
      [&](int64_t first, int64_t vectors) FA_INLINE_CALL {
        at = scores + first * L;
        for (int n = 0; n < vectors; ++n) {
          const int64_t all = range.group0 * per_group + v0 + first + n;  // among the vectors of all groups
          row[n] = all / per_group * group_rows;
          offset[n] = all % per_group;
          vector[n] = B == Bias::table ? all : offset[n];
        }
      },
      [&](int64_t m, int n, vf x) FA_INLINE_CALL {
        x *= scale;
        // Added last: starting the sum from a large bias would round every term of it at its magnitude.
        x += terms.at(m, row[n], vector[n], offset[n]);
        store(at + m * stride + n * L, x);
        seen(m, x);
      });
  if (grid == count) return;
  const int64_t prefix_begin = larger(range.prefix_begin - v0, 0);
  key.products(
      rows, query, v0 + prefix_begin, count - prefix_begin,
      [&](int64_t first, int64_t) FA_INLINE_CALL { at = scores + (prefix_begin + first) * L; },
      [&](int64_t m, int n, vf x) FA_INLINE_CALL { store(at + m * stride + n * L, x * scale); });
  for (int64_t v = grid; v < count; ++v) {
    vi key_there{};
    for (int i = 0; i < L; ++i) key_there[i] = v >= prefix_begin && (v0 + v) * L + i < range.lanes ? -1 : 0;
    for (int64_t m = 0; m < rows; ++m) {
      float* logits = to.row(m) + v * L;
      store(logits, select(key_there, load(logits), broadcast(-kInfinity)));
      seen(m, load(logits));
    }
  }
}

// body(block, first query, count) for the blocks of queries [first, end).
template <class Block, class Body>
FA_INLINE void each_block(Block* blocks, int64_t first, int64_t end, const Body& body) {
  for (int64_t q = first; q < end; q += QB) body(*blocks++, q, smaller(QB, end - q));
}
// How many blocks are in use at a time.
FA_INLINE int64_t blocks_of(int64_t queries) { return smaller(kBlocks, (queries + QB - 1) / QB); }

#include "rel_attention_2d/backward_impl.h"
#include "rel_attention_2d/forward_impl.h"

}  // namespace

extern const Kernels kernels = {.forward = forward,
                                .backward = backward,
                                .sum_query_partials = sum_query_partials,
                                .sum_table_partials = sum_table_partials,
                                .sum_bias_partials = sum_bias_partials};

}  // namespace fused_attn::rel_attention_2d::FUSED_ATTN_ISA
