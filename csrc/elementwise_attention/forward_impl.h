// Forward pass; part of kernel_impl.h.

// Sums of (product - 1 / (H W)) and of its square over a block.  A uniform plane holds 1 / (H W) everywhere: shifting
// by it keeps the variance from cancelling.
template <bool Weighted>
FA_INLINE void add_moments(const Operands& o, const Block& k, int64_t image, double* moments) {
  const int64_t vectors = o.vectors;
  const vf shift = broadcast(1.0f / (float(o.p.height) * float(o.p.width)));
  vf last = shift;
  for (int64_t i = o.p.width; i < o.stride; ++i) last[i - (o.vectors - 1) * L] = 0.0f;
  for (int64_t y = 0; y < k.rows;) {
    vf sum{}, square{};
    for (const int64_t part = smaller(k.rows, y + kLongestChain); y < part; ++y) {
      const Softmaxes<Weighted> row(o, o.x[image], y);
      for (int64_t v = 0; v < vectors; ++v) {
        const vf x = row.product(v) - (v + 1 < vectors ? shift : last);
        sum += x, square += x * x;
      }
    }
    moments[0] += sum_lanes(sum), moments[1] += sum_lanes(square);
  }
}

template <bool Weighted>
struct Statistics : Visitor {
  const Forward& p;
  Buffer col_max, col_sum;

  Statistics(const Forward& forward, Operands& operands)
      : Visitor{operands}, p(forward), col_max(o.stride, 0.0f), col_sum(o.stride, 0.0f) {}

  // L rows at a time: their reductions over lanes share shuffles.
  void rows(const Block& k, int64_t i, float* stats) {
    const int64_t vectors = o.vectors;
    for (int64_t y0 = 0; y0 < k.rows; y0 += L) {
      const int64_t count = smaller(L, k.rows - y0);
      vf rows[L];
      for (int64_t j = 0; j < count; ++j) {
        const Row<Weighted> row(o, o.x[i], y0 + j);
        rows[j] = over_vectors(
            vectors, broadcast(-kInfinity), [&](int64_t v) FA_INLINE_CALL { return row.row_logit(v); },
            [](vf a, vf b) FA_INLINE_CALL { return maximum(a, b); });
      }
      for (int64_t j = count; j < L; ++j) rows[j] = vf{};
      const vf max = max_lanes_of_each(rows), shift = select(max == -kInfinity, vf{}, max);
      for (int64_t j = 0; j < count; ++j) {
        const Row<Weighted> row(o, o.x[i], y0 + j);
        const float at_most = shift[j];
        rows[j] = over_vectors(
            vectors, vf{}, [&](int64_t v) FA_INLINE_CALL { return exp_of(row.row_logit(v) - at_most); },
            [](vf a, vf b) FA_INLINE_CALL { return a + b; });
      }
      for (int64_t j = count; j < L; ++j) rows[j] = vf{};
      write_row(stats + k.y0 + y0, count, [&](int64_t) FA_INLINE_CALL { return max; });
      const vf sum = sum_lanes_of_each(rows);
      write_row(stats + p.height + k.y0 + y0, count, [&](int64_t) FA_INLINE_CALL { return sum; });
    }
  }

  // Maximum and sum of the columns over the block, on top of what `before` holds.
  void columns(const Block& k, int64_t i, const float* before) {
    for (int64_t v = 0; v < o.vectors; ++v) {
      auto at = [&](int64_t y) FA_INLINE_CALL { return Row<Weighted>(o, o.x[i], y).col_logit(v); };
      vf old = before ? load(col_max + v * L) : broadcast(-kInfinity), max = old;
      for (int64_t y = 0; y < k.rows; ++y) max = maximum(at(y), max);
      // A column of -inf so far: its sum stays 0.
      const vf shift = select(max == -kInfinity, vf{}, max);
      vf sum = before ? load(col_sum + v * L) * exp_of(old - shift) : vf{};
      for (int64_t y = 0; y < k.rows;) {
        vf part{};
        for (const int64_t stop = smaller(k.rows, y + kLongestChain); y < stop; ++y) part += exp_of(at(y) - shift);
        sum += part;
      }
      store(col_max + v * L, max);
      store(col_sum + v * L, sum);
    }
  }

  void image(const Block& k, int64_t i, int64_t plane) {
    rows(k, i, p.row_stats + plane * 2 * p.height);
    if (!p.whole()) {
      float* partial = p.col_partials + (k.range * p.planes() + plane) * 2 * p.width;
      if (!k.first_rows) {
        load_row_as(partial, 1, p.width, -kInfinity, col_max.data);
        load_row_as(partial + p.width, 1, p.width, 0.0f, col_sum.data);
      }
      columns(k, i, k.first_rows ? nullptr : partial);
      store_row_as(partial, p.width, col_max.data);
      store_row_as(partial + p.width, p.width, col_sum.data);
      return;
    }
    columns(k, i, nullptr);
    float* stats = p.col_stats + plane * 2 * p.width;
    store_row_as(stats, p.width, col_max.data);
    store_row_as(stats + p.width, p.width, col_sum.data);
    if (!p.needs_moments) return;
    o.load_statistics(k, plane);
    add_moments<Weighted>(o, k, i, p.moments + (k.task * p.heads + k.h) * 2);
  }
};

void statistics(const Forward& p, int64_t begin, int64_t end) {
  Operands o(p);
  auto run = [&](auto visitor) { walk(p, begin, end, o, *visitor); };
  if (p.weighted) {
    Statistics<true> visitor(p, o);
    run(&visitor);
  } else {
    Statistics<false> visitor(p, o);
    run(&visitor);
  }
}

// Over the ranges of rows, in their order.
void combine_columns(const Forward& p, int64_t begin, int64_t end) {
  for (int64_t plane = begin; plane < end; ++plane) {
    auto partial = [&](int64_t range) { return p.col_partials + (range * p.planes() + plane) * 2 * p.width; };
    float* stats = p.col_stats + plane * 2 * p.width;
    for (int64_t x = 0; x < p.width; ++x) {
      float max = -kInfinity, sum = 0.0f;
      for (int64_t r = 0; r < p.ranges; ++r) max = partial(r)[x] > max ? partial(r)[x] : max;
      const float shift = max == -kInfinity ? 0.0f : max;
      for (int64_t r = 0; r < p.ranges; ++r)
        sum += partial(r)[p.width + x] * __builtin_exp2f((partial(r)[x] - shift) * kLog2e);
      stats[x] = max, stats[p.width + x] = sum;
    }
  }
}

struct Moments : Visitor {
  const Forward& p;
  void image(const Block& k, int64_t i, int64_t plane) {
    o.load_statistics(k, plane);
    add_moments<true>(o, k, i, p.moments + (k.task * p.heads + k.h) * 2);
  }
};

void moments(const Forward& p, int64_t begin, int64_t end) {
  Operands o(p);
  Moments visitor{{o}, p};
  walk(p, begin, end, o, visitor);
}

template <bool Weighted, bool Normalise>
struct Output : Visitor {
  const Forward& p;

  void image(const Block& k, int64_t i, int64_t plane) {
    o.load_statistics(k, plane);
    const TensorView& out = p.out;
    const int64_t channel = k.h * p.channels + k.c;
    const float mean = Normalise ? p.mean[channel] : 0.0f, scale = Normalise ? p.scale[channel] : 1.0f;
    const int64_t offset = (k.b0 + i) * out.stride[0] + k.h * out.stride[1] + k.c * out.stride[2];
    if (i + 1 < k.images)
      prefetch_rows<1>(out, offset + out.stride[0] + k.y0 * out.stride[3], out.stride[3], k.rows, p.width);
    for (int64_t y = 0; y < k.rows; ++y) {
      const Softmaxes<Weighted> row(o, o.x[i], y);
      write_row(out, offset + (k.y0 + y) * out.stride[3], p.width, [&](int64_t v) FA_INLINE_CALL {
        if constexpr (Normalise) return (row.product(v) - mean) * scale * row.value(v);
        return row.product(v);
      });
    }
  }
};

void output(const Forward& p, int64_t begin, int64_t end) {
  Operands o(p);
  if (!p.weighted) {
    Output<false, false> visitor{{o}, p};
    walk(p, begin, end, o, visitor);
  } else if (p.mean) {
    Output<true, true> visitor{{o}, p};
    walk(p, begin, end, o, visitor);
  } else {
    Output<true, false> visitor{{o}, p};
    walk(p, begin, end, o, visitor);
  }
}
