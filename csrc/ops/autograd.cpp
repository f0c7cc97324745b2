// Gradients of the operators of one layer: a node for each family (node.h), on the Autograd key.
//
// The kernels here decide once whether a call is plain eager. Every other call, tensors and parameters
// without a kernel, and the backward operators whenever a graph of the backward is asked for, run torch's own
// operators instead (`composite`, signatures.h). So derivatives of every order come from one rule, and there
// is no hand-written double backward, jvp or batching rule. A rule's backward calls its backward operator at
// the top of the dispatcher, not a kernel: a graph of it and hooks on its arguments come about there.
#include <ATen/TensorOperators.h>
#include <ATen/WrapDimUtils.h>
#include <ATen/ops/linear.h>
#include <torch/library.h>

#include "ops/network.h"
#include "ops/node.h"

namespace mlpext {
namespace {

struct ActivationRule : StaticArity<1, 1> {
  static constexpr const char* name = "ActivationBackward0";

  ActivationRef activation;
  bool from_output = false;

  bool saves_output(std::size_t) const { return from_output; }
  Want wants(std::size_t, PerInput<bool>, bool) const { return Want::values; }
  template <class Visit> void attributes(Visit&& visit) { activation.attributes(visit), visit(from_output); }
  variable_list backward(const variable_list& grads, const PerSaved<Tensor>& tensors,
                         PerInput<bool> mask) const {
    if (!grads[0].defined() || !mask[0]) return {Tensor()};
    return {ops::activation_backward().call(grads[0], tensors[0], activation.name(), activation.params(),
                                            from_output)};
  }
};

Tensor activation(DispatchKeySet keys, const Tensor& input, std::string_view name, Params params) {
  const std::size_t index = activation_index(name, params);
  const ActivationInfo& info = activation_infos[index];
  if (!plain_eager(keys, input) || !has_kernel(input, index, params))
    return composite::activation(input, name, params);

  auto forward = [&] {
    at::AutoDispatchBelowADInplaceOrView guard;
    return ops::activation().redispatch(keys & c10::after_autograd_keyset, input, name, params);
  };
  if (!compute_requires_grad(input)) return forward();

  auto node = make_node<OpNode<ActivationRule>>();
  node->set_next_edges(collect_next_edges(input));
  node->rule = {{}, {index, params}, info.keeps_output};
  if (!info.keeps_output) node->saved[0] = SavedVariable(input, /*is_output=*/false);
  Tensor output = forward();
  torch::autograd::set_history(output, node);
  if (info.keeps_output) node->saved[0] = SavedVariable(output, /*is_output=*/true);
  finish(node);
  return output;
}

Tensor& activation_(DispatchKeySet keys, Tensor& input, std::string_view name, Params params) {
  const std::size_t index = activation_index(name, params);
  const ActivationInfo& info = activation_infos[index];
  const bool keeps_output = info.output_suffices(params.data());
  // With a negative slope the sign of x is lost with x: torch refuses the backward of the in-place form.
  if (!plain_eager(keys, input) || !has_kernel(input, index, params) ||
      info.has_derivative_from_output != keeps_output)
    return composite::activation_(input, name, params);

  const bool requires_grad = compute_requires_grad(input);
  torch::autograd::check_inplace(input, requires_grad);
  auto node = requires_grad ? make_node<OpNode<ActivationRule>>() : nullptr;
  if (node) {
    node->set_next_edges(collect_next_edges(input));
    node->rule = {{}, {index, params}, keeps_output};
    if (!keeps_output) node->saved[0] = SavedVariable(input.clone(), /*is_output=*/false);
  }
  {
    at::AutoDispatchBelowAutograd guard;
    ops::activation_().redispatch(keys & c10::after_autograd_keyset, input, name, params);
  }
  if (node) {
    torch::autograd::rebase_history(input, node);
    if (keeps_output)
      node->saved[0] = SavedVariable(input, /*is_output=*/true, /*is_inplace_on_view=*/input.is_view());
    finish(node);
  }
  return input;
}

Tensor& bump_version(DispatchKeySet keys, Tensor& input, std::string_view name, Params params) {
  {
    at::AutoDispatchBelowADInplaceOrView guard;
    ops::activation_().redispatch(keys & c10::after_ADInplaceOrView_keyset, input, name, params);
  }
  torch::autograd::increment_version(input);
  return input;
}

Tensor activation_backward(DispatchKeySet keys, const Tensor& grad_output, const Tensor& saved,
                           std::string_view name, Params params, bool from_output) {
  if (!plain_eager(keys, grad_output, saved) || compute_requires_grad(grad_output, saved))
    return composite::activation_backward(grad_output, saved, name, params, from_output);
  at::AutoDispatchBelowADInplaceOrView guard;
  return ops::activation_backward().redispatch(keys & c10::after_autograd_keyset, grad_output, saved, name,
                                               params, from_output);
}

struct MaxoutRule : StaticArity<1, 1> {  // saved: the index of the piece that won
  static constexpr const char* name = "MaxoutBackward0";

  int64_t pieces = 1, dim = 0;

  bool saves_output(std::size_t) const { return false; }
  Want wants(std::size_t, PerInput<bool>, bool) const { return Want::values; }
  template <class Visit> void attributes(Visit&& visit) { visit(pieces), visit(dim); }
  variable_list backward(const variable_list& grads, const PerSaved<Tensor>& tensors,
                         PerInput<bool> mask) const {
    if (!grads[0].defined() || !mask[0]) return {Tensor()};
    return {ops::maxout_backward().call(grads[0], tensors[0], pieces, dim)};
  }
};

Tensor maxout(DispatchKeySet keys, const Tensor& input, int64_t pieces, int64_t dim) {
  if (!plain_eager(keys, input) || !is_supported(input)) return composite::maxout(input, pieces, dim);
  const bool requires_grad = compute_requires_grad(input);
  at::AutoDispatchBelowADInplaceOrView guard;
  if (!requires_grad) return ops::maxout().redispatch(keys & c10::after_autograd_keyset, input, pieces, dim);

  auto node = make_node<OpNode<MaxoutRule>>();
  node->set_next_edges(collect_next_edges(input));
  auto [output, index] =
      ops::maxout_forward().redispatch(keys & c10::after_autograd_keyset, input, pieces, dim);
  node->rule = {{}, pieces, at::maybe_wrap_dim(dim, input.dim())};
  node->saved[0] = SavedVariable(index, /*is_output=*/false);
  torch::autograd::set_history(output, node);
  finish(node);
  return output;
}

Tensor maxout_backward(DispatchKeySet keys, const Tensor& grad_output, const Tensor& index, int64_t pieces,
                       int64_t dim) {
  if (!plain_eager(keys, grad_output, index) || compute_requires_grad(grad_output))
    return composite::maxout_backward(grad_output, index, pieces, dim);
  at::AutoDispatchBelowADInplaceOrView guard;
  return ops::maxout_backward().redispatch(keys & c10::after_autograd_keyset, grad_output, index, pieces,
                                           dim);
}

struct LinearActivationRule : StaticArity<3, 4> {
  static constexpr const char* name = "LinearActivationBackward0";
  // `kept` is y where the derivative follows from it, else the pre-activation z, which is the node's second
  // output so that a graph of the backward reaches through it.
  enum Slot : std::size_t { input, weight, bias, kept };

  ActivationRef activation;
  bool from_output = false;
  // y's version counter, and its count when y was saved: after `y += skip` the derivative comes from z =
  // linear(x, W, b) again.
  std::optional<c10::VariableVersion> version;
  uint32_t saved_version = 0;

  bool saves_output(std::size_t i) const { return i == kept; }
  bool is_identity() const { return activation.index == index_of<Identity>; }
  bool output_changed() const { return version && version->current_version() != saved_version; }

  Want wants(std::size_t i, Mask mask, bool) const {
    const bool again = output_changed();
    const bool wanted =
        i == kept ? !is_identity() && !again : again || (i == input && mask[1]) || (i == weight && mask[0]);
    return wanted ? Want::values : Want::nothing;
  }
  template <class Visit> void attributes(Visit&& visit) { activation.attributes(visit), visit(from_output); }
  variable_list backward(const variable_list& grads, const PerSaved<Tensor>& tensors, Mask mask) const {
    if (!grads[0].defined() && !(grads.size() > 1 && grads[1].defined()))
      return {Tensor(), Tensor(), Tensor()};
    Tensor result = tensors[kept];
    bool derive_from_output = from_output;
    if (!result.defined() && !is_identity()) {
      result = at::linear(tensors[input], tensors[weight], optional(tensors[bias]));
      derive_from_output = false;
    }
    auto linear_backward = [&](const Tensor& grad_output, std::string_view name, Params params) {
      auto [dx, dw, db] = ops::linear_activation_backward().call(grad_output, optional(tensors[input]),
                                                                 optional(tensors[weight]), optional(result),
                                                                 name, params, derive_from_output, mask);
      return variable_list{dx, dw, db};
    };
    if (grads.size() == 1 || !grads[1].defined())
      return linear_backward(grads[0], activation.name(), activation.params());
    // The backward of a backward: z has a gradient of its own.
    Tensor dz = grads[1];
    if (grads[0].defined())
      dz = dz +
           ops::activation_backward().call(grads[0], result, activation.name(), activation.params(), false);
    return linear_backward(dz, Identity::name, {});
  }
};

Tensor linear_activation(DispatchKeySet keys, const Tensor& input, const Tensor& weight,
                         const OptionalTensor& bias, std::string_view name, Params params) {
  const std::size_t index = activation_index(name, params);
  const ActivationInfo& info = activation_infos[index];
  if (!plain_eager(keys, input, weight, bias) || !is_supported_linear(input, weight, bias) ||
      !has_kernel(input, index, params))
    return composite::linear_activation(input, weight, bias, name, params);

  const bool requires_grad = compute_requires_grad(input, weight, bias);
  at::AutoDispatchBelowADInplaceOrView guard;
  keys = keys & c10::after_autograd_keyset;
  if (!requires_grad) return ops::linear_activation().redispatch(keys, input, weight, bias, name, params);

  const Kept kept = kept_for_backward(index, params, input.scalar_type());
  auto [output, z] =
      ops::linear_activation_forward().redispatch(keys, input, weight, bias, name, params,
                                                  /*keep_preactivation=*/kept == Kept::preactivation);

  using Rule = LinearActivationRule;
  auto node = make_node<OpNode<Rule>>();
  node->set_next_edges(collect_next_edges(input, weight, bias));
  node->rule.activation = {index, params};
  node->rule.from_output = kept != Kept::preactivation;
  // Where torch's activation keeps its input (elu and its family), `y += skip` trains in torch, and so must
  // it here; elsewhere it may where x is at hand.
  const bool for_weight = node->should_compute_output(1);
  const bool recomputable = kept == Kept::output && (for_weight || !info.keeps_output);
  const auto save = [&](Rule::Slot i, const Tensor& tensor, bool for_gradients) {
    if (for_gradients) node->saved[i] = SavedVariable(tensor, /*is_output=*/false);
    else if (recomputable) node->saved[i] = Reference(tensor);
  };
  save(Rule::input, input, for_weight);
  save(Rule::weight, weight, node->should_compute_output(0));
  if (bias) save(Rule::bias, *bias, false);

  torch::autograd::set_history(output, node);
  if (kept == Kept::output) {
    node->saved[Rule::kept] = SavedVariable(output, /*is_output=*/true);
    if (recomputable) {
      node->rule.version = torch::autograd::impl::version_counter(output);
      node->rule.saved_version = node->rule.version->current_version();
    }
  } else if (kept == Kept::preactivation) {
    torch::autograd::set_history(z, node);
    node->saved[Rule::kept] = SavedVariable(z, /*is_output=*/true);
  }
  finish(node);
  return output;
}

std::tuple<Tensor, Tensor, Tensor> linear_activation_backward(
    DispatchKeySet keys, const Tensor& grad_output, const OptionalTensor& input, const OptionalTensor& weight,
    const OptionalTensor& saved, std::string_view name, Params params, bool from_output, Mask output_mask) {
  if (!plain_eager(keys, grad_output, input, weight, saved) ||
      compute_requires_grad(grad_output, input, weight, saved))
    return composite::linear_activation_backward(grad_output, input, weight, saved, name, params, from_output,
                                                 output_mask);
  at::AutoDispatchBelowADInplaceOrView guard;
  return ops::linear_activation_backward().redispatch(keys & c10::after_autograd_keyset, grad_output, input,
                                                      weight, saved, name, params, from_output, output_mask);
}

struct LinearMaxoutRule : StaticArity<3, 3> {
  static constexpr const char* name = "LinearMaxoutBackward0";
  enum Slot : std::size_t { input, weight, index };

  int64_t pieces = 1;

  bool saves_output(std::size_t) const { return false; }
  Want wants(std::size_t i, Mask mask, bool) const {
    return i == index || (i == input ? mask[1] : mask[0]) ? Want::values : Want::nothing;
  }
  template <class Visit> void attributes(Visit&& visit) { visit(pieces); }
  variable_list backward(const variable_list& grads, const PerSaved<Tensor>& tensors, Mask mask) const {
    if (!grads[0].defined()) return {Tensor(), Tensor(), Tensor()};
    auto [dx, dw, db] = ops::linear_maxout_backward().call(
        grads[0], optional(tensors[input]), optional(tensors[weight]), tensors[index], pieces, mask);
    return {dx, dw, db};
  }
};

Tensor linear_maxout(DispatchKeySet keys, const Tensor& input, const Tensor& weight,
                     const OptionalTensor& bias) {
  if (!plain_eager(keys, input, weight, bias) || !is_supported_linear_maxout(input, weight, bias))
    return composite::linear_maxout(input, weight, bias);

  const bool requires_grad = compute_requires_grad(input, weight, bias);
  at::AutoDispatchBelowADInplaceOrView guard;
  keys = keys & c10::after_autograd_keyset;
  if (!requires_grad) return ops::linear_maxout().redispatch(keys, input, weight, bias);

  auto [output, index] = ops::linear_maxout_forward().redispatch(keys, input, weight, bias);
  using Rule = LinearMaxoutRule;
  auto node = make_node<OpNode<Rule>>();
  node->set_next_edges(collect_next_edges(input, weight, bias));
  node->rule.pieces = weight.size(0);
  if (node->should_compute_output(1)) node->saved[Rule::input] = SavedVariable(input, /*is_output=*/false);
  if (node->should_compute_output(0)) node->saved[Rule::weight] = SavedVariable(weight, /*is_output=*/false);
  node->saved[Rule::index] = SavedVariable(index, /*is_output=*/false);
  torch::autograd::set_history(output, node);
  finish(node);
  return output;
}

std::tuple<Tensor, Tensor, Tensor> linear_maxout_backward(DispatchKeySet keys, const Tensor& grad_output,
                                                          const OptionalTensor& input,
                                                          const OptionalTensor& weight, const Tensor& index,
                                                          int64_t pieces, Mask output_mask) {
  if (!plain_eager(keys, grad_output, input, weight, index) ||
      compute_requires_grad(grad_output, input, weight))
    return composite::linear_maxout_backward(grad_output, input, weight, index, pieces, output_mask);
  at::AutoDispatchBelowADInplaceOrView guard;
  return ops::linear_maxout_backward().redispatch(keys & c10::after_autograd_keyset, grad_output, input,
                                                  weight, index, pieces, output_mask);
}

}  // namespace

TORCH_LIBRARY_IMPL(mlpext, Autograd, m) {
  m.impl("activation", activation);
  m.impl("activation_", activation_);
  m.impl("activation_backward", activation_backward);
  m.impl("maxout", maxout);
  m.impl("maxout_backward", maxout_backward);
  m.impl("linear_activation", linear_activation);
  m.impl("linear_activation_backward", linear_activation_backward);
  m.impl("linear_maxout", linear_maxout);
  m.impl("linear_maxout_backward", linear_maxout_backward);
  // Called by themselves, the operators that also return what backward wants are differentiated as torch's
  // operators.
  m.impl("maxout_forward", composite::maxout_forward);
  m.impl("linear_activation_forward", composite::linear_activation_forward);
  m.impl("linear_maxout_forward", composite::linear_maxout_forward);
}

TORCH_LIBRARY_IMPL(mlpext, ADInplaceOrView, m) { m.impl("activation_", bump_version); }

}  // namespace mlpext
