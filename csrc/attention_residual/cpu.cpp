// Registration of the CPU kernels: LibTorch tensors in, plain views to the kernels, work split over threads.

#include <optional>
#include <stdexcept>
#include <vector>

#include "attention_residual/kernels.h"
#include "common/cpu_op.h"

namespace fused_attn::attention_residual {
namespace {

constexpr int64_t kElementsToAThread = 256;  // at least, where the partial sums are added

std::vector<TensorView> views_of(const std::vector<Tensor>& tensors) {
  std::vector<TensorView> views;
  for (const Tensor& tensor : tensors) views.push_back(view_of(tensor));
  return views;
}

void fill_problem(Problem& p, const std::vector<Tensor>& values, const std::vector<TensorView>& views,
                  const Tensor& query, const std::optional<Tensor>& norm_weight) {
  const Tensor& first = values.at(0);
  p.outer = first.size(0), p.inner = first.size(1), p.dim = first.size(2);
  p.count = static_cast<int64_t>(values.size());
  p.dtype = dtype_of(first);
  p.values = views.data();
  p.query = view_of(query);
  if (norm_weight) p.norm_weight = view_of(*norm_weight);
}

void attention_residual_forward(std::vector<Tensor> values, Tensor query, std::optional<Tensor> norm_weight, double eps,
                                Tensor out, Tensor statistics) {
  const std::vector<TensorView> views = views_of(values);
  Forward p;
  fill_problem(p, values, views, query, norm_weight);
  p.eps = static_cast<float>(eps);
  p.out = view_of(out);
  p.statistics = floats_of(statistics);
  parallel(p.tasks(), best_kernels().forward, p);
}

void attention_residual_backward(Tensor grad_out, std::vector<Tensor> values, Tensor query,
                                 std::optional<Tensor> norm_weight, Tensor statistics, std::vector<Tensor> grad_values,
                                 Tensor grad_query, Tensor grad_norm_weight) {
  const std::vector<TensorView> views = views_of(values), grad_views = views_of(grad_values);
  Backward p;
  fill_problem(p, values, views, query, norm_weight);
  p.grad_out = view_of(grad_out);
  p.statistics = floats_of(statistics);
  p.grad_values = grad_views.data();
  p.large = p.count * grad_values[0].numel() * grad_values[0].element_size() >= kLargeBytes;
  p.grad_query = view_of(grad_query);
  if (norm_weight) p.grad_norm_weight = view_of(grad_norm_weight);
  std::vector<float> partials(p.tasks() * p.dim);
  p.partials = partials.data();

  const Kernels& use = best_kernels();
  parallel(p.tasks(), use.backward, p);
  parallel(p.dim, use.sum_partials, p, kElementsToAThread);
}

}  // namespace

FUSED_ATTN_REGISTER(
    attention_residual,
    "(Tensor[] values, Tensor query, Tensor? norm_weight, float eps, Tensor(a!) out, Tensor(b!) statistics)",
    "(Tensor grad_out, Tensor[] values, Tensor query, Tensor? norm_weight, Tensor statistics, "
    "Tensor(a!)[] grad_values, Tensor(b!) grad_query, Tensor(c!) grad_norm_weight)")

}  // namespace fused_attn::attention_residual
