#include <cstdint>
#include <cstdlib>
#include <new>
#include <type_traits>
#include <utility>

#include "squeeze_excite/kernel.h"

#if defined(__x86_64__)
#include <immintrin.h>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c,bmi,bmi2"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c,bmi,bmi2")
#endif

#define FUSED_ATTN_ISA avx2
#define FUSED_ATTN_LANES 8
#define FUSED_ATTN_PANEL_VECTORS 2
#define FUSED_ATTN_BLOCK_ROWS 4
#include "squeeze_excite/kernel_impl.h"

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif
