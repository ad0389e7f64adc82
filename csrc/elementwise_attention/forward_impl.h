// Forward pass; part of kernels_impl.h.

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
  Scratch<float> block;

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
    if (!p.large && image + 1 < k.images) prefetch_rows_to_write(p.out, offset + stride[0], stride[3], k.rows, p.width);
    for (int64_t y = 0; y < k.rows; ++y) write_row(p.out, offset + y * stride[3], p.width, p.large, at(y));
  }
};

// Statistics of the rows and columns of a block, each shifted by its own maximum.  With Keep, the products of the
// exponentials of both softmaxes are formed on the way: (row, o.stride).
struct Statistics : Visitor {
  const Forward& p;
  Scratch<float> col_max, col_sum;

  Statistics(const Forward& forward, Operands& operands)
      : Visitor{operands}, p(forward), col_max(o.stride, 0.0f), col_sum(o.stride, 0.0f) {}

  // L rows at a time: their reductions over lanes share shuffles.
  template <bool Weighted, bool Keep>
  void rows(const Block& k, int64_t i, float* statistics, float* exponentials) {
    const int64_t vectors = o.vectors;
    for (int64_t y0 = 0; y0 < k.rows; y0 += L) {
      const int64_t count = smaller(L, k.rows - y0);
      vf rows[L];
      for (int64_t j = 0; j < count; ++j) {
        const Row<Weighted> row(o, o.x[i], y0 + j);
        rows[j] = over_vectors(
            vectors, broadcast(-kInfinity), [&](int64_t v) FA_INLINE_CALL { return row.row_logit(v); }, kLarger);
      }
      for (int64_t j = count; j < L; ++j) rows[j] = vf{};
      const vf max = combine_lanes_of_each(rows, kLarger), shift = select(max == -kInfinity, vf{}, max);
      for (int64_t j = 0; j < count; ++j) {
        const Row<Weighted> row(o, o.x[i], y0 + j);
        const float at_most = shift[j];
        float* to = exponentials + (y0 + j) * o.stride;
        rows[j] = over_vectors(
            vectors, vf{},
            [&](int64_t v) FA_INLINE_CALL {
              const vf e = exp_of(row.row_logit(v) - at_most);
              if constexpr (Keep) store(to + v * L, e);
              return e;
            },
            kPlus);
      }
      for (int64_t j = count; j < L; ++j) rows[j] = vf{};
      write_row(statistics + k.y0 + y0, count, false, [&](int64_t) FA_INLINE_CALL { return max; });
      const vf sum = sum_lanes_of_each(rows);
      write_row(statistics + p.height + k.y0 + y0, count, false, [&](int64_t) FA_INLINE_CALL { return sum; });
    }
  }

  // Rows or columns that take no part: a sum other than 0, so that exponentials of 0 over it are 0.
  __attribute__((noinline)) static void settle(const Mask& mask, int64_t b, int64_t begin, int64_t count, float shift,
                                               float* shifts, float* sums) {
    for (int64_t i = 0; i < count; ++i)
      if (!mask(b, begin + i)) shifts[i] = shift, sums[i] = 1.0f;
  }
  void settle_rows(const Block& k, int64_t i, int64_t y, int64_t count, float shift, float* statistics) const {
    float* shifts = statistics + k.y0 + y;
    settle(p.row_mask, k.b0 + i, k.y0 + y, count, shift, shifts, shifts + p.height);
  }

  // Maximum and sum of the columns over the block, on top of those `before`, which col_max and col_sum hold.
  template <bool Weighted, bool Keep>
  void columns(const Block& k, int64_t i, bool before, float* exponentials) {
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
          if constexpr (Keep) {
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
};

template <bool Weighted, bool Normalise, bool Log>
struct Output : Visitor {
  const Forward& p;
  Writer write;

  Output(const Forward& forward, Operands& operands) : Visitor{operands}, p(forward), write(p) {}

  void image(const Block& k, int64_t i, int64_t plane) {
    o.load_statistics<false, Log>(k, plane);
    if constexpr (Log) return write_kept(k, i, [&](int64_t y) FA_INLINE_CALL { return LogSoftmaxes(o, o.x[i], y); });
    if (!Weighted && p.masked())
      return write_kept(k, i, [&](int64_t y) FA_INLINE_CALL {
        return [row = Softmaxes<false>(o, o.x[i], y)](int64_t v) FA_INLINE_CALL { return row.product(v); };
      });
    const int64_t channel = k.h * p.channels + k.c;
    const float mean = Normalise ? p.mean[channel] : 0.0f, scale = Normalise ? p.scale[channel] : 1.0f;
    write(k, i, [&](int64_t y) FA_INLINE_CALL {
      return [=, row = Softmaxes<Weighted>(o, o.x[i], y)](int64_t v) FA_INLINE_CALL {
        if constexpr (Normalise) return (row.product(v) - mean) * scale * row.value(v);
        if constexpr (!Weighted) prefetch_on(row.x + v * L);
        return row.product(v);
      };
    });
  }
  // at(y)(v) where an element takes part.
  template <class At>
  FA_INLINE void write_kept(const Block& k, int64_t i, const At& at) {
    if (!p.masked()) return write(k, i, at);
    write(k, i, [&](int64_t y) FA_INLINE_CALL {
      return [kept = o.kept(k, i, k.y0 + y), value = at(y)](int64_t v)
                 FA_INLINE_CALL { return Operands::where_kept(kept, v, value(v), Log ? -kInfinity : 0.0f); };
    });
  }
  void images_done(const Block&) { end_of_streams(); }
};

void output(const Forward& p, int64_t begin, int64_t end) {
  with_options(
      p, [&]<bool Weighted, bool Normalise, bool Log>() { walk<Output<Weighted, Normalise, Log>>(p, begin, end); });
}
