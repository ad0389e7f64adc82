// The products of the matrices of a pair, which lie in rows of whole vectors; part of kernels_impl.h.

constexpr int kSums = L == 16 ? 24 : 12;                       // vectors of sums in registers
constexpr int kMostRows = 12, kMostColumns = L == 16 ? 4 : 2;  // of them, in vectors

// A factor that is read number by number: those of a row and those of a sum are so many floats apart, one of them 1.
struct Factor {
  const float* data;
  int64_t row, depth;
};

// What is `i` steps on, for i of 0 to 3: one address for the processor to work out.
template <class T>
FA_INLINE const T* apart(const T* from, int64_t step, int64_t three, int i) {
  return i == 3 ? from + three : from + i * step;
}

// The next row: one addition, where the compiler would work out the places of all rows ahead.
template <class T>
FA_INLINE T* stepped(T* row, int64_t step) {
  row += step;
  asm("" : "+r"(row));
  return row;
}

// What the rows of a product are multiplied with: numbers so far apart, or 1.
struct Factors {
  const float* data = nullptr;
  int64_t step = 0;
};

// c[m, n] = factors[m] * (from[m, n] + sum over k < depth of a[m, k] * b[k, n]), from 0 where there is none; b and c,
// from likewise, in rows of so many floats.  Numbers of a are `step` apart over its rows or, Turned, over the sum, and
// 1 over the other.
template <int M, int N, bool Turned>
void product_block(int64_t depth, const float* a, int64_t step, const float* b, int64_t b_row, float* c,
                   const float* from, int64_t c_row, Factors factors, Lines ahead) {
  vf sum[M][N] = {};
  if (from != nullptr) {
    const float* next = from;
#pragma GCC unroll 16
    for (int m = 0; m < M; ++m, next = stepped(next, c_row))
#pragma GCC unroll 8
      for (int n = 0; n < N; ++n) __builtin_prefetch(next + n * L);
  }
  constexpr int kUnroll = 4, kRowSets = Turned ? 1 : (M + 3) / 4;
  const float* rows[kRowSets];
#pragma GCC unroll 8
  for (int i = 0; i < kRowSets; ++i) rows[i] = a + 4 * i * step;
  const int64_t three = 3 * step, three_rows = 3 * b_row;
  auto add = [&](int k) FA_INLINE_CALL {
    const float* numbers = apart(b, b_row, three_rows, k);
    vf column[N];
#pragma GCC unroll 8
    for (int n = 0; n < N; ++n) column[n] = held(load(numbers + n * L));
#pragma GCC unroll 16
    for (int m = 0; m < M; ++m) {
      const vf number =
          broadcast(Turned ? apart(rows[0], step, three, k)[m] : apart(rows[m / 4 % kRowSets], step, three, m % 4)[k]);
#pragma GCC unroll 8
      for (int n = 0; n < N; ++n) sum[m][n] += number * column[n];
    }
  };
  int64_t k = depth;
  for (; k >= kUnroll; k -= kUnroll) {
#pragma GCC unroll 8
    for (int i = 0; i < kUnroll; ++i) {
      if (i == 0 || ahead.all) ahead.fetch_next();
      add(i);
    }
#pragma GCC unroll 8
    for (int i = 0; i < kRowSets; ++i) rows[i] += Turned ? kUnroll * step : kUnroll;
    b += kUnroll * b_row;
  }
  for (; k > 0; --k) {
    add(0);
#pragma GCC unroll 8
    for (int i = 0; i < kRowSets; ++i) rows[i] += Turned ? step : 1;
    b += b_row;
  }
  if (factors.data != nullptr) {
#pragma GCC unroll 16
    for (int m = 0; m < M; ++m) {
      const vf factor = broadcast(factors.data[m * factors.step]);
#pragma GCC unroll 8
      for (int n = 0; n < N; ++n) {
        if (from != nullptr) sum[m][n] += load(from + m * c_row + n * L);
        sum[m][n] *= factor;
      }
    }
    from = nullptr;
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
FA_INLINE void product_columns(Ahead& ahead, int64_t rows, int64_t depth, Factor a, const float* b, int64_t b_row,
                               float* c, const float* from, int64_t c_row, Factors factors,
                               std::integer_sequence<int, M...>) {
  using Block =
      void (*)(int64_t, const float*, int64_t, const float*, int64_t, float*, const float*, int64_t, Factors, Lines);
  static constexpr Block plain[] = {product_block<M + 1, N, false>...}, turned[] = {product_block<M + 1, N, true>...};
  const Block* const blocks = a.depth == 1 ? plain : turned;
  const int64_t step = a.depth == 1 ? a.row : a.depth;
  constexpr int32_t kMost = sizeof...(M);
  const int32_t all = static_cast<int32_t>(rows), parts = (all + kMost - 1) / kMost;
  const int32_t least = all / (parts > 0 ? parts : 1), more = all - parts * least;  // rows of a part; one more in some
  int64_t m = 0, count;
  for (int32_t part = 0; part < parts; ++part, m += count) {
    count = least + (part < more);
    blocks[count - 1](depth, a.data + m * a.row, step, b, b_row, c + m * c_row,
                      from != nullptr ? from + m * c_row : nullptr, c_row,
                      {factors.data + m * factors.step, factors.step}, ahead.take(depth));
  }
}

template <int N>
FA_INLINE void product_columns(Ahead& ahead, int64_t rows, int64_t depth, Factor a, const float* b, int64_t b_row,
                               float* c, const float* from, int64_t c_row, Factors factors) {
  constexpr int kMost = kSums / N < kMostRows ? kSums / N : kMostRows;
  product_columns<N>(ahead, rows, depth, a, b, b_row, c, from, c_row, factors,
                     std::make_integer_sequence<int, kMost>());
}

// The same for `rows` rows and `vectors` vectors of columns.
void product(Ahead& ahead, int64_t rows, int64_t vectors, int64_t depth, Factor a, const float* b, int64_t b_row,
             float* c, int64_t c_row, const float* from = nullptr, Factors factors = {}) {
  const int64_t chains = larger((depth + kMostTerms - 1) / kMostTerms, 1);
  const int64_t parts = (vectors + kMostColumns - 1) / kMostColumns;
  for (int64_t chain = 0; chain < chains; ++chain) {
    const int64_t k = split_begin(depth, chains, chain), count = split_begin(depth, chains, chain + 1) - k;
    const Factor factor = {a.data + k * a.depth, a.row, a.depth};
    for (int64_t part = 0; part < parts; ++part) {
      const int64_t v = split_begin(vectors, parts, part), n = split_begin(vectors, parts, part + 1) - v;
      auto run = [&]<int N>() FA_INLINE_CALL {
        const float* to_add = chain > 0 ? c + v * L : from != nullptr ? from + v * L : nullptr;
        product_columns<N>(ahead, rows, count, factor, b + k * b_row + v * L, b_row, c + v * L, to_add, c_row,
                           chain + 1 == chains ? factors : Factors{});
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
