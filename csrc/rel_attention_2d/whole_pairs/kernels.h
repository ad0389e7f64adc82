// The kernels of small grids whose keys and depths fill whole vectors, for the same problems, with neither queries nor
// keys split.
#pragma once

#include "rel_attention_2d/kernels.h"

namespace fused_attn::rel_attention_2d::whole_pairs {

// Whether positions of a tensor serve as the rows of matrices, whole vectors each, where they are.  Not if they would
// share few sets of a cache.
inline bool serves_as_rows(const TensorView& view, int64_t depth, int64_t lanes) {
  constexpr int64_t kFewSets = 256;
  return view.dtype == DType::float32 && view.stride[4] == 1 && view.stride[3] % kFewSets != 0 && depth % lanes == 0;
}

struct Kernels {
  int64_t lanes;              // floats to a vector
  Kernel<Forward> forward;    // (image, head) pairs; null where the vectors are too short for these to be the faster
  Kernel<Backward> backward;  // tasks of the problem
};

FUSED_ATTN_DECLARE_KERNELS()

}  // namespace fused_attn::rel_attention_2d::whole_pairs
