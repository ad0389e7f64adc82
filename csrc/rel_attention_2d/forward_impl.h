// Forward pass; part of kernels_impl.h.

struct ForwardScratch {
  int64_t sum_stride;
  Keys key, value;
  BlockRows query;
  Weights score;
  Scratch<float> sum;  // (QB, sum_stride)
  float max[QB], total[QB];

  ForwardScratch(const Problem& p, const KeyRange& range) : sum_stride(row_stride(p.dv)) {
    const int64_t vectors = range.vectors;
    key.allocate(p.dk, vectors, true, false);
    value.allocate(p.dv, vectors, false, true);
    query.allocate(p.dk, false);
    score.allocate(smaller(panels_of(vectors) * NR, kForwardTile), true, false);
    sum.allocate(QB * sum_stride);
  }
};

// Weights of one tile from its logits, in place; updates the running maximum, total and weighted sum.
template <bool Dropout>
FA_INLINE void softmax_tile(const Forward& p, ForwardScratch& s, int64_t i, const float* tile_max, int64_t count,
                            const uint32_t* columns, uint64_t row) {
  float* score = s.score.row(i);
  const float max = tile_max[i] > s.max[i] ? tile_max[i] : s.max[i];
  const float shift = max == -kInfinity ? 0.0f : max;  // every key so far masked: weights of exactly 0
  const float decay = __builtin_exp2f((s.max[i] - shift) * kLog2e);
  s.max[i] = max;
  vf total{};
  const DropoutKeys keys(p.seed, row);
  const uint32_t drop_below = p.drop_below;
  s.score.each_weight(i, count, [&](int64_t v) FA_INLINE_CALL {
    const vf weight = exp_nonpositive(load(score + v * L) - shift);
    total += weight;
    if constexpr (Dropout) return select(keys.keep(load(columns + v * L), drop_below), weight, vf{});
    return weight;
  });
  s.total[i] = s.total[i] * decay + sum_lanes(total);
  float* sum = s.sum + i * s.sum_stride;
  for (int64_t d = 0; d < p.dv; ++d) sum[d] *= decay;
}

template <Bias B, bool Dropout>
void forward_block(const Forward& p, const KeyRange& range, ForwardScratch& s, BiasTerms& bias,
                   const Segments& segments, const uint32_t* columns, int64_t b, int64_t h, int64_t q0, int64_t count) {
  const int64_t rows = round_up(count, 4);
  for (int64_t i = 0; i < QB; ++i) {
    const int64_t q = q0 + i;
    if (i < count)
      gather_row(p, p.query, bias.queries.offset(p.query, b, h, q), p.dk, factor_before(p.scale), s.query.row(i));
    else
      set_zero(s.query.row(i), p.dk);
    s.max[i] = -kInfinity;
    s.total[i] = 0.0f;
  }
  s.query.seal();
  s.sum.fill(0.0f);
  bias.prepare(b, h, q0, count);

  const uint64_t row0 = (b * p.heads + h) * p.queries() + q0;
  for (int64_t v0 = 0; v0 < range.vectors; v0 += kForwardTile) {
    const int64_t tile = smaller(kForwardTile, range.vectors - v0), grid = range.grid_part(v0, tile);
    vf lane_max[QB];
    for (int64_t i = 0; i < rows; ++i) lane_max[i] = broadcast(-kInfinity);
    if constexpr (B == Bias::table) bias.free.prepare(q0, count, v0, grid);
    score_tile<B>(rows, v0, tile, s.query, s.key, bias, range, s.score,
                  [&](int64_t m, vf x) FA_INLINE_CALL { lane_max[m] = maximum(x, lane_max[m]); });
    if (segments.masks) {
      segments.hide(q0, rows, v0, grid, -kInfinity, s.score);
      for (int64_t i = 0; i < rows; ++i) {
        lane_max[i] = broadcast(-kInfinity);
        for (int64_t v = 0; v < tile; ++v) lane_max[i] = maximum(load(s.score.row(i) + v * L), lane_max[i]);
      }
    }
    float tile_max[QB];
    for (int64_t i = 0; i < rows; ++i) tile_max[i] = max_lanes(lane_max[i]);
    for (int64_t i = 0; i < rows; ++i) softmax_tile<Dropout>(p, s, i, tile_max, tile, columns + v0 * L, row0 + i);
    s.value.weigh(rows, v0, tile, smaller(tile * L, range.lanes - v0 * L), s.score, s.sum.data);
  }

  for (int64_t i = 0; i < count; ++i) {
    const int64_t q = q0 + i;
    const bool masked = s.max[i] == -kInfinity && s.total[i] == 0.0f;
    scatter_row(p, p.out, bias.queries.offset(p.out, b, h, q), p.dv, masked ? 0.0f : p.keep_scale / s.total[i],
                s.sum + i * s.sum_stride);
    p.statistics[2 * (row0 + i)] = s.max[i];
    p.statistics[2 * (row0 + i) + 1] = masked ? 0.0f : s.total[i];
  }
}

void forward(const Forward& p, int64_t begin, int64_t end) {
  [[maybe_unused]] const Instructions instructions;
  const KeyLayout keys(p);
  const KeyRange range(keys, 0, keys.groups, p.prefix);
  ForwardScratch scratch(p, range);
  const QueryGrid queries(p);
  BiasTerms bias(p, keys, queries, false);
  Segments segments(p, keys);
  Scratch<uint32_t> columns;
  if (p.drop_below > 0) hash_columns(p, keys, columns);
  const auto block =
      with_bias(p, keys, [&]<Bias B>() { return p.drop_below > 0 ? forward_block<B, true> : forward_block<B, false>; });
  int64_t packed_pair = -1, packed_table = -1;
  for (int64_t task = begin; task < end; ++task) {
    const int64_t pair = task / p.query_splits;
    // A free table is expanded once for a head, so its images follow one another.
    const int64_t b = p.bias_table ? pair % p.batch : pair / p.heads,
                  h = p.bias_table ? pair / p.batch : pair % p.heads;
    if (pair != packed_pair) {
      pack_keys(p.key, p.prefix_key, b, h, p, keys, range, true, scratch.key);
      pack_keys(p.value, p.prefix_value, b, h, p, keys, range, false, scratch.value);
      if (h != packed_table) bias.pack_tables(packed_table = h);
      segments.pack(b);
      packed_pair = pair;
    }
    const int64_t blocks = (p.queries() + QB - 1) / QB, split = task % p.query_splits;
    const int64_t last = split_begin(blocks, p.query_splits, split + 1);
    for (int64_t i = split_begin(blocks, p.query_splits, split); i < last; ++i)
      block(p, range, scratch, bias, segments, columns.data, b, h, i * QB, smaller(QB, p.queries() - i * QB));
  }
}
