// What cpu.cpp hands to the kernels.  One implementation (kernels_impl.h), compiled once per instruction set.
#pragma once

#include "common/kernels.h"

namespace fused_attn::attention_residual {

// Tokens to a task.  What several tasks contribute to is summed from partial results, one per task, so this must not
// depend on the number of threads.
constexpr int64_t kTaskTokens = 32;

// Values, their gradients, out and grad_out are (outer, inner, dim) with contiguous rows; a token is one (outer,
// inner). All but the statistics share one element type.
struct Problem {
  int64_t outer, inner, dim, count;  // count: values
  DType dtype;
  const TensorView* values;       // [count]
  TensorView query, norm_weight;  // (dim,); norm_weight may be missing

  int64_t tokens() const { return outer * inner; }
  int64_t tasks() const { return (tokens() + kTaskTokens - 1) / kTaskTokens; }
};

struct Forward : Problem {
  float eps;
  TensorView out;
  float* statistics;  // (tokens, count, 2): logit and 1 / root mean square
};

struct Backward : Problem {
  TensorView grad_out;
  const float* statistics;
  const TensorView* grad_values;  // [count]
  bool large;                     // they do not stay in the caches
  TensorView grad_query, grad_norm_weight;
  float* partials;  // (tasks, dim): gradient of query * norm_weight
};

struct Kernels {
  Kernel<Forward> forward;        // tasks
  Kernel<Backward> backward;      // tasks
  Kernel<Backward> sum_partials;  // elements of dim
};

FUSED_ATTN_DECLARE_KERNELS()

}  // namespace fused_attn::attention_residual
