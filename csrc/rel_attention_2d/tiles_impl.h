// The operands of a block of queries as numbers of bfloat16, and their products on the matrix tiles of AMX; part of
// kernels_impl.h.
//
// A tile is 16 rows of 64 bytes.  One instruction adds to 16 x 16 numbers of float32 the products of 16 rows of 32
// numbers, and of 16 columns of 32 numbers whose neighbours lie side by side in pairs.  Numbers i and i + 16 of 32 are
// such neighbours here, in every operand: two vectors then become one with a shift and a blend.
//
// FUSED_ATTN_TILES is the number of parts that sum up to a number:
//   1  of bfloat16.  Inputs are exact; weights and gradients of logits are rounded.
//   2  of float16, likewise; 16 bits are kept of weights and gradients of logits.
//   3  of float32: exact.  Of the nine products of parts the six are formed that matter in float32; each of the others
//      is 2^-25 of the whole or less.
// Where a call has numbers that more than one part cannot hold, the kernels without tiles do its task: fit_parts.

constexpr bool kTiles = true;
constexpr int kParts = FUSED_ATTN_TILES;
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

typedef uint16_t vector_of_halves __attribute__((vector_size(64), may_alias));

// The parts of a[i], b[i] side by side, the largest first.
struct Parts {
  vector_of_halves part[kParts];

  FA_INLINE Parts(vf a, vf b) {
    if constexpr (kParts == 1) {
      const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6,
                                             21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
      part[0] = (vector_of_halves)_mm512_permutexvar_epi16(order, (__m512i)_mm512_cvtne2ps_pbh((__m512)b, (__m512)a));
      return;
    }
#pragma GCC unroll 3
    for (int i = 0; i < kParts; ++i) {
      // To the nearest, the last as it is: of three there is nothing left to round, and a NaN stays one.
      const uint32_t half = i + 1 < kParts ? 0x8000 : 0, upper = 0xFFFF0000;
      const vu low = (vu)a + half, high = (vu)b + half;
      part[i] = (vector_of_halves)_mm512_mask_blend_epi16(0xAAAAAAAA, (__m512i)(low >> 16), (__m512i)high);
      a -= (vf)(low & upper), b -= (vf)(high & upper);
    }
  }
  // To `to` and every `distance` numbers on.
  template <class T>
  FA_INLINE void store(T* to, int64_t distance) const {
#pragma GCC unroll 3
    for (int i = 0; i < kParts; ++i) _mm512_storeu_si512(to + i * distance, (__m512i)part[i]);
  }
};

constexpr int kProducts = kParts * (kParts + 1) / 2;  // of parts

// Tiles 0 to 3, in rows of C, += the products of R tiles, 4 and 5, and C tiles, 6 and 7, of which a(part) and b(part)
// load a part, the largest last.  meanwhile() is called kProducts times, for what vector instructions do while tiles
// are multiplied.
template <int R, int C, class A, class B, class Meanwhile>
FA_INLINE void add_products(const A& a, const B& b, const Meanwhile& meanwhile) {
  auto multiply = [&]() FA_INLINE_CALL {
    _tile_dpbf16ps(0, 4, 6);
    if constexpr (C > 1) _tile_dpbf16ps(1, 4, 7);
    if constexpr (R > 1) _tile_dpbf16ps(2, 5, 6);
    if constexpr (R > 1 && C > 1) _tile_dpbf16ps(3, 5, 7);
    meanwhile();
  };
  a(0);
  if constexpr (kParts > 2) b(2), multiply();
  if constexpr (kParts > 1) {
    b(1), multiply();
    a(1);
    if constexpr (kParts > 2) multiply();
    b(0), multiply();
    if constexpr (kParts > 2) a(2), multiply();
    a(0);
  } else {
    b(0);
  }
  multiply();
}
template <int R, int C>
FA_INLINE void set_tiles_to_zero() {
  _tile_zero(0);
  if constexpr (C > 1) _tile_zero(1);
  if constexpr (R > 1) _tile_zero(2);
  if constexpr (R > 1 && C > 1) _tile_zero(3);
}
// Tiles of rows `stride` apart; those of the second row of tiles start at `below`.
template <int R, int C>
FA_INLINE void load_tiles(const float* from, int64_t below, int64_t beside, int64_t stride) {
  _tile_loadd(0, from, stride * 4);
  if constexpr (C > 1) _tile_loadd(1, from + beside, stride * 4);
  if constexpr (R > 1) _tile_loadd(2, from + below, stride * 4);
  if constexpr (R > 1 && C > 1) _tile_loadd(3, from + below + beside, stride * 4);
}
template <int R, int C>
FA_INLINE void store_tiles(float* to, int64_t below, int64_t beside, int64_t stride) {
  _tile_stored(0, to, stride * 4);
  if constexpr (C > 1) _tile_stored(1, to + beside, stride * 4);
  if constexpr (R > 1) _tile_stored(2, to + below, stride * 4);
  if constexpr (R > 1 && C > 1) _tile_stored(3, to + below + beside, stride * 4);
}
// run<R, C>() for one or two tiles.
template <class Run>
FA_INLINE void with_tiles(bool two_rows, bool two_columns, const Run& run) {
  if (two_rows) return two_columns ? run.template operator()<2, 2>() : run.template operator()<2, 1>();
  two_columns ? run.template operator()<1, 2>() : run.template operator()<1, 1>();
}

struct BlockRows {
  int64_t stride = 0, half_stride = 0;
  bool turns = false;
  Scratch<float> rows;       // (QB, stride)
  Scratch<uint16_t> halves;  // (parts, QB, half_stride)
  Scratch<uint16_t> turned;  // (parts, stride, QB)

  void allocate(int64_t depth, bool turns_) {
    stride = row_stride(depth), half_stride = round_up(depth, kDepth), turns = turns_;
    rows.allocate(QB * stride);
    rows.fill(0.0f);
    halves.allocate(kParts * QB * half_stride);
    if (turns) turned.allocate(kParts * stride * QB);
  }
  float* row(int64_t i) const { return rows + i * stride; }
  int64_t plane() const { return QB * half_stride; }
  int64_t turned_plane() const { return stride * QB; }

  // After the rows have been written.
  void seal() {
    for (int64_t i = 0; i < QB; ++i)
      for (int64_t d = 0; d < half_stride; d += 2 * L)
        Parts(load(row(i) + d), d + L < stride ? load(row(i) + d + L) : vf{})
            .store(halves + i * half_stride + d, plane());
    for (int64_t d = 0; turns && d < stride; d += L) {
      vf low[L], high[L];
#pragma GCC unroll 16
      for (int i = 0; i < L; ++i) low[i] = load(row(i) + d), high[i] = load(row(i + L) + d);
      transpose(low);
      transpose(high);
#pragma GCC unroll 16
      for (int i = 0; i < L; ++i) Parts(low[i], high[i]).store(turned + (d + i) * QB, turned_plane());
    }
  }
};

struct Weights {
  int64_t stride = 0;
  bool keeps_halves = false, keeps_pairs = false;
  Scratch<float> rows;       // (QB, stride), of whole lines of halves
  Scratch<uint16_t> halves;  // (parts, QB, stride): to weigh keys with
  Scratch<uint32_t> pairs;   // (parts, QB / 2, stride): of rows i and i + 16, to accumulate with

  void allocate(int64_t tile, bool halves_, bool pairs_) {
    stride = round_up(tile, 2) * L + 2 * L, keeps_halves = halves_, keeps_pairs = pairs_;
    rows.allocate(QB * stride);
    if (keeps_halves) halves.allocate(kParts * QB * stride);
    if (keeps_pairs) pairs.allocate(kParts * QB / 2 * stride);
  }
  float* row(int64_t i) const { return rows + i * stride; }
  int64_t plane() const { return QB * stride; }
  int64_t pair_plane() const { return QB / 2 * stride; }

  // Row i from weight(v), v < vectors, to weigh with.
  template <class Weight>
  FA_INLINE void each_weight(int64_t i, int64_t vectors, const Weight& weight) const {
    uint16_t* const to = halves + i * stride;
    const int64_t distance = plane();
    int64_t v = 0;
    for (; v + 2 <= vectors; v += 2) {
      const vf low = weight(v);
      Parts(low, weight(v + 1)).store(to + v * L, distance);
    }
    if (v < vectors) Parts(weight(v), vf{}).store(to + v * L, distance);
  }

  // The parts of `vectors` vectors of `count` rows.
  void seal(int64_t count, int64_t vectors) {
    if (keeps_halves)
      for (int64_t i = 0; i < count; ++i) {
        const float* const from = row(i);
        each_weight(i, vectors, [&](int64_t v) FA_INLINE_CALL { return load(from + v * L); });
      }
    if (keeps_pairs)
      for (int64_t i = 0; i < QB / 2; ++i)
        split_pairs(vectors, i < count ? row(i) : nullptr, i + L < count ? row(i + L) : nullptr, pairs + i * stride,
                    pair_plane());
  }
  static void split_pairs(int64_t vectors, const float* low, const float* high, uint32_t* to, int64_t distance) {
    for (int64_t v = 0; v < vectors; ++v)
      Parts(low ? load(low + v * L) : vf{}, high ? load(high + v * L) : vf{}).store(to + v * L, distance);
  }
};

struct Keys {
  int64_t depth = 0, stride = 0, half_stride = 0;  // of whole vectors, of whole tiles
  bool multiplies = false, weighs = false;
  Scratch<float> rows;         // 2 * L of them
  Scratch<uint32_t> of_depth;  // (vectors, parts, half_stride / 2, L): pairs of the numbers of a key
  Scratch<uint32_t> of_lanes;  // (vectors / 2, parts, L, stride): pairs of keys of two vectors

  void allocate(int64_t depth_, int64_t vectors, bool multiplies_, bool weighs_) {
    depth = depth_, stride = round_up(depth, L), half_stride = round_up(depth, kDepth);
    multiplies = multiplies_, weighs = weighs_;
    vectors = round_up(vectors, 2);
    rows.allocate(2 * L * half_stride);
    rows.fill(0.0f);
    if (multiplies) of_depth.allocate(vectors * vector_size()), of_depth.fill(0);
    if (weighs) of_lanes.allocate(vectors / 2 * pair_size()), of_lanes.fill(0);
  }
  int64_t vector_size() const { return kParts * half_stride / 2 * L; }
  int64_t pair_size() const { return kParts * L * stride; }

  // Vectors from `first` on, an even number; read(lane, to) writes the numbers of a lane, counted from there.
  template <class Read>
  void pack(int64_t first, int64_t vectors, const Read& read) {
    for (int64_t v = 0; v < vectors; v += 2) {
      const int64_t lanes = smaller(vectors - v, 2) * L;
      for (int64_t i = 0; i < lanes; ++i) read(v * L + i, rows + i * half_stride);
      if (lanes == L)
        for (int64_t i = L * half_stride; i < 2 * L * half_stride; ++i) rows[i] = 0.0f;
      for (int64_t n = 0; multiplies && n < lanes / L; ++n)
        for (int64_t d = 0; d < half_stride; d += kDepth) {
          const float* const from = rows + n * L * half_stride + d;
          vf x[kParts][L];  // pairs
#pragma GCC unroll 16
          for (int i = 0; i < L; ++i) {
            const Parts parts(load(from + i * half_stride), load(from + i * half_stride + L));
            for (int part = 0; part < kParts; ++part) x[part][i] = (vf)parts.part[part];
          }
          for (int part = 0; part < kParts; ++part) {
            transpose(x[part]);
            uint32_t* to = of_depth + (first + v + n) * vector_size() + (part * half_stride + d) / 2 * L;
            for (int i = 0; i < L; ++i) store(reinterpret_cast<float*>(to + i * L), x[part][i]);
          }
        }
      for (int64_t i = 0; weighs && i < L; ++i)
        for (int64_t d = 0; d < stride; d += L)
          Parts(load(rows + i * half_stride + d), load(rows + (i + L) * half_stride + d))
              .store(of_lanes + (first + v) / 2 * pair_size() + i * stride + d, L * stride);
    }
  }

  // Products of `count_rows` rows of a with the keys of `count` vectors from v on, two vectors at a time: start(first,
  // n) for these n, the first counted from v, then finish(m, i, row m times vector first + i).
  template <class Start, class Finish>
  FA_INLINE void products(int64_t count_rows, const BlockRows& a, int64_t v, int64_t count, const Start& start,
                          const Finish& finish) const {
    alignas(64) float found[QB * 2 * L];
    const int64_t deep = half_stride, row_bytes = deep * 2, plane = a.plane(), part_size = deep / 2 * L;
    const int64_t own_size = vector_size(), steps = larger(deep / kDepth * kProducts, 1);
    const int64_t rows_to_a_step = (count_rows + steps - 1) / steps;
    const uint16_t* const own = a.halves.data;
    const uint32_t* left = of_depth + v * own_size;
    stored_for_tiles();
    // The rows of the vectors before are finished while tiles are multiplied.
    int64_t row = count_rows, vectors = 0;
    auto finish_rows = [&](int64_t rows) FA_INLINE_CALL {
      const int64_t end = smaller(row + rows, count_rows);
      for (; row < end; ++row)
        for (int i = 0; i < vectors; ++i) finish(row, i, load(found + (2 * row + i) * L));
    };
    for (int64_t first = 0; first < count; first += 2, left += 2 * own_size) {
      const uint32_t* const right = left + own_size;
      set_tiles_to_zero<2, 2>();
      for (int64_t d = 0; d < deep; d += kDepth)
        add_products<2, 2>(
            [&](int part) FA_INLINE_CALL {
              _tile_loadd(4, own + part * plane + d, row_bytes);
              _tile_loadd(5, own + part * plane + L * deep + d, row_bytes);
            },
            [&](int part) FA_INLINE_CALL {
              _tile_loadd(6, left + part * part_size + d / 2 * L, L * 4);
              _tile_loadd(7, right + part * part_size + d / 2 * L, L * 4);
            },
            [&]() FA_INLINE_CALL { finish_rows(rows_to_a_step); });
      finish_rows(count_rows);
      store_tiles<2, 2>(found, 2 * L * L, L, 2 * L);
      row = 0, vectors = smaller(count - first, 2);
      start(first, vectors);
    }
    finish_rows(count_rows);
  }

  // to[m] += sum over `vectors` key vectors from v0 on, an even number, of weights[m][lane] * lane's numbers, in whole
  // vectors.
  void weigh(int64_t, int64_t v0, int64_t vectors, int64_t, const Weights& weights, float* to) const {
    const int64_t wide = stride, weight_stride = weights.stride, plane = weights.plane(), size = pair_size();
    const uint16_t* const top = weights.halves.data;
    const uint32_t* const first = of_lanes + v0 / 2 * size;
    stored_for_tiles();
    for (int64_t d = 0; d < wide; d += 2 * L)
      with_tiles(true, d + L < wide, [&]<int R, int C>() FA_INLINE_CALL {
        // The sum of many parts is added once: each of them would be rounded at the magnitude of the whole.
        alignas(64) float found[R * C * L * L];
        if constexpr (kParts == 1)
          load_tiles<R, C>(to + d, L * wide, L, wide);
        else
          set_tiles_to_zero<R, C>();
        const uint32_t* from = first + d;
        for (int64_t v = 0; v < vectors; v += 2, from += size)
          add_products<R, C>(
              [&](int part) FA_INLINE_CALL {
                _tile_loadd(4, top + part * plane + v * L, weight_stride * 2);
                _tile_loadd(5, top + part * plane + L * weight_stride + v * L, weight_stride * 2);
              },
              [&](int part) FA_INLINE_CALL {
                _tile_loadd(6, from + part * L * wide, wide * 4);
                if constexpr (C > 1) _tile_loadd(7, from + part * L * wide + L, wide * 4);
              },
              []() FA_INLINE_CALL {});
        if constexpr (kParts == 1) return store_tiles<R, C>(to + d, L * wide, L, wide);
        store_tiles<R, C>(found, C * L * L, L, C * L);
        for (int64_t i = 0; i < QB; ++i)
          for (int c = 0; c < C; ++c) add_to(to + i * wide + d + c * L, load(found + (i * C + c) * L));
      });
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
    const int64_t deep = stride, pair_stride = weights.stride, pair_plane = weights.pair_plane();
    const int64_t own_plane = from.turned_plane();
    const uint32_t* const pairs = weights.pairs.data;
    const uint16_t* const own = from.turned.data;
    float* const first = sums + v0 * deep * L;
    stored_for_tiles();
    // In parts, sums are added while the next tiles are multiplied.
    alignas(64) float found[4 * L * L];
    float* target[4];
    int64_t line = 0, lines = 0;
    auto add_lines = [&](int64_t most) FA_INLINE_CALL {
      const int64_t end = smaller(line + most, lines);
      for (; line < end; ++line) add_to(target[line / L] + line % L * L, load(found + line * L));
    };
    for (int64_t v = 0; v < count; v += 2)
      for (int64_t d = 0; d < deep; d += 2 * L)
        with_tiles(d + L < deep, v + 1 < count, [&]<int R, int C>() FA_INLINE_CALL {
          float* const to = first + (v * deep + d) * L;
          if constexpr (kParts == 1)
            load_tiles<R, C>(to, L * L, deep * L, L);
          else
            set_tiles_to_zero<R, C>();
          add_products<R, C>(
              [&](int part) FA_INLINE_CALL {
                _tile_loadd(4, own + part * own_plane + d * QB, QB * 2);
                if constexpr (R > 1) _tile_loadd(5, own + part * own_plane + (d + L) * QB, QB * 2);
              },
              [&](int part) FA_INLINE_CALL {
                _tile_loadd(6, pairs + part * pair_plane + v * L, pair_stride * 4);
                if constexpr (C > 1) _tile_loadd(7, pairs + part * pair_plane + (v + 1) * L, pair_stride * 4);
              },
              [&]() FA_INLINE_CALL { add_lines((4 * L + kProducts - 1) / kProducts); });
          if constexpr (kParts == 1) return store_tiles<R, C>(to, L * L, deep * L, L);
          add_lines(lines);
          store_tiles<R, C>(found, C * L * L, L * L, L);
          for (int r = 0; r < R; ++r)
            for (int c = 0; c < C; ++c) target[r * C + c] = to + r * L * L + c * deep * L;
          line = 0, lines = R * C * L;
        });
    add_lines(lines);
  }
};
