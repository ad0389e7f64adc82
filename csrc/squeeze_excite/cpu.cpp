// Registration of the CPU kernels: LibTorch tensors in, plain views to the kernels, work split over threads.

#include <algorithm>
#include <optional>
#include <stdexcept>
#include <vector>

#include "common/cpu_op.h"
#include "common/huge_pages.h"
#include "squeeze_excite/kernels.h"

namespace fused_attn::squeeze_excite {
namespace {

constexpr int64_t kChunkBytes = 1 << 21;  // of the maps of one chunk of samples
constexpr int64_t kSerialPack = 1 << 17;  // numbers that one thread packs sooner than several wake up
constexpr int64_t kSerialMaps = 1 << 16;  // numbers of maps that one thread passes over sooner than several wake up
constexpr int64_t kGroupsOfRow = 4;       // groups of channels of a position that a thread takes at least

// What `run_pack` fills: `depth` rows of whole panels.
std::vector<float> panels_for(const Kernels& use, int64_t depth, int64_t columns) {
  return std::vector<float>((columns + use.panel - 1) / use.panel * use.panel * depth);
}

void run_pack(const Kernels& use, const Pack& pack) {
  const int64_t panels = (pack.columns + use.panel - 1) / use.panel;
  if (pack.columns * pack.depth < kSerialPack) return use.pack(pack, 0, panels);
  parallel(panels, use.pack, pack);
}

// Panels of a weight (outputs, inputs) for a product with its inputs, or with `outputs_first` its outputs, as depth.
std::vector<float> pack_weight(const Kernels& use, const Tensor& weight, bool outputs_first) {
  const TensorView view = view_of(weight);
  const int64_t deep = outputs_first ? 0 : 1, wide = 1 - deep;
  std::vector<float> panels = panels_for(use, weight.size(deep), weight.size(wide));
  run_pack(use, {.from = view,
                 .depth = weight.size(deep),
                 .columns = weight.size(wide),
                 .split = weight.size(wide),
                 .depth_stride = view.stride[deep],
                 .column_stride = view.stride[wide],
                 .to = panels.data()});
  return panels;
}

void fill_problem(Problem& p, const Tensor& x, const Tensor& fc1_weight, const std::optional<Tensor>& fc2_weight,
                  const std::optional<Tensor>& result, int64_t activation, int64_t gate, bool channels_last, Tensor& z,
                  Tensor& preactivation, Tensor& scale) {
  p.batch = x.size(0), p.channels = x.size(1), p.positions = x.size(2) * x.size(3);
  p.features = result ? result->size(1) : 0, p.hidden = fc1_weight.size(0);
  p.one_layer = !fc2_weight;
  p.activation = static_cast<Activation>(activation), p.gate = static_cast<Gate>(gate);
  p.channels_last = channels_last || p.positions == 1;
  p.dtype = dtype_of(x);
  // Few channels at a position are mostly ends of vectors, which cannot be streamed.
  p.large = x.numel() * x.element_size() >= kLargeBytes && (!p.channels_last || p.channels >= 64);
  // Several samples share one pass over the small layers' weights; their maps must stay in the cache meanwhile.
  const int64_t bytes = p.map() * x.element_size();
  p.chunk = std::clamp<int64_t>(kChunkBytes / bytes, 1, 8);
  p.x = x.const_data_ptr();
  p.result = view_of(result);
  p.z = floats_of(z), p.preactivation = floats_of(preactivation), p.scale = floats_of(scale);
}

// Fewer chunks than threads: each step of the pass is split over channels, which costs the second read from the cache.
// Channels last, a thread takes 64 channels or so: less than that of every row is slower than to leave a thread idle.
template <class P>
void run(const Pass<P>& pass, const P& p) {
  const bool split = p.chunks() < torch::stable::get_num_threads() && p.batch * p.map() >= kSerialMaps;
  if (!split) return parallel(p.chunks(), pass.chunks, p);
  const int64_t groups = p.batch * p.groups(), grain = p.channels_last ? kGroupsOfRow : 1;
  parallel(groups, pass.sums, p, grain);
  parallel(p.chunks(), pass.layers, p);
  parallel(groups, pass.writes, p, grain);
}

void* data_or_null(Tensor& tensor) { return tensor.numel() > 0 ? tensor.mutable_data_ptr() : nullptr; }

// The memory of a map that was just allocated.
void* new_map(Tensor& tensor) {
  void* data = data_or_null(tensor);
  advise_huge_pages(data, tensor.numel() * tensor.element_size());
  return data;
}

void squeeze_excite_forward(Tensor x, Tensor fc1_weight, std::optional<Tensor> fc1_bias,
                            std::optional<Tensor> fc2_weight, std::optional<Tensor> fc2_bias,
                            std::optional<Tensor> result, std::optional<Tensor> share, std::optional<Tensor> residual,
                            bool relu, int64_t hidden_activation, int64_t gate, bool channels_last, Tensor out,
                            Tensor z, Tensor preactivation, Tensor scale) {
  Forward p;
  fill_problem(p, x, fc1_weight, fc2_weight, result, hidden_activation, gate, channels_last, z, preactivation, scale);
  if (p.batch == 0) return;
  p.relu = relu;
  p.bias1 = view_of(fc1_bias), p.bias2 = view_of(fc2_bias), p.share = view_of(share);
  p.residual = residual ? residual->const_data_ptr() : nullptr;
  p.out = new_map(out);
  const Kernels& use = best_kernels();
  const auto fc1 = pack_weight(use, fc1_weight, false);
  const auto fc2 = fc2_weight ? pack_weight(use, *fc2_weight, false) : std::vector<float>{};
  p.fc1 = fc1.data(), p.fc2 = fc2.data();
  run(use.forward, p);
}

void squeeze_excite_backward(Tensor grad_out, Tensor x, Tensor fc1_weight, std::optional<Tensor> fc2_weight,
                             std::optional<Tensor> result, std::optional<Tensor> out, Tensor z, Tensor preactivation,
                             Tensor scale, int64_t hidden_activation, int64_t gate, bool channels_last, Tensor grad_x,
                             Tensor grad_fc1_weight, Tensor grad_fc1_bias, Tensor grad_fc2_weight, Tensor grad_fc2_bias,
                             Tensor grad_result, Tensor grad_share, Tensor grad_residual) {
  Backward p;
  fill_problem(p, x, fc1_weight, fc2_weight, result, hidden_activation, gate, channels_last, z, preactivation, scale);
  p.relu = out.has_value();
  p.grad_out = grad_out.const_data_ptr(), p.out = out ? out->const_data_ptr() : nullptr;
  p.grad_x = new_map(grad_x), p.grad_residual = new_map(grad_residual);
  p.grad_result = data_or_null(grad_result), p.grad_share = data_or_null(grad_share);
  p.grad_fc1 = grad_fc1_weight.mutable_data_ptr(), p.grad_bias1 = grad_fc1_bias.mutable_data_ptr();
  p.grad_fc2 = data_or_null(grad_fc2_weight), p.grad_bias2 = data_or_null(grad_fc2_bias);

  const Kernels& use = best_kernels();
  const auto fc2 = fc2_weight ? pack_weight(use, *fc2_weight, true) : std::vector<float>{};
  const auto fc1 = pack_weight(use, fc1_weight, true);
  p.fc2 = fc2.data(), p.fc1 = fc1.data();
  std::vector<float> grad_logits(p.batch * padded(p.channels));
  std::vector<float> grad_first(p.one_layer ? 0 : p.batch * padded(p.hidden));
  std::vector<float> units(p.one_layer ? 0 : p.batch * p.hidden);
  std::vector<float> grad_input(p.batch * padded(p.columns()));
  p.grad_logits = grad_logits.data(), p.grad_first = p.one_layer ? p.grad_logits : grad_first.data();
  p.units = units.data(), p.grad_input = grad_input.data();
  run(use.backward, p);

  // One task sums over the whole batch in the order of the samples: the same bits at any number of threads.
  std::vector<float> inputs = panels_for(use, p.batch, p.columns());
  run_pack(use, {.from = p.result,
                 .tail = view_of(z),
                 .depth = p.batch,
                 .columns = p.columns(),
                 .split = p.features,
                 .depth_stride = p.result.stride[0],
                 .column_stride = p.result.stride[1],
                 .tail_depth_stride = p.channels,
                 .tail_column_stride = 1,
                 .to = inputs.data()});
  p.input_panels = inputs.data();
  std::vector<float> unit_panels;
  if (!p.one_layer) {
    unit_panels = panels_for(use, p.batch, p.hidden);
    run_pack(use, {.from = {units.data()},
                   .depth = p.batch,
                   .columns = p.hidden,
                   .split = p.hidden,
                   .depth_stride = p.hidden,
                   .column_stride = 1,
                   .to = unit_panels.data()});
  }
  p.unit_panels = unit_panels.data();
  parallel((padded(p.hidden) + (p.one_layer ? 0 : padded(p.channels))) / kRowGroup, use.weight_grads, p);
}

}  // namespace

FUSED_ATTN_REGISTER(
    squeeze_excite,
    "(Tensor x, Tensor fc1_weight, Tensor? fc1_bias, Tensor? fc2_weight, Tensor? fc2_bias, Tensor? result, "
    "Tensor? result_share, Tensor? residual, bool relu, int hidden_activation, int gate, bool channels_last, "
    "Tensor(a!) out, Tensor(b!) z, Tensor(c!) preactivation, Tensor(d!) scale)",
    "(Tensor grad_out, Tensor x, Tensor fc1_weight, Tensor? fc2_weight, Tensor? result, Tensor? out, Tensor z, "
    "Tensor preactivation, Tensor scale, int hidden_activation, int gate, bool channels_last, Tensor(a!) grad_x, "
    "Tensor(b!) grad_fc1_weight, Tensor(c!) grad_fc1_bias, Tensor(d!) grad_fc2_weight, Tensor(e!) grad_fc2_bias, "
    "Tensor(f!) grad_result, Tensor(g!) grad_result_share, Tensor(h!) grad_residual)")

}  // namespace fused_attn::squeeze_excite
