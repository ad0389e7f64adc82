// What cpu.cpp hands to the kernels.  One implementation (kernel_impl.h), compiled once per instruction set.
#pragma once

#include <cstdint>

#include "common/tensor_view.h"

namespace fused_attn::elementwise_attention {

// Sizes, inputs, statistics and how the work is cut up.  A task is one channel, one group of images and one range of
// rows, for all heads.  It walks down its rows a block at a time; a small plane is one block ("whole").  All of this
// follows the shape alone, so that no result depends on the number of threads.
struct Problem {
  int64_t batch, heads, channels, height, width;  // heads is 1 without weights
  bool weighted;
  TensorView x;                       // (batch, channel, y, x)
  TensorView weight_row, weight_col;  // (head, channel, y, x)
  float *row_stats, *col_stats;       // (batch, head, channel, 2, y or x): shift, sum of e^(logit - shift)
  int64_t groups, ranges, block_rows, images_at_once;
  bool large;  // more is written than stays in the caches

  // Batch normalisation of the product; without it mean is null.
  const float *mean, *scale;  // (head, channel); scale is 1 / sqrt(variance + eps)
  double* moments;            // (task, head, 2), see the kernels that write it

  bool whole() const { return block_rows >= height; }
  int64_t tasks() const { return channels * groups * ranges; }
  int64_t planes() const { return batch * heads * channels; }
  int64_t plane(int64_t b, int64_t h, int64_t c) const { return (b * heads + h) * channels + c; }
};

struct Forward : Problem {
  TensorView out;       // (batch, head, channel, y, x)
  bool needs_moments;   // statistics of the batch are wanted
  bool writes_whole;    // whole planes are written together with their statistics
  float* col_partials;  // (range, plane, 2, x): shift and sum of one range; null when whole
};

struct Backward : Problem {
  TensorView grad_out;                          // (batch, head, channel, y, x)
  TensorView grad_x;                            // (batch, channel, y, x)
  TensorView grad_weight_row, grad_weight_col;  // (head, channel, y, x)
  float* row_sums;                              // (plane, y); null when whole
  float* col_sums;                              // (range, plane, x); null when whole
  const float *grad_mean, *grad_var;            // (head, channel): what the batch statistics pass back, see README.md
  float* weight_partials;                       // (group, 2, head, channel, y, x); null when one visit sees all images
};

struct Kernels {
  void (*statistics)(const Forward&, int64_t begin, int64_t end);  // tasks; when whole, the moments or the output too
  void (*combine_columns)(const Forward&, int64_t begin, int64_t end);  // planes
  void (*moments)(const Forward&, int64_t begin, int64_t end);          // tasks
  void (*output)(const Forward&, int64_t begin, int64_t end);           // tasks
  void (*grad_moments)(const Backward&, int64_t begin, int64_t end);    // tasks
  void (*sums)(const Backward&, int64_t begin, int64_t end);            // tasks; part of gradients when whole
  void (*combine_sums)(const Backward&, int64_t begin, int64_t end);    // planes
  void (*gradients)(const Backward&, int64_t begin, int64_t end);       // tasks
  void (*sum_weights)(const Backward&, int64_t begin, int64_t end);     // (weight, head, channel, y) rows
};

namespace generic {
extern const Kernels kernels;
}
#if defined(__x86_64__)
namespace avx2 {
extern const Kernels kernels;
}
namespace avx512 {
extern const Kernels kernels;
}
#endif

}  // namespace fused_attn::elementwise_attention
