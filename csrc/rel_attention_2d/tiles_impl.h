// The operands of a block of queries in bfloat16, and their products on the matrix tiles of AMX; part of
// kernels_impl.h.
//
// A tile is 16 rows of 64 bytes.  One instruction adds to 16 x 16 numbers of float32 the products of 16 rows of 32
// numbers, and of 16 columns of 32 numbers whose neighbours lie side by side in pairs.  Inputs are exact in bfloat16,
// so their scale comes after the product; weights and gradients of logits are rounded to it.

constexpr bool kTiles = true;
constexpr int64_t kDepth = 32;  // numbers that an instruction sums over
static_assert(L == 16 && QB == kDepth);

// What was stored so far is there for tiles: the intrinsics that load them do not say that they read memory.
FA_INLINE void stored_for_tiles() { asm volatile("" : : : "memory"); }

// Tile registers 0 to 7, all whole, while a range of tasks runs.
struct Instructions {
  Instructions() {
    struct __attribute__((packed)) {
      uint8_t palette = 1, start_row = 0, reserved[14] = {};
      uint16_t bytes_of_row[16] = {};
      uint8_t rows[16] = {};
    } config;
    for (int i = 0; i < 8; ++i) config.bytes_of_row[i] = 64, config.rows[i] = 16;
    asm volatile("" : : "r"(&config) : "memory");  // nor does this one
    _tile_loadconfig(&config);
  }
  ~Instructions() { _tile_release(); }
  Instructions(const Instructions&) = delete;
};

typedef uint16_t pairs_of_halves __attribute__((vector_size(64), may_alias));

// a's numbers in the lower half.
FA_INLINE pairs_of_halves both_rounded(vf a, vf b) {
  return (pairs_of_halves)_mm512_cvtne2ps_pbh((__m512)b, (__m512)a);
}
// a[i], b[i] side by side.
FA_INLINE pairs_of_halves paired(vf a, vf b) {
  const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6, 21,
                                         5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  return (pairs_of_halves)_mm512_permutexvar_epi16(order, (__m512i)both_rounded(a, b));
}
FA_INLINE void store_halves(void* to, pairs_of_halves x) { _mm512_storeu_si512(to, (__m512i)x); }

struct BlockRows {
  int64_t stride = 0, half_stride = 0;
  bool turns = false;
  Scratch<float> rows;       // (QB, stride)
  Scratch<uint16_t> halves;  // (QB, half_stride)
  Scratch<uint16_t> turned;  // (stride, QB)

  void allocate(int64_t depth, bool turns_) {
    stride = row_stride(depth), half_stride = round_up(depth, kDepth), turns = turns_;
    rows.allocate(QB * stride);
    rows.fill(0.0f);
    halves.allocate(QB * half_stride);
    if (turns) turned.allocate(stride * QB);
  }
  float* row(int64_t i) const { return rows + i * stride; }

  // After the rows have been written.
  void seal() {
    for (int64_t i = 0; i < QB; ++i)
      for (int64_t d = 0; d < half_stride; d += 2 * L)
        store_halves(halves + i * half_stride + d,
                     both_rounded(load(row(i) + d), d + L < stride ? load(row(i) + d + L) : vf{}));
    for (int64_t d = 0; turns && d < stride; d += L) {
      vf low[L], high[L];
#pragma GCC unroll 16
      for (int i = 0; i < L; ++i) low[i] = load(row(i) + d), high[i] = load(row(i + L) + d);
      transpose(low);
      transpose(high);
#pragma GCC unroll 16
      for (int i = 0; i < L; ++i) store_halves(turned + (d + i) * QB, both_rounded(low[i], high[i]));
    }
  }
};

struct Weights {
  int64_t stride = 0;
  bool keeps_halves = false, keeps_pairs = false;
  Scratch<float> rows;       // (QB, stride), of whole lines of halves
  Scratch<uint16_t> halves;  // (QB, stride): to weigh keys with
  Scratch<uint32_t> pairs;   // (QB / 2, stride): of rows, to accumulate with

  void allocate(int64_t tile, bool halves_, bool pairs_) {
    stride = round_up(tile, 2) * L + 2 * L, keeps_halves = halves_, keeps_pairs = pairs_;
    rows.allocate(QB * stride);
    if (keeps_halves) halves.allocate(QB * stride);
    if (keeps_pairs) pairs.allocate(QB / 2 * stride);
  }
  float* row(int64_t i) const { return rows + i * stride; }

  // Row i from weight(v), v < vectors, to weigh with.
  template <class Weight>
  FA_INLINE void each_weight(int64_t i, int64_t vectors, const Weight& weight) const {
    uint16_t* const to = halves + i * stride;
    int64_t v = 0;
    for (; v + 2 <= vectors; v += 2) {
      const vf low = weight(v);
      store_halves(to + v * L, both_rounded(low, weight(v + 1)));
    }
    if (v < vectors) store_halves(to + v * L, both_rounded(weight(v), vf{}));
  }

  // Rounds `vectors` vectors of `count` rows.
  void seal(int64_t count, int64_t vectors) {
    if (keeps_halves) round_halves(count, vectors, rows.data, stride, halves.data);
    if (keeps_pairs) round_pairs(count, vectors, rows.data, stride, pairs.data);
  }
  static void round_halves(int64_t count, int64_t vectors, const float* from, int64_t stride, uint16_t* to) {
    for (int64_t i = 0; i < count; ++i, from += stride, to += stride) {
      int64_t v = 0;
      for (; v + 2 <= vectors; v += 2)
        store_halves(to + v * L, both_rounded(load(from + v * L), load(from + (v + 1) * L)));
      if (v < vectors) store_halves(to + v * L, both_rounded(load(from + v * L), vf{}));
    }
  }
  static void round_pairs(int64_t count, int64_t vectors, const float* from, int64_t stride, uint32_t* to) {
    for (int64_t i = 0; i < QB; i += 2, from += 2 * stride, to += stride)
      for (int64_t v = 0; v < vectors; ++v)
        store_halves(to + v * L,
                     i < count ? paired(load(from + v * L), load(from + stride + v * L)) : pairs_of_halves{});
  }
};

struct Keys {
  int64_t depth = 0, stride = 0, half_stride = 0;  // of whole vectors, of whole tiles
  bool multiplies = false, weighs = false;
  Scratch<float> rows;         // L of them
  Scratch<uint32_t> of_depth;  // (vectors, half_stride / 2, L): pairs of the numbers of a key
  Scratch<uint32_t> of_lanes;  // (vectors * L / 2, stride): pairs of keys

  void allocate(int64_t depth_, int64_t vectors, bool multiplies_, bool weighs_) {
    depth = depth_, stride = round_up(depth, L), half_stride = round_up(depth, kDepth);
    multiplies = multiplies_, weighs = weighs_;
    vectors = round_up(vectors, 2);
    rows.allocate(L * half_stride);
    rows.fill(0.0f);
    if (multiplies) of_depth.allocate(vectors * half_stride / 2 * L), of_depth.fill(0);
    if (weighs) of_lanes.allocate(vectors * L / 2 * stride), of_lanes.fill(0);
  }

  // Vectors from `first` on; read(lane, to) writes the numbers of a lane, counted from there.
  template <class Read>
  void pack(int64_t first, int64_t vectors, const Read& read) {
    for (int64_t v = 0; v < vectors; ++v) {
      for (int64_t i = 0; i < L; ++i) read(v * L + i, rows + i * half_stride);
      for (int64_t d = 0; multiplies && d < half_stride; d += kDepth) {
        vf x[L];  // pairs
#pragma GCC unroll 16
        for (int i = 0; i < L; ++i)
          x[i] = (vf)both_rounded(load(rows + i * half_stride + d), load(rows + i * half_stride + d + L));
        transpose(x);
        uint32_t* to = of_depth + ((first + v) * half_stride + d) / 2 * L;
#pragma GCC unroll 16
        for (int i = 0; i < L; ++i) store_halves(to + i * L, (pairs_of_halves)x[i]);
      }
      for (int64_t i = 0; weighs && i < L; i += 2)
        for (int64_t d = 0; d < stride; d += L)
          store_halves(of_lanes + ((first + v) * L + i) / 2 * stride + d,
                       paired(load(rows + i * half_stride + d), load(rows + (i + 1) * half_stride + d)));
    }
  }

  // finish(m, n, row m of a times the keys of vector v + n), n < count <= NR.
  template <class Finish>
  FA_INLINE void product(int64_t count_rows, const BlockRows& a, int64_t v, int64_t count, const Finish& finish) const {
    alignas(64) float found[QB * PANEL];
    const int64_t deep = half_stride, row_bytes = deep * 2;
    const uint16_t *top = a.halves.data, *bottom = top + L * deep;
    const uint32_t* from = of_depth + v * deep / 2 * L;
    stored_for_tiles();
    for (int64_t n = 0; n < count; n += 2) {
      const uint32_t *left = from + n * deep / 2 * L, *right = left + deep / 2 * L;
      _tile_zero(0);
      _tile_zero(1);
      _tile_zero(2);
      _tile_zero(3);
      for (int64_t d = 0; d < deep; d += kDepth) {
        _tile_loadd(4, top + d, row_bytes);
        _tile_loadd(5, bottom + d, row_bytes);
        _tile_loadd(6, left + d / 2 * L, L * 4);
        _tile_loadd(7, right + d / 2 * L, L * 4);
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 4, 7);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
      }
      float* to = found + n * L;
      _tile_stored(0, to, PANEL * 4);
      _tile_stored(1, to + L, PANEL * 4);
      _tile_stored(2, to + L * PANEL, PANEL * 4);
      _tile_stored(3, to + L * PANEL + L, PANEL * 4);
    }
    for (int64_t m = 0; m < count_rows; ++m)
      for (int n = 0; n < count; ++n) finish(m, n, load(found + m * PANEL + n * L));
  }

  // to[m] += sum over `vectors` key vectors from v0 on of weights[m][lane] * lane's numbers, in whole vectors.
  void weigh(int64_t, int64_t v0, int64_t vectors, int64_t, const Weights& weights, float* to) const {
    const int64_t wide = stride, row_bytes = wide * 4, weight_bytes = weights.stride * 2;
    const uint16_t *top = weights.halves.data, *bottom = top + L * weights.stride;
    const uint32_t* from = of_lanes + v0 * L / 2 * wide;
    stored_for_tiles();
    for (int64_t d = 0; d < wide; d += 2 * L) {
      float* at = to + d;
      const uint32_t* b = from + d;
      const bool both = d + L < wide;
      _tile_loadd(0, at, row_bytes);
      _tile_loadd(2, at + L * wide, row_bytes);
      if (both) {
        _tile_loadd(1, at + L, row_bytes);
        _tile_loadd(3, at + L * wide + L, row_bytes);
      }
      for (int64_t v = 0; v < vectors; v += 2) {
        _tile_loadd(4, top + v * L, weight_bytes);
        _tile_loadd(5, bottom + v * L, weight_bytes);
        _tile_loadd(6, b + v * L / 2 * wide, row_bytes);
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(2, 5, 6);
        if (!both) continue;
        _tile_loadd(7, b + v * L / 2 * wide + L, row_bytes);
        _tile_dpbf16ps(1, 4, 7);
        _tile_dpbf16ps(3, 5, 7);
      }
      _tile_stored(0, at, row_bytes);
      _tile_stored(2, at + L * wide, row_bytes);
      if (both) {
        _tile_stored(1, at + L, row_bytes);
        _tile_stored(3, at + L * wide + L, row_bytes);
      }
    }
  }
};

// Sums of float32 with the keys along the lanes, until they are turned.
struct KeySums {
  int64_t depth = 0, stride = 0, vectors = 0;
  bool turned = false;
  Scratch<float> sums, rows;  // (vectors, stride, L), turned (vectors * L, stride); (L, stride)

  void allocate(int64_t depth_, int64_t vectors_) {
    depth = depth_, stride = round_up(depth, L), vectors = vectors_;
    sums.allocate(vectors * stride * L);
    rows.allocate(L * stride);
    clear();
  }
  void clear() {
    sums.fill(0.0f);
    turned = false;
  }
  float* at(int64_t lane) const { return turned ? sums + lane * stride : sums + lane / L * stride * L + lane % L; }
  int64_t step() const { return turned ? 1 : L; }

  void turn() {
    turned = true;
    for (int64_t v = 0; v < vectors; ++v) {
      float* block = sums + v * stride * L;
      for (int64_t d = 0; d < stride; d += L) {
        vf x[L];
#pragma GCC unroll 16
        for (int i = 0; i < L; ++i) x[i] = load(block + (d + i) * L);
        transpose(x);
#pragma GCC unroll 16
        for (int i = 0; i < L; ++i) store(rows + i * stride + d, x[i]);
      }
      for (int64_t i = 0; i < L * stride; i += L) store(block + i, load(rows + i));
    }
  }

  // Each lane's numbers += sum over m of weights[m][lane] * from[m].
  void accumulate(int64_t, int64_t v0, int64_t count, int64_t, const Weights& weights, const BlockRows& from) {
    constexpr int64_t kLine = L * 4;
    const int64_t deep = stride, pair_bytes = weights.stride * 4;
    const uint32_t* pairs = weights.pairs.data;
    float* const first = sums + v0 * deep * L;
    stored_for_tiles();
    auto add = [&]<int D>(int64_t d) FA_INLINE_CALL {  // D tiles of the depth from d on, which stay in registers
      const uint16_t* own = from.turned + d * QB;
      _tile_loadd(4, own, QB * 2);
      if constexpr (D > 1) _tile_loadd(5, own + L * QB, QB * 2);
      if constexpr (D > 2) _tile_loadd(6, own + 2 * L * QB, QB * 2);
      if constexpr (D > 2) _tile_loadd(7, own + 3 * L * QB, QB * 2);
      for (int64_t v = 0; v < count; ++v) {
        float* to = first + (v * deep + d) * L;
        _tile_loadd(3, pairs + v * L, pair_bytes);
        _tile_loadd(0, to, kLine);
        if constexpr (D > 1) _tile_loadd(1, to + L * L, kLine);
        _tile_dpbf16ps(0, 4, 3);
        if constexpr (D > 1) _tile_dpbf16ps(1, 5, 3);
        _tile_stored(0, to, kLine);
        if constexpr (D > 1) _tile_stored(1, to + L * L, kLine);
        if constexpr (D > 2) {
          _tile_loadd(0, to + 2 * L * L, kLine);
          _tile_loadd(1, to + 3 * L * L, kLine);
          _tile_dpbf16ps(0, 6, 3);
          _tile_dpbf16ps(1, 7, 3);
          _tile_stored(0, to + 2 * L * L, kLine);
          _tile_stored(1, to + 3 * L * L, kLine);
        }
      }
    };
    int64_t d = 0;
    for (; d + 4 * L <= deep; d += 4 * L) add.template operator()<4>(d);
    for (; d + 2 * L <= deep; d += 2 * L) add.template operator()<2>(d);
    if (d < deep) add.template operator()<1>(d);
  }
};
