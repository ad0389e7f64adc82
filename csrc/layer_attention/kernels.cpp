#include "layer_attention/kernels.h"

#define FUSED_ATTN_KERNELS "layer_attention/kernels_impl.h"
#include "common/for_each_instruction_set.h"
