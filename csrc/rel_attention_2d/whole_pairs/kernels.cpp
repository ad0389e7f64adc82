#include "rel_attention_2d/whole_pairs/kernels.h"

#define FUSED_ATTN_KERNELS "rel_attention_2d/whole_pairs/kernels_impl.h"
#include "common/for_each_instruction_set.h"
