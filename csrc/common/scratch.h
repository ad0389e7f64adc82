// Scratch memory of a kernel, freed at the end of a range of tasks.  See simd.h.

// At least `count` numbers, and room for a vector load at the last of them; aligned to cache lines.
template <class T>
struct Scratch {
  T* data = nullptr;
  int64_t size = 0;

  Scratch() = default;
  explicit Scratch(int64_t count) { allocate(count); }
  Scratch(int64_t count, T value) : Scratch(count) { fill(value); }
  Scratch(const Scratch&) = delete;
  ~Scratch() { std::free(data); }

  void allocate(int64_t count) {
    const int64_t bytes = round_up((count + L) * int64_t(sizeof(T)), 64);
    size = bytes / int64_t(sizeof(T));
    data = static_cast<T*>(std::aligned_alloc(64, bytes));
    if (data == nullptr) throw std::bad_alloc();
  }
  void fill(T value) {
    for (int64_t i = 0; i < size; ++i) data[i] = value;
  }
  T* operator+(int64_t i) const { return data + i; }
  T& operator[](int64_t i) const { return data[i]; }
};
