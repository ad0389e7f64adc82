// Vectors of float32 from and to memory of any element type.  Included after simd.h, in the same way and place.

typedef uint16_t vh __attribute__((vector_size(L * 2)));
typedef uint16_t vh_unaligned __attribute__((vector_size(L * 2), aligned(2), may_alias));

FA_INLINE vf load_as_float(const float* p) { return load(p); }

FA_INLINE vf load_as_float(const c10::BFloat16* p) {
  const vh bits = *reinterpret_cast<const vh_unaligned*>(p);
  return (vf)(__builtin_convertvector(bits, vu) << 16);
}

FA_INLINE vf load_as_float(const c10::Half* p) {
#if FUSED_ATTN_LANES == 16
  return (vf)_mm512_maskz_cvtph_ps(0xffff, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
#elif FUSED_ATTN_LANES == 8
  return (vf)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
#else
  vf x;
  for (int i = 0; i < L; ++i) x[i] = static_cast<float>(p[i]);
  return x;
#endif
}

FA_INLINE void store_rounded(float* p, vf x) { store(p, x); }

FA_INLINE void store_rounded(c10::BFloat16* p, vf x) {
  const vu bits = (vu)x, rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16;
  const vu quiet = bits >> 16 | 0x40;
  *reinterpret_cast<vh_unaligned*>(p) = __builtin_convertvector(x == x ? rounded : quiet, vh);
}

FA_INLINE void store_rounded(c10::Half* p, vf x) {
#if FUSED_ATTN_LANES == 16
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p),
                      _mm512_maskz_cvtps_ph(0xffff, (__m512)x, _MM_FROUND_TO_NEAREST_INT));
#elif FUSED_ATTN_LANES == 8
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph((__m256)x, _MM_FROUND_TO_NEAREST_INT));
#else
  for (int i = 0; i < L; ++i) p[i] = static_cast<c10::Half>(x[i]);
#endif
}
