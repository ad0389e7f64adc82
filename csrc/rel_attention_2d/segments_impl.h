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

  // Puts `value` in the place of what queries [q0, q0 + count) have for keys of other segments:
  // `vectors` grid vectors from v0 of all groups on.
  FA_INLINE void hide(int64_t q0, int64_t count, int64_t v0, int64_t vectors, float value, const Weights& x) const {
    for (int64_t i = 0; i < count; ++i) {
      const vi own = of_query(q0 + i);
      for (int64_t v = 0; v < vectors; ++v) {
        float* at = x.row(i) + v * L;
        store(at, select(load(lane + (v0 + v) * L) == own, load(at), broadcast(value)));
      }
    }
  }
};
