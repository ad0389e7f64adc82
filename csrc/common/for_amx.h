// As for_each_instruction_set.h, for AVX-512 with matrix tiles; FUSED_ATTN_ISA is defined before.
#include <immintrin.h>

#include <cstdint>
#include <cstdlib>
#include <new>
#include <type_traits>
#include <utility>

#define FUSED_ATTN_LANES 16
#if defined(__clang__)
#pragma clang attribute push(                                                                                          \
    __attribute__((target("avx512f,avx512dq,avx512bw,avx512vl,avx512bf16,amx-tile,amx-bf16,avx2,fma,f16c,bmi,bmi2"))), \
    apply_to = function)
#include FUSED_ATTN_KERNELS
#pragma clang attribute pop
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512dq,avx512bw,avx512vl,avx512bf16,amx-tile,amx-bf16,avx2,fma,f16c,bmi,bmi2")
#include FUSED_ATTN_KERNELS
#pragma GCC pop_options
#endif
#undef FUSED_ATTN_LANES
