// What cpu.cpp hands to the kernels.  One implementation (kernels_impl.h), compiled once per instruction set.
#pragma once

#include "common/kernels.h"

namespace fused_attn::rel_attention_2d {

// Sizes, options and inputs.  Tensors are indexed (batch, heads, y, x, depth); `row_term` and `col_term` hold tables,
// indexed (head, position, depth, -, -) with a head stride of 0 for shared ones, or logits, indexed
// (batch, heads, yq, xq, key position), or nothing.  `bias_table` is indexed (head, y, x), or nothing; then the terms
// are nothing.  The prefix keys, indexed (batch, heads, position, depth), take part in every query's softmax with
// neither.
struct Problem {
  int64_t batch, heads, hq, wq, hk, wk, dk, dv;
  float scale, rel_scale;
  bool tables;           // the terms are tables
  bool key_minus_query;  // index convention of all tables
  uint32_t drop_below;   // dropout: weights whose hash is below this number are dropped; 0 = no dropout
  float keep_scale;      // 1 / (1 - dropout_p)
  uint64_t seed;
  TensorView query, key, value, row_term, col_term, bias_table;
  // (segment_sets, queries) and (segment_sets, keys), or null; image b has those of set b % segment_sets.
  const int32_t *query_segments, *key_segments;
  int64_t segment_sets;
  int64_t prefix;  // number of prefix keys
  // Of whole pairs with a bias table, which is a number for each query and key of a head there: whether those of all
  // heads are kept; whether the images of a head come in turn, rather than the heads of an image.
  bool keeps_biases = false, head_by_head = false;
  TensorView prefix_key, prefix_value;

  int64_t queries() const { return hq * wq; }
  int64_t row_length() const { return tables && row_term ? hq + hk - 1 : 0; }
  int64_t col_length() const { return tables && col_term ? wq + wk - 1 : 0; }
  int64_t bias_rows() const { return bias_table ? hq + hk - 1 : 0; }
  int64_t bias_columns() const { return bias_table ? wq + wk - 1 : 0; }
};

struct Forward : Problem {
  TensorView out;
  // (batch, heads, queries, 2): maximum of the logits and sum of e^(logit - maximum), 0 with every key masked.
  // The pair rather than its log-sum-exp, whose rounding would be an error common to a whole row of weights.
  float* statistics;
  int64_t query_splits;  // a task is one (batch, head) and one range of queries

  int64_t tasks() const { return batch * heads * query_splits; }
};

// A backward task is a run of heads (one, but for whole pairs with a bias table), a run of images (one, unless there is
// a bias table) and one range of key rows; on small grids it is a group of (image, head) pairs, and a run is a group
// that has every head, or an image.  What several tasks contribute to is summed afterwards in a fixed order, from
// float32 partial results, so that no result depends on the number of threads.
struct Backward : Problem {
  TensorView grad_out, out;
  const float* statistics;
  TensorView grad_query, grad_key, grad_value, grad_row_term, grad_col_term;
  TensorView grad_bias_table, grad_prefix_key, grad_prefix_value;
  int64_t key_splits, image_runs, head_runs;
  int64_t group = 0;      // pairs of a group on small grids
  float* query_partials;  // (tasks, queries, dk); null when key_splits is 1
  float* table_partials;  // (parts, row_length + col_length, dk)
  float* bias_partials;   // (parts, bias_rows, bias_columns)

  int64_t tasks() const {
    return group > 0 ? (batch * heads + group - 1) / group : image_runs * head_runs * key_splits;
  }
  // The parts of a head follow one another.
  int64_t part(int64_t head, int64_t run, int64_t split) const {
    return (head * image_runs + run) * key_splits + split;
  }
  int64_t first_part(int64_t head) const { return part(head, 0, 0); }
  int64_t parts() const { return part(heads, 0, 0); }
};

struct Kernels {
  Kernel<Forward> forward;              // tasks
  Kernel<Backward> backward;            // tasks
  Kernel<Backward> sum_query_partials;  // (batch, head) pairs
  Kernel<Backward> sum_table_partials;  // table rows, over all heads
  Kernel<Backward> sum_bias_partials;   // (head, row) pairs of the bias table
};

FUSED_ATTN_DECLARE_KERNELS()

#if defined(FUSED_ATTN_HAS_AMX)
namespace amx {
extern const Kernels kernels;  // of tensors of bfloat16
}
namespace amx_two_parts {
extern const Kernels kernels;  // of float16
}
namespace amx_three_parts {
extern const Kernels kernels;  // of float32
}
#endif

}  // namespace fused_attn::rel_attention_2d
