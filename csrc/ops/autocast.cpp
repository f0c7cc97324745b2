// Autocast as torch's own: products run in its dtype, activations in the dtype that comes, softplus on CUDA
// in float32.
#include <ATen/autocast_mode.h>
#include <torch/library.h>

#include <algorithm>

#include "ops/network.h"

namespace mlpext {
namespace {

using at::autocast::cached_cast;
constexpr c10::DispatchKeySet autocast_keys({c10::DispatchKey::AutocastCPU, c10::DispatchKey::AutocastCUDA});

at::DeviceType device_type(const Tensor& input) { return input.is_cuda() ? at::kCUDA : at::kCPU; }

bool autocasts_to_float(const Tensor& input, std::string_view name) {
  return input.is_cuda() && name == Softplus::name;
}

Tensor autocast_activation(const Tensor& input, std::string_view name, Params params) {
  c10::impl::ExcludeDispatchKeyGuard guard(autocast_keys);
  return ops::activation().call(
      autocasts_to_float(input, name) ? cached_cast(at::kFloat, input, device_type(input)) : input, name,
      params);
}

// The tensors of a layer in autocast's dtype.
struct Layer {
  Tensor input, weight;
  OptionalTensor bias;

  Layer(const Tensor& x, const Tensor& w, const OptionalTensor& b) {
    const auto device = device_type(x);
    const auto dtype = at::autocast::get_autocast_dtype(device);
    input = cached_cast(dtype, x, device), weight = cached_cast(dtype, w, device);
    bias = cached_cast(dtype, b, device);
  }
};

Tensor autocast_linear_activation(const Tensor& input, const Tensor& weight, const OptionalTensor& bias,
                                  std::string_view name, Params params) {
  c10::impl::ExcludeDispatchKeyGuard guard(autocast_keys);
  const auto [x, w, b] = Layer(input, weight, bias);
  if (autocasts_to_float(input, name))
    return ops::activation().call(ops::linear_activation().call(x, w, b, Identity::name, {}).to(at::kFloat),
                                  name, params);
  return ops::linear_activation().call(x, w, b, name, params);
}

Tensor autocast_linear_maxout(const Tensor& input, const Tensor& weight, const OptionalTensor& bias) {
  c10::impl::ExcludeDispatchKeyGuard guard(autocast_keys);
  const auto [x, w, b] = Layer(input, weight, bias);
  return ops::linear_maxout().call(x, w, b);
}

Tensor autocast_gated(const Tensor& gate, const Tensor& value, std::string_view name, Params params) {
  // By torch's operators, each under autocast.
  if (autocasts_to_float(gate, name)) return composite::gated(gate, value, name, params);
  c10::impl::ExcludeDispatchKeyGuard guard(autocast_keys);
  return ops::gated().call(gate, value, name, params);
}

Tensor autocast_linear_gated(const Tensor& input, const Tensor& weight, const OptionalTensor& bias,
                             std::string_view name, Params params) {
  // By torch's operators, each under autocast.
  if (autocasts_to_float(input, name)) return composite::linear_gated(input, weight, bias, name, params);
  c10::impl::ExcludeDispatchKeyGuard guard(autocast_keys);
  const auto [x, w, b] = Layer(input, weight, bias);
  return ops::linear_gated().call(x, w, b, name, params);
}

Tensor autocast_mlp(const Tensor& input, at::TensorList weights, at::TensorList biases,
                    at::IntArrayRef activations, Params params) {
  const auto device = device_type(input);
  if (autocasts_to_float(input, Softplus::name) &&
      std::ranges::find(activations, int64_t(index_of<Softplus>)) != activations.end())
    return composite::mlp(input, weights, biases, activations, params);
  c10::impl::ExcludeDispatchKeyGuard guard(autocast_keys);
  const auto dtype = at::autocast::get_autocast_dtype(device);
  return ops::mlp().call(cached_cast(dtype, input, device), cached_cast(dtype, weights, device),
                         cached_cast(dtype, biases, device), activations, params);
}

void register_autocast(torch::Library& m) {
  m.impl("activation", autocast_activation);
  m.impl("gated", autocast_gated);
  m.impl("linear_activation", autocast_linear_activation);
  m.impl("linear_maxout", autocast_linear_maxout);
  m.impl("linear_gated", autocast_linear_gated);
  m.impl("mlp", autocast_mlp);
}

}  // namespace

TORCH_LIBRARY_IMPL(mlpext, AutocastCPU, m) { register_autocast(m); }
TORCH_LIBRARY_IMPL(mlpext, AutocastCUDA, m) { register_autocast(m); }

}  // namespace mlpext
