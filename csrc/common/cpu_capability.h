// Instruction sets the kernels are compiled for, and the one in use.
#pragma once

namespace fused_attn {

enum class CpuCapability : int { generic = 0, avx2 = 1, avx512 = 2 };

// Best instruction set of this processor, unless set_cpu_capability chose a lower one.
CpuCapability cpu_capability();

// Throws std::runtime_error where the processor lacks it.
void set_cpu_capability(CpuCapability capability);

}  // namespace fused_attn
