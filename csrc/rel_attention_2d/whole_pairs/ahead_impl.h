// What the next pair reads and writes, fetched while this one is multiplied; part of kernels_impl.h.

constexpr int64_t kMostTerms = 2 * kLongestChain;  // of a sum that is added up in one go: the keys of a 7x7 window

// Lines of memory: so many bytes from `first` each.
struct Lines {
  const char* first;
  const int32_t* offsets;
  bool all;  // one for each term of a sum, or for each four

  FA_INLINE void fetch_next() { __builtin_prefetch(first + *offsets++, 0, 2); }
};

// The rows of a pair are few and its tensors many: where one pair ends and the next begins hardware does not follow.  A
// loop that asks for all of them at once waits for a processor's few open requests; so every product asks for some.
class Ahead {
  static constexpr int64_t kMostTensors = 8, kLine = 64;

  struct Part {
    const TensorView* view;
    const char* first;
    Scratch<int32_t> offsets;  // the last one is repeated: a product fetches as many as its sums are long
    int64_t count = 0;
  };
  Part parts[kMostTensors];  // one after the other
  int64_t used = 0, part = 0, next = 0;
  int64_t lines = 0, terms = 0;  // of a pair: what there is to fetch, and terms of the sums of its products
  bool all = true;

  static int64_t bytes_of(const TensorView& view) { return view.dtype == DType::float32 ? 4 : 2; }

 public:
  // The pairs of a (batch, heads, height, width, depth) tensor, which must outlive this.
  void add(const TensorView& view, int64_t height, int64_t width, int64_t depth) {
    const int64_t size = bytes_of(view);
    Part& to = parts[used++];
    to.view = &view;
    // Numbers that lie side by side: of a position or, channels first, of an image row.
    const bool channels = view.stride[4] != 1;
    const int64_t length = channels ? width : depth, runs = height * (channels ? depth : width);
    to.offsets.allocate(runs * (length * size / kLine + 2) + kMostTerms);
    int64_t last = -1;
    for (int64_t run = 0; run < runs; ++run) {
      const int64_t inner = channels ? height : width, outer = run / inner;
      const int64_t begin =
          (outer * view.stride[channels ? 4 : 2] + run % inner * view.stride[channels ? 2 : 3]) * size;
      for (int64_t i = begin / kLine; i <= (begin + length * size - 1) / kLine; ++i)
        if (i != last && i * kLine <= INT32_MAX) to.offsets[to.count++] = static_cast<int32_t>(i * kLine), last = i;
    }
    lines += to.count;
    if (to.count == 0) to.offsets[to.count++] = 0;
    for (int64_t i = 0; i < kMostTerms; ++i) to.offsets[to.count + i] = to.offsets[to.count - 1];
  }
  void start(int64_t image, int64_t head) {
    for (int64_t i = 0; i < used; ++i) {
      const TensorView& view = *parts[i].view;
      parts[i].first = static_cast<const char*>(view.data) + head_offset(view, image, head) * bytes_of(view);
    }
    part = next = 0;
    all = 4 * lines > terms;
    terms = 0;
  }
  // As many as a product of `count` terms fetches.
  FA_INLINE Lines take(int64_t count) {
    if (next >= parts[part].count && part + 1 < used) ++part, next = 0;
    const Part& from = parts[part];
    const int64_t line = smaller(next, from.count);
    next += all ? count : count / 4;
    terms += count;
    return {from.first, from.offsets + line, all};
  }
};
