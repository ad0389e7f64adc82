// Planes of one block; part of kernels_impl.h.

// The products of the exponentials of both softmaxes, in L1, give the moments or the output too.
template <bool Weighted>
struct WholeStatistics : Statistics {
  Scratch<float> exponentials;
  Writer write;

  WholeStatistics(const Forward& forward, Operands& operands)
      : Statistics(forward, operands), exponentials(o.plane, 0.0f), write(p) {}

  void image(const Block& k, int64_t i, int64_t plane) {
    float *row_statistics = p.row_statistics + plane * 2 * p.height,
          *col_statistics = p.col_statistics + plane * 2 * p.width;
    rows<Weighted, true>(k, i, row_statistics, exponentials.data);
    columns<Weighted, true>(k, i, false, exponentials.data);
    if (!Weighted && p.masked()) {
      settle_rows(k, i, 0, k.rows, 0.0f, row_statistics);
      settle(p.col_mask, k.b0 + i, 0, p.width, 0.0f, col_max.data, col_sum.data);
    }
    store_row_as(col_statistics, p.width, col_max.data);
    store_row_as(col_statistics + p.width, p.width, col_sum.data);
    if (p.also == Also::nothing) return;
    o.load_statistics<false>(k, plane);
    auto product = [&](int64_t y) FA_INLINE_CALL {
      return [from = exponentials + y * o.stride, row = o.row_inverse.data[y], col = o.col_inverse.data](int64_t v)
                 FA_INLINE_CALL { return load(from + v * L) * (row * load(col + v * L)); };
    };
    if (p.also == Also::moments) return add_moments(o, k, p.moments + (k.task * p.heads + k.h) * 2, product);
    write(k, i, product);
  }
  void images_done(const Block&) { end_of_streams(); }
};

void whole_statistics(const Forward& p, int64_t begin, int64_t end) {
  p.weighted ? walk<WholeStatistics<true>>(p, begin, end) : walk<WholeStatistics<false>>(p, begin, end);
}

// Forms the sums on the way, from softmaxes and gradients of their product kept in L1.
template <bool Weighted, bool Normalise, bool Log>
struct WholeGradients : Gradients {
  Scratch<float> gradient, row_softmax, col_softmax, row_sum;

  WholeGradients(const Backward& backward, Operands& operands)
      : Gradients(backward, operands),
        gradient(o.plane, 0.0f),
        row_softmax(o.plane, 0.0f),
        col_softmax(o.plane, 0.0f),
        row_sum(p.block_rows, 0.0f) {}

  void image(const Block& k, int64_t i, int64_t plane) {
    o.load_statistics<true>(k, plane);
    grad.load_image(k, i);
    const int64_t vectors = o.vectors;
    const Normalisation<Normalise> norm(p, k);
    float* const col_sums = col_sum.data;
    for (int64_t v = 0; v < vectors; ++v) store(col_sums + v * L, vf{});
    for (int64_t y0 = 0; y0 < k.rows; y0 += L) {
      const int64_t count = smaller(L, k.rows - y0);
      vf sums[L];
      for (int64_t j = 0; j < count; ++j) {
        const int64_t at = (y0 + j) * o.stride;
        const Softmaxes<Weighted> softmax(o, o.x[i], y0 + j);
        const float* grad_out = grad.rows[y0 + j];
        grad.prefetch_next(y0 + j);
        float *const d_to = gradient + at, *const row_to = row_softmax + at, *const col_to = col_softmax + at;
        vf sum{};
        for (int64_t v = 0; v < vectors; ++v) {
          const vf row = softmax.row(v), col = softmax.col(v);
          const vf d = norm.backward(load(grad_out + v * L), softmax.value(v), row * col);
          if constexpr (Log) {
            sum += d;
            store(col_sums + v * L, load(col_sums + v * L) + d);
          } else {
            sum += row * rounded(col * d);
            store(col_sums + v * L, load(col_sums + v * L) + col * rounded(row * d));
          }
          store(d_to + v * L, d), store(row_to + v * L, row), store(col_to + v * L, col);
        }
        sums[j] = sum;
      }
      for (int64_t j = count; j < L; ++j) sums[j] = vf{};
      store(row_sum + y0, sum_lanes_of_each(sums));
    }
    add<Weighted, Log>(k, i, norm, row_sum.data, [&](int64_t y) FA_INLINE_CALL {
      const int64_t at = y * o.stride;
      return [row = row_softmax + at, col = col_softmax + at, d = gradient + at](int64_t v)
                 FA_INLINE_CALL { return Factors{load(row + v * L), load(col + v * L), load(d + v * L)}; };
    });
  }
};

void whole_gradients(const Backward& p, int64_t begin, int64_t end) {
  with_options(p, [&]<bool Weighted, bool Normalise, bool Log>() {
    walk<WholeGradients<Weighted, Normalise, Log>>(p, begin, end);
  });
}
