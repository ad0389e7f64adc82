// Queries attend to keys of their own segment; part of kernels_impl.h.

struct Segments {
  const Problem& p;
  const KeyLayout& keys;
  bool masks = false;     // some query must leave out some key of the grid
  Scratch<int32_t> lane;  // segment of every lane of all groups; negative: no query has it
  int64_t packed_set = -1;
  const int32_t* query = nullptr;

  Segments(const Problem& problem, const KeyLayout& layout) : p(problem), keys(layout) {
    if (!p.query_segments) return;
    lane.allocate(keys.groups * keys.vectors * L);
    lane.fill(-1);
  }

  void pack(int64_t image) {
    if (!p.query_segments || image % p.segment_sets == packed_set) return;
    packed_set = image % p.segment_sets;
    query = p.query_segments + packed_set * p.queries();
    const int32_t* key = p.key_segments + packed_set * p.hk * p.wk;
    const int64_t count = p.hk * p.wk;
    masks = false;
    for (int64_t i = 0; i < count; ++i) {
      const int64_t y = i / p.wk;
      lane[y / keys.rows * keys.vectors * L + y % keys.rows * p.wk + i % p.wk] = key[i] < 0 ? -1 : key[i];
      masks |= key[i] != key[0] || key[i] < 0;
    }
    for (int64_t i = 0; count > 0 && i < p.queries(); ++i) masks |= query[i] != key[0];
  }

  // A number that no key's segment is for queries of a negative segment and for padding.
  FA_INLINE vi of_query(int64_t q) const {
    const int32_t segment = q < p.queries() && query[q] >= 0 ? query[q] : -2;
    return segment - vi{};
  }

  // Logits of -inf for the keys of other segments, of `vectors` vectors of which the first `grid` are those of all
  // groups from v0 on; where `maxima` is given, the largest logit left on every lane.
  void apply(int64_t q0, int64_t count, int64_t v0, int64_t grid, int64_t vectors, float* score, int64_t stride,
             vf* maxima) const {
    for (int64_t i = 0; i < count; ++i) {
      const vi own = of_query(q0 + i);
      vf max = broadcast(-kInfinity);
      for (int64_t v = 0; v < grid; ++v) {
        float* at = score + i * stride + v * L;
        const vf x = select(load(lane + (v0 + v) * L) == own, load(at), broadcast(-kInfinity));
        store(at, x);
        max = maximum(x, max);
      }
      if (!maxima) continue;
      for (int64_t v = grid; v < vectors; ++v) max = maximum(load(score + i * stride + v * L), max);
      maxima[i] = max;
    }
  }
};
