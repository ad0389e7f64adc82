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
  bool shares = false;  // so far, rows and columns of this range are shifted by one number:
  float shift = 0.0f;

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

  // Sums of R rows from y on, and of the columns over them: one exponential serves both.
  template <int R>
  FA_INLINE bool shared_rows(const Block& k, const Rows& x, int64_t y, float* stats) {
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
      stats[k.y0 + y + r] = by;
      stats[p.height + k.y0 + y + r] = sum_lanes(sums[r]);
    }
    return all_near(stats + p.height + k.y0 + y, R);
  }

  // Rows and columns of a block, shifted by the maximum of the plane's first row; false where others are too far from
  // it.
  bool shared(const Block& k, int64_t i, int64_t plane) {
    float* stats = p.row_stats + plane * 2 * p.height;
    if (k.first_rows) {
      load_row(p.x, (k.b0 + i) * p.x.stride[0] + k.c * p.x.stride[1], p.x.stride[3], p.width, -kInfinity, col_max.data);
      shift = max_lanes(over_vectors(
          o.vectors, broadcast(-kInfinity), [&](int64_t v) FA_INLINE_CALL { return load(col_max + v * L); },
          [](vf a, vf b) FA_INLINE_CALL { return maximum(a, b); }));
      for (int64_t v = 0; v < o.vectors; ++v) store(col_sum + v * L, vf{});
    }
    int64_t y = 0;
    for (; y + 8 <= k.rows; y += 8)
      if (!shared_rows<8>(k, o.x[i], y, stats)) return false;
    for (; y < k.rows; ++y)
      if (!shared_rows<1>(k, o.x[i], y, stats)) return false;
    if (!k.last_rows) return true;
    float* partial = p.col_partials + (k.range * p.planes() + plane) * 2 * p.width;
    for (int64_t x = 0; x < p.width; ++x) partial[x] = shift;
    store_row_as(partial + p.width, p.width, col_sum.data);
    return all_near(col_sum.data, p.width);
  }

  // Rows and columns of a block, each shifted by its own maximum.
  void separate(const Block& k, int64_t i, int64_t plane) {
    rows(k, i, p.row_stats + plane * 2 * p.height);
    float* partial = p.col_partials + (k.range * p.planes() + plane) * 2 * p.width;
    if (!k.first_rows) {
      load_row_as(partial, 1, p.width, -kInfinity, col_max.data);
      load_row_as(partial + p.width, 1, p.width, 0.0f, col_sum.data);
    }
    columns(k, i, k.first_rows ? nullptr : partial);
    store_row_as(partial, p.width, col_max.data);
    store_row_as(partial + p.width, p.width, col_sum.data);
  }

  void image(const Block& k, int64_t i, int64_t plane) {
    if constexpr (!Whole) {
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
      return;
    }
    float *row_stats = p.row_stats + plane * 2 * p.height, *col_stats = p.col_stats + plane * 2 * p.width;
    rows(k, i, row_stats);
    columns(k, i, nullptr);
    store_row_as(col_stats, p.width, col_max.data);
    store_row_as(col_stats + p.width, p.width, col_sum.data);
    if (!p.needs_moments && !p.writes_whole) return;
    o.load_statistics<false>(k, plane);
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
    o.load_statistics<false>(k, plane);
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
    o.load_statistics<false>(k, plane);
    const int64_t channel = k.h * p.channels + k.c;
    const float mean = Normalise ? p.mean[channel] : 0.0f, scale = Normalise ? p.scale[channel] : 1.0f;
    write(k, i, [&](int64_t y) FA_INLINE_CALL {
      return [mean, scale, row = Softmaxes<Weighted>(o, o.x[i], y)](int64_t v) FA_INLINE_CALL {
        if constexpr (Normalise) return (row.product(v) - mean) * scale * row.value(v);
        if constexpr (!Weighted) prefetch_on(row.x + v * L);
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
