// Registration of the CPU kernels: LibTorch tensors in, plain views to the kernels, work split over threads.

#include <algorithm>
#include <cmath>
#include <optional>
#include <stdexcept>
#include <vector>

#include "common/cpu_op.h"
#include "elementwise_attention/kernels.h"

namespace fused_attn::elementwise_attention {
namespace {

// (B, heads*C, H, W) or (B, C, H, W) becomes (batch, head, channel, y, x).
TensorView view_by_head(const Tensor& tensor, int64_t channels) {
  TensorView view = view_of(tensor);
  if (tensor.dim() == 4) {
    std::copy_backward(view.stride + 1, view.stride + 4, view.stride + 5);
    view.stride[1] = channels * view.stride[2];
  }
  return view;
}

bool is_large(const Tensor& written) { return written.numel() * written.element_size() >= kLargeBytes; }

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// How the work is cut up follows the shape alone: partial sums are then the same at any number of threads.
void tile(Problem& p) {
  constexpr int64_t kWholePlane = 8192;  // floats: what a plane needs in backward, eight copies, stays in a 256 KiB L2
  constexpr int64_t kBlock = 4096;       // floats of a block of rows of a larger plane, unless 8 rows have more
  constexpr int64_t kTasks = 32;
  const int64_t stride = ceil_div(p.width, 16) * 16;
  const bool whole = p.height * stride <= kWholePlane;
  p.block_rows = whole ? p.height : std::min(p.height, std::max<int64_t>(8, kBlock / stride));
  // Without weights no image shares a gradient with another, and large planes are taken one at a time.  With weights
  // every group holds a partial gradient, small next to the output of its 16 images.
  p.groups = std::max<int64_t>(p.weighted ? p.batch / 16 : p.batch, 1);
  if (p.weighted || whole) p.groups = std::min(p.groups, kTasks);
  const int64_t group = ceil_div(p.batch, p.groups);
  const int64_t room = std::max<int64_t>(32768 / (p.block_rows * stride), 1);
  p.images_at_once = std::min({group, room, kMostImagesAtOnce});
  p.ranges = 1;
  if (p.block_rows < p.height)
    p.ranges = std::clamp<int64_t>(ceil_div(kTasks, p.groups * p.channels), 1, std::max<int64_t>(p.height / 32, 1));
}

Mask mask_of(const std::optional<Tensor>& mask) {
  if (!mask) return {};
  return {static_cast<const bool*>(mask->data_ptr()), {mask->stride(0), mask->stride(1)}};
}

// What the softmax without weights has beside its input.
struct DualOptions {
  const std::optional<Tensor>&row_mask, &col_mask;
  double temperature;
  bool log;

  void fill(Problem& p) const {
    p.factor = static_cast<float>(1.0 / temperature);
    p.row_mask = mask_of(row_mask), p.col_mask = mask_of(col_mask);
    p.log = log;
  }
};

void fill_problem(Problem& p, const Tensor& x, const std::optional<Tensor>& weight_row,
                  const std::optional<Tensor>& weight_col, const Tensor& row_statistics, const Tensor& col_statistics) {
  p.batch = x.size(0), p.channels = x.size(1), p.height = x.size(2), p.width = x.size(3);
  p.weighted = weight_row.has_value();
  p.heads = p.weighted ? weight_row->size(0) : 1;
  p.x = view_of(x);
  if (p.weighted) p.weight_row = view_of(*weight_row), p.weight_col = view_of(*weight_col);
  p.row_statistics = floats_of(row_statistics);
  p.col_statistics = floats_of(col_statistics);
  p.mean = p.scale = nullptr, p.moments = nullptr;
  p.factor = 1.0f;
  tile(p);
}

// Both moments of every (head, channel), over tasks in their order.
struct Moments {
  std::vector<double> partial, first, second;

  explicit Moments(Problem& p) : partial(p.tasks() * p.heads * 2), first(p.heads * p.channels), second(first.size()) {
    p.moments = partial.data();
  }
  void reduce(const Problem& p) {
    for (int64_t task = 0; task < p.tasks(); ++task)
      for (int64_t h = 0; h < p.heads; ++h) {
        const double* from = partial.data() + (task * p.heads + h) * 2;
        const int64_t channel = h * p.channels + task % p.channels;
        first[channel] += from[0], second[channel] += from[1];
      }
  }
};

std::vector<float> inverse_deviations(const Problem& p, const float* var, double eps) {
  std::vector<float> scale(p.heads * p.channels);
  for (size_t i = 0; i < scale.size(); ++i) scale[i] = static_cast<float>(1.0 / std::sqrt(var[i] + eps));
  return scale;
}

void forward_statistics(Forward& p) {
  const Kernels& use = best_kernels();
  if (p.whole()) return parallel(p.tasks(), use.whole.statistics, p);
  std::vector<float> partials(p.ranges * p.planes() * 2 * p.width);
  p.col_partials = partials.data();
  parallel(p.tasks(), use.tiled.statistics, p);
  parallel(p.planes(), use.tiled.combine_columns, p);
}

void row_col_softmax_forward(Tensor x, std::optional<Tensor> weight_row, std::optional<Tensor> weight_col,
                             std::optional<Tensor> row_mask, std::optional<Tensor> col_mask, double temperature,
                             bool log, Tensor out, Tensor row_statistics, Tensor col_statistics) {
  if (out.numel() == 0) return;
  Forward p{};
  fill_problem(p, x, weight_row, weight_col, row_statistics, col_statistics);
  DualOptions{row_mask, col_mask, temperature, log}.fill(p);
  p.out = view_by_head(out, p.channels), p.large = is_large(out);
  p.also = p.log || p.masked() ? Also::nothing : Also::output;
  forward_statistics(p);
  if (!p.whole() || p.also == Also::nothing) parallel(p.tasks(), best_kernels().output, p);
}

void elementwise_attention_forward(Tensor x, Tensor weight_row, Tensor weight_col, bool training, double eps,
                                   Tensor out, Tensor row_statistics, Tensor col_statistics, Tensor mean, Tensor var) {
  if (out.numel() == 0) return;
  Forward p{};
  fill_problem(p, x, weight_row, weight_col, row_statistics, col_statistics);
  p.out = view_by_head(out, p.channels), p.large = is_large(out);
  p.also = training ? Also::moments : Also::nothing;
  float *means = floats_of(mean), *vars = floats_of(var);
  Moments moments(p);
  forward_statistics(p);
  if (training) {
    if (!p.whole()) parallel(p.tasks(), best_kernels().tiled.moments, p);
    moments.reduce(p);
    const double count = double(p.batch) * p.height * p.width;
    const double shift = 1.0f / (float(p.height) * float(p.width));  // as the kernels compute it
    for (int64_t i = 0; i < p.heads * p.channels; ++i) {
      const double offset = moments.first[i] / count;
      means[i] = static_cast<float>(shift + offset);
      const double variance = moments.second[i] / count - offset * offset;
      vars[i] = static_cast<float>(variance < 0.0 ? 0.0 : variance);  // NaN stays
    }
  }
  const std::vector<float> scale = inverse_deviations(p, vars, eps);
  p.mean = means, p.scale = scale.data();
  parallel(p.tasks(), best_kernels().output, p);
}

void backward(Backward& p, const Tensor& grad_out, const Tensor& grad_x, const Tensor& grad_weight_row,
              const Tensor& grad_weight_col) {
  p.grad_x = view_of(grad_x), p.large = is_large(grad_x);
  if (p.weighted) p.grad_weight_row = view_of(grad_weight_row), p.grad_weight_col = view_of(grad_weight_col);

  std::vector<float> row_sums, col_sums, weights;
  const Kernels& use = best_kernels();
  if (!p.whole()) {
    row_sums.resize(p.planes() * p.height), col_sums.resize(p.ranges * p.planes() * p.width);
    p.row_sums = row_sums.data(), p.col_sums = col_sums.data();
    parallel(p.tasks(), use.tiled.sums, p);
    parallel(p.planes(), use.tiled.combine_sums, p);
  }
  if (p.weighted && p.images_at_once < p.batch) {
    weights.resize(p.groups * 2 * p.heads * p.channels * p.height * p.width);
    p.weight_partials = weights.data();
  }
  parallel(p.tasks(), p.whole() ? use.whole.gradients : use.tiled.gradients, p);
  if (p.weight_partials) parallel(2 * p.heads * p.channels * p.height, use.sum_weights, p);
}

void row_col_softmax_backward(Tensor grad_out, Tensor x, std::optional<Tensor> weight_row,
                              std::optional<Tensor> weight_col, std::optional<Tensor> row_mask,
                              std::optional<Tensor> col_mask, Tensor row_statistics, Tensor col_statistics,
                              double temperature, bool log, Tensor grad_x, Tensor grad_weight_row,
                              Tensor grad_weight_col) {
  Backward p{};
  fill_problem(p, x, weight_row, weight_col, row_statistics, col_statistics);
  DualOptions{row_mask, col_mask, temperature, log}.fill(p);
  p.grad_out = view_by_head(grad_out, p.channels);
  backward(p, grad_out, grad_x, grad_weight_row, grad_weight_col);
}

void elementwise_attention_backward(Tensor grad_out, Tensor x, Tensor weight_row, Tensor weight_col,
                                    Tensor row_statistics, Tensor col_statistics, Tensor mean, Tensor var,
                                    bool training, double eps, Tensor grad_x, Tensor grad_weight_row,
                                    Tensor grad_weight_col) {
  Backward p{};
  fill_problem(p, x, weight_row, weight_col, row_statistics, col_statistics);
  p.grad_out = view_by_head(grad_out, p.channels);
  const std::vector<float> scale = inverse_deviations(p, floats_of(var), eps);
  p.mean = floats_of(mean), p.scale = scale.data();
  std::vector<float> grad_mean(scale.size()), grad_var(scale.size());
  if (training) {
    Moments moments(p);
    parallel(p.tasks(), best_kernels().grad_moments, p);
    moments.reduce(p);
    const double count = double(p.batch) * p.height * p.width;
    for (size_t i = 0; i < scale.size(); ++i) {
      grad_mean[i] = static_cast<float>(moments.first[i] / count);
      grad_var[i] = static_cast<float>(moments.second[i] / count * scale[i] * scale[i]);
    }
  }
  p.grad_mean = grad_mean.data(), p.grad_var = grad_var.data();
  backward(p, grad_out, grad_x, grad_weight_row, grad_weight_col);
}

}  // namespace

FUSED_ATTN_REGISTER(row_col_softmax,
                    "(Tensor x, Tensor? weight_row, Tensor? weight_col, Tensor? row_mask, Tensor? col_mask, "
                    "float temperature, bool log, Tensor(a!) out, Tensor(b!) row_statistics, "
                    "Tensor(c!) col_statistics)",
                    "(Tensor grad_out, Tensor x, Tensor? weight_row, Tensor? weight_col, Tensor? row_mask, "
                    "Tensor? col_mask, Tensor row_statistics, Tensor col_statistics, float temperature, bool log, "
                    "Tensor(a!) grad_x, Tensor(b!) grad_weight_row, Tensor(c!) grad_weight_col)")

FUSED_ATTN_REGISTER(
    elementwise_attention,
    "(Tensor x, Tensor weight_row, Tensor weight_col, bool training, float eps, Tensor(a!) out, "
    "Tensor(b!) row_statistics, Tensor(c!) col_statistics, Tensor(d!) mean, Tensor(e!) var)",
    "(Tensor grad_out, Tensor x, Tensor weight_row, Tensor weight_col, Tensor row_statistics, Tensor col_statistics, "
    "Tensor mean, Tensor var, bool training, float eps, Tensor(a!) grad_x, Tensor(b!) grad_weight_row, "
    "Tensor(c!) grad_weight_col)")

}  // namespace fused_attn::elementwise_attention
