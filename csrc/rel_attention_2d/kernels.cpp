#include "rel_attention_2d/kernels.h"

#define FUSED_ATTN_TILES 0
#define FUSED_ATTN_KERNELS "rel_attention_2d/kernels_impl.h"
#include "common/for_each_instruction_set.h"
