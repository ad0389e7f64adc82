// The kernels with their products on matrix tiles, for tensors of float16.
#include "rel_attention_2d/kernels.h"

#if defined(FUSED_ATTN_HAS_AMX)
#define FUSED_ATTN_KERNELS "rel_attention_2d/kernels_impl.h"
#define FUSED_ATTN_ISA amx_two_parts
#define FUSED_ATTN_TILES 2
#include "common/for_amx.h"
#endif
