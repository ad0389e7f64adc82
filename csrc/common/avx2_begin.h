// What follows is compiled for avx2, up to isa_end.h.  Included once in a translation unit, before kernel_impl.h.
// Headers of the standard library come first: their code must not be compiled for more than the machine may have.
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
