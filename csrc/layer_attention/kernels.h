// What cpu.cpp hands to the kernels.  One implementation (kernels_impl.h), compiled once per instruction set.
#pragma once

#include "common/kernels.h"

namespace fused_attn::layer_attention {

// Values, output and their gradients are dense per image, in one of two memory orders:
//   channels first: image b is `channels` runs of `positions` elements.  The positions of a group's channels share a
//                   weight, so the image is `groups` rows of channels / groups * positions elements.
//   channels last:  image b is `positions` rows of `channels` elements, with a weight per channel.
struct Problem {
  int64_t batch, channels, positions, groups, layers;
  bool channels_last;
  bool large;            // more is written than stays in the caches
  DType dtype;           // of values, output and gradients of both
  const float* weights;  // (batch, groups, layers)
  const void* const* values;
  const int64_t* value_strides;  // of the batch, in elements, per layer

  int64_t row() const { return channels / groups * positions; }
  int64_t image() const { return channels * positions; }
};

// A task is one image and one range of its elements, at most kPart of them: the split follows the shape alone.
struct Forward : Problem {
  void* out;
  int64_t out_stride;
};

struct Backward : Problem {
  const void* grad_out;
  int64_t grad_out_stride;
  void* const* grad_values;  // null: not wanted
  const int64_t* grad_value_strides;
  bool accumulate;  // add to grad_values
  float* partials;  // (tasks, groups or 1, layers): sums of grad_out * value; null: not wanted
};

constexpr int64_t kPart = 16384;  // elements to a task

inline int64_t parts_of_row(const Problem& p) { return (p.row() + kPart - 1) / kPart; }
inline int64_t positions_per_part(const Problem& p) {
  return p.channels > kPart ? 1 : kPart / (p.channels > 0 ? p.channels : 1);
}
inline int64_t parts_of_image(const Problem& p) {
  const int64_t per_part = positions_per_part(p);
  return (p.positions + per_part - 1) / per_part;
}
// Channels first: (image, group, part of the row).  Channels last: (image, part of the positions).
inline int64_t tasks_of(const Problem& p) {
  return p.channels_last ? p.batch * parts_of_image(p) : p.batch * p.groups * parts_of_row(p);
}

using Kernels = KernelPair<Forward, Backward>;  // of tasks

FUSED_ATTN_DECLARE_KERNELS()

}  // namespace fused_attn::layer_attention
