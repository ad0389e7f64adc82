// Compiles the kernels of an op, the file FUSED_ATTN_KERNELS, once for each instruction set, in a namespace of its
// name. With FUSED_ATTN_ONLY_LANES, only for the set that has so many floats to a vector: setup.py makes them separate
// objects.
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

#if !defined(FUSED_ATTN_ONLY_LANES) || FUSED_ATTN_ONLY_LANES == 4
#define FUSED_ATTN_ISA generic
#define FUSED_ATTN_LANES 4
#include FUSED_ATTN_KERNELS
#undef FUSED_ATTN_ISA
#undef FUSED_ATTN_LANES
#endif

#if defined(__x86_64__) && (!defined(FUSED_ATTN_ONLY_LANES) || FUSED_ATTN_ONLY_LANES == 8)
#define FUSED_ATTN_ISA avx2
#define FUSED_ATTN_LANES 8
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c,bmi,bmi2"))), apply_to = function)
#include FUSED_ATTN_KERNELS
#pragma clang attribute pop
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c,bmi,bmi2")
#include FUSED_ATTN_KERNELS
#pragma GCC pop_options
#endif
#undef FUSED_ATTN_ISA
#undef FUSED_ATTN_LANES
#endif

#if defined(__x86_64__) && (!defined(FUSED_ATTN_ONLY_LANES) || FUSED_ATTN_ONLY_LANES == 16)
#define FUSED_ATTN_ISA avx512
#define FUSED_ATTN_LANES 16
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512dq,avx512bw,avx512vl,avx2,fma,f16c,bmi,bmi2"))), \
                             apply_to = function)
#include FUSED_ATTN_KERNELS
#pragma clang attribute pop
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512dq,avx512bw,avx512vl,avx2,fma,f16c,bmi,bmi2")
#include FUSED_ATTN_KERNELS
#pragma GCC pop_options
#endif
#undef FUSED_ATTN_ISA
#undef FUSED_ATTN_LANES
#endif
