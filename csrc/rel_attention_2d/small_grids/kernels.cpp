#include "rel_attention_2d/small_grids/kernels.h"

#define FUSED_ATTN_KERNELS "rel_attention_2d/small_grids/kernels_impl.h"
#include "common/for_each_instruction_set.h"
