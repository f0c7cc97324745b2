// Gradients of f(gate) value and of gated layers: as autograd.cpp has it, which says how.
#include <ATen/TensorOperators.h>
#include <torch/library.h>

#include "ops/node.h"

namespace mlpext {
namespace {

struct GatedRule : StaticArity<2, 2> {
  static constexpr const char* name = "GatedBackward0";
  enum Slot : std::size_t { gate, value };

  ActivationRef activation;

  bool saves_output(std::size_t) const { return false; }
  // Both gradients need the gate, and that of the gate needs the value.
  Want wants(std::size_t i, GateMask mask, bool) const {
    return i == gate || mask[0] ? Want::values : Want::nothing;
  }
  template <class Visit> void attributes(Visit&& visit) { activation.attributes(visit); }
  variable_list backward(const variable_list& grads, const PerSaved<Tensor>& tensors, GateMask mask) const {
    if (!grads[0].defined()) return {Tensor(), Tensor()};
    auto [of_gate, of_value] = ops::gated_backward().call(grads[0], tensors[gate], optional(tensors[value]),
                                                          activation.name(), activation.params(), mask);
    return {of_gate, of_value};
  }
};

Tensor gated(DispatchKeySet keys, const Tensor& gate, const Tensor& value, std::string_view name,
             Params params) {
  const std::size_t index = activation_index(name, params);
  if (!plain_eager(keys, gate, value) || !has_gate_kernel(gate, value, index, params))
    return composite::gated(gate, value, name, params);

  const bool requires_grad = compute_requires_grad(gate, value);
  at::AutoDispatchBelowADInplaceOrView guard;
  Tensor output = ops::gated().redispatch(keys & c10::after_autograd_keyset, gate, value, name, params);
  if (!requires_grad) return output;

  using Rule = GatedRule;
  auto node = make_node<OpNode<Rule>>();
  node->set_next_edges(collect_next_edges(gate, value));
  node->rule.activation = {index, params};
  node->saved[Rule::gate] = SavedVariable(gate, /*is_output=*/false);
  if (node->should_compute_output(0)) node->saved[Rule::value] = SavedVariable(value, /*is_output=*/false);
  torch::autograd::set_history(output, node);
  finish(node);
  return output;
}

std::tuple<Tensor, Tensor> gated_backward(DispatchKeySet keys, const Tensor& grad_output, const Tensor& gate,
                                          const OptionalTensor& value, std::string_view name, Params params,
                                          GateMask output_mask) {
  if (!plain_eager(keys, grad_output, gate, value) || compute_requires_grad(grad_output, gate, value))
    return composite::gated_backward(grad_output, gate, value, name, params, output_mask);
  at::AutoDispatchBelowADInplaceOrView guard;
  return ops::gated_backward().redispatch(keys & c10::after_autograd_keyset, grad_output, gate, value, name,
                                          params, output_mask);
}

struct LinearGatedRule : StaticArity<3, 3> {
  static constexpr const char* name = "LinearGatedBackward0";
  // `kept` is z, the node's second output, so that a graph of the backward reaches through it.
  enum Slot : std::size_t { input, weight, kept };

  ActivationRef activation;

  bool saves_output(std::size_t i) const { return i == kept; }
  Want wants(std::size_t i, Mask mask, bool) const {
    return i == kept || (i == input ? mask[1] : mask[0]) ? Want::values : Want::nothing;
  }
  template <class Visit> void attributes(Visit&& visit) { activation.attributes(visit); }
  variable_list backward(const variable_list& grads, const PerSaved<Tensor>& tensors, Mask mask) const {
    const bool through_output = grads[0].defined(), through_z = grads.size() > 1 && grads[1].defined();
    if (!through_output && !through_z) return {Tensor(), Tensor(), Tensor()};
    const OptionalTensor x = optional(tensors[input]), w = optional(tensors[weight]);
    if (!through_z) {
      auto [dx, dw, db] = ops::linear_gated_backward().call(grads[0], x, w, tensors[kept], activation.name(),
                                                            activation.params(), mask);
      return {dx, dw, db};
    }
    // The backward of a backward: z has a gradient of its own.
    Tensor dz = grads[1];
    if (through_output)
      dz = dz + composite::gate_backward(grads[0], tensors[kept], activation.name(), activation.params());
    auto [dx, dw, db] = ops::linear_activation_backward().call(
        dz, x, w ? OptionalTensor(w->flatten(0, 1)) : w, std::nullopt, Identity::name, {},
        /*from_output=*/false, mask);
    return {dx, composite::in_halves(dw), composite::in_halves(db)};
  }
};

Tensor linear_gated(DispatchKeySet keys, const Tensor& input, const Tensor& weight,
                    const OptionalTensor& bias, std::string_view name, Params params) {
  const std::size_t index = activation_index(name, params);
  if (!plain_eager(keys, input, weight, bias) || !is_supported_linear_maxout(input, weight, bias) ||
      !has_kernel(input, index, params))
    return composite::linear_gated(input, weight, bias, name, params);

  const bool requires_grad = compute_requires_grad(input, weight, bias);
  at::AutoDispatchBelowADInplaceOrView guard;
  keys = keys & c10::after_autograd_keyset;
  if (!requires_grad) return ops::linear_gated().redispatch(keys, input, weight, bias, name, params);

  auto [output, z] = ops::linear_gated_forward().redispatch(keys, input, weight, bias, name, params);
  using Rule = LinearGatedRule;
  auto node = make_node<OpNode<Rule>>();
  node->set_next_edges(collect_next_edges(input, weight, bias));
  node->rule.activation = {index, params};
  if (node->should_compute_output(1)) node->saved[Rule::input] = SavedVariable(input, /*is_output=*/false);
  if (node->should_compute_output(0)) node->saved[Rule::weight] = SavedVariable(weight, /*is_output=*/false);
  torch::autograd::set_history(output, node);
  torch::autograd::set_history(z, node);
  node->saved[Rule::kept] = SavedVariable(z, /*is_output=*/true);
  finish(node);
  return output;
}

std::tuple<Tensor, Tensor, Tensor> linear_gated_backward(DispatchKeySet keys, const Tensor& grad_output,
                                                         const OptionalTensor& input,
                                                         const OptionalTensor& weight,
                                                         const Tensor& preactivation, std::string_view name,
                                                         Params params, Mask output_mask) {
  if (!plain_eager(keys, grad_output, input, weight, preactivation) ||
      compute_requires_grad(grad_output, input, weight, preactivation))
    return composite::linear_gated_backward(grad_output, input, weight, preactivation, name, params,
                                            output_mask);
  at::AutoDispatchBelowADInplaceOrView guard;
  return ops::linear_gated_backward().redispatch(keys & c10::after_autograd_keyset, grad_output, input,
                                                 weight, preactivation, name, params, output_mask);
}

}  // namespace

TORCH_LIBRARY_IMPL(mlpext, Autograd, m) {
  m.impl("gated", gated);
  m.impl("gated_backward", gated_backward);
  m.impl("linear_gated", linear_gated);
  m.impl("linear_gated_backward", linear_gated_backward);
  m.impl("linear_gated_forward", composite::linear_gated_forward);
}

}  // namespace mlpext
