// Backward pass; part of kernels_impl.h.

// The gradient of the output of one image and head, zero in the padding.
struct GradOut {
  const Backward& p;
  const Operands& o;
  Scratch<float> memory;
  Rows rows;
  const char* next;  // the same rows of the next image
  int64_t size, next_stride;

  GradOut(const Backward& backward, const Operands& operands)
      : p(backward),
        o(operands),
        memory(operands.plane, 0.0f),
        size(p.grad_out.dtype == DType::float32 ? 4 : 2),
        next_stride(p.grad_out.stride[3] * size) {}
  void load_image(const Block& k, int64_t i) {
    const TensorView& g = p.grad_out;
    const int64_t offset = (k.b0 + i) * g.stride[0] + k.h * g.stride[1] + k.c * g.stride[2] + k.y0 * g.stride[3];
    if (p.masked())
      load_kept(k, i, offset);
    else
      rows = rows_of(g, 3, offset, k.rows, p.width, 0.0f, memory.data, o.stride);
    const bool last = i + 1 == k.images || g.stride[4] != 1;
    next = static_cast<const char*>(g.data) + (offset + (last ? 0 : g.stride[0])) * size;
  }
  // Zero where an element takes no part, whatever is there.
  __attribute__((noinline)) void load_kept(const Block& k, int64_t i, int64_t offset) {
    const TensorView& g = p.grad_out;
    load_rows(g, offset, g.stride[3], g.stride[4], k.rows, p.width, 0.0f, memory.data, o.stride);
    rows = {memory.data, o.stride};
    for (int64_t y = 0; y < k.rows; ++y) {
      const float* kept = o.kept(k, i, k.y0 + y);
      float* row = memory + y * o.stride;
      for (int64_t v = 0; v < o.vectors; ++v)
        store(row + v * L, Operands::where_kept(kept, v, load(row + v * L), 0.0f));
    }
  }
  // Brings row y of the next image closer, to be called while this one's is computed: images lie heads planes apart,
  // where no hardware prefetcher follows, and a whole image at once would wait for room among the outstanding misses.
  FA_INLINE void prefetch_next(int64_t y) const {
    for (int64_t i = 0; i < p.width * size; i += 64) __builtin_prefetch(next + y * next_stride + i);
  }
};

// Sums of grad_out * x and of grad_out * x * (product - mean).
struct GradMoments : Visitor {
  const Backward& p;
  GradOut grad;

  GradMoments(const Backward& backward, Operands& operands)
      : Visitor{operands}, p(backward), grad(backward, operands) {}
  void image(const Block& k, int64_t i, int64_t plane) {
    o.load_statistics<false>(k, plane);
    grad.load_image(k, i);
    const int64_t vectors = o.vectors;
    const float mean = p.mean[k.h * p.channels + k.c];
    double* moments = p.moments + (k.task * p.heads + k.h) * 2;
    for (int64_t y = 0; y < k.rows;) {
      vf sum{}, weighted{};
      for (const int64_t part = smaller(k.rows, y + kLongestChain); y < part; ++y) {
        const Softmaxes<true> row(o, o.x[i], y);
        const float* grad_row = grad.rows[y];
        grad.prefetch_next(y);
        for (int64_t v = 0; v < vectors; ++v) {
          const vf d = load(grad_row + v * L) * row.value(v);
          sum += d, weighted += d * (row.product(v) - mean);
        }
      }
      moments[0] += sum_lanes(sum), moments[1] += sum_lanes(weighted);
    }
  }
};

void grad_moments(const Backward& p, int64_t begin, int64_t end) { walk<GradMoments>(p, begin, end); }

// What the batch normalisation of one (head, channel) does to the gradient.
template <bool Normalise>
struct Normalisation {
  float mean = 0.0f, scale = 1.0f, grad_mean = 0.0f, grad_var = 0.0f;

  Normalisation(const Backward& p, const Block& k) {
    if constexpr (Normalise) {
      const int64_t channel = k.h * p.channels + k.c;
      mean = p.mean[channel], scale = p.scale[channel];
      grad_mean = p.grad_mean[channel], grad_var = p.grad_var[channel];
    }
  }
  // Gradient of the product of the softmaxes.
  FA_INLINE vf backward(vf grad_out, vf x, vf product) const {
    if constexpr (!Normalise) return grad_out;
    return scale * (grad_out * x - grad_mean - (product - mean) * grad_var);
  }
};

// Gradients of x and of the weights, from the sums per row and per column.
struct Gradients : Visitor {
  const Backward& p;
  GradOut grad;
  Scratch<float> grad_x, grad_row, grad_col, col_sum;

  Gradients(const Backward& backward, Operands& operands)
      : Visitor{operands},
        p(backward),
        grad(backward, operands),
        grad_x(p.images_at_once * o.plane, 0.0f),
        grad_row(p.weighted ? o.plane : 0, 0.0f),
        grad_col(p.weighted ? o.plane : 0, 0.0f),
        col_sum(o.stride, 0.0f) {}

  void images(const Block& k) {
    for (int64_t i = 0; i < k.images * o.plane; i += L) store(grad_x + i, vf{});
  }
  void head(const Block&) {
    if (!p.weighted) return;
    for (int64_t i = 0; i < o.plane; i += L) store(grad_row + i, vf{}), store(grad_col + i, vf{});
  }

  struct Factors {
    vf row, col, grad;  // softmaxes and the gradient of their product
  };

  struct Logits {
    vf row, col;
  };
  template <bool Log>
  FA_INLINE static Logits grad_logits(vf row, vf col, vf d, float row_sum, vf col_sum) {
    if constexpr (Log) return {d - row * row_sum, d - col * col_sum};
    // The difference first: where one probability is near 1 it cancels.
    return {row * (rounded(col * d) - row_sum), col * (rounded(row * d) - col_sum)};
  }

  // factors(y)(v): those of vector v of row y.
  template <bool Weighted, bool Log, bool Normalise, class At>
  FA_INLINE void add(const Block& k, int64_t i, const Normalisation<Normalise>& norm, const float* row_sums,
                     const At& factors) {
    const int64_t vectors = o.vectors;
    const float* const col_sums = col_sum.data;
    for (int64_t y = 0; y < k.rows; ++y) {
      const int64_t at = y * o.stride;
      const auto factors_of = factors(y);
      const Row<Weighted> from(o, o.x[i], y);
      const float* grad_out = grad.rows[y];
      const float sum = row_sums[y];
      float *const x_to = grad_x + i * o.plane + at, *const row_to = grad_row + at, *const col_to = grad_col + at;
      for (int64_t v = 0; v < vectors; ++v) {
        const int64_t lane = v * L;
        const auto [row, col, d] = factors_of(v);
        const auto [d_row, d_col] = grad_logits<Log>(row, col, d, sum, load(col_sums + lane));
        if constexpr (!Weighted) {
          store(x_to + lane, d_row + d_col);
        } else {
          const vf value = from.value(v);
          vf d_x = d_row * load(from.weight_row + lane) + d_col * load(from.weight_col + lane);
          if constexpr (Normalise) d_x += load(grad_out + lane) * ((row * col - norm.mean) * norm.scale);
          store(x_to + lane, load(x_to + lane) + d_x);
          store(row_to + lane, load(row_to + lane) + d_row * value);
          store(col_to + lane, load(col_to + lane) + d_col * value);
        }
      }
    }
  }

  void head_done(const Block& k) {
    if (!p.weighted) return;
    store_weight(k, 0, p.grad_weight_row, grad_row);
    store_weight(k, 1, p.grad_weight_col, grad_col);
  }
  void store_weight(const Block& k, int64_t which, const TensorView& grad_weight, Scratch<float>& from) {
    for (int64_t y = 0; y < k.rows; ++y) {
      const float* row = from + y * o.stride;
      if (p.weight_partials == nullptr) {
        store_row(grad_weight, k.h * grad_weight.stride[0] + k.c * grad_weight.stride[1] + (k.y0 + y) * p.width,
                  p.width, row);
        continue;
      }
      const int64_t index = ((k.group * 2 + which) * p.heads + k.h) * p.channels + k.c;
      float* to = p.weight_partials + (index * p.height + k.y0 + y) * p.width;
      for (int64_t x = 0; x < p.width; ++x) to[x] = k.first_images ? row[x] : to[x] + row[x];
    }
  }
  void images_done(const Block& k) {
    const TensorView& g = p.grad_x;
    if (!p.logits_are_x()) scale_and_mask(k);
    for (int64_t i = 0; i < k.images; ++i)
      for (int64_t y = 0; y < k.rows; ++y)
        store_row(g, (k.b0 + i) * g.stride[0] + k.c * g.stride[1] + (k.y0 + y) * g.stride[2], p.width,
                  grad_x + i * o.plane + y * o.stride, p.large);
    end_of_streams();
  }
  // Gradients of logits become those of x.
  __attribute__((noinline)) void scale_and_mask(const Block& k) {
    for (int64_t i = 0; i < k.images; ++i)
      for (int64_t y = 0; y < k.rows; ++y) {
        const float* kept = o.kept(k, i, k.y0 + y);
        float* row = grad_x + i * o.plane + y * o.stride;
        for (int64_t v = 0; v < o.vectors; ++v)
          store(row + v * L, Operands::where_kept(kept, v, load(row + v * L) * p.factor, 0.0f));
      }
  }
};

// Over the groups of images, in their order, some rows at a time.
void sum_weights(const Backward& p, int64_t begin, int64_t end) {
  const int64_t rows = p.heads * p.channels * p.height, most = p.width < 512 ? 512 / p.width : 1;
  Scratch<float> sum(round_up(most * p.width, L), 0.0f);
  for (int64_t index = begin, count; index < end; index += count) {
    const int64_t which = index / rows, first = index % rows;
    count = smaller(most, smaller(end - index, rows - first));
    for (int64_t i = 0; i < count * p.width; ++i) sum.data[i] = 0.0f;
    for (int64_t g = 0; g < p.groups; ++g) {
      const float* part = p.weight_partials + ((g * 2 + which) * rows + first) * p.width;
      for (int64_t i = 0; i < count * p.width; ++i) sum.data[i] += part[i];
    }
    const TensorView& to = which == 0 ? p.grad_weight_row : p.grad_weight_col;
    for (int64_t row = first; row < first + count; ++row)
      store_row(to,
                row / p.height / p.channels * to.stride[0] + row / p.height % p.channels * to.stride[1] +
                    row % p.height * p.width,
                p.width, sum + (row - first) * p.width);
  }
}
