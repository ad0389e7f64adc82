// Stores past the caches, for results that would not stay there: a plain store reads the line first.  Included after
// simd.h, in the same way and place.

// Whether whole vectors can be streamed to here; the generic build has no such store.
template <class T>
FA_INLINE bool can_stream(const T* to) {
#if FUSED_ATTN_LANES >= 8
  return std::is_same_v<T, float> && reinterpret_cast<uintptr_t>(to) % sizeof(vf) == 0;
#else
  return false;
#endif
}

FA_INLINE void store_streamed(float* to, vf x) {
#if FUSED_ATTN_LANES == 16
  _mm512_stream_ps(to, (__m512)x);
#elif FUSED_ATTN_LANES == 8
  _mm256_stream_ps(to, (__m256)x);
#else
  store(to, x);
#endif
}

// What this thread streamed comes before whatever it does next.
FA_INLINE void end_of_streams() {
#if FUSED_ATTN_LANES >= 8
  _mm_sfence();
#endif
}
