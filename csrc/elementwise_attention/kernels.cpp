#include "elementwise_attention/kernels.h"

#define FUSED_ATTN_KERNELS "elementwise_attention/kernels_impl.h"
#include "common/for_each_instruction_set.h"
