// Registration of the CPU kernels: LibTorch tensors in, plain views to the kernels, work split over threads.

#include <algorithm>
#include <cmath>
#include <optional>
#include <stdexcept>
#include <vector>

#include "common/cpu_op.h"
#include "rel_attention_2d/kernels.h"
#include "rel_attention_2d/small_grids/kernels.h"
#include "rel_attention_2d/whole_pairs/kernels.h"

namespace fused_attn::rel_attention_2d {
namespace {

// Tables become (head, position, depth); a shared one gets a head stride of 0.
TensorView term_view(const std::optional<Tensor>& term) {
  if (!term || term->numel() == 0) return {};
  TensorView view = view_of(*term);
  if (term->dim() == 2) {
    view.stride[2] = view.stride[1], view.stride[1] = view.stride[0], view.stride[0] = 0;
  }
  return view;
}

void fill_problem(Problem& p, const Tensor& query, const Tensor& key, const Tensor& value,
                  const std::optional<Tensor>& row_term, const std::optional<Tensor>& col_term,
                  const std::optional<Tensor>& bias_table, const std::optional<Tensor>& query_segments,
                  const std::optional<Tensor>& key_segments, const std::optional<Tensor>& prefix_key,
                  const std::optional<Tensor>& prefix_value, double scale, double rel_scale, bool key_minus_query,
                  double dropout_p, const std::optional<Tensor>& seed) {
  p.batch = query.size(0), p.heads = query.size(1), p.hq = query.size(2), p.wq = query.size(3);
  p.hk = key.size(2), p.wk = key.size(3), p.dk = query.size(4), p.dv = value.size(4);
  p.scale = static_cast<float>(scale), p.rel_scale = static_cast<float>(rel_scale);
  p.tables = (row_term && row_term->dim() < 5) || (col_term && col_term->dim() < 5);
  p.key_minus_query = key_minus_query;
  p.drop_below = seed ? static_cast<uint32_t>(std::min(std::nearbyint(dropout_p * 4294967296.0), 4294967295.0)) : 0;
  p.keep_scale = seed ? static_cast<float>(1.0 / (1.0 - dropout_p)) : 1.0f;
  p.seed = seed ? static_cast<uint64_t>(*static_cast<const int64_t*>(seed->const_data_ptr())) : 0;
  p.query = view_of(query), p.key = view_of(key), p.value = view_of(value);
  p.row_term = term_view(row_term), p.col_term = term_view(col_term), p.bias_table = view_of(bias_table);
  p.query_segments = query_segments ? static_cast<const int32_t*>(query_segments->const_data_ptr()) : nullptr;
  p.key_segments = key_segments ? static_cast<const int32_t*>(key_segments->const_data_ptr()) : nullptr;
  p.segment_sets = query_segments ? query_segments->size(0) : 1;
  p.prefix = prefix_key ? prefix_key->size(2) : 0;
  p.prefix_key = view_of(prefix_key), p.prefix_value = view_of(prefix_value);
}

// In how many parts matrix tiles hold the numbers of the problem, or 0 without tiles.
int parts_of_tiles([[maybe_unused]] const Problem& p) {
#if defined(FUSED_ATTN_HAS_AMX)
  if (cpu_capability() != CpuCapability::amx) return 0;
  auto all = [&](DType dtype) {
    auto is = [&](const TensorView& view) { return !view || view.dtype == dtype; };
    return is(p.query) && is(p.key) && is(p.value) && is(p.prefix_key) && is(p.prefix_value);
  };
  return all(DType::bfloat16) ? 1 : all(DType::float16) ? 2 : 3;
#else
  return 0;
#endif
}

// Whether they outweigh what the kernels for small maps save, and the parts what it takes to make them.
bool prefers_tiles(const Problem& p) {
  constexpr int64_t kDeep = 128, kLeastQueries = 128, kLeastDepths = 64;
  const int64_t keys = p.hk * p.wk + p.prefix, depths = p.dk + p.dv;
  const bool large = p.queries() >= kLeastQueries && depths >= kLeastDepths;
  const int parts = parts_of_tiles(p);
  if (always_tiles()) return parts > 0;
  switch (parts) {
    case 1: return keys >= (depths >= kDeep ? 64 : 144);
    case 2: return large && keys >= 256;
    case 3: return large && keys >= 1024;
    default: return false;
  }
}

// Pairs of a group if the kernels of small grids take the problem, or 0.  They are the faster ones up to 20x20 keys or
// so, and take many pairs at a time: four groups or more, to have work for several threads.  The choice follows the
// shape alone, so that no result depends on the number of threads.
int64_t small_grid_group(const Problem& p) {
  constexpr int64_t kMostKeys = 400, kLeastGroups = 4;
  const int64_t group = small_grids::best_kernels().lanes, keys = p.hk * p.wk + p.prefix;
  const bool fits = p.queries() > 0 && keys > 0 && keys <= kMostKeys && p.dk > 0 && p.dv > 0;
  return fits && !prefers_tiles(p) && p.batch * p.heads >= kLeastGroups * group ? group : 0;
}

// Whether the kernels of whole pairs take the problem: where little of the vectors of keys and depths would be padding,
// less with tables of the axes, whose own products are padded too.  Those of small grids, which pad nothing, are faster
// with shorter vectors and, of few keys, where rows would have to be copied.  By shape and layout alone, likewise.
bool takes_whole_pairs(const Problem& p) {
  constexpr int64_t kMostKeys = 784, kLeastPairs = 16, kManyKeys = 64, kLeastKeys = 16;
  const auto& kernels = whole_pairs::best_kernels();
  const int64_t keys = p.hk * p.wk + p.prefix, lanes = kernels.lanes;
  if (kernels.forward == nullptr || prefers_tiles(p) || p.queries() == 0) return false;
  if (keys == 0 || p.dk == 0 || p.dv == 0) return false;
  if (p.bias_table && p.queries() * keys > kMostKeys * kMostKeys) return false;  // they hold a number for each
  auto padded = [&](int64_t count) { return (count + lanes - 1) / lanes * lanes; };
  const bool full = p.dk % lanes == 0 && p.dv % lanes == 0;
  const int64_t most_percent = p.tables && !full ? 110 : 135;
  if (padded(keys) * (padded(p.dk) + padded(p.dv)) * 100 > most_percent * keys * (p.dk + p.dv)) return false;
  if (small_grid_group(p) == 0) return keys <= kMostKeys && p.batch * p.heads >= kLeastPairs;
  if (lanes < 16) return false;
  if (keys >= kManyKeys) return true;
  auto serve = [&](const TensorView& view, int64_t depth) { return whole_pairs::serves_as_rows(view, depth, lanes); };
  return keys >= kLeastKeys && !p.row_term && !p.col_term && serve(p.query, p.dk) && serve(p.key, p.dk) &&
         serve(p.value, p.dv);
}

// The order of theirs where there is a bias table.  The biases of all heads are kept if they leave room in the
// second-level cache.  Else they are made anew for each image where the heads of a position lie side by side: what
// belongs to an image is then on the same pages of memory; otherwise the images of a head come in turn.
void choose_order(Problem& p) {
  constexpr int64_t kMostBiases = 60000;
  if (!p.bias_table) return;
  p.keeps_biases = p.heads * p.queries() * (p.hk * p.wk + p.prefix) <= kMostBiases;
  p.head_by_head = !p.keeps_biases && p.query.stride[1] >= p.query.stride[3] && p.key.stride[1] >= p.key.stride[3];
}

// The kernels for everything else.
const Kernels& split_kernels([[maybe_unused]] const Problem& p) {
#if defined(FUSED_ATTN_HAS_AMX)
  const int parts = parts_of_tiles(p);
  if (parts == 1) return amx::kernels;
  if (prefers_tiles(p)) return parts == 2 ? amx_two_parts::kernels : amx_three_parts::kernels;
#endif
  return best_kernels();
}

void rel_attention_2d_forward(Tensor query, Tensor key, Tensor value, std::optional<Tensor> row_term,
                              std::optional<Tensor> col_term, std::optional<Tensor> bias_table,
                              std::optional<Tensor> query_segments, std::optional<Tensor> key_segments,
                              std::optional<Tensor> prefix_key, std::optional<Tensor> prefix_value, double scale,
                              double rel_scale, bool key_minus_query, double dropout_p, std::optional<Tensor> seed,
                              Tensor out, Tensor statistics) {
  Forward p;
  fill_problem(p, query, key, value, row_term, col_term, bias_table, query_segments, key_segments, prefix_key,
               prefix_value, scale, rel_scale, key_minus_query, dropout_p, seed);
  p.out = view_of(out);
  p.statistics = floats_of(statistics);
  if (p.queries() == 0) return;
  if (takes_whole_pairs(p)) {
    p.query_splits = 1;
    choose_order(p);
    return parallel(p.tasks(), whole_pairs::best_kernels().forward, p);
  }
  if (const int64_t group = small_grid_group(p))
    return parallel((p.batch * p.heads + group - 1) / group, small_grids::best_kernels().forward, p);
  // Splitting the queries does not change a result, so it may follow the number of threads; each part packs the
  // keys anew, which so many queries make cheap.
  constexpr int64_t kQueriesToAPart = 128;
  const int64_t pairs = std::max<int64_t>(p.batch * p.heads, 1), wanted = 4 * torch::stable::get_num_threads();
  p.query_splits =
      std::clamp<int64_t>((wanted + pairs - 1) / pairs, 1, std::max<int64_t>(p.queries() / kQueriesToAPart, 1));
  if (pairs % torch::stable::get_num_threads() == 0) p.query_splits = 1;
  parallel(p.tasks(), split_kernels(p).forward, p);
}

void rel_attention_2d_backward(Tensor grad_out, Tensor query, Tensor key, Tensor value, std::optional<Tensor> row_term,
                               std::optional<Tensor> col_term, std::optional<Tensor> bias_table,
                               std::optional<Tensor> query_segments, std::optional<Tensor> key_segments,
                               std::optional<Tensor> prefix_key, std::optional<Tensor> prefix_value, Tensor out,
                               Tensor statistics, double scale, double rel_scale, bool key_minus_query,
                               double dropout_p, std::optional<Tensor> seed, Tensor grad_query, Tensor grad_key,
                               Tensor grad_value, Tensor grad_row_term, Tensor grad_col_term, Tensor grad_bias_table,
                               Tensor grad_prefix_key, Tensor grad_prefix_value) {
  Backward p;
  fill_problem(p, query, key, value, row_term, col_term, bias_table, query_segments, key_segments, prefix_key,
               prefix_value, scale, rel_scale, key_minus_query, dropout_p, seed);
  p.grad_out = view_of(grad_out), p.out = view_of(out);
  p.statistics = floats_of(statistics);
  p.grad_query = view_of(grad_query), p.grad_key = view_of(grad_key), p.grad_value = view_of(grad_value);
  p.grad_row_term = term_view(grad_row_term), p.grad_col_term = term_view(grad_col_term);
  p.grad_bias_table = view_of(grad_bias_table);
  p.grad_prefix_key = view_of(grad_prefix_key), p.grad_prefix_value = view_of(grad_prefix_value);

  const bool whole = takes_whole_pairs(p);
  if (whole) choose_order(p);
  p.group = whole ? 0 : small_grid_group(p);
  // The split of the keys changes the order of summation, so it follows the shape alone: enough tasks for many threads
  // where the image is large, at the cost of one float32 copy of grad_query for every further part.
  const int64_t pairs = p.batch * p.heads;
  constexpr int64_t kTasks = 16, kKeysToAPart = 512, kKeyRowsToAPart = 16;
  const int64_t wanted = pairs > 0 ? (kTasks + pairs - 1) / pairs : 1;
  p.key_splits = std::clamp<int64_t>(std::min(wanted, p.hk * p.wk / kKeysToAPart), 1,
                                     std::max<int64_t>(p.hk / kKeyRowsToAPart, 1));
  // Gradients of given logits are as large as those: no further copy of them, hence no split.
  if (p.group > 0 || whole || (!p.tables && (p.row_term || p.col_term))) p.key_splits = 1;

  // Likewise the runs of images and heads whose gradients of a bias table a task adds up.
  constexpr int64_t kTableTasks = 256, kTableTasksOfWholePairs = 64;  // which have more to do at the end of one
  auto runs = [](int64_t tasks, int64_t others) { return (tasks + others - 1) / others; };
  p.image_runs = p.batch, p.head_runs = p.heads;
  if (p.bias_table && pairs > 0 && whole) {
    p.image_runs = std::min(p.batch, p.head_by_head ? runs(kTableTasksOfWholePairs, p.heads) : kTableTasksOfWholePairs);
    p.head_runs = p.head_by_head ? p.heads : std::min(p.heads, runs(kTableTasksOfWholePairs, p.image_runs));
  } else if (p.bias_table && p.key_splits == 1 && pairs > 0) {
    p.image_runs = std::min(p.batch, runs(kTableTasks, p.heads));
  }
  if (p.group > 0) p.image_runs = p.heads <= p.group ? p.tasks() : p.batch;

  std::vector<float> query_partials, table_partials, bias_partials;
  if (p.key_splits > 1) query_partials.resize(p.tasks() * p.queries() * p.dk);
  const int64_t table_rows = p.row_length() + p.col_length();
  table_partials.resize(p.parts() * table_rows * p.dk);
  p.query_partials = query_partials.data();
  bias_partials.resize(p.parts() * p.bias_rows() * p.bias_columns());
  p.table_partials = table_partials.data();
  p.bias_partials = bias_partials.data();

  const Kernels& use = split_kernels(p);
  parallel(p.tasks(),
           whole         ? whole_pairs::best_kernels().backward
           : p.group > 0 ? small_grids::best_kernels().backward
                         : use.backward,
           p);
  if (p.key_splits > 1) parallel(pairs, use.sum_query_partials, p);
  parallel(table_rows, use.sum_table_partials, p);
  parallel(p.heads * p.bias_rows(), use.sum_bias_partials, p);
}

}  // namespace

FUSED_ATTN_REGISTER(
    rel_attention_2d,
    "(Tensor query, Tensor key, Tensor value, Tensor? row_term, Tensor? col_term, Tensor? bias_table, "
    "Tensor? query_segments, Tensor? key_segments, Tensor? prefix_key, Tensor? prefix_value, float scale, "
    "float rel_scale, bool key_minus_query, float dropout_p, Tensor? seed, Tensor(a!) out, Tensor(b!) statistics)",
    "(Tensor grad_out, Tensor query, Tensor key, Tensor value, Tensor? row_term, Tensor? col_term, "
    "Tensor? bias_table, Tensor? query_segments, Tensor? key_segments, Tensor? prefix_key, Tensor? prefix_value, "
    "Tensor out, Tensor statistics, float scale, float rel_scale, bool key_minus_query, float dropout_p, Tensor? seed, "
    "Tensor(a!) grad_query, Tensor(b!) grad_key, Tensor(c!) grad_value, Tensor(d!) grad_row_term, "
    "Tensor(e!) grad_col_term, Tensor(f!) grad_bias_table, Tensor(g!) grad_prefix_key, "
    "Tensor(h!) grad_prefix_value)")

}  // namespace fused_attn::rel_attention_2d
