// Instruction sets the kernels are compiled for, and the one in use.
#pragma once

// Whether the compiler has the instructions of matrix tiles.
#if defined(__x86_64__) && defined(__linux__)
#if (defined(__clang__) && __clang_major__ >= 12) || (!defined(__clang__) && __GNUC__ >= 11)
#define FUSED_ATTN_HAS_AMX 1
#endif
#endif

namespace fused_attn {

// amx: AVX-512 with products on matrix tiles, for the kernels that have them.
enum class CpuCapability : int { generic = 0, avx2 = 1, avx512 = 2, amx = 3 };

// Best instruction set of this processor, unless set_cpu_capability chose a lower one.
CpuCapability cpu_capability();

// Throws std::runtime_error where the processor lacks it.
void set_cpu_capability(CpuCapability capability);

// Whether the kernels that have matrix tiles use them for every call, also where others are faster: for tests.
bool always_tiles();

}  // namespace fused_attn
