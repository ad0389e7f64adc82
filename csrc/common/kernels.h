// The kernels of an op as its cpu.cpp sees them.
#pragma once

#include <cstdint>

#include "common/cpu_capability.h"
#include "common/tensor_view.h"

namespace fused_attn {

// Runs tasks [begin, end) of a problem.
template <class Problem>
using Kernel = void (*)(const Problem&, int64_t begin, int64_t end);

// The kernels of an op that has one for each pass.
template <class Forward, class Backward = Forward>
struct KernelPair {
  Kernel<Forward> forward;
  Kernel<Backward> backward;
};

}  // namespace fused_attn

// In the namespace of the op, after its `Kernels`, a table of functions: declares the table of every instruction set,
// which kernels.cpp defines, and best_kernels(), the table of the set in use.
#if defined(__x86_64__)
#define FUSED_ATTN_DECLARE_KERNELS()                         \
  namespace avx512 {                                         \
  extern const Kernels kernels;                              \
  }                                                          \
  namespace avx2 {                                           \
  extern const Kernels kernels;                              \
  }                                                          \
  namespace generic {                                        \
  extern const Kernels kernels;                              \
  }                                                          \
  inline const Kernels& best_kernels() {                     \
    const CpuCapability best = cpu_capability();             \
    return best >= CpuCapability::avx512 ? avx512::kernels   \
           : best == CpuCapability::avx2 ? avx2::kernels     \
                                         : generic::kernels; \
  }
#else
#define FUSED_ATTN_DECLARE_KERNELS() \
  namespace generic {                \
  extern const Kernels kernels;      \
  }                                  \
  inline const Kernels& best_kernels() { return generic::kernels; }
#endif
