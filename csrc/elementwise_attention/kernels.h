// What cpu.cpp hands to the kernels.  One implementation (kernels_impl.h), compiled once per instruction set.
#pragma once

#include "common/kernels.h"

namespace fused_attn::elementwise_attention {

constexpr int64_t kMostImagesAtOnce = 32;

// Which rows or columns of every image take part; null data: all.
struct Mask {
  const bool* data;
  int64_t stride[2];

  bool operator()(int64_t b, int64_t i) const { return data == nullptr || data[b * stride[0] + i * stride[1]]; }
};

// Sizes, inputs, statistics and how the work is cut up.  A task is one channel, one group of images and one range of
// rows, for all heads.  A small plane is taken whole, as one block; a larger one is tiled: the task walks down its rows
// a block at a time.  All of this follows the shape alone, so that no result depends on the number of threads.
struct Problem {
  int64_t batch, heads, channels, height, width;  // heads is 1 without weights
  bool weighted;
  TensorView x;                            // (batch, channel, y, x)
  TensorView weight_row, weight_col;       // (head, channel, y, x)
  float *row_statistics, *col_statistics;  // (batch, head, channel, 2, y or x): shift, sum of e^(logit - shift)
  int64_t groups, ranges, block_rows, images_at_once;
  bool large;  // more is written than stays in the caches

  // Without weights: logits are x times the factor, what a mask excludes is in no softmax, and the result is the log.
  float factor;
  Mask row_mask, col_mask;
  bool log;

  // Batch normalisation of the product; without it mean is null.
  const float *mean, *scale;  // (head, channel); scale is 1 / sqrt(variance + eps)
  double* moments;            // (task, head, 2), see the kernels that write it

  bool masked() const { return row_mask.data != nullptr || col_mask.data != nullptr; }
  bool logits_are_x() const { return factor == 1.0f && !masked(); }
  bool whole() const { return block_rows >= height; }
  int64_t tasks() const { return channels * groups * ranges; }
  int64_t planes() const { return batch * heads * channels; }
  int64_t plane(int64_t b, int64_t h, int64_t c) const { return (b * heads + h) * channels + c; }
};

// What is formed together with the statistics of whole planes.
enum class Also { nothing, moments, output };

struct Forward : Problem {
  TensorView out;  // (batch, head, channel, y, x)
  Also also;
  float* col_partials;  // tiled: (range, plane, 2, x), shift and sum of one range
};

struct Backward : Problem {
  TensorView grad_out;                          // (batch, head, channel, y, x)
  TensorView grad_x;                            // (batch, channel, y, x)
  TensorView grad_weight_row, grad_weight_col;  // (head, channel, y, x)
  float *row_sums, *col_sums;                   // tiled: (plane, y), (range, plane, x)
  const float *grad_mean, *grad_var;            // (head, channel): what the batch statistics pass back, see README.md
  float* weight_partials;                       // (group, 2, head, channel, y, x); null when one visit sees all images
};

struct WholePlaneKernels {
  Kernel<Forward> statistics;  // tasks; and what Forward::also says
  Kernel<Backward> gradients;  // tasks
};

struct TiledPlaneKernels {
  Kernel<Forward> statistics;       // tasks
  Kernel<Forward> combine_columns;  // planes
  Kernel<Forward> moments;          // tasks
  Kernel<Backward> sums;            // tasks
  Kernel<Backward> combine_sums;    // planes
  Kernel<Backward> gradients;       // tasks
};

struct Kernels {
  WholePlaneKernels whole;
  TiledPlaneKernels tiled;
  Kernel<Forward> output;         // tasks
  Kernel<Backward> grad_moments;  // tasks
  Kernel<Backward> sum_weights;   // (weight, head, channel, y) rows
};

FUSED_ATTN_DECLARE_KERNELS()

}  // namespace fused_attn::elementwise_attention
