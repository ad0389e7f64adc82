// Matrices of a group of pairs, their products, and their way from and to tensors; part of kernels_impl.h.

// (image, head) pairs, one to a lane; lanes past the last repeat it.  They follow one another in an order that has the
// images of a set of segments side by side: few groups then have lanes with something to mask.
struct Pairs {
  int64_t count = 0;
  int64_t set[L], image[L], head[L], of[L];  // of: the pair's number, image by image

  Pairs() = default;
  Pairs(int64_t batch, int64_t heads, int64_t sets, int64_t group) {
    const int64_t first = group * L, images = batch / sets;
    count = smaller(L, batch * heads - first);
    for (int64_t lane = 0; lane < L; ++lane) {
      const int64_t place = first + smaller(lane, count - 1), run = place / heads;
      set[lane] = run / images;
      image[lane] = run % images * sets + set[lane];
      head[lane] = place % heads;
      of[lane] = image[lane] * heads + head[lane];
    }
  }
};

// A (positions, depth) matrix of each pair.
struct Matrix {
  int64_t depth = 0, stride = 0;  // from row to row an odd number of vectors: rows then spread over all cache sets
  Scratch<float> data;

  void allocate(int64_t positions, int64_t depth_) {
    depth = depth_, stride = (depth | 1) * L;
    data.allocate(positions * stride);
  }
  float* at(int64_t position) const { return data + position * stride; }
};

// --- products -----------------------------------------------------------------------------------------------------

// A factor: its numbers along the result's rows or columns and along the sum, so many floats apart.
struct Operand {
  const float* data;
  int64_t step, depth_step;

  Operand from(int64_t i, int64_t depth = 0) const { return {data + i * step + depth * depth_step, step, depth_step}; }
};
struct Result {
  float* data;
  int64_t row_step, column_step;

  float* at(int64_t row, int64_t column) const { return data + row * row_step + column * column_step; }
};

constexpr int kRows = 6, kColumns = L == 16 ? 4 : 2;  // of a block in registers

// `ahead`: what is multiplied later, of as many rows; a part of it is fetched.
template <int M, int N, bool Add>
FA_INLINE void product_block(int64_t depth, Operand a, Operand b, Result c, const float* ahead) {
  vf acc[M][N] = {};
  for (int64_t k = 0; k < depth; ++k) {
    vf column[N];
    if constexpr (M == kRows) {
      __builtin_prefetch(ahead);
      __builtin_prefetch(ahead + a.step);
    }
#pragma GCC unroll 8
    for (int n = 0; n < N; ++n) column[n] = held(load(b.data + n * b.step));
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m) {
      const vf row = held(load(a.data + m * a.step));
#pragma GCC unroll 8
      for (int n = 0; n < N; ++n) acc[m][n] += row * column[n];
    }
    a.data += a.depth_step, b.data += b.depth_step, ahead += a.depth_step;
  }
#pragma GCC unroll 8
  for (int m = 0; m < M; ++m)
#pragma GCC unroll 8
    for (int n = 0; n < N; ++n) store(c.at(m, n), Add ? load(c.at(m, n)) + acc[m][n] : acc[m][n]);
}

template <bool Add>
void product_part(int64_t rows, int64_t columns, int64_t depth, Operand a, Operand b, Result c) {
  auto across = [&]<int M>(int64_t m) FA_INLINE_CALL {
    int64_t n = 0;
    auto run = [&]<int N>() FA_INLINE_CALL {
      for (; n + N <= columns; n += N)
        product_block<M, N, Add>(depth, a.from(m), b.from(n), {c.at(m, n), c.row_step, c.column_step},
                                 a.from(m + kRows + n / 2).data);
    };
    run.template operator()<kColumns>();
    if constexpr (kColumns > 2) run.template operator()<2>();
    run.template operator()<1>();
  };
  int64_t m = 0;
  for (; m + kRows <= rows; m += kRows) across.template operator()<kRows>(m);
  for (; m + 2 <= rows; m += 2) across.template operator()<2>(m);
  if (m < rows) across.template operator()<1>(m);
}

// c[m, n] = sum over k < depth of a[m, k] * b[n, k], or added to what is there.
void product(int64_t rows, int64_t columns, int64_t depth, Operand a, Operand b, Result c, bool add = false) {
  constexpr int64_t kLongest = 2 * kLongestChain;  // the keys of a 7x7 window in one part
  const int64_t parts = (depth + kLongest - 1) / kLongest;
  for (int64_t part = 0; part < parts; ++part) {
    const int64_t first = split_begin(depth, parts, part), count = split_begin(depth, parts, part + 1) - first;
    const auto use = add || part > 0 ? product_part<true> : product_part<false>;
    use(rows, columns, count, a.from(0, first), b.from(0, first), c);
  }
}

// Operands of a matrix: summed over its depth, or over its positions.
Operand over_depth(const Matrix& x, int64_t position = 0, int64_t step = 1) {
  return {x.at(position), step * x.stride, L};
}
Operand over_positions(const Matrix& x, int64_t position = 0, int64_t step = 1) {
  return {x.at(position), L, step * x.stride};
}
// Results to a matrix, (positions, depth) or the transpose.
Result to_positions(const Matrix& x, int64_t position = 0, int64_t step = 1) {
  return {x.at(position), step * x.stride, L};
}
Result to_depth(const Matrix& x, int64_t position = 0, int64_t step = 1) {
  return {x.at(position), L, step * x.stride};
}

// --- tensors to matrices and back -----------------------------------------------------------------------------------

// Rows [y, y + height) of a (batch, heads, -, width, depth) tensor, as lines of numbers that lie side by side where
// some do: those of a position or, channels first, those of a channel.
struct Lines {
  const TensorView& view;
  int64_t first, width;
  bool channels;
  int64_t count, length, step;

  Lines(const TensorView& view_, int64_t y, int64_t height, int64_t width_, int64_t depth)
      : view(view_), first(y * view.stride[2]), width(width_) {
    channels = view.stride[4] != 1 && view.stride[3] == 1 && view.stride[2] == width;
    count = channels ? depth : height * width;
    length = channels ? height * width : depth;
    step = channels ? 1 : view.stride[4];
  }
  FA_INLINE int64_t offset(int64_t line) const {
    return first + (channels ? line * view.stride[4] : line / width * view.stride[2] + line % width * view.stride[3]);
  }
  // Number i of a line in a matrix, and how far the next one is.
  FA_INLINE float* in(const Matrix& x, int64_t position, int64_t line, int64_t i) const {
    return channels ? x.at(position + i) + line * L : x.at(position + line) + i * L;
  }
  int64_t step_in(const Matrix& x) const { return channels ? x.stride : L; }
};

constexpr int64_t kAhead = 2;  // lines: those of many pairs are too many streams for the hardware to follow

// body(offset in the pairs' heads, elements, offset of what comes later, place in the matrix) for L numbers of a line
// at a time, of which the last may be fewer.
template <class Body>
FA_INLINE void each_piece(const Lines& lines, const Matrix& matrix, int64_t position, const Body& body) {
  for (int64_t line = 0; line < lines.count; ++line) {
    const int64_t offset = lines.offset(line), ahead = lines.offset(smaller(line + kAhead, lines.count - 1));
    for (int64_t i = 0; i < lines.length; i += L)
      body(offset + i * lines.step, smaller(L, lines.length - i), ahead + i * lines.step,
           lines.in(matrix, position, line, i));
  }
}

// to[position...] = factor * the lines of the pairs.
void pack(const Lines& lines, const Pairs& pairs, float factor, const Matrix& to, int64_t position = 0) {
  const int64_t step = lines.step, step_in = lines.step_in(to);
  with_element(lines.view.dtype, [&](auto element) {
    using T = decltype(element);
    const T* base[L];
    for (int i = 0; i < L; ++i) base[i] = at<T>(lines.view, head_offset(lines.view, pairs.image[i], pairs.head[i]));
    each_piece(lines, to, position, [&](int64_t offset, int64_t count, int64_t ahead, float* at) FA_INLINE_CALL {
      vf x[L];
      if (step == 1 && count == L) {
#pragma GCC unroll 16
        for (int lane = 0; lane < L; ++lane) {
          x[lane] = load_as_float(base[lane] + offset);
          __builtin_prefetch(base[lane] + ahead);
        }
      } else {
        for (int lane = 0; lane < L; ++lane) {
          x[lane] = vf{};
          if (step == 1)
            x[lane] = load_part(base[lane] + offset, count);
          else
            for (int64_t i = 0; i < count; ++i) x[lane][i] = static_cast<float>(base[lane][offset + i * step]);
        }
      }
      transpose(x);
#pragma GCC unroll 16
      for (int i = 0; i < L; ++i)
        if (i < count) store(at + i * step_in, x[i] * factor);
    });
  });
}

// The inverse: the lines of the pairs = factor * from[position...].
void unpack(const Lines& lines, const Pairs& pairs, float factor, const Matrix& from, int64_t position = 0) {
  const int64_t step = lines.step, step_in = lines.step_in(from);
  with_element(lines.view.dtype, [&](auto element) {
    using T = decltype(element);
    T* base[L];
    for (int i = 0; i < L; ++i) base[i] = at<T>(lines.view, head_offset(lines.view, pairs.image[i], pairs.head[i]));
    each_piece(lines, from, position, [&](int64_t offset, int64_t count, int64_t ahead, float* at) FA_INLINE_CALL {
      vf x[L];
#pragma GCC unroll 16
      for (int i = 0; i < L; ++i) x[i] = i < count ? load(at + i * step_in) * factor : vf{};
      transpose(x);
      if (step == 1 && count == L && pairs.count == L) {
#pragma GCC unroll 16
        for (int lane = 0; lane < L; ++lane) {
          store_rounded(base[lane] + offset, x[lane]);
          __builtin_prefetch(base[lane] + ahead, 1);
        }
        return;
      }
      for (int64_t lane = 0; lane < pairs.count; ++lane)
        if (step == 1 && count == L)
          store_rounded(base[lane] + offset, x[lane]);
        else if (step == 1)
          store_part(base[lane] + offset, count, x[lane]);
        else
          for (int64_t i = 0; i < count; ++i) base[lane][offset + i * step] = static_cast<T>(x[lane][i]);
    });
  });
}

// to[i] = the sum of the lanes of vector i that `used` names.
void sum_lanes_of(const float* from, int64_t count, vi used, float* to) {
  for (int64_t i = 0; i < count; i += L) {
    vf x[L];
    for (int64_t j = 0; j < L; ++j) x[j] = i + j < count ? select(used, load(from + (i + j) * L), vf{}) : vf{};
    const vf sums = sum_lanes_of_each(x);
    for (int64_t j = 0; j < smaller(L, count - i); ++j) to[i + j] = sums[j];
  }
}
