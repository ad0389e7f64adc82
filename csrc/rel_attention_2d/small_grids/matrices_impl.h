// Matrices of a group of pairs, their products, and their way from and to tensors; part of kernels_impl.h.

// Consecutive (image, head) pairs, one to a lane; lanes past the last repeat it.
struct Pairs {
  int64_t heads, first, count;

  int64_t of(int64_t lane) const { return first + smaller(lane, count - 1); }
  int64_t image(int64_t lane) const { return of(lane) / heads; }
  int64_t head(int64_t lane) const { return of(lane) % heads; }
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

// An operand: its numbers along the result's rows or columns and along the sum, so many floats apart.
struct Operand {
  const float* data;
  int64_t step, depth_step;
};

constexpr int kRows = 6, kColumns = L == 16 ? 4 : 2;  // of a block in registers

template <int M, int N, bool Add>
FA_INLINE void product_block(int64_t depth, const float* a, int64_t a_step, int64_t a_depth, const float* b,
                             int64_t b_step, int64_t b_depth, float* c, int64_t c_row, int64_t c_column) {
  vf acc[M][N] = {};
  for (int64_t k = 0; k < depth; ++k, a += a_depth, b += b_depth) {
    vf column[N];
#pragma GCC unroll 8
    for (int n = 0; n < N; ++n) column[n] = held(load(b + n * b_step));
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m) {
      const vf row = held(load(a + m * a_step));
#pragma GCC unroll 8
      for (int n = 0; n < N; ++n) acc[m][n] += row * column[n];
    }
  }
#pragma GCC unroll 8
  for (int m = 0; m < M; ++m)
#pragma GCC unroll 8
    for (int n = 0; n < N; ++n) {
      float* to = c + m * c_row + n * c_column;
      store(to, Add ? load(to) + acc[m][n] : acc[m][n]);
    }
}

template <bool Add>
void product_part(int64_t rows, int64_t columns, int64_t depth, Operand a, Operand b, float* c, int64_t c_row,
                  int64_t c_column) {
  auto across = [&]<int M>(int64_t m) FA_INLINE_CALL {
    const float* from = a.data + m * a.step;
    float* to = c + m * c_row;
    int64_t n = 0;
    for (; n + kColumns <= columns; n += kColumns)
      product_block<M, kColumns, Add>(depth, from, a.step, a.depth_step, b.data + n * b.step, b.step, b.depth_step,
                                      to + n * c_column, c_row, c_column);
    for (; n < columns; ++n)
      product_block<M, 1, Add>(depth, from, a.step, a.depth_step, b.data + n * b.step, b.step, b.depth_step,
                               to + n * c_column, c_row, c_column);
  };
  int64_t m = 0;
  for (; m + kRows <= rows; m += kRows) across.template operator()<kRows>(m);
  for (; m < rows; ++m) across.template operator()<1>(m);
}

// c[m, n] = sum over k < depth of a[m, k] * b[n, k], or added to what is there.
void product(int64_t rows, int64_t columns, int64_t depth, Operand a, Operand b, float* c, int64_t c_row,
             int64_t c_column, bool add = false) {
  const int64_t parts = (depth + kLongestChain - 1) / kLongestChain;
  for (int64_t part = 0; part < parts; ++part) {
    const int64_t first = split_begin(depth, parts, part), count = split_begin(depth, parts, part + 1) - first;
    const Operand a_part{a.data + first * a.depth_step, a.step, a.depth_step};
    const Operand b_part{b.data + first * b.depth_step, b.step, b.depth_step};
    if (add || part > 0)
      product_part<true>(rows, columns, count, a_part, b_part, c, c_row, c_column);
    else
      product_part<false>(rows, columns, count, a_part, b_part, c, c_row, c_column);
  }
}

// Operands of a matrix: summed over its depth, or over its positions.
Operand over_depth(const Matrix& x, int64_t position = 0, int64_t step = 1) {
  return {x.at(position), step * x.stride, L};
}
Operand over_positions(const Matrix& x, int64_t position = 0, int64_t step = 1) {
  return {x.at(position), L, step * x.stride};
}

// --- tensors to matrices and back -----------------------------------------------------------------------------------

// Rows [y, y + height) of a (batch, heads, -, width, depth) tensor, as lines of numbers that lie side by side where some
// do: those of a position or, channels first, those of a channel.
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

// A (batch, heads, positions, depth) tensor as one of rows of one position.
FA_INLINE TensorView as_grid(const TensorView& prefix) {
  TensorView view = prefix;
  view.stride[4] = prefix.stride[3], view.stride[3] = 0;
  return view;
}

constexpr int64_t kAhead = 2;  // lines: those of many pairs are too many streams for the hardware to follow

// body(offset in the pairs' heads, elements, offset of what comes later, place in the matrix) for L numbers of a line at
// a time, of which the last may be fewer.
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
    for (int i = 0; i < L; ++i) base[i] = at<T>(lines.view, head_offset(lines.view, pairs.image(i), pairs.head(i)));
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
    for (int i = 0; i < L; ++i) base[i] = at<T>(lines.view, head_offset(lines.view, pairs.image(i), pairs.head(i)));
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
