// Vector types and the two matrix microkernels, written once on GCC/Clang vector extensions.
//
// Included once per instruction set, inside `namespace fused_attn::FUSED_ATTN_ISA` and after a target pragma, with
// FUSED_ATTN_LANES floats to a vector.  Deliberately without an include guard and without includes of its own: code
// from a header that was first seen under a higher instruction set could be merged into the generic build.

constexpr int L = FUSED_ATTN_LANES;
constexpr float kInfinity = __builtin_inff();

typedef float vf __attribute__((vector_size(L * 4)));
typedef int32_t vi __attribute__((vector_size(L * 4)));
typedef uint32_t vu __attribute__((vector_size(L * 4)));
typedef float vf_unaligned __attribute__((vector_size(L * 4), aligned(4), may_alias));
typedef int32_t vi_unaligned __attribute__((vector_size(L * 4), aligned(4), may_alias));
typedef uint32_t vu_unaligned __attribute__((vector_size(L * 4), aligned(4), may_alias));

#define FA_INLINE inline __attribute__((always_inline))
#define FA_INLINE_CALL __attribute__((always_inline))

FA_INLINE vf load(const float* p) { return *reinterpret_cast<const vf_unaligned*>(p); }
FA_INLINE vi load(const int32_t* p) { return *reinterpret_cast<const vi_unaligned*>(p); }
FA_INLINE vu load(const uint32_t* p) { return *reinterpret_cast<const vu_unaligned*>(p); }
FA_INLINE void store(float* p, vf x) { *reinterpret_cast<vf_unaligned*>(p) = x; }
FA_INLINE vf broadcast(float x) { return x - vf{}; }
// Makes the compiler load x once and keep it, rather than fold the load into each instruction that uses it: loads, not
// multiplications, would bound the microkernels.
FA_INLINE vf held(vf x) {
#if defined(__x86_64__)
  asm("" : "+v"(x));
#elif defined(__aarch64__)
  asm("" : "+w"(x));
#endif
  return x;
}
// Keeps an array out of the registers, which then are left to the innermost loop.
FA_INLINE void leave_in_memory(float* x) { asm volatile("" : : "r"(x) : "memory"); }
FA_INLINE vf select(vi mask, vf yes, vf no) { return mask ? yes : no; }
FA_INLINE vf maximum(vf a, vf b) { return select(a > b, a, b); }

// Degree-6 minimax polynomial of 2^r on [-1/2, 1/2] with p(0) = 1: relative error 7.5e-8 in float32.
FA_INLINE vf exp2_polynomial(vf r) {
  vf p = broadcast(0.00015353196067735553f);
  p = p * r + 0.0013398872688412666f;
  p = p * r + 0.009618437848985195f;
  p = p * r + 0.055503323674201965f;
  p = p * r + 0.24022647738456726f;
  p = p * r + 0.6931471824645996f;
  return p * r + 1.0f;
}

// e^x for x <= 0 (and slightly above): 1 at 0, 0 below 2^-126, NaN stays NaN.  A logit's weight is e^(logit - max) of a
// difference taken first: logit * log2(e) and max * log2(e) would be infinite for a mask of the least finite number.
FA_INLINE vf exp_nonpositive(vf x) {
  constexpr float kLog2e = 1.4426950408889634f;
#if defined(__AVX512DQ__) && FUSED_ATTN_LANES == 16
  // exp2_polynomial on [0, 1], relative error 6.1e-8: scalef takes the integer below its exponent, and care of -inf and
  // of results that underflow.
  x *= kLog2e;
  const vf r = (vf)_mm512_reduce_ps((__m512)x, _MM_FROUND_TO_NEG_INF);
  vf p = broadcast(0.00021565984934568405f);
  p = p * r + 0.0012482288293540478f;
  p = p * r + 0.009673775173723698f;
  p = p * r + 0.05548618361353874f;
  p = p * r + 0.24022908508777618f;
  p = p * r + 0.6931470632553101f;
  return (vf)_mm512_scalef_ps((__m512)(p * r + 1.0f), (__m512)x);
#else
  const vf shifted = x * kLog2e + 12582912.0f;  // 1.5 * 2^23: rounds to an integer held in the low mantissa bits
  const vf r = x * kLog2e - (shifted - 12582912.0f);
  const vi result = (vi)exp2_polynomial(r) + ((vi)shifted << 23);
  const vi underflow = x < -87.0f;
  return (vf)(result & ~underflow);
#endif
}

// --- reductions over lanes ---------------------------------------------------------------------------------------

// Lane j of the result is lane Lanes::of(j) of u followed by v.
template <class Lanes, int... J>
FA_INLINE vf permute(vf u, vf v, std::integer_sequence<int, J...>) {
#if defined(__clang__) || __GNUC__ >= 12
  return __builtin_shufflevector(u, v, Lanes::of(J)...);
#else
  return __builtin_shuffle(u, v, vi{Lanes::of(J)...});
#endif
}

// Of every 2H lanes: H of u, then H of v, taken from the low or the high half.
template <int H, bool High>
struct InterleavedBlocks {
  static constexpr int of(int j) {
    const int chunk = j / (2 * H) * (2 * H), r = j % (2 * H);
    return (r < H ? chunk + r : L + chunk + r - H) + (High ? H : 0);
  }
};

template <int H, bool High>
FA_INLINE vf interleave_blocks(vf u, vf v) {
  return permute<InterleavedBlocks<H, High>>(u, v, std::make_integer_sequence<int, L>());
}

template <int H>
FA_INLINE void fold(vf* x) {
  for (int i = 0; i < H; ++i)
    x[i] = interleave_blocks<H, false>(x[i], x[i + H]) + interleave_blocks<H, true>(x[i], x[i + H]);
}

// Lane i of the result is the sum over lanes of x[i], i < L.  Overwrites x.
FA_INLINE vf sum_lanes_of_each(vf* x) {
  if constexpr (L >= 16) fold<8>(x);
  if constexpr (L >= 8) fold<4>(x);
  fold<2>(x);
  fold<1>(x);
  return x[0];
}

// Lane i of the result is lane index[i] of x; 0 <= index < L.
FA_INLINE vf permute_lanes(vf x, vi index) {
#if defined(__clang__)
  vf result;
  for (int i = 0; i < L; ++i) result[i] = x[index[i]];
  return result;
#else
  return __builtin_shuffle(x, index);
#endif
}

template <int H>
FA_INLINE void transpose_blocks(vf* x) {
#pragma GCC unroll 16
  for (int i = 0; i < L; ++i) {
    if (i & H) continue;
    const vf low = interleave_blocks<H, false>(x[i], x[i + H]);
    x[i + H] = interleave_blocks<H, true>(x[i], x[i + H]);
    x[i] = low;
  }
}

// Lane j of x[i] and lane i of x[j] change places, i and j < L.
FA_INLINE void transpose(vf* x) {
  if constexpr (L >= 16) transpose_blocks<8>(x);
  if constexpr (L >= 8) transpose_blocks<4>(x);
  transpose_blocks<2>(x);
  transpose_blocks<1>(x);
}

template <int Width>
struct RotatedLanes {
  static constexpr int of(int j) { return (j + Width) % L; }
};

template <int Width>
FA_INLINE vf rotate_lanes(vf x) {
  return permute<RotatedLanes<Width>>(x, x, std::make_integer_sequence<int, L>());
}

FA_INLINE float sum_lanes(vf x) {
  if constexpr (L >= 16) x += rotate_lanes<8>(x);
  if constexpr (L >= 8) x += rotate_lanes<4>(x);
  x += rotate_lanes<2>(x);
  x += rotate_lanes<1>(x);
  return x[0];
}

FA_INLINE float max_lanes(vf x) {
  if constexpr (L >= 16) x = maximum(x, rotate_lanes<8>(x));
  if constexpr (L >= 8) x = maximum(x, rotate_lanes<4>(x));
  x = maximum(x, rotate_lanes<2>(x));
  x = maximum(x, rotate_lanes<1>(x));
  return x[0];
}

// --- matrix microkernels -----------------------------------------------------------------------------------------
//
// All products run over panels: NR vectors (NR * L consecutive key positions) by some number of rows, rows
// contiguous, so that a product streams through memory and never strides by a power of two.

constexpr int NR = FUSED_ATTN_PANEL_VECTORS;
constexpr int MR = FUSED_ATTN_BLOCK_ROWS;
constexpr int PANEL = NR * L;

// A longer sum is formed in parts and these are added, so that no rounding error grows with the whole depth.
constexpr int64_t kLongestChain = 32;

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
