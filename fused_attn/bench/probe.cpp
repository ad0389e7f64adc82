// What this machine can do at most, for the shares in the tables: bytes moved, multiplications, exponentials.
//
// Compiled where the benchmark runs, for the processor it runs on.  Each measure has every thread do the same work on
// memory of its own at the same time, and is of the shortest of several rounds.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <cstdlib>
#include <map>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#if defined(__x86_64__)
#include <immintrin.h>
#endif
#if defined(__AMX_BF16__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif
typedef float vf __attribute__((vector_size(kLanes * 4)));
typedef int32_t vi __attribute__((vector_size(kLanes * 4)));

// Seconds of the shortest of `rounds` rounds in which every thread runs work(thread).
template <class Work>
double shortest(int threads, int rounds, const Work& work) {
  std::atomic<int> ready{0}, done{0};
  std::atomic<int> round{-1};
  double best = 1e30;
  std::vector<std::thread> team;
  for (int t = 1; t < threads; ++t)
    team.emplace_back([&, t] {
      for (int r = 0; r < rounds; ++r) {
        ready.fetch_add(1);
        while (round.load(std::memory_order_acquire) < r) {
        }
        work(t);
        done.fetch_add(1, std::memory_order_release);
      }
    });
  for (int r = 0; r < rounds; ++r) {
    while (ready.load() < (threads - 1) * (r + 1)) {
    }
    const auto start = std::chrono::steady_clock::now();
    round.store(r, std::memory_order_release);
    work(0);
    while (done.load(std::memory_order_acquire) < (threads - 1) * (r + 1)) {
    }
    best = std::min(best, std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count());
  }
  for (auto& each : team) each.join();
  return best;
}

inline void keep(vf x) {
#if defined(__x86_64__)
  asm volatile("" : : "v"(x));
#else
  asm volatile("" : : "w"(x));
#endif
}

// The compiler neither knows x nor leaves it out.
inline vf held(vf x) {
#if defined(__x86_64__)
  asm("" : "+v"(x));
#else
  asm("" : "+w"(x));
#endif
  return x;
}

void read(const float* from, int64_t count) {
  vf sum[8] = {};
  for (int64_t i = 0; i < count; i += 8 * kLanes)
    for (int n = 0; n < 8; ++n) sum[n] += *reinterpret_cast<const vf*>(from + i + n * kLanes);
  for (vf each : sum) keep(each);
}
template <bool Stream>
void put(float* to, vf x) {
#if defined(__AVX512F__)
  if (Stream) return _mm512_stream_ps(to, (__m512)x);
#elif defined(__AVX__)
  if (Stream) return _mm256_stream_ps(to, (__m256)x);
#endif
  *reinterpret_cast<vf*>(to) = x;
}
template <bool Stream>
void write(float* to, int64_t count, float number) {
  for (int64_t i = 0; i < count; i += kLanes) {
    put<Stream>(to + i, number - vf{});
    asm volatile("" : : : "memory");
  }
}
template <bool Stream>
void copy(const float* from, float* to, int64_t count) {
  for (int64_t i = 0; i < count; i += kLanes) {
    put<Stream>(to + i, *reinterpret_cast<const vf*>(from + i));
    asm volatile("" : : : "memory");
  }
}

// 1e9 bytes per second over `bytes` bytes, all threads' together: read; written; copied, both counted.
std::map<std::string, double> bandwidth(int64_t bytes, int threads, double seconds) {
  const int64_t count = std::max<int64_t>(bytes / 4 / threads / 2 / (8 * kLanes), 1) * 8 * kLanes;  // of each of two
  std::vector<std::unique_ptr<float, void (*)(void*)>> memory;
  for (int t = 0; t < 2 * threads; ++t)
    memory.emplace_back(static_cast<float*>(std::aligned_alloc(4096, (count * 4 + 4095) / 4096 * 4096)), std::free);
  auto a = [&](int t) { return memory[2 * t].get(); };
  auto b = [&](int t) { return memory[2 * t + 1].get(); };
  const int repeats = std::max<int64_t>((int64_t{1} << 24) / (count * 8), 1);
  auto rate = [&](double moved, auto work) {
    auto repeated = [&](int t) {
      for (int i = 0; i < repeats; ++i) work(t);
    };
    shortest(threads, 1, repeated);  // touches every page
    double best = 1e30, spent = 0;
    for (int i = 0; i < 3 || spent < seconds; ++i) {
      const double took = shortest(threads, 3, repeated);
      best = std::min(best, took), spent += 3 * took;
    }
    return moved * repeats * threads / best * 1e-9;
  };
  const double size = count * 4.0;
  std::map<std::string, double> found;
  found["write"] = rate(2 * size, [&](int t) { write<false>(a(t), count, 1.0f), write<false>(b(t), count, 2.0f); });
  found["write, streaming"] =
      rate(2 * size, [&](int t) { write<true>(a(t), count, 1.0f), write<true>(b(t), count, 2.0f); });
  found["copy"] = rate(2 * size, [&](int t) { copy<false>(a(t), b(t), count); });
  found["copy, streaming"] = rate(2 * size, [&](int t) { copy<true>(a(t), b(t), count); });
  found["read"] = rate(2 * size, [&](int t) { read(a(t), count), read(b(t), count); });
  return found;
}

// e^x as in vectors.h of the kernels: the instructions of a degree-6 polynomial.
inline vf exponential(vf x) {
  const vf shifted = x * 1.4426950408889634f + 12582912.0f;
  const vf r = x * 1.4426950408889634f - (shifted - 12582912.0f);
  vf p = 0.00015353196067735553f - vf{};
  p = p * r + 0.0013398872688412666f;
  p = p * r + 0.009618437848985195f;
  p = p * r + 0.055503323674201965f;
  p = p * r + 0.24022647738456726f;
  p = p * r + 0.6931471824645996f;
  return (vf)((vi)(p * r + 1.0f) + ((vi)shifted << 23));
}

template <class Body>
double rate_of(int threads, double seconds, double each, const Body& body) {
  constexpr int64_t kRepeats = 100000;
  auto work = [&](int) { body(kRepeats); };
  shortest(threads, 1, work);
  double best = 1e30, spent = 0;
  for (int i = 0; i < 3 || spent < seconds; ++i) {
    const double took = shortest(threads, 3, work);
    best = std::min(best, took), spent += 3 * took;
  }
  return each * kRepeats * threads / best * 1e-9;
}

#if defined(__AVX512BF16__)
double bf16_pairs(int threads, double seconds) {
  return rate_of(threads, seconds, 24 * 64, [](int64_t repeats) {
    __m512 sum[24] = {};
    const __m512bh x = (__m512bh)_mm512_set1_epi16(0x3f80);
    for (int64_t i = 0; i < repeats; ++i) {
#pragma GCC unroll 24
      for (int n = 0; n < 24; ++n) sum[n] = (__m512)held((vf)_mm512_dpbf16_ps(sum[n], x, x));
    }
    for (__m512 each : sum) keep((vf)each);
  });
}
#endif

#if defined(__AMX_BF16__)
double bf16_tiles(int threads, double seconds) {
  if (syscall(SYS_arch_prctl, 0x1023, 18) != 0) return 0;
  return rate_of(threads, seconds, 4 * 16 * 16 * 32 * 2, [](int64_t repeats) {
    alignas(64) uint8_t config[64] = {1};  // palette 1: from byte 16 on bytes to a row, from byte 48 on rows
    for (int i = 0; i < 8; ++i) config[16 + 2 * i] = 64, config[48 + i] = 16;
    asm volatile("" : : "r"(config) : "memory");  // GCC's intrinsic does not say that it reads all of it
    _tile_loadconfig(config);
    for (int64_t i = 0; i < repeats; ++i) {
      _tile_dpbf16ps(0, 4, 6);
      _tile_dpbf16ps(1, 4, 7);
      _tile_dpbf16ps(2, 5, 6);
      _tile_dpbf16ps(3, 5, 7);
    }
    _tile_release();
  });
}
#endif

// 1e9 per second: floating-point operations of float32, of bfloat16 where there are instructions; exponentials.
std::map<std::string, double> arithmetic(int threads, double seconds) {
  std::map<std::string, double> found;
  found["float32"] = rate_of(threads, seconds, 16 * 2 * kLanes, [](int64_t repeats) {
    vf sum[16] = {};
    const vf a = 1.0f - vf{}, b = 0.5f - vf{};
    for (int64_t i = 0; i < repeats; ++i) {
#pragma GCC unroll 16
      for (int n = 0; n < 16; ++n) sum[n] = held(sum[n] * b + a);
    }
    for (vf each : sum) keep(each);
  });
  found["exponentials"] = rate_of(threads, seconds, 8 * kLanes, [](int64_t repeats) {
    vf x[8], sum[8] = {};
    for (int n = 0; n < 8; ++n) x[n] = -0.125f * n - vf{};
    for (int64_t i = 0; i < repeats; ++i) {
#pragma GCC unroll 8
      for (int n = 0; n < 8; ++n) {
        x[n] = held(x[n]);
        sum[n] += exponential(x[n]);
      }
    }
    for (vf each : sum) keep(each);
  });
#if defined(__AVX512BF16__)
  found["bfloat16, AVX-512"] = bf16_pairs(threads, seconds);
#endif
#if defined(__AMX_BF16__)
  if (const double rate = bf16_tiles(threads, seconds)) found["bfloat16, AMX"] = rate;
#endif
  return found;
}

}  // namespace

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  m.def("bandwidth", &bandwidth, pybind11::call_guard<pybind11::gil_scoped_release>());
  m.def("arithmetic", &arithmetic, pybind11::call_guard<pybind11::gil_scoped_release>());
}
