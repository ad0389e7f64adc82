// Scratch memory of a kernel, freed at the end of a range of tasks.  See simd.h.

// A block of each thread that small scratch is taken from.  The allocator would give every one of a short call's back
// to the system, or merge it with its neighbours: that takes longer than the call.
struct Arena {
  static constexpr int64_t kBytes = int64_t{1} << 20, kLine = 64;
  char* block = nullptr;
  int64_t used = 0, live = 0;

  ~Arena() { std::free(block); }

  // Null where it does not fit.
  void* take(int64_t bytes) {
    if (used + bytes > kBytes) return nullptr;
    if (block == nullptr && (block = static_cast<char*>(std::aligned_alloc(kLine, kBytes))) == nullptr) return nullptr;
    void* const memory = block + used;
    used += bytes + kLine;  // sizes are often powers of two: not all to the same lines of a cache
    ++live;
    return memory;
  }
  // Whether `memory` was taken here.  In any order: all is free once everything has been given back.
  bool give_back(void* memory) {
    if (block == nullptr || memory < block || memory >= block + kBytes) return false;
    if (--live == 0) used = 0;
    return true;
  }
};

inline Arena& arena() {
  static thread_local Arena own;
  return own;
}

// At least `count` numbers, and room for a vector load at the last of them; aligned to cache lines.
template <class T>
struct Scratch {
  T* data = nullptr;
  int64_t size = 0;

  Scratch() = default;
  explicit Scratch(int64_t count) { allocate(count); }
  Scratch(int64_t count, T value) : Scratch(count) { fill(value); }
  Scratch(const Scratch&) = delete;
  ~Scratch() {
    if (data != nullptr && !arena().give_back(data)) std::free(data);
  }

  void allocate(int64_t count) {
    const int64_t bytes = round_up((count + L) * int64_t(sizeof(T)), Arena::kLine);
    size = bytes / int64_t(sizeof(T));
    void* memory = arena().take(bytes);
    if (memory == nullptr) memory = std::aligned_alloc(Arena::kLine, bytes);
    if (memory == nullptr) throw std::bad_alloc();
    data = static_cast<T*>(memory);
  }
  void fill(T value) {
    for (int64_t i = 0; i < size; ++i) data[i] = value;
  }
  T* operator+(int64_t i) const { return data + i; }
  T& operator[](int64_t i) const { return data[i]; }
};
