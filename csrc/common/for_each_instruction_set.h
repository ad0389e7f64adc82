// Compiles the kernels of an op, the file FUSED_ATTN_KERNELS, once for each instruction set, in a namespace of its
// name.
//
// That file, and what it includes, sees FUSED_ATTN_ISA, the name, and FUSED_ATTN_LANES, the floats to a vector.  It has
// no include guard and includes no header of a library: those come first, here or before, as their code must not be
// compiled for more than the machine may have.
#include <cstdint>
#include <cstdlib>
#include <new>
#include <type_traits>
#include <utility>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#define FUSED_ATTN_ISA generic
#define FUSED_ATTN_LANES 4
#include FUSED_ATTN_KERNELS
#undef FUSED_ATTN_ISA
#undef FUSED_ATTN_LANES

#if defined(__x86_64__)
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c,bmi,bmi2"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c,bmi,bmi2")
#endif
#define FUSED_ATTN_ISA avx2
#define FUSED_ATTN_LANES 8
#include FUSED_ATTN_KERNELS
#undef FUSED_ATTN_ISA
#undef FUSED_ATTN_LANES
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512dq,avx512bw,avx512vl,avx2,fma,f16c,bmi,bmi2"))), \
                             apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512dq,avx512bw,avx512vl,avx2,fma,f16c,bmi,bmi2")
#endif
#define FUSED_ATTN_ISA avx512
#define FUSED_ATTN_LANES 16
#include FUSED_ATTN_KERNELS
#undef FUSED_ATTN_ISA
#undef FUSED_ATTN_LANES
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif  // defined(__x86_64__)
