// What both passes hold of a pair of an image and a head, and its way from and to tensors; part of kernels_impl.h.

// Rows of whole vectors, zero past their depth: of its own or, where they lie as products want them, those of a tensor.
struct Rows {
  int64_t depth = 0, vectors = 0, own_stride = 0;
  Scratch<float> own;
  float* first = nullptr;
  int64_t stride = 0;

  void allocate(int64_t count, int64_t depth_) {
    depth = depth_, vectors = vectors_of(depth), own_stride = vectors * L;
    own.allocate(count * own_stride);
    own.fill(0.0f);
    use_own();
  }
  void use_own() { first = own.data, stride = own_stride; }
  bool is_own() const { return first == own.data; }
  float* at(int64_t i) const { return first + i * stride; }
  // Numbers of rows `step` apart, summed over the depth or over the rows.
  Factor over_depth(int64_t i = 0, int64_t step = 1) const { return {at(i), step * stride, 1}; }
  Factor over_rows(int64_t i = 0, int64_t step = 1) const { return {at(i), 1, step * stride}; }
};

// to = factor * from, turned: rows of `stride`, a multiple of L.  Past the `count` rows the last one again: what is
// made of it is as finite as what is made of a row.
void turn(const Rows& from, int64_t count, int64_t stride, float* to, float factor = 1.0f) {
  const float* const rows = from.first;
  const int64_t depth = from.vectors * L, step = from.stride;
  for (int64_t k = 0; k < count; k += L)
    for (int64_t d = 0; d < depth; d += L) {
      vf x[L];
#pragma GCC unroll 16
      for (int i = 0; i < L; ++i) x[i] = load(rows + smaller(k + i, count - 1) * step + d) * factor;
      transpose(x);
#pragma GCC unroll 16
      for (int i = 0; i < L; ++i) store(to + (d + i) * stride + k, x[i]);
    }
}

// Tables of the rows or the columns: those of a head, key positions counting up, and the logits of a block of queries.
struct Axis {
  int64_t length = 0, turned_stride = 0;  // of the table; of a window past its end there is room for a vector
  Rows table, logits;                     // (length, dk); (queries of a block, positions)
  Scratch<float> turned;                  // (dk, turned_stride)

  void allocate(const Problem& p, int64_t length_, int64_t queries, int64_t positions) {
    length = length_;
    logits.allocate(queries, positions);
    if (length == 0) return;
    table.allocate(round_up(length, L), p.dk);
    turned_stride = round_up(length, L) + L;
    turned.allocate(table.own_stride * turned_stride);
    turned.fill(0.0f);
  }
  int64_t position(const Problem& p, int64_t i) const { return p.key_minus_query ? i : length - 1 - i; }
  void pack(const Problem& p, const TensorView& view, int64_t head) {
    for (int64_t i = 0; i < length; ++i)
      gather(view, head * view.stride[0] + position(p, i) * view.stride[1], view.stride[2], p.dk, 1.0f, table.at(i));
    if (length > 0) turn(table, length, turned_stride, turned.data);
  }
};

struct Place {
  int64_t image, head;
};

struct Pair {
  const Problem& p;
  const int64_t grid, keys, vectors;  // keys: of the grid, then of the prefix
  const int64_t stride;  // of scores: past 4 vectors an odd number, so that rows spread over all cache sets
  int64_t most;          // queries of a block
  Rows query, key, value;
  Scratch<float> turned_key, score;  // (dk, stride), (most, stride)
  Scratch<float> table;              // (bias_rows, bias_columns): key positions count up
  Scratch<float> bias;               // (queries, stride) of a table, (most, stride) of axes: -inf past the keys
  Axis row, col;
  Rows relative_query;            // with the scale of the tables
  Scratch<int32_t> key_segments;  // (stride)
  const int32_t* query_segments = nullptr;
  bool masks = false;  // some query must leave out some key of the grid
  int64_t head = -1, image = -1;
  Ahead ahead;
  int64_t q0 = 0, queries = 0;    // the block
  const float* biases = nullptr;  // of its queries

  Pair(const Problem& problem, int64_t scores)
      : p(problem),
        grid(p.hk * p.wk),
        keys(grid + p.prefix),
        vectors(vectors_of(keys)),
        stride((vectors > 4 ? vectors | 1 : vectors) * L) {
    const int64_t unit = p.tables ? p.wq : 1;  // queries of an image row see the same part of a table
    const int64_t units = p.queries() / unit, wanted = larger(scores / (stride * unit), 1);
    const int64_t blocks = (units + wanted - 1) / wanted;
    most = (units + blocks - 1) / blocks * unit;
    ahead.add(p.query, p.hq, p.wq, p.dk);
    ahead.add(p.key, p.hk, p.wk, p.dk);
    ahead.add(p.value, p.hk, p.wk, p.dv);
    query.allocate(most, p.dk);
    key.allocate(keys, p.dk);
    value.allocate(keys, p.dv);
    turned_key.allocate(key.own_stride * stride);
    score.allocate(most * stride);
    if (p.query_segments) key_segments.allocate(stride);
    if (p.row_term) row.allocate(p, p.row_length(), most, p.hk);
    if (p.col_term) col.allocate(p, p.col_length(), most, p.wk);
    if (p.tables) relative_query.allocate(most, p.dk);
    if (p.row_term || p.col_term) bias.allocate(most * stride);
    if (!p.bias_table) return;
    table.allocate(p.bias_rows() * p.bias_columns());
    bias.allocate((p.keeps_biases ? p.heads : 1) * p.queries() * stride);
  }

  // --- tensors to rows and back -------------------------------------------------------------------------------------

  // body(i, offset) for positions [first, first + count) of a grid `width` wide of the pair.
  template <class Body>
  FA_INLINE void each_position(const TensorView& view, int64_t width, int64_t first, int64_t count,
                               const Body& body) const {
    if (count == 0) return;                                        // nor a width, perhaps
    const int64_t down = view.stride[2], across = view.stride[3];  // no store of a number may seem to change them
    int64_t x = first % width, row = head_offset(view, image, head) + first / width * down;
    for (int64_t i = 0; i < count; x = 0, row += down)
      for (; x < width && i < count; ++x, ++i) body(i, row + x * across);
  }
  // body(block, i, d, rows, depths) for blocks of L positions and L depths of rows, or what there is of them, where
  // those of a channel lie side by side: `block` is where it starts, its channels view.stride[4] apart.
  template <class Body>
  FA_INLINE void each_channel_block(const TensorView& view, int64_t first, int64_t count, int64_t depth,
                                    const Body& body) const {
    const int64_t base = head_offset(view, image, head) + first;
    for (int64_t d = 0; d < depth; d += L)
      for (int64_t i = 0; i < count; i += L)
        body(base + d * view.stride[4] + i, i, d, smaller(L, count - i), smaller(L, depth - d));
  }
  static bool channels_first(const TensorView& view, int64_t width) {
    return view.stride[4] != 1 && view.stride[3] == 1 && view.stride[2] == width;
  }

  // Whether `count` positions of a tensor from `first` on serve as rows, which then are those.
  bool lend(const TensorView& view, int64_t width, int64_t first, int64_t count, Rows& to) const {
    const int64_t step = view.stride[3];
    to.use_own();
    if (count == 0 || !serves_as_rows(view, to.depth, L)) return false;
    if (view.stride[2] != width * step && first / width != (first + count - 1) / width) return false;
    to.first = at<float>(view, head_offset(view, image, head) + first / width * view.stride[2] + first % width * step);
    to.stride = step;
    return true;
  }
  void copy(const TensorView& view, int64_t width, int64_t first, int64_t count, float factor, Rows& to,
            int64_t to_row = 0) const {
    to.use_own();
    const int64_t step = view.stride[4];
    with_element(view.dtype, [&](auto element) {
      using T = decltype(element);
      if (channels_first(view, width))
        return each_channel_block(view, first, count, to.depth,
                                  [&](int64_t offset, int64_t i, int64_t d, int64_t rows, int64_t depths) {
                                    const T* from = at<T>(view, offset);
                                    vf x[L];
                                    for (int j = 0; j < L; ++j) {
                                      x[j] = j >= depths ? vf{}
                                             : rows == L ? load_as_float(from + j * step)
                                                         : load_part(from + j * step, rows);
                                      x[j] *= factor;
                                    }
                                    transpose(x);
                                    for (int64_t j = 0; j < rows; ++j) store(to.at(to_row + i + j) + d, x[j]);
                                  });
      const T* const data = at<T>(view, 0);
      float* const numbers = to.at(to_row);
      const int64_t depth = to.depth, stride = to.stride;
      if (step != 1)
        return each_position(view, width, first, count, [&](int64_t i, int64_t offset) FA_INLINE_CALL {
          for (int64_t d = 0; d < depth; ++d)
            numbers[i * stride + d] = static_cast<float>(data[offset + d * step]) * factor;
        });
      each_position(view, width, first, count, [=](int64_t i, int64_t offset) FA_INLINE_CALL {
        each(depth, [=](auto lanes) FA_INLINE_CALL {
          store(numbers + i * stride + lanes.begin, lanes.load(data + offset) * factor);
        });
      });
    });
  }
  // Unless they are the tensor's.
  void write(const TensorView& view, int64_t width, int64_t first, int64_t count, const Rows& from,
             int64_t from_row = 0) const {
    if (!from.is_own()) return;
    const int64_t step = view.stride[4];
    with_element(view.dtype, [&](auto element) {
      using T = decltype(element);
      if (channels_first(view, width))
        return each_channel_block(view, first, count, from.depth,
                                  [&](int64_t offset, int64_t i, int64_t d, int64_t rows, int64_t depths) {
                                    T* to = at<T>(view, offset);
                                    vf x[L];
                                    for (int64_t j = 0; j < L; ++j)
                                      x[j] = j < rows ? load(from.at(from_row + i + j) + d) : vf{};
                                    transpose(x);
                                    for (int64_t j = 0; j < depths; ++j)
                                      if (rows == L)
                                        store_rounded(to + j * step, x[j]);
                                      else
                                        store_part(to + j * step, rows, x[j]);
                                  });
      T* const data = at<T>(view, 0);
      const float* const numbers = from.at(from_row);
      const int64_t depth = from.depth, stride = from.stride;
      if (step != 1)
        return each_position(view, width, first, count, [&](int64_t i, int64_t offset) FA_INLINE_CALL {
          for (int64_t d = 0; d < depth; ++d) data[offset + d * step] = static_cast<T>(numbers[i * stride + d]);
        });
      each_position(view, width, first, count, [=](int64_t i, int64_t offset) FA_INLINE_CALL {
        each(depth,
             [=](auto lanes) FA_INLINE_CALL { lanes.store(data + offset, load(numbers + i * stride + lanes.begin)); });
      });
    });
  }
  bool lend_keys(const TensorView& view, Rows& to) const { return p.prefix == 0 && lend(view, p.wk, 0, grid, to); }
  void read_keys(const TensorView& view, const TensorView& prefix, Rows& to) const {
    if (lend_keys(view, to)) return;
    copy(view, p.wk, 0, grid, 1.0f, to);
    if (p.prefix > 0) copy(as_grid(prefix), 1, 0, p.prefix, 1.0f, to, grid);
  }
  void write_keys(const TensorView& view, const TensorView& prefix, const Rows& from) const {
    write(view, p.wk, 0, grid, from);
    if (p.prefix > 0) write(as_grid(prefix), 1, 0, p.prefix, from, grid);
  }
  bool lend_queries(const TensorView& view, Rows& to) const { return lend(view, p.wq, q0, queries, to); }
  void read_queries(const TensorView& view, float factor, Rows& to) const {
    if (factor != 1.0f || !lend_queries(view, to)) copy(view, p.wq, q0, queries, factor, to);
  }
  void write_queries(const TensorView& view, const Rows& from) const { write(view, p.wq, q0, queries, from); }

  // --- biases -------------------------------------------------------------------------------------------------------

  // First number of a query's biases: for key row y, bias_columns() further each.
  int64_t bias_start(int64_t q) const { return (p.hq - 1 - q / p.wq) * p.bias_columns() + p.wq - 1 - q % p.wq; }

  // A query's biases: key_row(y, x) gives those of a vector of key row y from column x on.
  template <class KeyRow>
  FA_INLINE void fill_biases(float* to, const KeyRow& key_row) const {
    for (int64_t y = 0; y < p.hk; ++y, to += p.wk)
      for (int64_t x = 0; x < p.wk; x += L) store(to + x, key_row(y, x));  // past the row: overwritten next
    for (int64_t k = grid; k < keys; ++k) *to++ = 0.0f;
    for (int64_t k = keys; k < vectors * L; ++k) *to++ = -kInfinity;
  }
  void pack_biases() {
    row.pack(p, p.row_term, head);
    col.pack(p, p.col_term, head);
    if (!p.bias_table || (p.keeps_biases && biases != nullptr)) return;
    const int64_t columns = p.bias_columns();
    for (int64_t h = p.keeps_biases ? 0 : head; h <= (p.keeps_biases ? p.heads - 1 : head); ++h) {
      pack_bias_table(p, h, columns, table.data);
      for (int64_t q = 0; q < p.queries(); ++q) {
        const float* from = table + bias_start(q);
        fill_biases(bias + expanded(h) + q * stride,
                    [&](int64_t y, int64_t x) FA_INLINE_CALL { return load(from + y * columns + x); });
      }
    }
  }
  // Where the biases of a head start, a number for each query and key.
  int64_t expanded(int64_t h) const { return p.keeps_biases ? h * p.queries() * stride : 0; }

  // The queries of the block that see the same part of a table, those of an image row for the rows' and of a column for
  // the columns': body(first, step to the next, how many, table position of their first key).
  template <class Body>
  FA_INLINE void each_window(bool of_rows, const Body& body) const {
    const int64_t y0 = q0 / p.wq, rows = queries / p.wq;
    if (of_rows)
      for (int64_t y = 0; y < rows; ++y) body(y * p.wq, 1, p.wq, p.hq - 1 - y0 - y);
    else
      for (int64_t x = 0; x < p.wq; ++x) body(x, p.wq, rows, p.wq - 1 - x);
  }
  void prepare_biases() {
    biases = p.bias_table ? bias + expanded(head) + q0 * stride : bias.data;
    if (!p.row_term && !p.col_term) return;
    if (p.tables) read_queries(p.query, p.rel_scale, relative_query);
    auto fill = [&](const TensorView& term, Axis& axis, bool of_rows) {
      if (!term) return;
      if (!p.tables) return read_queries(term, 1.0f, axis.logits);
      each_window(of_rows, [&](int64_t first, int64_t step, int64_t count, int64_t position) {
        product(ahead, count, axis.logits.vectors, p.dk, relative_query.over_depth(first, step), axis.turned + position,
                axis.turned_stride, axis.logits.at(first), step * axis.logits.stride);
      });
    };
    fill(p.row_term, row, true);
    fill(p.col_term, col, false);
    for (int64_t i = 0; i < queries; ++i) {
      const float *of_rows = p.row_term ? row.logits.at(i) : nullptr, *of_columns = col.logits.at(i);
      const bool columns = static_cast<bool>(p.col_term);
      fill_biases(bias + i * stride, [&](int64_t y, int64_t x) FA_INLINE_CALL {
        const vf of_row = of_rows != nullptr ? broadcast(of_rows[y]) : vf{};
        return columns ? load(of_columns + x) + of_row : of_row;
      });
    }
  }

  // --- segments -----------------------------------------------------------------------------------------------------

  static constexpr int32_t kAll = -3;  // segment of a key that all queries attend to

  void pack_segments() {
    masks = false;
    if (!p.query_segments) return;
    const int64_t set = image % p.segment_sets;
    const int32_t* of_key = p.key_segments + set * grid;
    query_segments = p.query_segments + set * p.queries();
    for (int64_t k = 0; k < grid; ++k) masks |= of_key[k] != of_key[0] || of_key[k] < 0;
    for (int64_t q = 0; grid > 0 && q < p.queries(); ++q) masks |= query_segments[q] != of_key[0];
    for (int64_t k = 0; masks && k < vectors * L; ++k)
      key_segments[k] = k < grid ? (of_key[k] < 0 ? -1 : of_key[k]) : k < keys ? kAll : -1;
  }

  // Which keys of a vector a query of the block attends to.
  struct Attended {
    vi own;
    const int32_t* segments;
    FA_INLINE vi of(int64_t v) const {
      const vi segment = load(segments + v * L);
      return (segment == own) | (segment == kAll);
    }
  };
  FA_INLINE Attended attended_by(int64_t i) const {
    const int32_t own = masks && query_segments[q0 + i] >= 0 ? query_segments[q0 + i] : -2;  // -2: no key's
    return {own + vi{}, key_segments.data};
  }

  // --- a pair, a block of it
  // ------------------------------------------------------------------------------------------

  void start(Place place, Place next) {
    ahead.start(next.image, next.head);
    image = place.image;
    if (place.head != head) {
      head = place.head;
      pack_biases();
    }
    pack_segments();
    read_keys(p.key, p.prefix_key, key);
    read_keys(p.value, p.prefix_value, value);
    turn(key, keys, stride, turned_key.data, p.scale);
  }

  // Products of the queries and keys of the block, which the softmax adds biases to.
  void start_block() {
    read_queries(p.query, 1.0f, query);
    prepare_biases();
    product(ahead, queries, vectors, p.dk, query.over_depth(), turned_key.data, stride, score.data, stride);
    if (biases != nullptr || keys == vectors * L) return;
    const vi real = first_lanes(keys - (vectors - 1) * L);
    for (int64_t i = 0; i < queries; ++i) {
      float* last = score + i * stride + (vectors - 1) * L;
      store(last, select(real, load(last), broadcast(-kInfinity)));
    }
  }
  template <class Body>
  void each_block(const Body& body) {
    for (q0 = 0; q0 < p.queries(); q0 += most) {
      queries = smaller(most, p.queries() - q0);
      start_block();
      body();
    }
  }

  // Of query i of the block, among all queries.
  int64_t row_of(int64_t i) const { return (image * p.heads + head) * p.queries() + q0 + i; }

  // Added last: starting the sum from a large bias would round every term of it at the bias's magnitude.
  template <Bias B>
  FA_INLINE vf logit(int64_t i, int64_t v) const {
    const vf products = load(score + i * stride + v * L);
    if constexpr (B == Bias::none) return products;
    return products + load(biases + i * stride + v * L);
  }
};

// What of the weights of a query is not dropped.
template <bool Dropout>
struct Kept {
  const DropoutKeys keys;
  const uint32_t drop_below;
  vu lane;

  Kept(const Pair& pair, int64_t i) : keys(pair.p.seed, Dropout ? pair.row_of(i) : 0), drop_below(pair.p.drop_below) {
    for (int j = 0; j < L; ++j) lane[j] = j * 0x9E3779B1u;
  }
  FA_INLINE vf of(int64_t v, vf x) const {
    if constexpr (!Dropout) return x;
    return select(keys.keep(lane + static_cast<uint32_t>(v * L) * 0x9E3779B1u, drop_below), x, vf{});
  }
};
