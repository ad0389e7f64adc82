// Forward pass; part of kernels_impl.h.

struct ForwardBlock {
  BlockRows query;
  BiasBlock bias;
  Scratch<float> sum;  // (QB, sum_stride)
  float max[QB], total[QB];
};

struct ForwardScratch {
  int64_t sum_stride;
  Keys key, value;
  Weights score;
  ForwardBlock blocks[kBlocks];

  ForwardScratch(const Forward& p, const KeyRange& range, const BiasTerms& bias) : sum_stride(row_stride(p.dv)) {
    const int64_t vectors = range.vectors;
    key.allocate(p.dk, vectors, true, false);
    value.allocate(p.dv, vectors, false, true);
    score.allocate(smaller(panels_of(vectors) * NR, kTile), true, false);
    for (int64_t i = 0; i < blocks_of(p.queries()); ++i) {
      blocks[i].query.allocate(p.dk, false);
      blocks[i].sum.allocate(QB * sum_stride);
      bias.allocate(blocks[i].bias, false);
    }
  }
};

// Weights of one tile from its logits, in place; updates the running maximum, total and weighted sum.
template <bool Dropout>
FA_INLINE void softmax_tile(const Forward& p, ForwardScratch& s, ForwardBlock& block, int64_t i, const float* tile_max,
                            int64_t count, const uint32_t* columns, uint64_t row) {
  float* score = s.score.row(i);
  const float max = tile_max[i] > block.max[i] ? tile_max[i] : block.max[i];
  const float shift = max == -kInfinity ? 0.0f : max;  // every key so far masked: weights of exactly 0
  const float decay = __builtin_exp2f((block.max[i] - shift) * kLog2e);
  block.max[i] = max;
  vf total{};
  const DropoutKeys keys(p.seed, row);
  const uint32_t drop_below = p.drop_below;
  s.score.each_weight(i, count, [&](int64_t v) FA_INLINE_CALL {
    const vf weight = exp_nonpositive(load(score + v * L) - shift);
    total += weight;
    if constexpr (Dropout) return select(keys.keep(load(columns + v * L), drop_below), weight, vf{});
    return weight;
  });
  block.total[i] = block.total[i] * decay + sum_lanes(total);
  float* sum = block.sum + i * s.sum_stride;
  for (int64_t d = 0; d < p.dv; ++d) sum[d] *= decay;
}

void begin_forward(const Forward& p, ForwardBlock& block, BiasTerms& bias, int64_t b, int64_t h, int64_t q0,
                   int64_t count) {
  for (int64_t i = 0; i < QB; ++i) {
    const int64_t q = q0 + i;
    if (i < count)
      gather_row(p, p.query, bias.queries.offset(p.query, b, h, q), p.dk, factor_before(p.scale), block.query.row(i));
    else
      set_zero(block.query.row(i), p.dk);
    block.max[i] = -kInfinity;
    block.total[i] = 0.0f;
  }
  block.query.seal();
  block.sum.fill(0.0f);
  bias.prepare(b, h, q0, count, block.bias);
}

// Queries [q0, q0 + count) on a tile of keys, `tile` vectors from v0 on.
template <Bias B, bool Dropout>
void forward_tile(const Forward& p, const KeyRange& range, ForwardScratch& s, ForwardBlock& block, BiasTerms& bias,
                  const Segments& segments, const uint32_t* columns, int64_t b, int64_t h, int64_t q0, int64_t count,
                  int64_t v0, int64_t tile) {
  const int64_t rows = round_up(count, 4), grid = range.grid_part(v0, tile);
  const uint64_t row0 = (b * p.heads + h) * p.queries() + q0;
  vf lane_max[QB];
  for (int64_t i = 0; i < rows; ++i) lane_max[i] = broadcast(-kInfinity);
  if constexpr (B == Bias::table) bias.free.prepare(q0, count, v0, grid);
  score_tile<B>(rows, v0, tile, block.query, s.key, bias, block.bias, range, s.score,
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
  for (int64_t i = 0; i < rows; ++i) softmax_tile<Dropout>(p, s, block, i, tile_max, tile, columns + v0 * L, row0 + i);
  s.value.weigh(rows, v0, tile, smaller(tile * L, range.lanes - v0 * L), s.score, block.sum.data);
}

void end_forward(const Forward& p, const ForwardScratch& s, const ForwardBlock& block, const BiasTerms& bias, int64_t b,
                 int64_t h, int64_t q0, int64_t count) {
  const uint64_t row0 = (b * p.heads + h) * p.queries() + q0;
  for (int64_t i = 0; i < count; ++i) {
    const int64_t q = q0 + i;
    const bool masked = block.max[i] == -kInfinity && block.total[i] == 0.0f;
    scatter_row(p, p.out, bias.queries.offset(p.out, b, h, q), p.dv, masked ? 0.0f : p.keep_scale / block.total[i],
                block.sum + i * s.sum_stride);
    p.statistics[2 * (row0 + i)] = block.max[i];
    p.statistics[2 * (row0 + i) + 1] = masked ? 0.0f : block.total[i];
  }
}

// Queries [first, end), kBlocks blocks at most.
template <Bias B, bool Dropout>
void forward_blocks(const Forward& p, const KeyRange& range, ForwardScratch& s, BiasTerms& bias,
                    const Segments& segments, const uint32_t* columns, int64_t b, int64_t h, int64_t first,
                    int64_t end) {
  each_block(s.blocks, first, end, [&](ForwardBlock& block, int64_t q0, int64_t count) FA_INLINE_CALL {
    begin_forward(p, block, bias, b, h, q0, count);
  });
  for (int64_t v0 = 0; v0 < range.vectors; v0 += kTile)
    each_block(s.blocks, first, end, [&](ForwardBlock& block, int64_t q0, int64_t count) FA_INLINE_CALL {
      forward_tile<B, Dropout>(p, range, s, block, bias, segments, columns, b, h, q0, count, v0,
                               smaller(kTile, range.vectors - v0));
    });
  each_block(s.blocks, first, end, [&](ForwardBlock& block, int64_t q0, int64_t count) FA_INLINE_CALL {
    end_forward(p, s, block, bias, b, h, q0, count);
  });
}

void forward(const Forward& p, int64_t begin, int64_t end) {
  [[maybe_unused]] const Instructions instructions;
  const KeyLayout keys(p);
  const KeyRange range(keys, 0, keys.groups, p.prefix);
  const QueryGrid queries(p);
  BiasTerms bias(p, keys, queries, false);
  ForwardScratch scratch(p, range, bias);
  Segments segments(p, keys);
  Scratch<uint32_t> columns;
  if (p.drop_below > 0) hash_columns(p, keys, columns);
  const auto run_blocks = with_bias(
      p, keys, [&]<Bias B>() { return p.drop_below > 0 ? forward_blocks<B, true> : forward_blocks<B, false>; });
  int64_t packed_pair = -1, packed_table = -1;
  [[maybe_unused]] bool fit = true;
  for (int64_t task = begin; task < end; ++task) {
    const int64_t pair = task / p.query_splits;
    // A free table is expanded once for a head, so its images follow one another.
    const int64_t b = p.bias_table ? pair % p.batch : pair / p.heads,
                  h = p.bias_table ? pair / p.batch : pair % p.heads;
    if (pair != packed_pair) {
#if FUSED_ATTN_TILES > 1
      fit = fit_parts(p, {}, b, h);
#endif
      pack_keys(p.key, p.prefix_key, b, h, p, keys, range, true, scratch.key);
      pack_keys(p.value, p.prefix_value, b, h, p, keys, range, false, scratch.value);
      if (h != packed_table) bias.pack_tables(packed_table = h);
      segments.pack(b);
      packed_pair = pair;
    }
#if FUSED_ATTN_TILES > 1
    if (!fit) {
      avx512::kernels.forward(p, task, task + 1);
      continue;
    }
#endif
    const int64_t blocks = (p.queries() + QB - 1) / QB, split = task % p.query_splits;
    const int64_t last = smaller(split_begin(blocks, p.query_splits, split + 1) * QB, p.queries());
    for (int64_t q = split_begin(blocks, p.query_splits, split) * QB; q < last; q += kBlocks * QB)
      run_blocks(p, range, scratch, bias, segments, columns.data, b, h, q, smaller(q + kBlocks * QB, last));
  }
}
