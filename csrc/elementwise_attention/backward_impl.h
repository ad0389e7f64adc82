// Backward pass; part of kernel_impl.h.

// The gradient of the output of one image and head, zero in the padding.
struct GradOut {
  const Backward& p;
  const Operands& o;
  Buffer memory;
  Rows rows;

  GradOut(const Backward& backward, const Operands& operands)
      : p(backward), o(operands), memory(operands.plane, 0.0f) {}
  void load_image(const Block& k, int64_t i) {
    const TensorView& g = p.grad_out;
    const int64_t offset = (k.b0 + i) * g.stride[0] + k.h * g.stride[1] + k.c * g.stride[2] + k.y0 * g.stride[3];
    rows = rows_of(g, 3, offset, k.rows, p.width, memory.data, o.stride);
  }
  FA_INLINE vf operator()(int64_t y, int64_t v) const { return load(rows[y] + v * L); }
};

// Sums of grad_out * x and of grad_out * x * (product - mean).
struct GradMoments : Visitor {
  const Backward& p;
  GradOut grad;

  GradMoments(const Backward& backward, Operands& operands)
      : Visitor{operands}, p(backward), grad(backward, operands) {}
  void image(const Block& k, int64_t i, int64_t plane) {
    o.load_statistics(k, plane);
    grad.load_image(k, i);
    const Product<true> product{o, o.x[i]};
    const float mean = p.mean[k.h * p.channels + k.c];
    double* moments = p.moments + (k.task * p.heads + k.h) * 2;
    for (int64_t y = 0; y < k.rows;) {
      vf sum{}, weighted{};
      for (const int64_t part = smaller(k.rows, y + kLongestChain); y < part; ++y)
        for (int64_t v = 0; v < o.vectors; ++v) {
          const vf d = grad(y, v) * load(o.x[i][y] + v * L);
          sum += d, weighted += d * (product(y, v) - mean);
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

// Gradient of the product of the softmaxes.
template <bool Weighted, bool Normalise>
struct GradProduct {
  const GradOut& grad;
  const Rows& x;
  float mean = 0.0f, scale = 1.0f, grad_mean = 0.0f, grad_var = 0.0f;

  GradProduct(const GradOut& grad_out, const Rows& image, const Backward& p, const Block& k)
      : grad(grad_out), x(image) {
    if constexpr (Normalise) {
      const int64_t channel = k.h * p.channels + k.c;
      mean = p.mean[channel], scale = p.scale[channel];
      grad_mean = p.grad_mean[channel], grad_var = p.grad_var[channel];
    }
  }
  FA_INLINE vf operator()(int64_t y, int64_t v, vf product) const {
    if constexpr (!Normalise) return grad(y, v);
    return scale * (grad(y, v) * load(x[y] + v * L) - grad_mean - (product - mean) * grad_var);
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
    o.load_statistics(k, plane);
    grad.load_image(k, i);
    const Product<Weighted> product{o, o.x[i]};
    const GradProduct<Weighted, Normalise> grad_product(grad, o.x[i], p, k);
    float* partial = p.col_sums + (k.range * p.planes() + plane) * p.width;
    if (k.first_rows)
      for (int64_t v = 0; v < o.vectors; ++v) store(col_sum + v * L, vf{});
    else
      load_row_as(partial, 1, p.width, col_sum.data);
    for (int64_t y = 0; y < k.rows; ++y) {
      vf sum{};
      for (int64_t v = 0; v < o.vectors; ++v) {
        const vf value = product(y, v), t = value * grad_product(y, v, value);
        sum += t;
        store(col_sum + v * L, load(col_sum + v * L) + t);
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

// Gradients of x and of the weights.  A whole plane forms its sums on the way, from products kept in L1.
template <bool Weighted, bool Normalise, bool Whole>
struct Gradients : Visitor {
  const Backward& p;
  GradOut grad;
  Buffer grad_x, grad_row, grad_col;
  Buffer products, row_softmax, col_softmax, row_sum, col_sum;

  Gradients(const Backward& backward, Operands& operands)
      : Visitor{operands},
        p(backward),
        grad(backward, operands),
        grad_x(p.images_at_once * o.plane, 0.0f),
        grad_row(Weighted ? o.plane : 0, 0.0f),
        grad_col(Weighted ? o.plane : 0, 0.0f),
        products(Whole ? o.plane : 0, 0.0f),
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
    o.load_statistics(k, plane);
    grad.load_image(k, i);
    const Rows& x = o.x[i];
    const Product<Weighted> product{o, x};
    const GradProduct<Weighted, Normalise> grad_product(grad, x, p, k);
    const float* row_sums = row_sum.data;
    if constexpr (Whole) {
      for (int64_t v = 0; v < o.vectors; ++v) store(col_sum + v * L, vf{});
      for (int64_t y = 0; y < k.rows; ++y) {
        vf sum{};
        for (int64_t v = 0; v < o.vectors; ++v) {
          const int64_t at = y * o.stride + v * L;
          const vf row = product.row(y, v), col = product.col(y, v), value = row * col;
          const vf t = value * grad_product(y, v, value);
          sum += t;
          store(col_sum + v * L, load(col_sum + v * L) + t);
          store(products + at, t), store(row_softmax + at, row), store(col_softmax + at, col);
        }
        row_sum.data[y] = sum_lanes(sum);
      }
    } else {
      row_sums = p.row_sums + plane * p.height + k.y0;
      load_row_as(p.col_sums + plane * p.width, 1, p.width, col_sum.data);
    }

    for (int64_t y = 0; y < k.rows; ++y) {
      for (int64_t v = 0; v < o.vectors; ++v) {
        const int64_t at = y * o.stride + v * L;
        vf row, col, t;
        if constexpr (Whole) {
          row = load(row_softmax + at), col = load(col_softmax + at), t = load(products + at);
        } else {
          row = product.row(y, v), col = product.col(y, v);
          t = row * col * grad_product(y, v, row * col);
        }
        const vf d_row = t - row * row_sums[y], d_col = t - col * load(col_sum + v * L);
        float* to = grad_x + i * o.plane + at;
        if constexpr (!Weighted) {
          store(to, d_row + d_col);
        } else {
          const vf value = load(x[y] + v * L);
          vf d_x = d_row * load(o.weight_row[y] + v * L) + d_col * load(o.weight_col[y] + v * L);
          if constexpr (Normalise) d_x += grad(y, v) * ((row * col - grad_product.mean) * grad_product.scale);
          store(to, load(to) + d_x);
          store(grad_row + at, load(grad_row + at) + d_row * value);
          store(grad_col + at, load(grad_col + at) + d_col * value);
        }
      }
    }
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
        store_row(grad_weight, k.h * grad_weight.stride[0] + k.c * grad_weight.stride[1] + (k.y0 + y) * p.width, p.width,
                  row);
        continue;
      }
      const int64_t index = ((k.group * 2 + which) * p.heads + k.h) * p.channels + k.c;
      float* to = p.weight_partials + (index * p.height + k.y0 + y) * p.width;
      for (int64_t x = 0; x < p.width; ++x) to[x] = k.first_images ? row[x] : to[x] + row[x];
    }
  }
  void images_done(const Block& k) {
    const TensorView& g = p.grad_x;
    for (int64_t i = 0; i < k.images; ++i)
      for (int64_t y = 0; y < k.rows; ++y)
        store_row(g, (k.b0 + i) * g.stride[0] + k.c * g.stride[1] + (k.y0 + y) * g.stride[2], p.width,
                  grad_x + i * o.plane + y * o.stride);
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

// Over the groups of images, in their order.
void sum_weights(const Backward& p, int64_t begin, int64_t end) {
  const int64_t rows = p.heads * p.channels * p.height;
  Buffer sum(round_up(p.width, L), 0.0f);
  for (int64_t index = begin; index < end; ++index) {
    const int64_t which = index / rows, row = index % rows, h = row / p.height / p.channels;
    for (int64_t x = 0; x < p.width; ++x) {
      float total = 0.0f;
      for (int64_t g = 0; g < p.groups; ++g) total += p.weight_partials[((g * 2 + which) * rows + row) * p.width + x];
      sum.data[x] = total;
    }
    const TensorView& to = which == 0 ? p.grad_weight_row : p.grad_weight_col;
    store_row(to, h * to.stride[0] + row / p.height % p.channels * to.stride[1] + row % p.height * p.width, p.width,
              sum.data);
  }
}
