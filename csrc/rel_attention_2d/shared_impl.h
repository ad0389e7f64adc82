// What the kernels of all grid sizes share: rows of tensors, tables, dropout.

// A strided (batch, heads, y, x, depth) tensor at one (batch, head).
FA_INLINE int64_t head_offset(const TensorView& view, int64_t b, int64_t h) {
  return b * view.stride[0] + h * view.stride[1];
}

// Block sums are formed first and then added, so that a long sum is rounded once per block and not once per term.
FA_INLINE void add_to(float* to, vf x) { store(to, load(to) + x); }

// Splits 0..count into `splits` near-equal ranges.
FA_INLINE int64_t split_begin(int64_t count, int64_t splits, int64_t i) { return count * i / splits; }

// The bias table of a head, turned so that key positions count up: rows `stride` apart, numbers `step`.
void pack_bias_table(const Problem& p, int64_t head, int64_t stride, float* to, int64_t step = 1) {
  const TensorView& view = p.bias_table;
  const int64_t rows = p.bias_rows(), columns = p.bias_columns();
  for (int64_t y = 0; y < rows; ++y) {
    const int64_t row = p.key_minus_query ? y : rows - 1 - y;
    const int64_t first = p.key_minus_query ? 0 : columns - 1, sign = p.key_minus_query ? 1 : -1;
    gather(view, head * view.stride[0] + row * view.stride[1] + first * view.stride[2], sign * view.stride[2], columns,
           1.0f, to + y * stride, step);
  }
}
// Its gradient to (bias_rows, bias_columns), in the order of the user's table.
void unpack_bias_table(const Problem& p, const float* from, int64_t stride, float* to) {
  const int64_t rows = p.bias_rows(), columns = p.bias_columns();
  for (int64_t y = 0; y < rows; ++y)
    for (int64_t x = 0; x < columns; ++x)
      to[p.key_minus_query ? y * columns + x : (rows - 1 - y) * columns + columns - 1 - x] = from[y * stride + x];
}

// Dropout: a hash of (seed, row, column); the same function as fused_attn/ops/dropout.py.  A key is of one row, or of
// one in each lane.
template <class Key>
FA_INLINE vi kept(vu column, Key key0, Key key1, uint32_t drop_below) {
  vu x = column + key0;
  x = (x ^ (x >> 16)) * 0x21F0AAADu;
  x = (x ^ (x >> 15) ^ key1) * 0x735A2D97u;
  x ^= x >> 15;
  return x >= drop_below;
}

struct DropoutKeys {
  uint32_t key0, key1;

  DropoutKeys(uint64_t seed, uint64_t row) {
    uint64_t z = seed + (row + 1) * 0x9E3779B97F4A7C15ull;
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9ull;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EBull;
    z ^= z >> 31;
    key0 = static_cast<uint32_t>(z), key1 = static_cast<uint32_t>(z >> 32);
  }

  // Lanes to keep; `column` holds key index * 0x9E3779B1.
  FA_INLINE vi keep(vu column, uint32_t drop_below) const { return kept(column, key0, key1, drop_below); }
};
