// Planes of more than one block; part of kernels_impl.h.

template <bool Weighted>
struct TiledStatistics : Statistics {
  bool shares = false;  // so far, rows and columns of this range are shifted by one number:
  float shift = 0.0f;

  using Statistics::Statistics;

  // Sums of R rows from y on, and of the columns over them: one exponential serves both.
  template <int R>
  FA_INLINE bool shared_rows(const Block& k, int64_t i, int64_t y, float* statistics) {
    const Rows& x = o.x[i];
    const int64_t vectors = o.vectors;
    const float by = shift;
    float* const to = col_sum.data;
    const float* rows[R];
    for (int r = 0; r < R; ++r) rows[r] = x[y + r];
    vf sums[R] = {};
    for (int64_t v = 0; v < vectors;) {
      vf part[R] = {};
      for (const int64_t stop = smaller(vectors, v + kLongestChain); v < stop; ++v) {
        vf column{};
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) {
          prefetch_on(rows[r] + v * L);
          const vf e = exp_of(load(rows[r] + v * L) - by);
          part[r] += e, column += e;
        }
        store(to + v * L, load(to + v * L) + column);
      }
      for (int r = 0; r < R; ++r) sums[r] += part[r];
    }
    for (int r = 0; r < R; ++r) {
      statistics[k.y0 + y + r] = by;
      statistics[p.height + k.y0 + y + r] = sum_lanes(sums[r]);
    }
    if (p.masked()) settle_rows(k, i, y, R, by, statistics);
    return all_near(statistics + p.height + k.y0 + y, R);
  }

  // Rows and columns of a block, shifted by the maximum of the plane's first row that takes part; false where others
  // are too far from it.
  bool shared(const Block& k, int64_t i, int64_t plane) {
    float* statistics = p.row_statistics + plane * 2 * p.height;
    if (k.first_rows) {
      int64_t first = 0;
      while (first + 1 < p.height && !p.row_mask(k.b0 + i, first)) ++first;
      load_row(p.x, (k.b0 + i) * p.x.stride[0] + k.c * p.x.stride[1] + first * p.x.stride[2], p.x.stride[3], p.width,
               -kInfinity, col_max.data);
      if (!p.logits_are_x()) o.scale_and_mask(col_max.data, o.kept(k, i, first));
      shift = max_lanes(over_vectors(
          o.vectors, broadcast(-kInfinity), [&](int64_t v) FA_INLINE_CALL { return load(col_max + v * L); }, kLarger));
      for (int64_t v = 0; v < o.vectors; ++v) store(col_sum + v * L, vf{});
    }
    int64_t y = 0;
    for (; y + 8 <= k.rows; y += 8)
      if (!shared_rows<8>(k, i, y, statistics)) return false;
    for (; y < k.rows; ++y)
      if (!shared_rows<1>(k, i, y, statistics)) return false;
    if (!k.last_rows) return true;
    float* partial = p.col_partials + (k.range * p.planes() + plane) * 2 * p.width;
    for (int64_t x = 0; x < p.width; ++x) partial[x] = shift;
    store_row_as(partial + p.width, p.width, col_sum.data);
    if (!any_row(k, i)) return shift - shift == 0.0f;  // the sums of columns are 0, and a finite shift keeps them so
    if (p.masked()) settle(p.col_mask, k.b0 + i, 0, p.width, shift, col_max.data, col_sum.data);
    return all_near(col_sum.data, p.width);
  }

  // Whether a row of the range takes part.
  bool any_row(const Block& k, int64_t i) const {
    bool any = p.row_mask.data == nullptr;
    for (int64_t y = p.height * k.range / p.ranges; !any && y < k.y0 + k.rows; ++y) any = p.row_mask(k.b0 + i, y);
    return any;
  }

  // Rows and columns of a block, each shifted by its own maximum.
  void separate(const Block& k, int64_t i, int64_t plane) {
    float* statistics = p.row_statistics + plane * 2 * p.height;
    rows<Weighted, false>(k, i, statistics, nullptr);
    if (!Weighted && p.masked()) settle_rows(k, i, 0, k.rows, 0.0f, statistics);
    float* partial = p.col_partials + (k.range * p.planes() + plane) * 2 * p.width;
    if (!k.first_rows) {
      load_row_as(partial, 1, p.width, -kInfinity, col_max.data);
      load_row_as(partial + p.width, 1, p.width, 0.0f, col_sum.data);
    }
    columns<Weighted, false>(k, i, !k.first_rows, nullptr);
    store_row_as(partial, p.width, col_max.data);
    store_row_as(partial + p.width, p.width, col_sum.data);
  }

  void image(const Block& k, int64_t i, int64_t plane) {
    if (Weighted) return separate(k, i, plane);
    if (k.first_rows) shares = true;
    if (!shares) return separate(k, i, plane);
    shares = shared(k, i, plane);
    if (shares) return;
    const int64_t y_begin = p.height * k.range / p.ranges;
    Block again = k;
    for (again.y0 = y_begin; again.y0 <= k.y0; again.y0 += p.block_rows) {
      again.first_rows = again.y0 == y_begin;
      again.rows = again.y0 == k.y0 ? k.rows : p.block_rows;
      o.load_images(again);
      separate(again, i, plane);
    }
  }
};

void tiled_statistics(const Forward& p, int64_t begin, int64_t end) {
  p.weighted ? walk<TiledStatistics<true>>(p, begin, end) : walk<TiledStatistics<false>>(p, begin, end);
}

// Over the ranges of rows, in their order.
void combine_columns(const Forward& p, int64_t begin, int64_t end) {
  for (int64_t plane = begin; plane < end; ++plane) {
    auto partial = [&](int64_t range) { return p.col_partials + (range * p.planes() + plane) * 2 * p.width; };
    float* statistics = p.col_statistics + plane * 2 * p.width;
    for (int64_t x = 0; x < p.width; ++x) {
      float max = -kInfinity, sum = 0.0f;
      for (int64_t r = 0; r < p.ranges; ++r) max = partial(r)[x] > max ? partial(r)[x] : max;
      const float shift = max == -kInfinity ? 0.0f : max;
      for (int64_t r = 0; r < p.ranges; ++r)
        sum += partial(r)[p.width + x] * __builtin_exp2f((partial(r)[x] - shift) * kLog2e);
      const bool takes_part = p.col_mask(plane / p.channels / p.heads, x);
      statistics[x] = takes_part ? max : shift, statistics[p.width + x] = takes_part ? sum : 1.0f;
    }
  }
}

struct Moments : Visitor {
  const Forward& p;

  Moments(const Forward& forward, Operands& operands) : Visitor{operands}, p(forward) {}
  void image(const Block& k, int64_t i, int64_t plane) {
    o.load_statistics<false>(k, plane);
    add_moments(o, k, p.moments + (k.task * p.heads + k.h) * 2, [&](int64_t y) FA_INLINE_CALL {
      return [row = Softmaxes<true>(o, o.x[i], y)](int64_t v) FA_INLINE_CALL { return row.product(v); };
    });
  }
};

void moments(const Forward& p, int64_t begin, int64_t end) { walk<Moments>(p, begin, end); }

// Per row and per column, the sum of product times its gradient.
template <bool Weighted, bool Normalise, bool Log>
struct Sums : Visitor {
  static constexpr bool kReadsX = !Log;  // the gradient alone
  const Backward& p;
  GradOut grad;
  Scratch<float> col_sum;

  Sums(const Backward& backward, Operands& operands)
      : Visitor{operands}, p(backward), grad(backward, operands), col_sum(o.stride, 0.0f) {}

  void image(const Block& k, int64_t i, int64_t plane) {
    if constexpr (!Log) o.load_statistics<false>(k, plane);
    grad.load_image(k, i);
    const int64_t vectors = o.vectors;
    const Normalisation<Normalise> norm(p, k);
    float* partial = p.col_sums + (k.range * p.planes() + plane) * p.width;
    if (k.first_rows)
      for (int64_t v = 0; v < o.vectors; ++v) store(col_sum + v * L, vf{});
    else
      load_row_as(partial, 1, p.width, 0.0f, col_sum.data);
    float* col = col_sum.data;
    for (int64_t y = 0; y < k.rows; ++y) {
      const float* grad_row = grad.rows[y];
      vf sum{};
      if constexpr (Log) {
        for (int64_t v = 0; v < vectors; ++v) {
          prefetch_on(grad_row + v * L);
          const vf d = load(grad_row + v * L);
          sum += d;
          store(col + v * L, load(col + v * L) + d);
        }
        p.row_sums[plane * p.height + k.y0 + y] = sum_lanes(sum);
        continue;
      }
      const Softmaxes<Weighted> row(o, o.x[i], y);
      for (int64_t v = 0; v < vectors; ++v) {
        if constexpr (!Weighted) prefetch_on(row.x + v * L), prefetch_on(grad_row + v * L);
        const vf product = row.product(v), t = product * norm.backward(load(grad_row + v * L), row.value(v), product);
        sum += t;
        store(col + v * L, load(col + v * L) + t);
      }
      p.row_sums[plane * p.height + k.y0 + y] = sum_lanes(sum);
    }
    store_row_as(partial, p.width, col_sum.data);
  }
};

void sums(const Backward& p, int64_t begin, int64_t end) {
  with_options(p,
               [&]<bool Weighted, bool Normalise, bool Log>() { walk<Sums<Weighted, Normalise, Log>>(p, begin, end); });
}

void combine_sums(const Backward& p, int64_t begin, int64_t end) {
  for (int64_t plane = begin; plane < end; ++plane)
    for (int64_t x = 0; x < p.width; ++x) {
      float sum = 0.0f;
      for (int64_t r = 0; r < p.ranges; ++r) sum += p.col_sums[(r * p.planes() + plane) * p.width + x];
      p.col_sums[plane * p.width + x] = sum;
    }
}

template <bool Weighted, bool Normalise, bool Log>
struct TiledGradients : Gradients {
  bool written = false;  // grad_x of this block already

  using Gradients::Gradients;

  void image(const Block& k, int64_t i, int64_t plane) {
    o.load_statistics<true>(k, plane);
    grad.load_image(k, i);
    const Normalisation<Normalise> norm(p, k);
    const float* row_sums = p.row_sums + plane * p.height + k.y0;
    load_row_as(p.col_sums + plane * p.width, 1, p.width, 0.0f, col_sum.data);
    if constexpr (!Weighted) {
      written = o.shares(k);
      if (written) return shared(k, i, row_sums);
    }
    add<Weighted, Log>(k, i, norm, row_sums, [&](int64_t y) FA_INLINE_CALL {
      return [norm, softmax = Softmaxes<Weighted>(o, o.x[i], y), grad_out = grad.rows[y]](int64_t v) FA_INLINE_CALL {
        const vf row = softmax.row(v), col = softmax.col(v);
        return Factors{row, col, norm.backward(load(grad_out + v * L), softmax.value(v), row * col)};
      };
    });
  }

  // One exponential for both softmaxes.
  void shared(const Block& k, int64_t i, const float* row_sums) {
    const TensorView& g = p.grad_x;
    const int64_t offset = (k.b0 + i) * g.stride[0] + k.c * g.stride[1] + k.y0 * g.stride[2];
    const float shift = o.col_max.data[0];
    auto grad_logit = [&](int64_t y) FA_INLINE_CALL {
      return [x = o.x[i][y], grad_out = grad.rows[y], row_inverse = o.row_inverse.data[y],
              row_rest = o.row_rest.data[y], row_sum = row_sums[y], col_inverse = o.col_inverse.data,
              col_rest = o.col_rest.data, col_sum = col_sum.data, shift](int64_t v) FA_INLINE_CALL {
        const int64_t lane = v * L;
        prefetch_on(x + lane), prefetch_on(grad_out + lane);
        const vf e = exp_of(load(x + lane) - shift), d = load(grad_out + lane);
        const vf row = e * row_inverse + rounded(e * row_rest);
        const vf col = e * load(col_inverse + lane) + rounded(e * load(col_rest + lane));
        const auto [d_row, d_col] = Gradients::grad_logits<Log>(row, col, d, row_sum, load(col_sum + lane));
        return d_row + d_col;
      };
    };
    if (p.logits_are_x()) {
      for (int64_t y = 0; y < k.rows; ++y) write_row(g, offset + y * g.stride[2], p.width, p.large, grad_logit(y));
    } else {
      for (int64_t y = 0; y < k.rows; ++y)
        write_row(g, offset + y * g.stride[2], p.width, p.large,
                  [kept = o.kept(k, i, k.y0 + y), factor = p.factor, grad = grad_logit(y)](int64_t v)
                      FA_INLINE_CALL { return Operands::where_kept(kept, v, grad(v) * factor, 0.0f); });
    }
  }

  void images_done(const Block& k) { written ? end_of_streams() : Gradients::images_done(k); }
};

void tiled_gradients(const Backward& p, int64_t begin, int64_t end) {
  with_options(p, [&]<bool Weighted, bool Normalise, bool Log>() {
    walk<TiledGradients<Weighted, Normalise, Log>>(p, begin, end);
  });
}
