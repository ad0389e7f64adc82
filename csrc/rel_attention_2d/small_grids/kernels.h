// The kernels of small grids and many (image, head) pairs, for the same problems, with neither queries nor keys split.
#pragma once

#include "rel_attention_2d/kernels.h"

namespace fused_attn::rel_attention_2d::small_grids {

struct Kernels {
  int64_t lanes;              // pairs of a group
  Kernel<Forward> forward;    // groups
  Kernel<Backward> backward;  // groups
};

FUSED_ATTN_DECLARE_KERNELS()

}  // namespace fused_attn::rel_attention_2d::small_grids
