// Vectors of float32, written once on GCC/Clang vector extensions; see simd.h.

constexpr int L = FUSED_ATTN_LANES;
constexpr float kInfinity = __builtin_inff();
constexpr float kLog2e = 1.4426950408889634f;

// A longer sum is formed in parts and these are added, so that no rounding error grows with the whole length.
constexpr int64_t kLongestChain = 32;

typedef float vf __attribute__((vector_size(L * 4)));
typedef int32_t vi __attribute__((vector_size(L * 4)));
typedef uint32_t vu __attribute__((vector_size(L * 4)));
typedef float vf_unaligned __attribute__((vector_size(L * 4), aligned(4), may_alias));
typedef int32_t vi_unaligned __attribute__((vector_size(L * 4), aligned(4), may_alias));
typedef uint32_t vu_unaligned __attribute__((vector_size(L * 4), aligned(4), may_alias));

#define FA_INLINE inline __attribute__((always_inline))
#define FA_INLINE_CALL __attribute__((always_inline))

FA_INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
FA_INLINE int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }
FA_INLINE int64_t round_up(int64_t x, int64_t to) { return (x + to - 1) / to * to; }
FA_INLINE int64_t vectors_of(int64_t count) { return (count + L - 1) / L; }

// Elements of dense memory, from `offset` on; of a view, whatever it is of.
template <class T>
FA_INLINE const T* at(const void* base, int64_t offset) {
  return static_cast<const T*>(base) + offset;
}
template <class T>
FA_INLINE T* at(void* base, int64_t offset) {
  return static_cast<T*>(base) + offset;
}

template <class T>
FA_INLINE T* at(const TensorView& view, int64_t offset) {
  return static_cast<T*>(view.data) + offset;
}

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
// A product that is not fused with the sum it goes into.
FA_INLINE vf rounded(vf x) { return held(x); }
// a * b + c, in one rounding where the instruction set can.  The compiler fuses a plain product with its sum only if it
// finds both in one basic block: this one's bits do not depend on that.
FA_INLINE vf fused(vf a, vf b, vf c) {
#if FUSED_ATTN_LANES == 16
  return (vf)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif FUSED_ATTN_LANES == 8
  return (vf)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#else
  return a * b + c;
#endif
}

// A product that becomes part of a sum.
struct Product {
  vf a, b;
};
FA_INLINE vf value_of(vf x) { return x; }
FA_INLINE vf value_of(Product x) { return x.a * x.b; }
FA_INLINE vf plus(vf sum, vf x) { return sum + x; }
FA_INLINE vf plus(vf sum, Product x) { return fused(x.a, x.b, sum); }

// A sum of any number of vectors, in chains of 8 additions: equal terms, such as the weights of equal keys, round alike
// at every addition.
struct Sum {
  vf part = {}, whole = {};
  int64_t count = 0;

  template <class Term>
  FA_INLINE void add(Term x) {
    part = plus(part, x);
    if (++count % 8 == 0) whole += part, part = vf{};
  }
  FA_INLINE vf total() const { return whole + part; }
};

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
  const vf shifted = x * kLog2e + 12582912.0f;  // 1.5 * 2^23: rounds to an integer held in the low mantissa bits
  const vf r = x * kLog2e - (shifted - 12582912.0f);
  const vi result = (vi)exp2_polynomial(r) + ((vi)shifted << 23);
  const vi underflow = x < -87.0f;
  return (vf)(result & ~underflow);
}

// --- reductions over lanes ---------------------------------------------------------------------------------------

// Lane j of the result is lane Order::of(j) of u followed by v.
template <class Order, int... J>
FA_INLINE vf permute(vf u, vf v, std::integer_sequence<int, J...>) {
#if defined(__clang__) || __GNUC__ >= 12
  return __builtin_shufflevector(u, v, Order::of(J)...);
#else
  return __builtin_shuffle(u, v, vi{Order::of(J)...});
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

constexpr auto kPlus = [](vf a, vf b) FA_INLINE_CALL { return a + b; };
constexpr auto kLarger = [](vf a, vf b) FA_INLINE_CALL { return maximum(a, b); };

template <int H, class Combine>
FA_INLINE void fold(vf* x, const Combine& combine) {
  for (int i = 0; i < H; ++i)
    x[i] = combine(interleave_blocks<H, false>(x[i], x[i + H]), interleave_blocks<H, true>(x[i], x[i + H]));
}

// Lane i of the result combines the lanes of x[i], i < L.  Overwrites x.
template <class Combine>
FA_INLINE vf combine_lanes_of_each(vf* x, const Combine& combine) {
  if constexpr (L >= 16) fold<8>(x, combine);
  if constexpr (L >= 8) fold<4>(x, combine);
  fold<2>(x, combine);
  fold<1>(x, combine);
  return x[0];
}
FA_INLINE vf sum_lanes_of_each(vf* x) { return combine_lanes_of_each(x, kPlus); }

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

template <class Combine>
FA_INLINE float combine_lanes(vf x, const Combine& combine) {
  if constexpr (L >= 16) x = combine(x, rotate_lanes<8>(x));
  if constexpr (L >= 8) x = combine(x, rotate_lanes<4>(x));
  x = combine(x, rotate_lanes<2>(x));
  x = combine(x, rotate_lanes<1>(x));
  return x[0];
}
FA_INLINE float sum_lanes(vf x) { return combine_lanes(x, kPlus); }
FA_INLINE float max_lanes(vf x) { return combine_lanes(x, kLarger); }
