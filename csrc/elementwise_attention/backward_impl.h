// Backward pass; part of kernel_impl.h.

// The gradient of the output of one image and head, zero in the padding.
struct GradOut {
  const Backward& p;
  const Operands& o;
  Buffer memory;
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
    rows = rows_of(g, 3, offset, k.rows, p.width, 0.0f, memory.data, o.stride);
    const bool last = i + 1 == k.images || g.stride[4] != 1;
    next = static_cast<const char*>(g.data) + (offset + (last ? 0 : g.stride[0])) * size;
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

void grad_moments(const Backward& p, int64_t begin, int64_t end) {
  Operands o(p);
  GradMoments visitor(p, o);
  walk(p, begin, end, o, visitor);
}

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

// Per row and per column, the sum of product times its gradient.
template <bool Weighted, bool Normalise>
struct Sums : Visitor {
  const Backward& p;
  GradOut grad;
  Buffer col_sum;

  Sums(const Backward& backward, Operands& operands)
      : Visitor{operands}, p(backward), grad(backward, operands), col_sum(o.stride, 0.0f) {}

  void image(const Block& k, int64_t i, int64_t plane) {
    o.load_statistics<false>(k, plane);
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
      const Softmaxes<Weighted> row(o, o.x[i], y);
      const float* grad_row = grad.rows[y];
      vf sum{};
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

void combine_sums(const Backward& p, int64_t begin, int64_t end) {
  for (int64_t plane = begin; plane < end; ++plane)
    for (int64_t x = 0; x < p.width; ++x) {
      float sum = 0.0f;
      for (int64_t r = 0; r < p.ranges; ++r) sum += p.col_sums[(r * p.planes() + plane) * p.width + x];
      p.col_sums[plane * p.width + x] = sum;
    }
}

// Gradients of x and of the weights.  A whole plane forms its sums on the way, from gradients of the product kept in
// L1.
template <bool Weighted, bool Normalise, bool Whole>
struct Gradients : Visitor {
  const Backward& p;
  GradOut grad;
  Buffer grad_x, grad_row, grad_col;
  Buffer gradient, row_softmax, col_softmax, row_sum, col_sum;
  bool written = false;  // grad_x of this block already

  Gradients(const Backward& backward, Operands& operands)
      : Visitor{operands},
        p(backward),
        grad(backward, operands),
        grad_x(p.images_at_once * o.plane, 0.0f),
        grad_row(Weighted ? o.plane : 0, 0.0f),
        grad_col(Weighted ? o.plane : 0, 0.0f),
        gradient(Whole ? o.plane : 0, 0.0f),
        row_softmax(Whole ? o.plane : 0, 0.0f),
        col_softmax(Whole ? o.plane : 0, 0.0f),
        row_sum(p.block_rows, 0.0f),
        col_sum(o.stride, 0.0f) {}

  void images(const Block& k) {
    for (int64_t i = 0; i < k.images * o.plane; i += L) store(grad_x + i, vf{});
  }
  void head(const Block&) {
    if constexpr (Weighted)
      for (int64_t i = 0; i < o.plane; i += L) store(grad_row + i, vf{}), store(grad_col + i, vf{});
  }

  void image(const Block& k, int64_t i, int64_t plane) {
    o.load_statistics<true>(k, plane);
    grad.load_image(k, i);
    const int64_t vectors = o.vectors;
    const Normalisation<Normalise> norm(p, k);
    const float* row_sums = row_sum.data;
    float* const col_sums = col_sum.data;
    if constexpr (Whole) {
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
            sum += row * rounded(col * d);
            store(col_sums + v * L, load(col_sums + v * L) + col * rounded(row * d));
            store(d_to + v * L, d), store(row_to + v * L, row), store(col_to + v * L, col);
          }
          sums[j] = sum;
        }
        for (int64_t j = count; j < L; ++j) sums[j] = vf{};
        store(row_sum + y0, sum_lanes_of_each(sums));
      }
    } else {
      row_sums = p.row_sums + plane * p.height + k.y0;
      load_row_as(p.col_sums + plane * p.width, 1, p.width, 0.0f, col_sums);
    }

    if constexpr (!Weighted && !Whole) {
      written = o.shares(k);
      if (written) return shared(k, i, row_sums);
    }

    for (int64_t y = 0; y < k.rows; ++y) {
      const int64_t at = y * o.stride;
      const Softmaxes<Weighted> softmax(o, o.x[i], y);
      const float* grad_out = grad.rows[y];
      const float sum = row_sums[y];
      const float *const d_from = gradient + at, *const row_from = row_softmax + at, *const col_from = col_softmax + at;
      float *const x_to = grad_x + i * o.plane + at, *const row_to = grad_row + at, *const col_to = grad_col + at;
      for (int64_t v = 0; v < vectors; ++v) {
        const int64_t lane = v * L;
        vf row, col, d;
        if constexpr (Whole) {
          row = load(row_from + lane), col = load(col_from + lane), d = load(d_from + lane);
        } else {
          row = softmax.row(v), col = softmax.col(v);
          d = norm.backward(load(grad_out + lane), softmax.value(v), row * col);
        }
        // The difference first: where one probability is near 1 it cancels.
        const vf d_row = row * (rounded(col * d) - sum), d_col = col * (rounded(row * d) - load(col_sums + lane));
        if constexpr (!Weighted) {
          store(x_to + lane, d_row + d_col);
        } else {
          const vf value = softmax.value(v);
          vf d_x = d_row * load(softmax.weight_row + lane) + d_col * load(softmax.weight_col + lane);
          if constexpr (Normalise) d_x += load(grad_out + lane) * ((row * col - norm.mean) * norm.scale);
          store(x_to + lane, load(x_to + lane) + d_x);
          store(row_to + lane, load(row_to + lane) + d_row * value);
          store(col_to + lane, load(col_to + lane) + d_col * value);
        }
      }
    }
  }

  // One exponential for both softmaxes.
  void shared(const Block& k, int64_t i, const float* row_sums) {
    const TensorView& g = p.grad_x;
    const int64_t offset = (k.b0 + i) * g.stride[0] + k.c * g.stride[1] + k.y0 * g.stride[2];
    const float shift = o.col_max.data[0];
    for (int64_t y = 0; y < k.rows; ++y)
      write_row(g, offset + y * g.stride[2], p.width, p.large,
                [x = o.x[i][y], grad_out = grad.rows[y], row_inverse = o.row_inverse.data[y],
                 row_rest = o.row_rest.data[y], row_sum = row_sums[y], col_inverse = o.col_inverse.data,
                 col_rest = o.col_rest.data, col_sum = col_sum.data, shift](int64_t v) FA_INLINE_CALL {
                  const int64_t lane = v * L;
                  prefetch_on(x + lane), prefetch_on(grad_out + lane);
                  const vf e = exp_of(load(x + lane) - shift), d = load(grad_out + lane);
                  const vf row = e * row_inverse + rounded(e * row_rest);
                  const vf col = e * load(col_inverse + lane) + rounded(e * load(col_rest + lane));
                  return row * (rounded(col * d) - row_sum) + col * (rounded(row * d) - load(col_sum + lane));
                });
  }

  void head_done(const Block& k) {
    if constexpr (Weighted) {
      store_weight(k, 0, p.grad_weight_row, grad_row);
      store_weight(k, 1, p.grad_weight_col, grad_col);
    }
  }
  void store_weight(const Block& k, int64_t which, const TensorView& grad_weight, Buffer& from) {
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
    if (!Weighted && !Whole && written) return end_of_streams();
    for (int64_t i = 0; i < k.images; ++i)
      for (int64_t y = 0; y < k.rows; ++y)
        store_row(g, (k.b0 + i) * g.stride[0] + k.c * g.stride[1] + (k.y0 + y) * g.stride[2], p.width,
                  grad_x + i * o.plane + y * o.stride, p.large);
    end_of_streams();
  }
};

template <bool Weighted, bool Normalise>
void sums_of(const Backward& p, int64_t begin, int64_t end) {
  Operands o(p);
  Sums<Weighted, Normalise> visitor(p, o);
  walk(p, begin, end, o, visitor);
}

void column_sums(const Backward& p, int64_t begin, int64_t end) {
  (!p.weighted ? sums_of<false, false> : p.mean ? sums_of<true, true> : sums_of<true, false>)(p, begin, end);
}

template <bool Weighted, bool Normalise, bool Whole>
void gradients_of(const Backward& p, int64_t begin, int64_t end) {
  Operands o(p);
  Gradients<Weighted, Normalise, Whole> visitor(p, o);
  walk(p, begin, end, o, visitor);
}

void gradients(const Backward& p, int64_t begin, int64_t end) {
  if (p.whole())
    (!p.weighted ? gradients_of<false, false, true>
     : p.mean    ? gradients_of<true, true, true>
                 : gradients_of<true, false, true>)(p, begin, end);
  else
    (!p.weighted ? gradients_of<false, false, false>
     : p.mean    ? gradients_of<true, true, false>
                 : gradients_of<true, false, false>)(p, begin, end);
}

// Over the groups of images, in their order, some rows at a time.
void sum_weights(const Backward& p, int64_t begin, int64_t end) {
  const int64_t rows = p.heads * p.channels * p.height, most = p.width < 512 ? 512 / p.width : 1;
  Buffer sum(round_up(most * p.width, L), 0.0f);
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
