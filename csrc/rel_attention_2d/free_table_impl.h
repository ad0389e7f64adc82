// A free table of biases, one number to every (head, row difference, column difference); part of kernels_impl.h.

// to[i] += from[i], i < count; `to` has room for a vector at its last number.
FA_INLINE void add_numbers(const float* from, int64_t count, float* to) {
  vi lane;
  for (int i = 0; i < L; ++i) lane[i] = i;
  int64_t i = 0;
  for (; i + L <= count; i += L) add_to(to + i, load(from + i));
  if (i < count) add_to(to + i, (vf)((vi)load(from + i) & (lane < static_cast<int32_t>(count - i))));
}

// For one query, a row of keys takes its biases from consecutive places of a row of the table.
struct FreeTable {
  // Largest map of queries by keys that is kept expanded for a head, as it serves every image: a part of the
  // second-level cache.  Of a larger one, a block of queries on a tile of keys is.
  static constexpr int64_t kMostExpanded = 1 << 16;

  const Problem& p;
  const KeyLayout& keys;
  const QueryGrid& queries;
  int64_t stride = 0;  // of a row of the table
  bool whole = false;
  Scratch<float> table;                             // (bias_rows, stride): key positions count up
  Scratch<float> expanded;                          // (queries or QB, logit_stride): -inf on lanes without a key
  int64_t logit_stride = 0, row0 = 0, vector0 = 0;  // of `expanded`: its first query and vector
  int64_t query0 = 0;                               // first query of the block

  FreeTable(const Problem& problem, const KeyLayout& layout, const QueryGrid& grid)
      : p(problem), keys(layout), queries(grid) {
    if (!p.bias_table) return;
    stride = round_up(p.bias_columns(), L) + L;
    table.allocate(p.bias_rows() * stride);
    const int64_t vectors = keys.groups * keys.vectors;
    whole = round_up(p.queries(), QB) * vectors * L <= kMostExpanded;
    logit_stride = (whole ? vectors : smaller(vectors, kTile)) * L + L;
    expanded.allocate((whole ? round_up(p.queries(), QB) : QB) * logit_stride);
    expanded.fill(0.0f);
  }

  // First number of a query's biases: for key row y, `stride` further each.
  int64_t start(int64_t q) const { return (p.hq - 1 - queries.y[q]) * stride + p.wq - 1 - queries.x[q]; }

  void pack(int64_t head) {
    pack_bias_table(p, head, stride, table.data);
    if (whole) expand(0, p.queries(), 0, keys.groups * keys.vectors);
  }

  // Biases of queries [q0, q0 + count) on grid vectors [v0, v0 + vectors) of all groups.
  void expand(int64_t q0, int64_t count, int64_t v0, int64_t vectors) {
    row0 = q0, vector0 = v0;
    if (vectors == 0) return;
    const int64_t group_lanes = keys.vectors * L, end = (v0 + vectors) * L;
    for (int64_t i = 0; i < count; ++i) {
      const float* from = table + start(q0 + i);
      float* to = expanded + i * logit_stride - v0 * L;
      for (int64_t group = v0 / keys.vectors; group * group_lanes < end; ++group) {
        int64_t lane = group * group_lanes;
        for (int64_t y = group * keys.rows; y < smaller(p.hk, (group + 1) * keys.rows); ++y, lane += p.wk) {
          const int64_t first = larger(lane, v0 * L), last = smaller(lane + p.wk, end);
          if (first < last) copy(from + y * stride + first - lane, last - first, to + first);
        }
        for (lane = larger(lane, v0 * L); lane < smaller((group + 1) * group_lanes, end); ++lane) to[lane] = -kInfinity;
      }
    }
  }

  // Before a tile of queries [q0, q0 + count) is scored on grid vectors [v0, v0 + vectors).
  void prepare(int64_t q0, int64_t count, int64_t v0, int64_t vectors) {
    query0 = q0;
    if (!whole) expand(q0, count, v0, vectors);
  }

  // Biases of the block's first query on the first vector of all groups; the next query's are logit_stride further.
  const float* first() const { return expanded + (query0 - row0) * logit_stride - vector0 * L; }

  // Adds gradients of the logits of queries [q0, q0 + count), (count, grad_stride) on grid vectors [v0, v0 + vectors)
  // of all groups, to those of the table.
  void accumulate(int64_t q0, int64_t count, int64_t v0, int64_t vectors, const float* grad, int64_t grad_stride,
                  float* grad_table) const {
    if (vectors == 0) return;
    const int64_t group_lanes = keys.vectors * L, end = (v0 + vectors) * L;
    for (int64_t i = 0; i < count; ++i) {
      const float* from = grad + i * grad_stride - v0 * L;
      float* to = grad_table + start(q0 + i);
      for (int64_t group = v0 / keys.vectors; group * group_lanes < end; ++group) {
        int64_t lane = group * group_lanes;
        for (int64_t y = group * keys.rows; y < smaller(p.hk, (group + 1) * keys.rows); ++y, lane += p.wk) {
          const int64_t first = larger(lane, v0 * L), last = smaller(lane + p.wk, end);
          if (first < last) add_numbers(from + first, last - first, to + y * stride + first - lane);
        }
      }
    }
  }

  // Adds the gradients of queries [q0, q0 + count) to a sum, and clears them.  Sums of a block first: no long chains.
  void flush(int64_t q0, int64_t count, float* grad_block, float* sum) const {
    const int64_t first = p.hq - 1 - queries.y[q0 + count - 1], last = p.hq - 1 - queries.y[q0] + p.hk;
    for (int64_t i = first * stride; i < last * stride; i += L) {
      add_to(sum + i, load(grad_block + i));
      store(grad_block + i, vf{});
    }
  }
};
