// Matrices of keys, and their products with a block of queries; part of kernels_impl.h.

// A matrix of one row of `depth` numbers to each key (or table position) is held as panels, to[(panel, depth, lane)],
// where products run along the keys.  Where they sum over keys, or yield one number per key and depth, a wide depth
// lies along the lanes instead, in rows of whole vectors: no sum over lanes then, and results in the layout of the
// tensors. Narrow depths (2 to 8 value channels) would leave lanes idle.
FA_INLINE bool is_wide(int64_t depth) { return 4 * round_up(depth, L) <= 5 * depth; }
FA_INLINE int64_t row_stride(int64_t depth) { return FUSED_ATTN_TILES || is_wide(depth) ? round_up(depth, L) : depth; }

struct KeyMatrix {
  int64_t depth = 0, stride = 0;  // stride of a row, in whole vectors
  bool keeps_panels = false, keeps_rows = false;
  Scratch<float> panels, rows;  // without rows to keep, room for L of them

  void allocate(int64_t depth_, int64_t vectors, bool panels_, bool rows_) {
    depth = depth_, stride = round_up(depth_, L), keeps_panels = panels_, keeps_rows = rows_;
    if (keeps_panels) panels.allocate(panels_of(vectors) * depth * PANEL);
    rows.allocate((keeps_rows ? vectors : 1) * L * stride);
    clear();
  }
  void clear() {
    if (keeps_panels) panels.fill(0.0f);
    if (keeps_rows) rows.fill(0.0f);
  }
  int64_t panel_offset(int64_t lane) const { return lane / PANEL * depth * PANEL + lane % PANEL; }

  // One lane's numbers, `step` apart.
  float* at(int64_t lane) { return keeps_rows ? rows + lane * stride : panels + panel_offset(lane); }
  int64_t step() const { return keeps_rows ? 1 : PANEL; }

  // Vectors from `first` on; read(lane, to) writes the numbers of a lane, counted from there.
  template <class Read>
  void pack(int64_t first, int64_t vectors, const Read& read) {
    for (int64_t v = 0; v < vectors; ++v) {
      float* block = keeps_rows ? rows + (first + v) * L * stride : rows.data;
      for (int64_t i = 0; i < L; ++i) read(v * L + i, block + i * stride);
      if (!keeps_panels) continue;
      float* to = panels + panel_offset((first + v) * L);
      for (int64_t d0 = 0; d0 < depth; d0 += L) {
        vf x[L];
#pragma GCC unroll 16
        for (int i = 0; i < L; ++i) x[i] = load(block + i * stride + d0);
        transpose(x);
        for (int64_t d = d0; d < smaller(d0 + L, depth); ++d) store(to + d * PANEL, x[d - d0]);
      }
    }
  }

  // to[m] += sum over `vectors` key vectors from v0 on, of which the first `lanes` lanes count, of
  // weights[m][lane] * lane's numbers.  `to` has the stride of row_stride(depth).
  void weigh(int64_t count, int64_t v0, int64_t vectors, int64_t lanes, const float* weights, int64_t weight_stride,
             float* to) {
    if (!keeps_rows)
      return dot_product(count, depth, vectors, weights, weight_stride, panels + v0 / NR * depth * PANEL, to,
                         row_stride(depth));
    const float* from = rows + v0 * L * stride;
    for (int64_t lane = 0; lane < lanes; lane += kKeyChunk)
      for (int64_t d = 0; d < stride; d += PANEL)
        outer_product(count, smaller(NR, (stride - d) / L), weights + lane, weight_stride, 1,
                      smaller(kKeyChunk, lanes - lane), from + lane * stride + d, stride,
                      [&](int64_t m, int n, vf x) FA_INLINE_CALL { add_to(to + m * stride + d + n * L, x); });
  }

  // Each lane's numbers += sum over m of weights[m][lane] * from[m], with lanes as above.
  void accumulate(int64_t count, int64_t v0, int64_t vectors, int64_t lanes, const float* weights,
                  int64_t weight_stride, const float* from) {
    if (!keeps_rows) {
      for (int64_t v = 0; v < vectors; v += NR) {
        float* to = panels + (v0 + v) / NR * depth * PANEL;
        outer_product(depth, smaller(NR, vectors - v), from, 1, row_stride(depth), count, weights + v * L,
                      weight_stride, [&](int64_t m, int n, vf x) FA_INLINE_CALL { add_to(to + m * PANEL + n * L, x); });
      }
      return;
    }
    float* to = rows + v0 * L * stride;
    for (int64_t d = 0; d < stride; d += PANEL)
      outer_product(lanes, smaller(NR, (stride - d) / L), weights, 1, weight_stride, count, from + d, stride,
                    [&](int64_t m, int n, vf x) FA_INLINE_CALL { add_to(to + m * stride + d + n * L, x); });
  }
};

#if !FUSED_ATTN_TILES
// --- the operands of a block of queries, in float32; tiles_impl.h has them for matrix tiles --------------------------

constexpr bool kTiles = false;
constexpr int kParts = 1;
struct Instructions {};  // what a range of tasks sets up and takes down

// A block's queries, or gradients of its outputs.
struct BlockRows {
  int64_t stride = 0;
  Scratch<float> rows;  // (QB, stride)

  void allocate(int64_t depth, bool) {
    stride = row_stride(depth);
    rows.allocate(QB * stride);
    rows.fill(0.0f);
  }
  float* row(int64_t i) const { return rows + i * stride; }
  void seal() {}  // after the rows have been written
};

// A block's logits, weights or their gradients on a tile of keys.
struct Weights {
  int64_t stride = 0;
  Scratch<float> rows;  // (QB, stride)

  void allocate(int64_t tile, bool, bool) {
    stride = tile * L + L;  // an odd number of vectors: rows then spread over all cache sets
    rows.allocate(QB * stride);
  }
  float* row(int64_t i) const { return rows + i * stride; }
  void seal(int64_t, int64_t) {}  // after so many rows of so many vectors have been written
  // Row i from weight(v), v < vectors, to weigh with.
  template <class Weight>
  FA_INLINE void each_weight(int64_t i, int64_t vectors, const Weight& weight) const {
    float* const to = row(i);
    for (int64_t v = 0; v < vectors; ++v) store(to + v * L, weight(v));
  }
};

struct Keys : KeyMatrix {
  void allocate(int64_t depth, int64_t vectors, bool multiplies, bool weighs) {
    KeyMatrix::allocate(depth, vectors, multiplies || !is_wide(depth), weighs && is_wide(depth));
  }
  // Products of `count_rows` rows of a with the keys of `count` vectors from v on, some vectors at a time:
  // start(first, n) for these n <= NR, the first counted from v, then finish(m, i, row m times vector first + i).
  template <class Start, class Finish>
  FA_INLINE void products(int64_t count_rows, const BlockRows& a, int64_t v, int64_t count, const Start& start,
                          const Finish& finish) const {
    for (int64_t first = 0; first < count; first += NR) {
      const int64_t vectors = smaller(NR, count - first);
      start(first, vectors);
      outer_product(count_rows, vectors, a.rows.data, a.stride, 1, depth, panels + (v + first) / NR * depth * PANEL,
                    PANEL, finish);
    }
  }
  void weigh(int64_t count, int64_t v0, int64_t vectors, int64_t lanes, const Weights& weights, float* to) {
    KeyMatrix::weigh(count, v0, vectors, lanes, weights.rows.data, weights.stride, to);
  }
};

struct KeySums : KeyMatrix {
  void turn() {}  // into rows, of what has been summed
  void allocate(int64_t depth, int64_t vectors) {
    KeyMatrix::allocate(depth, vectors, !is_wide(depth), is_wide(depth));
  }
  void accumulate(int64_t count, int64_t v0, int64_t vectors, int64_t lanes, const Weights& weights,
                  const BlockRows& from) {
    KeyMatrix::accumulate(count, v0, vectors, lanes, weights.rows.data, weights.stride, from.rows.data);
  }
};
#endif
