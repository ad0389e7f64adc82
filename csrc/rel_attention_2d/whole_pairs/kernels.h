// The kernels of small grids whose keys and depths fill whole vectors, for the same problems, with neither queries nor
// keys split.
#pragma once

#include "rel_attention_2d/kernels.h"

namespace fused_attn::rel_attention_2d::whole_pairs {

struct Kernels {
  int64_t lanes;              // floats to a vector
  Kernel<Forward> forward;    // (image, head) pairs; null where the vectors are too short for these to be the faster
  Kernel<Backward> backward;  // tasks of the problem
};

FUSED_ATTN_DECLARE_KERNELS()

}  // namespace fused_attn::rel_attention_2d::whole_pairs
