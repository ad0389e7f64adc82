// Rows of a strided tensor to and from padded float32 rows; part of kernels_impl.h.

// `to` has whole vectors and, where elements are strided, holds `fill` in its padding already.
template <class T>
FA_INLINE void load_rows_as(const T* from, int64_t y_stride, int64_t x_stride, int64_t rows, int64_t width, float fill,
                            float* to, int64_t to_stride) {
  const int64_t whole = width / L * L, rest = width - whole;
  for (int64_t y = 0; y < rows; ++y, from += y_stride, to += to_stride) {
    if (x_stride != 1) {
      for (int64_t i = 0; i < width; ++i) to[i] = static_cast<float>(from[i * x_stride]);
      continue;
    }
    for (int64_t i = 0; i < whole; i += L) store(to + i, load_as_float(from + i));
    if (rest > 0) store(to + whole, load_part(from + whole, rest, fill));
  }
}
template <class T>
FA_INLINE void load_row_as(const T* from, int64_t stride, int64_t count, float fill, float* to) {
  load_rows_as(from, 0, stride, 1, count, fill, to, 0);
}

FA_INLINE void load_rows(const TensorView& view, int64_t offset, int64_t y_stride, int64_t x_stride, int64_t rows,
                         int64_t width, float fill, float* to, int64_t to_stride) {
  with_element(view.dtype, [&](auto element) FA_INLINE_CALL {
    load_rows_as(at<decltype(element)>(view.data, offset), y_stride, x_stride, rows, width, fill, to, to_stride);
  });
}
FA_INLINE void load_row(const TensorView& view, int64_t offset, int64_t stride, int64_t count, float fill, float* to) {
  load_rows(view, offset, 0, stride, 1, count, fill, to, 0);
}

// to[i] = from[i], i < count, streamed but for a few at the ends.
FA_INLINE void stream(float* to, const float* from, int64_t count) {
  each_aligned(to, count, [&](auto lanes) FA_INLINE_CALL { lanes.store(to, lanes.load(from), true); });
}

// to[i] = value(vector of i), rounded to T, for `count` elements; streamed, if that is wanted, where vectors are
// aligned.
template <class T, class Value>
FA_INLINE void write_row(T* to, int64_t count, bool stream, const Value& value) {
  const int64_t vectors = count / L;
  if (stream && can_stream(to))
    for (int64_t v = 0; v < vectors; ++v) store_streamed(to + v * L, value(v));
  else
    for (int64_t v = 0; v < vectors; ++v) store_rounded(to + v * L, value(v));
  if (vectors * L < count) store_part(to + vectors * L, count - vectors * L, value(vectors));
}

// The last dimension of what the kernels write is contiguous.
template <class Value>
FA_INLINE void write_row(const TensorView& view, int64_t offset, int64_t count, bool stream, const Value& value) {
  with_element(view.dtype, [&](auto element) FA_INLINE_CALL {
    write_row(at<decltype(element)>(view.data, offset), count, stream, value);
  });
}

FA_INLINE void store_row_as(float* to, int64_t count, const float* from) {
  write_row(to, count, false, [&](int64_t v) FA_INLINE_CALL { return load(from + v * L); });
}
FA_INLINE void store_row(const TensorView& view, int64_t offset, int64_t count, const float* from,
                         bool stream = false) {
  write_row(view, offset, count, stream, [&](int64_t v) FA_INLINE_CALL { return load(from + v * L); });
}

// Rows of one plane in float32, `stride` floats apart, readable in whole vectors.
struct Rows {
  const float* data;
  int64_t stride;
  const float* operator[](int64_t y) const { return data + y * stride; }
};

// `rows` rows at `offset`: in place where they are float32 vectors already, else copied to `to`, whose padding stays.
FA_INLINE Rows rows_of(const TensorView& view, int dimension, int64_t offset, int64_t rows, int64_t width, float fill,
                       float* to, int64_t to_stride) {
  const int64_t y_stride = view.stride[dimension], x_stride = view.stride[dimension + 1];
  if (view.dtype == DType::float32 && x_stride == 1 && width % L == 0)
    return {static_cast<const float*>(view.data) + offset, y_stride};
  load_rows(view, offset, y_stride, x_stride, rows, width, fill, to, to_stride);
  return {to, to_stride};
}

// Brings rows that the next image writes closer while this one is computed: images lie heads planes apart, where no
// hardware prefetcher follows.
FA_INLINE void prefetch_rows_to_write(const TensorView& view, int64_t offset, int64_t y_stride, int64_t rows,
                                      int64_t width) {
  const int64_t size = view.dtype == DType::float32 ? 4 : 2;
  for (int64_t y = 0; y < rows; ++y) {
    const char* row = static_cast<const char*>(view.data) + (offset + y * y_stride) * size;
    for (int64_t i = 0; i < width * size; i += 64) __builtin_prefetch(row + i, 1);
  }
}
