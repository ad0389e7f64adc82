// The products of the matrices of a pair, which lie in rows of whole vectors; part of kernels_impl.h.

constexpr int kSums = L == 16 ? 24 : 12;                       // vectors of sums in registers
constexpr int kMostRows = 12, kMostColumns = L == 16 ? 4 : 2;  // of them, in vectors

// A factor that is read number by number: those of a row and those of a sum are so many floats apart.
struct Factor {
  const float* data;
  int64_t row, depth;
};

// The next row: one addition, where the compiler would work out the places of all rows ahead.
template <class T>
FA_INLINE T* stepped(T* row, int64_t step) {
  row += step;
  asm("" : "+r"(row));
  return row;
}

// c[m, n] = sum over k < depth of a[m, k] * b[k, n], on top of from[m, n] if there is such; b and c, from likewise, in
// rows of so many floats.
template <int M, int N>
void product_block(int64_t depth, Factor a, const float* b, int64_t b_row, float* c, const float* from, int64_t c_row) {
  vf sum[M][N] = {};
  if (from != nullptr) {
    const float* next = from;
#pragma GCC unroll 16
    for (int m = 0; m < M; ++m, next = stepped(next, c_row))
#pragma GCC unroll 8
      for (int n = 0; n < N; ++n) __builtin_prefetch(next + n * L);
  }
  for (int64_t k = 0; k < depth; ++k) {
    vf column[N];
#pragma GCC unroll 8
    for (int n = 0; n < N; ++n) column[n] = held(load(b + n * L));
#pragma GCC unroll 16
    for (int m = 0; m < M; ++m) {
      const vf number = broadcast(a.data[m * a.row]);
#pragma GCC unroll 8
      for (int n = 0; n < N; ++n) sum[m][n] += number * column[n];
    }
    a.data += a.depth, b += b_row;
  }
  if (from == nullptr) {
#pragma GCC unroll 16
    for (int m = 0; m < M; ++m, c = stepped(c, c_row))
#pragma GCC unroll 8
      for (int n = 0; n < N; ++n) store(c + n * L, sum[m][n]);
    return;
  }
#pragma GCC unroll 16
  for (int m = 0; m < M; ++m, c = stepped(c, c_row), from = stepped(from, c_row))
#pragma GCC unroll 8
    for (int n = 0; n < N; ++n) store(c + n * L, load(from + n * L) + sum[m][n]);
}

template <int N, int... M>
FA_INLINE void product_columns(int64_t rows, int64_t depth, Factor a, const float* b, int64_t b_row, float* c,
                               const float* from, int64_t c_row, std::integer_sequence<int, M...>) {
  using Block = void (*)(int64_t, Factor, const float*, int64_t, float*, const float*, int64_t);
  static constexpr Block blocks[] = {product_block<M + 1, N>...};
  constexpr int64_t kMost = sizeof...(M);
  const int64_t parts = (rows + kMost - 1) / kMost;
  for (int64_t part = 0; part < parts; ++part) {
    const int64_t m = split_begin(rows, parts, part), count = split_begin(rows, parts, part + 1) - m;
    blocks[count - 1](depth, {a.data + m * a.row, a.row, a.depth}, b, b_row, c + m * c_row,
                      from != nullptr ? from + m * c_row : nullptr, c_row);
  }
}

template <int N>
FA_INLINE void product_columns(int64_t rows, int64_t depth, Factor a, const float* b, int64_t b_row, float* c,
                               const float* from, int64_t c_row) {
  constexpr int kMost = kSums / N < kMostRows ? kSums / N : kMostRows;
  product_columns<N>(rows, depth, a, b, b_row, c, from, c_row, std::make_integer_sequence<int, kMost>());
}

// The same for `rows` rows and `vectors` vectors of columns.
void product(int64_t rows, int64_t vectors, int64_t depth, Factor a, const float* b, int64_t b_row, float* c,
             int64_t c_row, const float* from = nullptr) {
  constexpr int64_t kLongest = 2 * kLongestChain;  // the keys of a 7x7 window in one part
  const int64_t chains = larger((depth + kLongest - 1) / kLongest, 1);
  const int64_t parts = (vectors + kMostColumns - 1) / kMostColumns;
  for (int64_t chain = 0; chain < chains; ++chain) {
    const int64_t k = split_begin(depth, chains, chain), count = split_begin(depth, chains, chain + 1) - k;
    const Factor factor = {a.data + k * a.depth, a.row, a.depth};
    for (int64_t part = 0; part < parts; ++part) {
      const int64_t v = split_begin(vectors, parts, part), n = split_begin(vectors, parts, part + 1) - v;
      auto run = [&]<int N>() FA_INLINE_CALL {
        const float* to_add = chain > 0 ? c + v * L : from != nullptr ? from + v * L : nullptr;
        product_columns<N>(rows, count, factor, b + k * b_row + v * L, b_row, c + v * L, to_add, c_row);
      };
      if (n == 1) run.template operator()<1>();
      if (n == 2) run.template operator()<2>();
      if constexpr (kMostColumns > 2) {
        if (n == 3) run.template operator()<3>();
        if (n == 4) run.template operator()<4>();
      }
    }
  }
}
