#include "common/cpu_capability.h"

#include <torch/csrc/stable/library.h>

#include <atomic>
#include <stdexcept>

#if defined(FUSED_ATTN_HAS_AMX)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace fused_attn {
namespace {

// Tiles, and the conversions that go with them.  Linux gives a process their registers when it asks.
[[maybe_unused]] bool detect_amx() {
#if defined(FUSED_ATTN_HAS_AMX)
  constexpr unsigned kBf16 = 1u << 22, kTile = 1u << 24, kAvx512Bf16 = 1u << 5;
  constexpr long kRequestPermission = 0x1023, kTileData = 18;
  unsigned eax, ebx, ecx, edx;
  if (!__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) || (edx & kBf16) == 0 || (edx & kTile) == 0) return false;
  if (!__get_cpuid_count(7, 1, &eax, &ebx, &ecx, &edx) || (eax & kAvx512Bf16) == 0) return false;
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}

CpuCapability detect() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("fma"))
    return detect_amx() ? CpuCapability::amx : CpuCapability::avx512;
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return CpuCapability::avx2;
#endif
  return CpuCapability::generic;
}

const CpuCapability best = detect();
std::atomic<CpuCapability> in_use{best};
std::atomic<bool> tiles_always{false};

}  // namespace

CpuCapability cpu_capability() { return in_use.load(std::memory_order_relaxed); }

bool always_tiles() { return tiles_always.load(std::memory_order_relaxed); }

void set_cpu_capability(CpuCapability capability) {
  if (capability < CpuCapability::generic || capability > best)
    throw std::runtime_error("this processor does not have the requested instruction set");
  in_use.store(capability, std::memory_order_relaxed);
}

namespace {
int64_t cpu_capability_op() { return static_cast<int64_t>(cpu_capability()); }
void set_cpu_capability_op(int64_t capability) { set_cpu_capability(static_cast<CpuCapability>(capability)); }
void set_always_tiles_op(bool always) { tiles_always.store(always, std::memory_order_relaxed); }
}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(fused_attn_cpu, m) {
  m.def("cpu_capability() -> int");
  m.def("set_cpu_capability(int capability) -> ()");
  m.def("set_always_tiles(bool always) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(fused_attn_cpu, CompositeExplicitAutograd, m) {
  m.impl("cpu_capability", TORCH_BOX(&cpu_capability_op));
  m.impl("set_cpu_capability", TORCH_BOX(&set_cpu_capability_op));
  m.impl("set_always_tiles", TORCH_BOX(&set_always_tiles_op));
}

}  // namespace fused_attn
