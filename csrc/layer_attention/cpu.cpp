// Registration of the CPU kernels, and the weights themselves: small per-head work that needs no vector code.

#include <algorithm>
#include <cmath>
#include <limits>
#include <optional>
#include <stdexcept>
#include <vector>

#include "common/cpu_op.h"
#include "common/huge_pages.h"
#include "layer_attention/kernels.h"

namespace fused_attn::layer_attention {
namespace {

// --- the weights --------------------------------------------------------------------------------------------------

// One (image, group): sums in double, as they are few and everything else follows from them.
struct Head {
  int64_t groups, depth, layers;
  double scale;
  bool sigmoid;
  TensorView query;  // (batch, groups, depth)
  std::vector<TensorView> keys;
  TensorView bias;  // (layers, groups), or nothing

  Head(const Tensor& q, const std::vector<Tensor>& k, const std::optional<Tensor>& b, double scale_, bool sigmoid_)
      : groups(q.size(1)), depth(q.size(2)), layers(k.size()), scale(scale_), sigmoid(sigmoid_), query(view_of(q)) {
    for (const Tensor& key : k) keys.push_back(view_of(key));
    if (b) bias = view_of(*b);
  }

  // Of these to a thread: fewer are done sooner than another thread wakes up.
  int64_t grain() const {
    constexpr int64_t kSerialProducts = 16384;
    return std::max<int64_t>(1, kSerialProducts / std::max<int64_t>(layers * depth, 1));
  }
  void load(const TensorView& view, int64_t bg, float* to) const {
    gather(view, bg / groups * view.stride[0] + bg % groups * view.stride[1], view.stride[2], depth, 1.0f, to);
  }
};

void layer_attention_weights_forward(Tensor query, std::vector<Tensor> keys, std::optional<Tensor> bias, double scale,
                                     bool sigmoid, Tensor weights) {
  const Head head(query, keys, bias, scale, sigmoid);
  float* to = floats_of(weights);
  auto run = [&](int64_t begin, int64_t end) {
    std::vector<float> q(head.depth), k(head.depth);
    std::vector<double> logits(head.layers);
    for (int64_t bg = begin; bg < end; ++bg) {
      head.load(head.query, bg, q.data());
      double max = -std::numeric_limits<double>::infinity();
      for (int64_t l = 0; l < head.layers; ++l) {
        head.load(head.keys[l], bg, k.data());
        double dot = 0.0;
        for (int64_t i = 0; i < head.depth; ++i) dot += double(q[i]) * k[i];
        float add = 0.0f;
        if (head.bias)
          gather(head.bias, l * head.bias.stride[0] + bg % head.groups * head.bias.stride[1], 1, 1, 1.0f, &add);
        logits[l] = head.scale * dot + add;
        max = std::max(max, logits[l]);
      }
      if (head.sigmoid) {
        for (int64_t l = 0; l < head.layers; ++l)
          to[bg * head.layers + l] = static_cast<float>(1.0 / (1.0 + std::exp(-logits[l])));
        continue;
      }
      double total = 0.0;
      for (double& logit : logits) total += logit = std::exp(logit - max);
      for (int64_t l = 0; l < head.layers; ++l) to[bg * head.layers + l] = static_cast<float>(logits[l] / total);
    }
  };
  parallel(query.size(0) * head.groups, run, head.grain());
}

// grad_scores (batch, groups, layers) holds the gradient of the weights and receives that of the scores.
void layer_attention_weights_backward(Tensor query, std::vector<Tensor> keys, double scale, bool sigmoid,
                                      Tensor weights, Tensor grad_scores, Tensor grad_query,
                                      std::vector<Tensor> grad_keys) {
  const Head head(query, keys, std::nullopt, scale, sigmoid);
  const float* weight = floats_of(weights);
  float* grad = floats_of(grad_scores);
  const TensorView to_query = view_of(grad_query);
  std::vector<TensorView> to_keys;
  for (const Tensor& key : grad_keys) to_keys.push_back(view_of(key));
  auto run = [&](int64_t begin, int64_t end) {
    std::vector<float> q(head.depth), k(head.depth), result(head.depth);
    std::vector<double> sum(head.depth);
    auto put = [&](const TensorView& view, int64_t bg) {
      scatter(view, bg / head.groups * view.stride[0] + bg % head.groups * view.stride[1], view.stride[2], head.depth,
              1.0f, result.data());
    };
    for (int64_t bg = begin; bg < end; ++bg) {
      const float* a = weight + bg * head.layers;
      float* da = grad + bg * head.layers;
      double delta = 0.0;
      if (!head.sigmoid)
        for (int64_t l = 0; l < head.layers; ++l) delta += double(a[l]) * da[l];
      std::fill(sum.begin(), sum.end(), 0.0);
      head.load(head.query, bg, q.data());
      for (int64_t l = 0; l < head.layers; ++l) {
        const double ds = head.sigmoid ? double(a[l]) * (1.0 - a[l]) * da[l] : a[l] * (da[l] - delta);
        da[l] = static_cast<float>(ds);
        head.load(head.keys[l], bg, k.data());
        for (int64_t i = 0; i < head.depth; ++i) {
          sum[i] += ds * k[i];
          result[i] = static_cast<float>(head.scale * ds * q[i]);
        }
        put(to_keys[l], bg);
      }
      for (int64_t i = 0; i < head.depth; ++i) result[i] = static_cast<float>(head.scale * sum[i]);
      put(to_query, bg);
    }
  };
  parallel(query.size(0) * head.groups, run, head.grain());
}

// --- the sum ------------------------------------------------------------------------------------------------------

struct Pointers {
  std::vector<void*> data;
  std::vector<int64_t> strides;

  explicit Pointers(const std::vector<Tensor>& tensors) {
    for (const Tensor& tensor : tensors) {
      data.push_back(tensor.data_ptr());
      strides.push_back(tensor.dim() > 0 ? tensor.stride(0) : 0);
    }
  }
};

void fill_problem(Problem& p, const Tensor& weights, const Tensor& like, const Pointers& values, int64_t maps,
                  bool channels_last) {
  p.batch = like.size(0), p.channels = like.size(1), p.positions = 1;
  for (int64_t i = 2; i < like.dim(); ++i) p.positions *= like.size(i);
  p.groups = weights.size(1), p.layers = weights.size(2);
  p.channels_last = channels_last;
  p.large = maps * like.numel() * like.element_size() >= kLargeBytes;
  p.dtype = dtype_of(like);
  p.weights = floats_of(weights);
  p.values = values.data.data();
  p.value_strides = values.strides.data();
}

void weighted_layer_sum_forward(Tensor weights, std::vector<Tensor> values, bool channels_last, Tensor out) {
  if (out.numel() == 0) return;
  const Pointers pointers(values);
  Forward p;
  fill_problem(p, weights, out, pointers, 1, channels_last);
  p.out = out.mutable_data_ptr();
  advise_huge_pages(p.out, out.numel() * out.element_size());
  p.out_stride = out.stride(0);
  parallel(tasks_of(p), best_kernels().forward, p);
}

void weighted_layer_sum_backward(Tensor grad_out, Tensor weights, std::vector<Tensor> values, bool channels_last,
                                 bool accumulate, std::optional<Tensor> grad_weights, std::vector<Tensor> grad_values) {
  const int64_t heads = weights.size(0) * weights.size(1), layers = weights.size(2);
  float* to = grad_weights ? floats_of(*grad_weights) : nullptr;
  if (to) std::fill(to, to + heads * layers, 0.0f);
  if (grad_out.numel() == 0) return;
  const Pointers pointers(values), grads(grad_values);
  if (!accumulate)
    for (Tensor& grad : grad_values) advise_huge_pages(grad.data_ptr(), grad.numel() * grad.element_size());
  Backward p;
  fill_problem(p, weights, grad_out, pointers, grad_values.size(), channels_last);
  p.grad_out = grad_out.const_data_ptr();
  p.grad_out_stride = grad_out.stride(0);
  p.grad_values = grads.data.empty() ? nullptr : grads.data.data();
  p.grad_value_strides = grads.strides.data();
  p.accumulate = accumulate;
  std::vector<float> partials(to ? tasks_of(p) * layers * (channels_last ? p.groups : 1) : 0);
  p.partials = to ? partials.data() : nullptr;
  parallel(tasks_of(p), best_kernels().backward, p);
  if (!to) return;
  // In a fixed order: no result depends on the number of threads.
  const int64_t parts = channels_last ? parts_of_image(p) : parts_of_row(p);
  for (int64_t b = 0; b < p.batch; ++b)
    for (int64_t part = 0; part < parts; ++part)
      for (int64_t g = 0; g < p.groups; ++g) {
        const int64_t slot = channels_last ? (b * parts + part) * p.groups + g : (b * p.groups + g) * parts + part;
        for (int64_t l = 0; l < layers; ++l) to[(b * p.groups + g) * layers + l] += partials[slot * layers + l];
      }
}

}  // namespace

FUSED_ATTN_REGISTER(layer_attention_weights,
                    "(Tensor query, Tensor[] keys, Tensor? bias, float scale, bool sigmoid, Tensor(a!) weights)",
                    "(Tensor query, Tensor[] keys, float scale, bool sigmoid, Tensor weights, Tensor(a!) grad_scores, "
                    "Tensor(b!) grad_query, Tensor(c!)[] grad_keys)")

FUSED_ATTN_REGISTER(weighted_layer_sum, "(Tensor weights, Tensor[] values, bool channels_last, Tensor(a!) out)",
                    "(Tensor grad_out, Tensor weights, Tensor[] values, bool channels_last, bool accumulate, "
                    "Tensor(a!)? grad_weights, Tensor(b!)[] grad_values)")

}  // namespace fused_attn::layer_attention
