#include "attention_residual/kernels.h"

#define FUSED_ATTN_KERNELS "attention_residual/kernels_impl.h"
#include "common/for_each_instruction_set.h"
