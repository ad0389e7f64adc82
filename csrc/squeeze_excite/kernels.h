// What cpu.cpp hands to the kernels.  One implementation (kernels_impl.h), compiled once per instruction set.
#pragma once

#include "common/kernels.h"

namespace fused_attn::squeeze_excite {

// Weights of a small layer as panels: to[(panel, depth, lane)] = weight of (depth, panel * width + lane).
struct Pack {
  TensorView from, tail = {};  // columns past `split` come from `tail`, where they count from 0
  int64_t depth, columns, split;
  int64_t depth_stride, column_stride, tail_depth_stride = 0, tail_column_stride = 0;
  float* to;
};

// As op.py numbers them.
enum class Activation : int64_t { relu, silu, gelu, hardswish };
enum class Gate : int64_t { sigmoid, hardsigmoid };

// Channels, or rows of a weight's gradient, to a task: a multiple of every vector length.
constexpr int64_t kRowGroup = 16;
inline int64_t padded(int64_t count) { return (count + kRowGroup - 1) / kRowGroup * kRowGroup; }

// Maps are dense, (batch, channels, positions) or, channels last, (batch, positions, channels), of one element type.
struct Problem {
  int64_t batch, channels, positions, features;
  int64_t hidden;  // outputs of the first layer; with one layer, the channels
  bool one_layer, channels_last, relu;
  Activation activation;  // of the hidden units
  Gate gate;
  bool large;  // maps are streamed past the caches, in which they would not stay
  DType dtype;
  int64_t chunk;  // samples that go through the layers together
  const void* x;
  TensorView result;     // (batch, features)
  float *z, *scale;      // (batch, channels), dense
  float* preactivation;  // (batch, hidden), dense: outputs of the first layer; unused with one layer

  int64_t columns() const { return features + channels; }
  int64_t map() const { return channels * positions; }
  int64_t chunks() const { return (batch + chunk - 1) / chunk; }
  int64_t groups() const { return padded(channels) / kRowGroup; }  // of a sample
};

struct Forward : Problem {
  const float *fc1, *fc2;   // panels: (columns x hidden), (hidden x channels); no fc2 with one layer, here and below
  TensorView bias1, bias2;  // or nothing
  TensorView share;         // (batch, hidden), or nothing
  const void* residual;     // or null
  void* out;
};

struct Backward : Problem {
  const void *grad_out, *out;      // out: null without an activation
  const float *fc2, *fc1;          // panels: (channels x hidden), (hidden x columns)
  float* grad_logits;              // (batch, padded channels): gradient of the gate's argument
  float* grad_first;               // (batch, padded hidden): of the first layer's outputs; grad_logits with one layer
  float* units;                    // (batch, hidden): the hidden units, formed anew
  float* grad_input;               // (batch, padded columns): of the features; of the means, over the positions
  void *grad_x, *grad_residual;    // grad_residual: or null
  void *grad_result, *grad_share;  // dense, or null
  // For the weights' gradients, sums over the batch:
  const float *input_panels, *unit_panels;              // (batch x columns), (batch x hidden)
  void *grad_fc1, *grad_bias1, *grad_fc2, *grad_bias2;  // dense
};

// A pass over the maps: chunk by chunk, or a step over all of them before the next one.
template <class P>
struct Pass {
  Kernel<P> chunks;  // chunks of samples
  Kernel<P> sums;    // groups of channels, those of the first sample first
  Kernel<P> layers;  // chunks of samples
  Kernel<P> writes;  // groups of channels
};

struct Kernels {
  int64_t panel;      // columns to a panel
  Kernel<Pack> pack;  // panels
  Pass<Forward> forward;
  Pass<Backward> backward;
  Kernel<Backward> weight_grads;  // groups of rows: of fc1, then of fc2
};

FUSED_ATTN_DECLARE_KERNELS()

}  // namespace fused_attn::squeeze_excite
