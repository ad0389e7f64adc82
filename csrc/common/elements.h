// Vectors of float32 from and to memory of any element type: whole, in part, past the caches.  See simd.h.

// --- whole vectors ------------------------------------------------------------------------------------------------

typedef uint16_t vh __attribute__((vector_size(L * 2)));
typedef uint16_t vh_unaligned __attribute__((vector_size(L * 2), aligned(2), may_alias));

// Vectors of 16-bit elements, given as their bits, and vectors of float32.
template <class T>
FA_INLINE vf widened(vh bits) {
  if constexpr (std::is_same_v<T, c10::BFloat16>) return (vf)(__builtin_convertvector(bits, vu) << 16);
#if FUSED_ATTN_LANES == 16
  return (vf)_mm512_maskz_cvtph_ps(0xffff, (__m256i)bits);
#elif FUSED_ATTN_LANES == 8
  return (vf)_mm256_cvtph_ps((__m128i)bits);
#else
  vf x;
  for (int i = 0; i < L; ++i) x[i] = static_cast<float>(c10::Half(bits[i], c10::Half::from_bits()));
  return x;
#endif
}
template <class T>
FA_INLINE vh rounded_to(vf x) {
  if constexpr (std::is_same_v<T, c10::BFloat16>) {
    const vu bits = (vu)x, nearest = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16;
    const vu quiet = bits >> 16 | 0x40;
    return __builtin_convertvector(x == x ? nearest : quiet, vh);
  }
#if FUSED_ATTN_LANES == 16
  return (vh)_mm512_maskz_cvtps_ph(0xffff, (__m512)x, _MM_FROUND_TO_NEAREST_INT);
#elif FUSED_ATTN_LANES == 8
  return (vh)_mm256_cvtps_ph((__m256)x, _MM_FROUND_TO_NEAREST_INT);
#else
  vh bits;
  for (int i = 0; i < L; ++i) bits[i] = static_cast<c10::Half>(x[i]).x;
  return bits;
#endif
}

template <class T>
FA_INLINE vf load_as_float(const T* p) {
  if constexpr (std::is_same_v<T, float>)
    return load(p);
  else
    return widened<T>(*reinterpret_cast<const vh_unaligned*>(p));
}
template <class T>
FA_INLINE void store_rounded(T* p, vf x) {
  if constexpr (std::is_same_v<T, float>)
    store(p, x);
  else
    *reinterpret_cast<vh_unaligned*>(p) = rounded_to<T>(x);
}

// --- the first `count` elements of a vector, 0 < count < L ----------------------------------------------------------
//
// Through registers and masks: a vector load from scratch memory would wait for the narrow stores before it to leave
// the store buffer.

// All ones in the first `count` lanes.
FA_INLINE vi first_lanes(int64_t count) {
  vi lane;
  for (int i = 0; i < L; ++i) lane[i] = i;
  return lane < static_cast<int32_t>(count);
}

// Up to four elements of 16 bits and a register that holds them.
FA_INLINE uint64_t load_up_to_4(const void* from, int64_t count) {
  const char* p = static_cast<const char*>(from);
  uint64_t four = 0;
  if (count >= 4) {
    __builtin_memcpy(&four, p, 8);
    return four;
  }
  uint32_t two = 0;
  uint16_t one = 0;
  if (count & 1) __builtin_memcpy(&one, p + (count & 2) * 2, 2);
  if (count & 2) {
    __builtin_memcpy(&two, p, 4);
    return two | uint64_t(one) << 32;
  }
  return one;
}
FA_INLINE void store_up_to_4(void* to, int64_t count, uint64_t four) {
  char* p = static_cast<char*>(to);
  if (count >= 4) {
    __builtin_memcpy(p, &four, 8);
    return;
  }
  if (count & 2) {
    __builtin_memcpy(p, &four, 4);
    four >>= 32, p += 4;
  }
  if (count & 1) __builtin_memcpy(p, &four, 2);
}

// Zero in the other lanes.
template <class T>
FA_INLINE vf load_part(const T* p, int64_t count) {
#if FUSED_ATTN_LANES == 16
  const auto mask = static_cast<__mmask16>((1u << count) - 1);
  if constexpr (std::is_same_v<T, float>)
    return (vf)_mm512_maskz_loadu_ps(mask, p);
  else
    return widened<T>((vh)_mm256_maskz_loadu_epi16(mask, p));
#elif FUSED_ATTN_LANES == 8
  if constexpr (std::is_same_v<T, float>) {
    return (vf)_mm256_maskload_ps(p, (__m256i)first_lanes(count));
  } else {
    typedef uint64_t pair __attribute__((vector_size(16)));
    return widened<T>((vh)pair{load_up_to_4(p, count), count > 4 ? load_up_to_4(p + 4, count - 4) : 0});
  }
#else
  if constexpr (std::is_same_v<T, float>) {
    if (count == 1) return vf{p[0]};
    if (count == 2) return vf{p[0], p[1]};
    return vf{p[0], p[1], p[2]};
  } else {
    return widened<T>((vh)load_up_to_4(p, count));
  }
#endif
}
// `fill` in the other lanes.
template <class T>
FA_INLINE vf load_part(const T* p, int64_t count, float fill) {
  return select(first_lanes(count), load_part(p, count), broadcast(fill));
}
template <class T>
FA_INLINE void store_part(T* p, int64_t count, vf x) {
#if FUSED_ATTN_LANES == 16
  const auto mask = static_cast<__mmask16>((1u << count) - 1);
  if constexpr (std::is_same_v<T, float>)
    _mm512_mask_storeu_ps(p, mask, (__m512)x);
  else
    _mm256_mask_storeu_epi16(p, mask, (__m256i)rounded_to<T>(x));
#elif FUSED_ATTN_LANES == 8
  if constexpr (std::is_same_v<T, float>) {
    // A masked store takes longer than these three on some processors.
    __m128 four = _mm256_castps256_ps128((__m256)x);
    if (count & 4) {
      _mm_storeu_ps(p, four);
      four = _mm256_extractf128_ps((__m256)x, 1), p += 4;
    }
    if (count & 2) {
      _mm_storel_pi(reinterpret_cast<__m64*>(p), four);
      four = _mm_movehl_ps(four, four), p += 2;
    }
    if (count & 1) _mm_store_ss(p, four);
  } else {
    typedef uint64_t pair __attribute__((vector_size(16)));
    const pair bits = (pair)rounded_to<T>(x);
    store_up_to_4(p, count, bits[0]);
    if (count > 4) store_up_to_4(p + 4, count - 4, bits[1]);
  }
#else
  if constexpr (std::is_same_v<T, float>) {
    p[0] = x[0];
    if (count > 1) p[1] = x[1];
    if (count > 2) p[2] = x[2];
  } else {
    store_up_to_4(p, count, (uint64_t)rounded_to<T>(x));
  }
#endif
}

// --- runs of elements -----------------------------------------------------------------------------------------------

// Stores past the caches, for results that would not stay there: a plain store reads the line first.  The generic build
// has no such store.
template <class T>
FA_INLINE bool can_stream(const T* to) {
  return L >= 8 && std::is_same_v<T, float> && reinterpret_cast<uintptr_t>(to) % sizeof(vf) == 0;
}
template <class T>
FA_INLINE void store_streamed(T* to, vf x) {
#if FUSED_ATTN_LANES == 16
  if constexpr (std::is_same_v<T, float>) return _mm512_stream_ps(to, (__m512)x);
#elif FUSED_ATTN_LANES == 8
  if constexpr (std::is_same_v<T, float>) return _mm256_stream_ps(to, (__m256)x);
#endif
  store_rounded(to, x);
}
// What this thread streamed comes before whatever it does next.
FA_INLINE void end_of_streams() {
#if FUSED_ATTN_LANES >= 8
  _mm_sfence();
#endif
}

// A vector of a run: where it starts, and how many of its elements there are, all of them if Whole.
template <bool Whole>
struct Lanes {
  int64_t begin, count;

  template <class T>
  FA_INLINE vf load(const T* p) const {
    if constexpr (Whole) return load_as_float(p + begin);
    return load_part(p + begin, count);
  }
  // Of what is read once from memory: no hardware prefetcher follows over the end of a page.
  template <class T>
  FA_INLINE vf load_on(const T* p) const {
    __builtin_prefetch(reinterpret_cast<const char*>(p + begin) + 4096);
    return load(p);
  }
  template <class T>
  FA_INLINE void store(T* p, vf x) const {
    if constexpr (Whole) return store_rounded(p + begin, x);
    store_part(p + begin, count, x);
  }
  // a * b for a sum of elements of T.  That it is fused but for parts of vectors of float32 is a convention, written
  // down down so that results depend on no compiler.
  template <class T>
  FA_INLINE auto product(vf a, vf b) const {
    if constexpr (Whole || !std::is_same_v<T, float>)
      return Product{a, b};
    else
      return rounded(a * b);
  }
  // Past the caches if `streamed` and the vector is whole: then it must be aligned.
  template <class T>
  FA_INLINE void store(T* p, vf x, bool streamed) const {
    if constexpr (Whole && std::is_same_v<T, float>)
      if (streamed) return store_streamed(p + begin, x);
    store(p, x);
  }
};

// body(lanes) for every vector of `count` elements.
template <class Body>
FA_INLINE void each(int64_t count, const Body& body) {
  int64_t i = 0;
  for (; i + L <= count; i += L) body(Lanes<true>{i, L});
  if (i < count) body(Lanes<false>{i, count - i});
}

// The same, whole vectors lying where those of `to` can be streamed.
template <class Body>
FA_INLINE void each_aligned(const float* to, int64_t count, const Body& body) {
  const int64_t head = smaller(-(reinterpret_cast<uintptr_t>(to) / sizeof(float)) % L, count);
  if (head > 0) body(Lanes<false>{0, head});
  int64_t i = head;
  for (; i + L <= count; i += L) body(Lanes<true>{i, L});
  if (i < count) body(Lanes<false>{i, count - i});
}
