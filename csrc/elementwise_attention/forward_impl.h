// Forward pass; part of kernel_impl.h.

// Sums of (product - 1 / (H W)) and of its square over a block, with the product of row y and vector v at(y)(v).  A
// uniform plane holds 1 / (H W) everywhere: shifting by it keeps the variance from cancelling.
template <class At>
FA_INLINE void add_moments(const Operands& o, const Block& k, double* moments, const At& at) {
  const int64_t vectors = o.vectors;
  const vf shift = broadcast(1.0f / (float(o.p.height) * float(o.p.width)));
  vf last = shift;
  for (int64_t i = o.p.width; i < o.stride; ++i) last[i - (o.vectors - 1) * L] = 0.0f;
  for (int64_t y = 0; y < k.rows;) {
    vf sum{}, square{};
    for (const int64_t part = smaller(k.rows, y + kLongestChain); y < part; ++y) {
      const auto product = at(y);
      for (int64_t v = 0; v < vectors; ++v) {
        const vf x = product(v) - (v + 1 < vectors ? shift : last);
        sum += x, square += x * x;
      }
    }
    moments[0] += sum_lanes(sum), moments[1] += sum_lanes(square);
  }
}

// Writes the output of a block of rows.  Large outputs are streamed: row by row where rows are aligned, else the block
// as one run, gathered in the first-level cache.
struct Writer {
  const Forward& p;
  bool gathers;
  Buffer block;

  explicit Writer(const Forward& forward)
      : p(forward),
        gathers(p.large && p.out.dtype == DType::float32 && p.width % L != 0),
        block(gathers ? p.block_rows * p.width + L : 0, 0.0f) {}

  // at(y)(v): vector v of row y.
  template <class At>
  FA_INLINE void operator()(const Block& k, int64_t image, const At& at) {
    const int64_t* stride = p.out.stride;
    const int64_t offset = (k.b0 + image) * stride[0] + k.h * stride[1] + k.c * stride[2] + k.y0 * stride[3];
    if (gathers) {
      for (int64_t y = 0; y < k.rows; ++y) write_row(block + y * p.width, p.width, false, at(y));
      return stream(static_cast<float*>(p.out.data) + offset, block.data, k.rows * p.width);
    }
    if (!p.large && image + 1 < k.images) prefetch_rows<1>(p.out, offset + stride[0], stride[3], k.rows, p.width);
    for (int64_t y = 0; y < k.rows; ++y) write_row(p.out, offset + y * stride[3], p.width, p.large, at(y));
  }
};

// Of a whole plane the exponentials of both softmaxes are multiplied on the way, in L1.  They give the moments, or the
// output where there is no batch normalisation.
template <bool Weighted, bool Whole>
struct Statistics : Visitor {
  const Forward& p;
  Buffer col_max, col_sum, exponentials;
  Writer write;

  Statistics(const Forward& forward, Operands& operands)
      : Visitor{operands},
        p(forward),
        col_max(o.stride, 0.0f),
        col_sum(o.stride, 0.0f),
        exponentials(Whole ? o.plane : 0, 0.0f),
        write(p) {}

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
        float* to = exponentials + (y0 + j) * o.stride;
        rows[j] = over_vectors(
            vectors, vf{},
            [&](int64_t v) FA_INLINE_CALL {
              const vf e = exp_of(row.row_logit(v) - at_most);
              if constexpr (Whole) store(to + v * L, e);
              return e;
            },
            [](vf a, vf b) FA_INLINE_CALL { return a + b; });
      }
      for (int64_t j = count; j < L; ++j) rows[j] = vf{};
      write_row(stats + k.y0 + y0, count, false, [&](int64_t) FA_INLINE_CALL { return max; });
      const vf sum = sum_lanes_of_each(rows);
      write_row(stats + p.height + k.y0 + y0, count, false, [&](int64_t) FA_INLINE_CALL { return sum; });
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
        for (const int64_t stop = smaller(k.rows, y + kLongestChain); y < stop; ++y) {
          const vf e = exp_of(at(y) - shift);
          part += e;
          if constexpr (Whole) {
            float* to = exponentials + y * o.stride + v * L;
            store(to, load(to) * e);
          }
        }
        sum += part;
      }
      store(col_max + v * L, max);
      store(col_sum + v * L, sum);
    }
  }

  void image(const Block& k, int64_t i, int64_t plane) {
    rows(k, i, p.row_stats + plane * 2 * p.height);
    if constexpr (!Whole) {
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
    if (!p.needs_moments && !p.writes_whole) return;
    o.load_statistics(k, plane);
    auto product = [&](int64_t y) FA_INLINE_CALL {
      return [from = exponentials + y * o.stride, row = o.row_inverse.data[y], col = o.col_inverse.data](int64_t v)
                 FA_INLINE_CALL { return load(from + v * L) * (row * load(col + v * L)); };
    };
    if (p.needs_moments) return add_moments(o, k, p.moments + (k.task * p.heads + k.h) * 2, product);
    write(k, i, product);
  }
  void images_done(const Block&) { end_of_streams(); }
};

template <bool Weighted, bool Whole>
void statistics_of(const Forward& p, int64_t begin, int64_t end) {
  Operands o(p);
  Statistics<Weighted, Whole> visitor(p, o);
  walk(p, begin, end, o, visitor);
}

void statistics(const Forward& p, int64_t begin, int64_t end) {
  if (p.whole())
    (p.weighted ? statistics_of<true, true> : statistics_of<false, true>)(p, begin, end);
  else
    (p.weighted ? statistics_of<true, false> : statistics_of<false, false>)(p, begin, end);
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
    add_moments(o, k, p.moments + (k.task * p.heads + k.h) * 2, [&](int64_t y) FA_INLINE_CALL {
      return [row = Softmaxes<true>(o, o.x[i], y)](int64_t v) FA_INLINE_CALL { return row.product(v); };
    });
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
  Writer write;

  Output(const Forward& forward, Operands& operands) : Visitor{operands}, p(forward), write(p) {}

  void image(const Block& k, int64_t i, int64_t plane) {
    o.load_statistics(k, plane);
    const int64_t channel = k.h * p.channels + k.c;
    const float mean = Normalise ? p.mean[channel] : 0.0f, scale = Normalise ? p.scale[channel] : 1.0f;
    write(k, i, [&](int64_t y) FA_INLINE_CALL {
      return [mean, scale, row = Softmaxes<Weighted>(o, o.x[i], y)](int64_t v) FA_INLINE_CALL {
        if constexpr (Normalise) return (row.product(v) - mean) * scale * row.value(v);
        return row.product(v);
      };
    });
  }
  void images_done(const Block&) { end_of_streams(); }
};

void output(const Forward& p, int64_t begin, int64_t end) {
  Operands o(p);
  if (!p.weighted) {
    Output<false, false> visitor(p, o);
    walk(p, begin, end, o, visitor);
  } else if (p.mean) {
    Output<true, true> visitor(p, o);
    walk(p, begin, end, o, visitor);
  } else {
    Output<true, false> visitor(p, o);
    walk(p, begin, end, o, visitor);
  }
}
