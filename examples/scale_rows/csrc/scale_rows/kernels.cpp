#include "scale_rows/kernels.h"

#define FUSED_ATTN_KERNELS "scale_rows/kernels_impl.h"
#include "common/for_each_instruction_set.h"
