// Backward pass; part of kernels_impl.h.  Weights are recomputed from the saved softmax statistics.

// What the softmax of a row was, and the sum of its weights times their gradients.
struct Row {
  float max, normalize, delta;

  FA_INLINE vf weight(vf score) const { return exp_nonpositive(score - max) * normalize; }
};

struct BackwardBlock {
  BlockRows query, grad_out;
  BiasBlock bias;
  Scratch<float> grad_query;                        // (QB, query_stride)
  Scratch<float> grad_col_logits, grad_row_logits;  // (QB, lanes of a group), (QB, key rows)
  Row rows[QB];
};

struct BackwardScratch {
  int64_t col_stride, query_stride;
  Keys key, value;  // the task's keys
  KeySums grad_key, grad_value, grad_table;
  Scratch<float> out, table_row;  // (dv), (dk)
  Weights score, grad_score;
  Weights grad_product;                  // on the positions of the tables
  Scratch<float> grad_relative;          // (QB, query_stride)
  Scratch<float> grad_block, grad_bias;  // like bias.free.table: of a block on a tile, of the task
  BackwardBlock blocks[kBlocks];

  BackwardScratch(const Problem& p, const KeyLayout& keys, const BiasTerms& bias, int64_t splits)
      : col_stride(keys.vectors * L), query_stride(row_stride(p.dk)) {
    const int64_t vectors = KeyRange(keys, 0, (keys.groups + splits - 1) / splits, p.prefix).vectors;
    const int64_t tile = smaller(panels_of(vectors) * NR, kTile);
    key.allocate(p.dk, vectors, true, true);
    value.allocate(p.dv, vectors, true, false);
    grad_key.allocate(p.dk, vectors);
    grad_value.allocate(p.dv, vectors);
    out.allocate(p.dv);
    score.allocate(tile, false, true);
    grad_score.allocate(tile, true, true);
    for (int64_t i = 0; i < blocks_of(p.queries()); ++i) {
      BackwardBlock& block = blocks[i];
      block.query.allocate(p.dk, true);
      block.grad_out.allocate(p.dv, true);
      block.grad_query.allocate(QB * query_stride);
      bias.allocate(block.bias, true);
      if (p.bias_table) continue;
      block.grad_col_logits.allocate(QB * col_stride);
      block.grad_row_logits.allocate(QB * bias.bias_rows);
    }
    if (p.bias_table) {
      grad_block.allocate(bias.free.table.size);
      grad_block.fill(0.0f);
      grad_bias.allocate(bias.free.table.size);
    }
    if (bias.from_tables()) {
      grad_relative.allocate(QB * query_stride);
      table_row.allocate(p.dk);
      grad_product.allocate(panels_of(bias.table_vectors) * NR, true, true);
      grad_table.allocate(p.dk, bias.table_vectors);
    }
  }
};

// Sums many vectors over their lanes, L at a time, adding each sum to its own target.
struct LaneSums {
  vf pending[L];
  float* target[L];
  int count = 0;

  FA_INLINE void add(vf x, float* to) {
    pending[count] = x;
    target[count] = to;
    if (++count == L) flush();
  }
  FA_INLINE void flush() {
    for (int i = count; i < L; ++i) pending[i] = vf{};
    const vf sums = sum_lanes_of_each(pending);
    for (int i = 0; i < count; ++i) *target[i] += sums[i];
    count = 0;
  }
};

// Weights in place of logits for one query whose keys all lie in this tile, and delta = sum over keys of weight times
// gradient.  It equals out.grad_out, but summed from the weights at hand it lacks the rounding of out, an error that
// all gradients of a row would share.
template <bool Dropout>
FA_INLINE void weights_and_delta(const Backward& p, BackwardScratch& s, Row& own, int64_t i, int64_t count,
                                 const uint32_t* columns, uint64_t row) {
  float* score = s.score.row(i);
  float* grad = s.grad_score.row(i);
  const DropoutKeys keys(p.seed, row);
  const uint32_t drop_below = p.drop_below;
  const Row state = own;
  vf sum{};
  for (int64_t v = 0; v < count; ++v) {
    const vf weight = state.weight(load(score + v * L));
    vf grad_weight = load(grad + v * L);
    if constexpr (Dropout) grad_weight = select(keys.keep(load(columns + v * L), drop_below), grad_weight, vf{});
    store(score + v * L, weight);
    sum += weight * grad_weight;
  }
  own.delta = sum_lanes(sum);
}

// From a vector of logits (weights when Whole) and of the gradient of the weights, both in place: the dropped weights
// and the gradient of the logits, which is returned.  Given the segments of its keys, those of other segments get
// zeros, also of a query whose logits are NaN.
template <bool Dropout, bool Whole>
FA_INLINE vf grad_of_logits(const Row& row, float* score, float* grad, uint32_t drop_below, const DropoutKeys& keys,
                            const uint32_t* columns, const int32_t* segments, vi own) {
  const vf score_or_weight = load(score);
  vf weight = Whole ? score_or_weight : row.weight(score_or_weight);
  if (segments) {
    const vi attended = load(segments) == own;
    weight = select(attended, weight, vf{});
    store(score, weight);
  }
  vf grad_weight = load(grad);
  if constexpr (Dropout) {
    const vi keep = keys.keep(load(columns), drop_below);
    store(score, select(keep, weight, vf{}));
    grad_weight = select(keep, grad_weight, vf{});
  } else if constexpr (!Whole) {
    store(score, weight);
  }
  vf grad_logit = weight * (grad_weight - row.delta);
  if (segments) grad_logit = select(load(segments) == own, grad_logit, vf{});
  store(grad, grad_logit);
  return grad_logit;
}

// The same for one query on one tile, of which the first `grid` vectors are the grid's, with the sums per column and
// per row.
template <Bias B, bool Dropout, bool Whole>
FA_INLINE void softmax_tile_backward(const Backward& p, BackwardScratch& s, BackwardBlock& block, const BiasTerms& bias,
                                     const KeyRange& range, int64_t i, int64_t v0, int64_t grid, int64_t count,
                                     const uint32_t* columns, uint64_t row, const int32_t* segments, vi own) {
  float* score = s.score.row(i);
  float* grad = s.grad_score.row(i);
  const DropoutKeys keys(p.seed, row);
  const uint32_t drop_below = p.drop_below;
  const Row state = block.rows[i];
  auto backward = [&](int64_t v, const int32_t* of_keys) FA_INLINE_CALL {
    const int64_t at = v * L;
    return grad_of_logits<Dropout, Whole>(state, score + at, grad + at, drop_below, keys, columns + at, of_keys, own);
  };
  auto grid_backward = [&](int64_t v) FA_INLINE_CALL { return backward(v, segments ? segments + v * L : nullptr); };
  for (int64_t v = grid; v < count; ++v) backward(v, nullptr);
  if constexpr (B == Bias::table) {
    for (int64_t v = 0; v < grid; ++v) grid_backward(v);
    return;
  }

  float* to_col = block.grad_col_logits + i * s.col_stride;
  LaneSums rows;
  const int64_t per_group = bias.keys.vectors, group_rows = bias.keys.rows;
  if (grid == 0) return;
  int64_t group = range.group0 + v0 / per_group, offset = v0 % per_group;
  float* to_row = block.grad_row_logits + i * bias.bias_rows + group * group_rows;

  // Rows of N vectors, none of which the tile cuts: the sums of the columns stay in registers.
  auto whole_rows = [&]<int N>() FA_INLINE_CALL {
    vf column[N]{};
    for (int64_t v = 0; v < grid; v += N) {
      vf sum{};
#pragma GCC unroll 4
      for (int n = 0; n < N; ++n) {
        const vf x = grid_backward(v + n);
        column[n] += x, sum += x;
      }
      rows.add(sum, to_row++);
    }
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n) add_to(to_col + n * L, column[n]);
    rows.flush();
  };
  if constexpr (B == Bias::one_row)
    if (offset == 0 && grid % per_group == 0) switch (per_group) {
        case 1: return whole_rows.template operator()<1>();
        case 2: return whole_rows.template operator()<2>();
        case 4: return whole_rows.template operator()<4>();
      }

  vf open{};  // sum over the vectors so far of the row that the next one continues
  for (int64_t v = 0; v < grid; ++v) {
    const vf grad_logit = grid_backward(v);
    if constexpr (B == Bias::one_row) {
      add_to(to_col + offset * L, grad_logit);
      open += grad_logit;
      if (offset == per_group - 1 || v == grid - 1) {
        rows.add(open, to_row);
        open = vf{};
      }
    } else {  // rows past the image stay out, as an infinite delta would make NaN of their zero weights
      vi real{};
      const int64_t last = bias.row_span[2 * offset + 1];
      const bool goes_on = v + 1 < grid && offset + 1 < per_group && bias.row_span[2 * offset + 2] == last;
      for (int64_t r = bias.row_span[2 * offset]; r <= smaller(last, p.hk - 1 - group * group_rows); ++r) {
        const vi part = (vi)grad_logit & load(bias.row_mask + r * s.col_stride + offset * L);
        real |= part;
        open += (vf)part;
        if (r == last && goes_on) continue;
        rows.add(open, to_row + r);
        open = vf{};
      }
      add_to(to_col + offset * L, (vf)real);
    }
    if (++offset == per_group) offset = 0, ++group, to_row += group_rows;
  }
  rows.flush();
}

// Gradients of the tables and of the query through them: products over all table positions, zeros included.
void table_products(BackwardScratch& s, const BlockRows& query, BiasTerms& bias, int64_t rows) {
  const int64_t vectors = bias.table_vectors;
  s.grad_product.seal(rows, vectors);
  s.grad_table.accumulate(rows, 0, vectors, vectors * L, s.grad_product, query);
  bias.table.weigh(rows, 0, vectors, vectors * L, s.grad_product, s.grad_relative.data);
}

// The same over each query's own positions only: where a query or a table holds NaN or infinities, its product with a
// zero outside would spread them.
void table_products_in_windows(const Backward& p, BackwardScratch& s, const BlockRows& query, BiasTerms& bias,
                               int64_t q0, int64_t count) {
  for (int64_t i = 0; i < count; ++i) {
    auto window = [&](int64_t first, int64_t length) {
      for (int64_t position = first; position < first + length; ++position) {
        const float grad = s.grad_product.row(i)[position];
        bias.table_row(position, s.table_row.data);
        float* grad_table = s.grad_table.at(position);
        for (int64_t d = 0; d < p.dk; ++d) {
          grad_table[d * s.grad_table.step()] += grad * query.row(i)[d];
          s.grad_relative[i * s.query_stride + d] += grad * s.table_row[d];
        }
      }
    };
    if (p.row_term) window(bias.row_start(q0 + i), p.hk);
    if (p.col_term) window(bias.col_start(q0 + i), p.wk);
  }
}

template <Bias B>
void begin_backward(const Backward& p, BackwardScratch& s, BackwardBlock& block, BiasTerms& bias, int64_t b, int64_t h,
                    int64_t q0, int64_t count, bool whole) {
  const uint64_t row0 = (b * p.heads + h) * p.queries() + q0;
  for (int64_t i = 0; i < QB; ++i) {
    float* query = block.query.row(i);
    float* grad_out = block.grad_out.row(i);
    // Weights of exactly 0: for padding and for queries with every key masked.
    Row& row = block.rows[i] = {.max = kInfinity, .normalize = 0.0f, .delta = 0.0f};
    set_zero(query, p.dk);
    set_zero(grad_out, p.dv);
    if (i >= count) continue;
    auto at = [&](const TensorView& view) { return bias.queries.offset(view, b, h, q0 + i); };
    gather_row(p, p.query, at(p.query), p.dk, factor_before(p.scale), query);
    gather_row(p, p.grad_out, at(p.grad_out), p.dv, 1.0f, grad_out);
    if (!whole) {
      gather_row(p, p.out, at(p.out), p.dv, 1.0f, s.out.data);
      for (int64_t d = 0; d < p.dv; ++d) row.delta += s.out[d] * grad_out[d];
    }
    const float max = p.statistics[2 * (row0 + i)], total = p.statistics[2 * (row0 + i) + 1];
    if (total != 0.0f) {
      row.max = max;
      row.normalize = 1.0f / total;
    }
    for (int64_t d = 0; d < p.dv; ++d) grad_out[d] *= factor_before(p.keep_scale);
  }
  block.query.seal();
  block.grad_out.seal();
  bias.prepare(b, h, q0, count, block.bias);
  block.grad_query.fill(0.0f);
  if constexpr (B != Bias::table) {
    block.grad_col_logits.fill(0.0f);
    block.grad_row_logits.fill(0.0f);
  }
}

// Queries [q0, q0 + count) on a tile of keys, `tile` vectors from v0 on; all there are if `whole`.
template <Bias B, bool Dropout>
void backward_tile(const Backward& p, const KeyLayout& keys, const KeyRange& range, BackwardScratch& s,
                   BackwardBlock& block, BiasTerms& bias, const Segments& segments, const uint32_t* columns, int64_t b,
                   int64_t h, int64_t q0, int64_t count, bool whole, int64_t v0, int64_t tile) {
  const int64_t rows = round_up(count, 4), grid = range.grid_part(v0, tile);
  const int64_t all_v0 = range.group0 * keys.vectors + v0;  // among those of all groups
  const uint64_t row0 = (b * p.heads + h) * p.queries() + q0;
  if constexpr (B == Bias::table) bias.free.prepare(q0, count, all_v0, grid);
  score_tile<B>(rows, v0, tile, block.query, s.key, bias, block.bias, range, s.score,
                [](int64_t, vf) FA_INLINE_CALL {});
  products(rows, block.grad_out, s.value, v0, tile, p.keep_scale, s.grad_score);
  if (segments.masks) {
    segments.hide(q0, rows, all_v0, grid, -kInfinity, s.score);
    segments.hide(q0, rows, all_v0, grid, 0.0f, s.grad_score);
  }
  const int32_t* of_keys = segments.masks ? segments.lane + all_v0 * L : nullptr;
  for (int64_t i = 0; i < rows; ++i) {
    const vi own = of_keys ? segments.of_query(q0 + i) : vi{};
    if (whole) {
      weights_and_delta<Dropout>(p, s, block.rows[i], i, tile, columns, row0 + i);
      softmax_tile_backward<B, Dropout, true>(p, s, block, bias, range, i, v0, grid, tile, columns, row0 + i, of_keys,
                                              own);
    } else {
      softmax_tile_backward<B, Dropout, false>(p, s, block, bias, range, i, v0, grid, tile, columns + v0 * L, row0 + i,
                                               of_keys, own);
    }
  }
  if constexpr (B == Bias::table) {
    bias.free.accumulate(q0, count, all_v0, grid, s.grad_score.rows.data, s.grad_score.stride, s.grad_block.data);
    bias.free.flush(q0, count, s.grad_block.data, s.grad_bias.data);
  }

  const int64_t lanes = smaller(tile * L, range.lanes - v0 * L);
  s.score.seal(rows, tile);
  s.grad_score.seal(rows, tile);
  s.grad_value.accumulate(rows, v0, tile, lanes, s.score, block.grad_out);
  s.grad_key.accumulate(rows, v0, tile, lanes, s.grad_score, block.query);
  s.key.weigh(rows, v0, tile, lanes, s.grad_score, block.grad_query.data);
}

template <Bias B>
void end_backward(const Backward& p, const KeyLayout& keys, BackwardScratch& s, BackwardBlock& block, BiasTerms& bias,
                  int64_t b, int64_t h, int64_t split, int64_t q0, int64_t count) {
  const int64_t rows = round_up(count, 4), pair = b * p.heads + h;
  for (int64_t i = 0; B != Bias::table && i < count; ++i)  // fold the rows of a group onto its first
    for (int64_t r = 1; r < keys.rows; ++r)
      for (int64_t x = 0; x < p.wk; ++x)
        block.grad_col_logits[i * s.col_stride + x] += block.grad_col_logits[i * s.col_stride + r * p.wk + x];

  for (int64_t i = 0; i < rows * s.query_stride; ++i) block.grad_query[i] *= p.scale;
  if (bias.from_tables()) {
    s.grad_product.rows.fill(0.0f);
    s.grad_relative.fill(0.0f);
    for (int64_t i = 0; i < count; ++i) {
      float* product = s.grad_product.row(i);
      if (p.row_term) copy(block.grad_row_logits + i * bias.bias_rows, p.hk, product + bias.row_start(q0 + i));
      if (p.col_term) copy(block.grad_col_logits + i * s.col_stride, p.wk, product + bias.col_start(q0 + i));
    }
    if (bias.finite_tables && BiasTerms::finite_queries(block.bias))
      table_products(s, block.bias.query, bias, rows);
    else
      table_products_in_windows(p, s, block.bias.query, bias, q0, count);
    for (int64_t i = 0; i < rows * s.query_stride; ++i) block.grad_query[i] += p.rel_scale * s.grad_relative[i];
  }

  for (int64_t i = 0; i < count; ++i) {
    const int64_t q = q0 + i;
    auto at = [&](const TensorView& view) { return bias.queries.offset(view, b, h, q); };
    if (p.key_splits == 1)
      scatter_row(p, p.grad_query, at(p.grad_query), p.dk, 1.0f, block.grad_query + i * s.query_stride);
    else
      copy(block.grad_query + i * s.query_stride, p.dk,
           p.query_partials + ((pair * p.key_splits + split) * p.queries() + q) * p.dk);
    if (p.tables) continue;
    if (p.col_term)
      scatter(p.grad_col_term, at(p.grad_col_term), p.grad_col_term.stride[4], p.wk, 1.0f,
              block.grad_col_logits + i * s.col_stride);
    if (p.row_term)
      scatter(p.grad_row_term, at(p.grad_row_term), p.grad_row_term.stride[4], p.hk, 1.0f,
              block.grad_row_logits + i * bias.bias_rows);
  }
}

// Queries [first, end), kBlocks blocks at most.
template <Bias B, bool Dropout>
void backward_blocks(const Backward& p, const KeyLayout& keys, const KeyRange& range, BackwardScratch& s,
                     BiasTerms& bias, const Segments& segments, const uint32_t* columns, int64_t b, int64_t h,
                     int64_t split, int64_t first, int64_t end) {
  const bool whole = p.key_splits == 1 && range.vectors <= kTile;
  each_block(s.blocks, first, end, [&](BackwardBlock& block, int64_t q0, int64_t count) FA_INLINE_CALL {
    begin_backward<B>(p, s, block, bias, b, h, q0, count, whole);
  });
  for (int64_t v0 = 0; v0 < range.vectors; v0 += kTile)
    each_block(s.blocks, first, end, [&](BackwardBlock& block, int64_t q0, int64_t count) FA_INLINE_CALL {
      backward_tile<B, Dropout>(p, keys, range, s, block, bias, segments, columns, b, h, q0, count, whole, v0,
                                smaller(kTile, range.vectors - v0));
    });
  each_block(s.blocks, first, end, [&](BackwardBlock& block, int64_t q0, int64_t count) FA_INLINE_CALL {
    end_backward<B>(p, keys, s, block, bias, b, h, split, q0, count);
  });
}

#if FUSED_ATTN_TILES > 1
// A task of these images.  Their forward pass is done anew: the logits have to be the same in both passes to the last
// bit, as weights follow from their difference.
void backward_without_tiles(const Backward& p, int64_t task, int64_t h, int64_t first_image, int64_t last_image) {
  const int64_t queries = p.queries(), images = last_image - first_image, first_pair = first_image * p.heads + h;
  Scratch<float> out(images * queries * p.dv), statistics(2 * images * p.heads * queries);
  Forward forward;
  static_cast<Problem&>(forward) = p;
  forward.query_splits = 1;
  forward.statistics = statistics.data - 2 * first_pair * queries;
  forward.out = {out.data - first_image * queries * p.dv, DType::float32, {queries * p.dv, 0, p.wq * p.dv, p.dv, 1}};
  for (int64_t b = first_image; b < last_image; ++b) {
    const int64_t pair = p.bias_table ? h * p.batch + b : b * p.heads + h;
    avx512::kernels.forward(forward, pair, pair + 1);
  }
  Backward backward = p;
  backward.statistics = forward.statistics;
  backward.out = forward.out;
  avx512::kernels.backward(backward, task, task + 1);
}
#endif

void backward(const Backward& p, int64_t begin, int64_t end) {
  [[maybe_unused]] const Instructions instructions;
  const KeyLayout keys(p);
  const QueryGrid queries(p);
  BiasTerms bias(p, keys, queries, true);
  BackwardScratch s(p, keys, bias, p.key_splits);
  Segments segments(p, keys);
  Scratch<uint32_t> columns;
  if (p.drop_below > 0) hash_columns(p, keys, columns);
  const auto run_blocks = with_bias(
      p, keys, [&]<Bias B>() { return p.drop_below > 0 ? backward_blocks<B, true> : backward_blocks<B, false>; });
  int64_t packed_table = -1;
  for (int64_t task = begin; task < end; ++task) {
    const int64_t split = task % p.key_splits, unit = task / p.key_splits;
    const int64_t run = p.bias_table ? unit % p.image_runs : unit / p.heads;
    const int64_t h = p.bias_table ? unit / p.image_runs : unit % p.heads;
    const bool last = split == p.key_splits - 1;
    const KeyRange range(keys, split_begin(keys.groups, p.key_splits, split),
                         split_begin(keys.groups, p.key_splits, split + 1), last ? p.prefix : 0);
    if ((bias.from_tables() || p.bias_table) && h != packed_table) bias.pack_tables(packed_table = h);
    const int64_t first_image = split_begin(p.batch, p.image_runs, run);
    const int64_t last_image = split_begin(p.batch, p.image_runs, run + 1);
#if FUSED_ATTN_TILES > 1
    bool fit = true;
    for (int64_t b = first_image; b < last_image; ++b) fit = fit && fit_parts(p, p.grad_out, b, h);
    if (!fit) {
      backward_without_tiles(p, task, h, first_image, last_image);
      continue;
    }
#endif
    if (bias.from_tables()) s.grad_table.clear();
    if (p.bias_table) s.grad_bias.fill(0.0f);
    for (int64_t b = first_image; b < last_image; ++b) {
      pack_keys(p.key, p.prefix_key, b, h, p, keys, range, true, s.key);
      pack_keys(p.value, p.prefix_value, b, h, p, keys, range, false, s.value);
      s.grad_key.clear();
      s.grad_value.clear();
      segments.pack(b);
      for (int64_t q = 0; q < p.queries(); q += kBlocks * QB)
        run_blocks(p, keys, range, s, bias, segments, columns.data + range.group0 * keys.vectors * L, b, h, split, q,
                   smaller(q + kBlocks * QB, p.queries()));

      unpack_keys(p.grad_key, p.grad_prefix_key, b, h, p, keys, range, factor_after(p.scale), s.grad_key);
      unpack_keys(p.grad_value, p.grad_prefix_value, b, h, p, keys, range, factor_after(p.keep_scale), s.grad_value);
    }
    const int64_t part = p.part(h, run, split);
    if (p.bias_table)
      unpack_bias_table(p, s.grad_bias.data, bias.free.stride,
                        p.bias_partials + part * p.bias_rows() * p.bias_columns());
    if (!bias.from_tables()) continue;
    auto unpack = [&](int64_t length, int64_t first, float* to) {
      for (int64_t i = 0; i < length; ++i) {
        const float* from = s.grad_table.at(first + i);
        float* row = to + (p.key_minus_query ? i : length - 1 - i) * p.dk;
        for (int64_t d = 0; d < p.dk; ++d) row[d] = factor_after(p.rel_scale) * from[d * s.grad_table.step()];
      }
    };
    float* partial = p.table_partials + part * (p.row_length() + p.col_length()) * p.dk;
    unpack(p.row_length(), 0, partial);
    unpack(p.col_length(), bias.row_vectors * L, partial + p.row_length() * p.dk);
  }
}

void sum_query_partials(const Backward& p, int64_t begin, int64_t end) {
  const QueryGrid queries(p);
  Scratch<float> sum(p.dk);
  for (int64_t pair = begin; pair < end; ++pair)
    for (int64_t q = 0; q < p.queries(); ++q) {
      for (int64_t d = 0; d < p.dk; ++d) sum[d] = 0.0f;
      for (int64_t split = 0; split < p.key_splits; ++split) {
        const float* partial = p.query_partials + ((pair * p.key_splits + split) * p.queries() + q) * p.dk;
        for (int64_t d = 0; d < p.dk; ++d) sum[d] += partial[d];
      }
      scatter(p.grad_query, queries.offset(p.grad_query, pair / p.heads, pair % p.heads, q), p.grad_query.stride[4],
              p.dk, 1.0f, sum.data);
    }
}

// sum[i] = the sum of number i of `count` partial results, `stride` apart, in as many chains as a chain has terms: one
// alone would round every image of a large batch at the magnitude of the whole sum.
void sum_partials(const float* partials, int64_t count, int64_t stride, int64_t length, float* chain, float* sum) {
  int64_t chains = 1;
  while (chains * chains < count) ++chains;
  set_zero(sum, length);
  for (int64_t i = 0; i < chains; ++i) {
    set_zero(chain, length);
    for (int64_t part = split_begin(count, chains, i); part < split_begin(count, chains, i + 1); ++part)
      for (int64_t d = 0; d < length; ++d) chain[d] += partials[part * stride + d];
    for (int64_t d = 0; d < length; ++d) sum[d] += chain[d];
  }
}

void sum_table_partials(const Backward& p, int64_t begin, int64_t end) {
  Scratch<float> sum(p.dk), chain(p.dk);
  const int64_t rows = p.row_length() + p.col_length();
  for (int64_t row = begin; row < end; ++row) {
    const bool in_col = row >= p.row_length();
    const TensorView& to = in_col ? p.grad_col_term : p.grad_row_term;
    const bool shared = to.stride[0] == 0;
    for (int64_t table = 0; table < (shared ? 1 : p.heads); ++table) {
      const int64_t first = shared ? 0 : p.first_part(table), parts = shared ? p.parts() : p.first_part(1);
      sum_partials(p.table_partials + (first * rows + row) * p.dk, parts, rows * p.dk, p.dk, chain.data, sum.data);
      const int64_t position = in_col ? row - p.row_length() : row;
      scatter(to, table * to.stride[0] + position * to.stride[1], to.stride[2], p.dk, 1.0f, sum.data);
    }
  }
}

void sum_bias_partials(const Backward& p, int64_t begin, int64_t end) {
  const int64_t columns = p.bias_columns();
  Scratch<float> sum(columns), chain(columns);
  for (int64_t row = begin; row < end; ++row) {
    const int64_t head = row / p.bias_rows(), y = row % p.bias_rows();
    const float* partials = p.bias_partials + (p.first_part(head) * p.bias_rows() + y) * columns;
    sum_partials(partials, p.first_part(1), p.bias_rows() * columns, columns, chain.data, sum.data);
    const TensorView& to = p.grad_bias_table;
    scatter(to, head * to.stride[0] + y * to.stride[1], to.stride[2], columns, 1.0f, sum.data);
  }
}
