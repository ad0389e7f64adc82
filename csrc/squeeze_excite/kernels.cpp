#include "squeeze_excite/kernels.h"

#define FUSED_ATTN_KERNELS "squeeze_excite/kernels_impl.h"
#include "common/for_each_instruction_set.h"
