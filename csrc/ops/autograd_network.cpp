// The gradient of a whole network: one node, whose backward goes through the layers without Python or a graph
// in between. See autograd.cpp for when.
#include <ATen/ops/linear.h>
#include <torch/library.h>

#include "ops/network.h"
#include "ops/node.h"

namespace mlpext {
namespace {

struct MlpRule : DynamicArity {
  static constexpr const char* name = "MlpBackward0";
  // Saved: input, weights, biases, what mlp_forward keeps, and what the last activation's derivative comes
  // from, if anything.

  std::vector<int64_t> activations;
  std::vector<double> params;
  int64_t layers = 0;
  bool has_biases = false, has_last = false, from_output = false;
  // As LinearActivationRule's, of the network's output.
  std::optional<c10::VariableVersion> version;
  uint32_t saved_version = 0;
  std::size_t count = 0;  // of saved tensors

  bool saves_output(std::size_t i) const { return from_output && i + 1 == count; }
  bool output_changed() const { return version && version->current_version() != saved_version; }

  // A graph goes forward again from the input, and wants all of it but what was kept.
  Want wants(std::size_t i, const PerInput<bool>& mask, bool graph) const {
    const std::size_t n = layers, arguments = mask.size();
    if (i >= arguments) return graph || (saves_output(i) && output_changed()) ? Want::nothing : Want::values;
    const std::size_t layer = i == 0 ? 0 : (i - 1) % n;
    const bool again = graph || (output_changed() && layer == n - 1);
    const auto asked_below = [&] {  // whether a gradient passes through W of this layer
      if (mask[0]) return true;
      for (std::size_t j = 1; j < arguments; ++j)
        if (mask[j] && (j - 1) % n < layer) return true;
      return false;
    };
    return again || (i == 0 ? mask[1] : i <= n && asked_below()) ? Want::values : Want::shape;
  }
  template <class Visit> void attributes(Visit&& visit) {
    visit(activations), visit(params), visit(layers), visit(has_biases), visit(has_last), visit(from_output);
  }

  variable_list backward(const variable_list& grads, const PerSaved<Tensor>& tensors,
                         const PerInput<bool>& mask) const {
    if (!grads[0].defined()) return variable_list(mask.size());
    const at::TensorList all = tensors;
    const std::size_t n = layers, end = all.size() - has_last;
    const at::TensorList weights = all.slice(1, n), biases = all.slice(1 + n, has_biases ? n : 0);
    const at::TensorList kept = all.slice(mask.size(), end - mask.size());
    const c10::SmallVector<int64_t, 17> asked(mask.begin(), mask.end());
    if (at::GradMode::is_enabled())
      return composite::mlp_backward_from_input(grads[0], all[0], weights, biases, activations, params,
                                                asked);
    Tensor last = has_last ? all[end] : Tensor();
    bool last_is_output = from_output;
    if (has_last && !last.defined()) {
      const Network network(weights, biases, activations, params);
      last = at::linear(network.input_of(layers - 1, composite::gate_forward, all[0], kept), weights[n - 1],
                        network.bias(layers - 1));
      last_is_output = false;
    }
    return ops::mlp_backward().call(grads[0], all[0], weights, biases, kept, optional(last), last_is_output,
                                    activations, params, asked);
  }
};

Tensor mlp(DispatchKeySet keys, const Tensor& input, at::TensorList weights, at::TensorList biases,
           at::IntArrayRef activations, Params params) {
  const Network network(weights, biases, activations, params);
  if (!plain_eager(keys, input, weights, biases) || !network.is_supported(input))
    return composite::mlp(input, weights, biases, activations, params);

  const bool requires_grad = compute_requires_grad(input, weights, biases);
  at::AutoDispatchBelowADInplaceOrView guard;
  keys = keys & c10::after_autograd_keyset;
  if (!requires_grad) return ops::mlp().redispatch(keys, input, weights, biases, activations, params);

  // Frozen layers before the first one that learns keep nothing.
  std::size_t first = 0;
  if (!input.requires_grad())
    while (!weights[first].requires_grad() && (biases.empty() || !biases[first].requires_grad())) ++first;
  Tensor x = input;
  if (first > 0) {
    const auto params_before = static_cast<std::size_t>(network.layers[first].params.data() - params.data());
    x = ops::mlp().redispatch(keys, input, weights.slice(0, first),
                              biases.slice(0, biases.empty() ? 0 : first), activations.slice(0, first),
                              params.slice(0, params_before));
    activations = activations.slice(first);
    params = params.slice(params_before);
    weights = weights.slice(first);
    if (!biases.empty()) biases = biases.slice(first);
  }
  auto [output, last, kept] = ops::mlp_forward().redispatch(keys, x, weights, biases, activations, params);

  auto node = make_node<OpNode<MlpRule>>();
  node->set_next_edges(collect_next_edges(x, weights, biases));
  MlpRule& rule = node->rule;
  rule.activations = activations.vec();
  rule.params = params.vec();
  rule.layers = static_cast<int64_t>(weights.size());
  rule.has_biases = !biases.empty();
  rule.from_output = network.layers.back().kept(input.scalar_type()) == Kept::output;
  rule.has_last = rule.from_output || last.defined();
  rule.count = 1 + weights.size() + biases.size() + kept.size() + rule.has_last;
  node->saved.reserve(rule.count);
  const auto save = [&](const Tensor& tensor) {
    node->saved.emplace_back(SavedVariable(tensor, /*is_output=*/false));
  };
  const auto save_if = [&](bool for_gradients, const Tensor& tensor) {
    if (for_gradients) save(tensor);
    else node->saved.emplace_back(Reference(tensor));
  };
  save_if(node->should_compute_output(1), x);
  save_if(node->should_compute_output(0), weights[0]);
  for (const Tensor& weight : weights.slice(1)) save(weight);
  for (const Tensor& bias : biases) save_if(false, bias);
  for (const Tensor& tensor : kept) save(tensor);
  torch::autograd::set_history(output, node);
  if (rule.from_output) {
    node->saved.emplace_back(SavedVariable(output, /*is_output=*/true));
    rule.version = torch::autograd::impl::version_counter(output);
    rule.saved_version = rule.version->current_version();
  } else if (last.defined()) {
    save(last);
  }
  finish(node);
  return output;
}

std::vector<Tensor> mlp_backward(DispatchKeySet keys, const Tensor& grad_output, const Tensor& input,
                                 at::TensorList weights, at::TensorList biases, at::TensorList kept,
                                 const OptionalTensor& last, bool last_is_output, at::IntArrayRef activations,
                                 Params params, at::IntArrayRef output_mask) {
  // What was kept is no function of the input and the parameters.
  if (compute_requires_grad(grad_output, input, weights, biases) || has_tangent(input) ||
      has_tangent(weights) || has_tangent(biases))
    return composite::mlp_backward_from_input(grad_output, input, weights, biases, activations, params,
                                              output_mask);
  if (!plain_eager(keys, grad_output))
    return composite::mlp_backward(grad_output, input, weights, biases, kept, last, last_is_output,
                                   activations, params, output_mask);
  at::AutoDispatchBelowADInplaceOrView guard;
  return ops::mlp_backward().redispatch(keys & c10::after_autograd_keyset, grad_output, input, weights,
                                        biases, kept, last, last_is_output, activations, params, output_mask);
}

}  // namespace

TORCH_LIBRARY_IMPL(mlpext, Autograd, m) {
  m.impl("mlp", mlp);
  m.impl("mlp_backward", mlp_backward);
  m.impl("mlp_forward", composite::mlp_forward);  // by itself, as torch's operators (autograd.cpp)
}

}  // namespace mlpext
