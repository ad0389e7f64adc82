// The two matrix microkernels.  See simd.h.
//
// All products run over panels: NR vectors (NR * L consecutive key positions) by some number of rows, rows
// contiguous, so that a product streams through memory and never strides by a power of two.

constexpr int NR = L == 16 ? 4 : 2;
constexpr int MR = 4;
constexpr int PANEL = NR * L;

FA_INLINE int64_t panels_of(int64_t vectors) { return (vectors + NR - 1) / NR; }

// finish(m, n, sum_k A[m, k] * B[k][n]).
template <int M, int N, class Finish>
FA_INLINE void outer_block(const float* a, int64_t a_row, int64_t a_depth, int64_t depth, const float* b, int64_t b_row,
                           const Finish& finish) {
  vf acc[M][N] = {};
  auto accumulate = [&](int64_t begin, int64_t end) FA_INLINE_CALL {
    for (int64_t k = begin; k < end; ++k) {
      vf column[N];
#pragma GCC unroll 8
      for (int n = 0; n < N; ++n) column[n] = held(load(b + k * b_row + n * L));
#pragma GCC unroll 8
      for (int m = 0; m < M; ++m) {
        const vf scalar = broadcast(a[m * a_row + k * a_depth]);
#pragma GCC unroll 8
        for (int n = 0; n < N; ++n) acc[m][n] += scalar * column[n];
      }
    }
  };
  if (depth <= kLongestChain) {
    accumulate(0, depth);
  } else {
    const int64_t parts = (depth + kLongestChain - 1) / kLongestChain;
    alignas(64) float whole[M * N * L];
    for (int64_t part = 0; part < parts; ++part) {
      accumulate(depth * part / parts, depth * (part + 1) / parts);
      if (part + 1 == parts) break;
#pragma GCC unroll 8
      for (int m = 0; m < M; ++m)
#pragma GCC unroll 8
        for (int n = 0; n < N; ++n) {
          float* to = whole + (m * N + n) * L;
          store(to, part == 0 ? acc[m][n] : load(to) + acc[m][n]);
          acc[m][n] = vf{};
        }
      leave_in_memory(whole);
    }
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m)
#pragma GCC unroll 8
      for (int n = 0; n < N; ++n) acc[m][n] += load(whole + (m * N + n) * L);
  }
#pragma GCC unroll 8
  for (int m = 0; m < M; ++m)
#pragma GCC unroll 8
    for (int n = 0; n < N; ++n) finish(m, n, acc[m][n]);
}

// The same for `rows` rows and `vectors` <= NR vectors; finish sees the row's index in the whole.
template <class Finish>
FA_INLINE void outer_product(int64_t rows, int vectors, const float* a, int64_t a_row, int64_t a_depth, int64_t depth,
                             const float* b, int64_t b_row, const Finish& finish) {
  auto run = [&]<int M, int N>(int64_t row) FA_INLINE_CALL {
    outer_block<M, N>(a + row * a_row, a_row, a_depth, depth, b, b_row,
                      [&](int m, int n, vf x) FA_INLINE_CALL { finish(row + m, n, x); });
  };
  auto run_rows = [&]<int N>() FA_INLINE_CALL {
    int64_t row = 0;
    for (; row + MR <= rows; row += MR) run.template operator()<MR, N>(row);
    for (; row + 2 <= rows; row += 2) run.template operator()<2, N>(row);
    if (row < rows) run.template operator()<1, N>(row);
  };
  if (vectors == NR) return run_rows.template operator()<NR>();
  for (int n = 0; n < vectors; ++n) {  // a narrow last panel, one vector at a time
    auto run_one = [&](int64_t row, auto count) FA_INLINE_CALL {
      outer_block<decltype(count)::value, 1>(a + row * a_row, a_row, a_depth, depth, b + n * L, b_row,
                                             [&](int m, int, vf x) FA_INLINE_CALL { finish(row + m, n, x); });
    };
    int64_t row = 0;
    for (; row + 2 * MR <= rows; row += 2 * MR) run_one(row, std::integral_constant<int, 2 * MR>{});
    for (; row + MR <= rows; row += MR) run_one(row, std::integral_constant<int, MR>{});
    for (; row < rows; ++row) run_one(row, std::integral_constant<int, 1>{});
  }
}

// c[m * c_row + n] += sum over `vectors` vectors of A[m] * B[n]; A rows contiguous, B in panels of `b_rows` rows.
template <int M, int N>
FA_INLINE void dot_block(int64_t vectors, const float* a, int64_t a_row, const float* b, int64_t b_rows, float* c,
                         int64_t c_row) {
  static_assert(M * N <= 16);
  constexpr int Sums = (M * N + L - 1) / L * L;
  vf acc[Sums] = {};
  const int64_t panels = vectors / NR;
  for (int64_t p = 0; p < panels; ++p) {
#pragma GCC unroll 8
    for (int v = 0; v < NR; ++v) {
      vf column[N];
#pragma GCC unroll 8
      for (int n = 0; n < N; ++n) column[n] = load(b + (p * b_rows + n) * PANEL + v * L);
#pragma GCC unroll 8
      for (int m = 0; m < M; ++m) {
        const vf row = load(a + m * a_row + p * PANEL + v * L);
#pragma GCC unroll 8
        for (int n = 0; n < N; ++n) acc[m * N + n] += row * column[n];
      }
    }
  }
  for (int64_t v = 0; v < vectors - panels * NR; ++v) {
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m) {
      const vf row = load(a + m * a_row + panels * PANEL + v * L);
#pragma GCC unroll 8
      for (int n = 0; n < N; ++n) acc[m * N + n] += row * load(b + (panels * b_rows + n) * PANEL + v * L);
    }
  }
  alignas(64) float sums[Sums];
#pragma GCC unroll 8
  for (int i = 0; i < Sums; i += L) store(sums + i, sum_lanes_of_each(acc + i));
#pragma GCC unroll 8
  for (int m = 0; m < M; ++m)
#pragma GCC unroll 8
    for (int n = 0; n < N; ++n) c[m * c_row + n] += sums[m * N + n];
}

// The same for `rows` rows (a multiple of 4) and `columns` columns.
FA_INLINE void dot_product(int64_t rows, int64_t columns, int64_t vectors, const float* a, int64_t a_row,
                           const float* b, float* c, int64_t c_row) {
  for (int64_t row = 0; row < rows; row += 4) {
    const float* a_block = a + row * a_row;
    float* c_block = c + row * c_row;
    int64_t column = 0;
    for (; column + 4 <= columns; column += 4)
      dot_block<4, 4>(vectors, a_block, a_row, b + column * PANEL, columns, c_block + column, c_row);
    for (; column + 2 <= columns; column += 2)
      dot_block<4, 2>(vectors, a_block, a_row, b + column * PANEL, columns, c_block + column, c_row);
    if (column < columns)
      dot_block<4, 1>(vectors, a_block, a_row, b + column * PANEL, columns, c_block + column, c_row);
  }
}
