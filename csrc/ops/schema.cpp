// The operator surface on one page: schemas, argument checks, and what happens under autocast and vmap and on
// backends that have no kernel here (Meta among them). Gradients: autograd.cpp. Kernels: cpu/ and cuda/.
#include "ops/ops.h"

#include <ATen/WrapDimUtils.h>
#include <ATen/autocast_mode.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <limits>

#include "ops/composites.h"

namespace mlpext {

TORCH_LIBRARY(mlpext, m) {
  m.def("activation(Tensor input, str name, float[] params) -> Tensor");
  m.def("activation_(Tensor(a!) input, str name, float[] params) -> Tensor(a!)");
  m.def(
      "activation_backward(Tensor grad_output, Tensor saved, str name, float[] params, bool from_output) -> "
      "Tensor");

  m.def("maxout(Tensor input, int pieces, int dim=-1) -> Tensor");
  m.def("maxout_forward(Tensor input, int pieces, int dim=-1) -> (Tensor output, Tensor index)");
  m.def("maxout_backward(Tensor grad_output, Tensor index, int pieces, int dim=-1) -> Tensor");

  m.def("linear_activation(Tensor input, Tensor weight, Tensor? bias, str name, float[] params) -> Tensor");
  m.def(
      "linear_activation_forward(Tensor input, Tensor weight, Tensor? bias, str name, float[] params, "
      "bool keep_preactivation) -> (Tensor output, Tensor preactivation)");
  m.def(
      "linear_activation_backward(Tensor grad_output, Tensor? input, Tensor? weight, Tensor? saved, str "
      "name, "
      "float[] params, bool from_output, bool[3] output_mask) -> (Tensor, Tensor, Tensor)");

  m.def("linear_maxout(Tensor input, Tensor weight, Tensor? bias) -> Tensor");
  m.def("linear_maxout_forward(Tensor input, Tensor weight, Tensor? bias) -> (Tensor output, Tensor index)");
  m.def(
      "linear_maxout_backward(Tensor grad_output, Tensor? input, Tensor? weight, Tensor index, int pieces, "
      "bool[3] output_mask) -> (Tensor, Tensor, Tensor)");

  m.def("mlp(Tensor input, Tensor[] weights, Tensor[] biases, str names, float[] params) -> Tensor");
  // `kept` are the outputs of all layers but the last, then what a device may add for its own backward (CUDA:
  // cuda/mlp.cpp), then, of those of them that need it, preactivations and indices of the winner; `last` is
  // that of the last layer.
  m.def(
      "mlp_forward(Tensor input, Tensor[] weights, Tensor[] biases, str names, float[] params) -> "
      "(Tensor output, Tensor last, Tensor[] kept)");
  // The gradients of input, weights and biases where output_mask has a 1.
  m.def(
      "mlp_backward(Tensor grad_output, Tensor input, Tensor[] weights, Tensor[] biases, Tensor[] kept, "
      "Tensor? last, bool last_is_output, str names, float[] params, int[] output_mask) -> Tensor[]");
}

std::size_t activation_index(std::string_view name, Params params) {
  for (std::size_t index = 0; index < activation_count; ++index) {
    const ActivationInfo& info = activation_infos[index];
    if (info.name == name) {
      TORCH_CHECK_VALUE(params.size() == info.params.size(), "params: activation '", name, "' takes ",
                        info.params.size(), " parameter(s), got ", params.size());
      return index;
    }
  }
  std::string known;
  for (const ActivationInfo& info : activation_infos)
    known += (known.empty() ? "" : ", ") + std::string(info.name);
  TORCH_CHECK_VALUE(false, "activation: unknown name '", name, "', expected one of ", known);
}

namespace {

template <class Number> bool holds(double param, bool to_the_last_digit) {
  return std::abs(param) <= static_cast<double>(std::numeric_limits<Number>::max()) &&
         (!to_the_last_digit || static_cast<double>(static_cast<Number>(static_cast<float>(param))) == param);
}

}  // namespace

bool usual(std::size_t activation, Params params, at::ScalarType dtype) {
  const ActivationInfo& info = activation_infos[activation];
  return info.usual(params.data()) && std::ranges::all_of(params, [&](double param) {
           switch (dtype) {
             case at::kFloat: return holds<float>(param, false);  // the kernels round there too
             case at::kHalf: return holds<c10::Half>(param, info.rounds_params);
             case at::kBFloat16: return holds<c10::BFloat16>(param, info.rounds_params);
             default: return true;
           }
         });
}

bool served(const Tensor& tensor) {
  const auto dtype = tensor.scalar_type();
  return (tensor.device().is_cpu() || (has_cuda && tensor.device().is_cuda())) &&
         tensor.layout() == at::kStrided &&
         (dtype == at::kFloat || dtype == at::kDouble || dtype == at::kBFloat16 || dtype == at::kHalf) &&
         !tensor.is_nested();
}

bool linear_served(const Tensor& input, const Tensor& weight, const OptionalTensor& bias) {
  if (!linear_maxout_served(input, weight, bias)) return false;
  // torch's linear takes a vector as weight, and broadcasts the bias.
  return weight.dim() >= 2 && (!bias || (bias->dim() == 1 && (bias->size(0) != 1 || weight.size(-2) == 1)));
}

bool linear_maxout_served(const Tensor& input, const Tensor& weight, const OptionalTensor& bias) {
  return served(input) && served(weight) && weight.device() == input.device() &&
         (!bias || (served(*bias) && bias->device() == input.device()));
}

Network::Network(at::TensorList weights, at::TensorList biases, std::string_view names, Params params)
    : weights(weights), biases(biases) {
  std::size_t used = 0;
  for (std::size_t begin = 0; begin <= names.size();) {
    const std::size_t end = std::min(names.find(',', begin), names.size());
    const std::string_view name = names.substr(begin, end - begin);
    begin = end + 1;
    Layer& layer = layers.emplace_back();
    layer = {name, {}, 0, name == "maxout"};
    if (layer.maxout) continue;
    const auto* info = std::ranges::find(activation_infos, name, &ActivationInfo::name);
    const std::size_t count = info == activation_infos.end() ? 0 : info->params.size();
    TORCH_CHECK_VALUE(used + count <= params.size(), "params: too few for ", names, ", got ", params.size());
    layer.params = params.slice(used, count);
    layer.activation = activation_index(name, layer.params);
    used += count;
  }
  TORCH_CHECK_VALUE(used == params.size(), "params: ", names, " take ", used, ", got ", params.size());
  TORCH_CHECK_VALUE(layers.size() == weights.size(), "names: ", layers.size(), " activations for ",
                    weights.size(), " weights");
  TORCH_CHECK_VALUE(biases.empty() || biases.size() == weights.size(), "biases: ", biases.size(), " for ",
                    weights.size(), " weights, expected as many or none");
}

Network::Keep Network::Layer::keep(at::ScalarType dtype) const {
  if (maxout) return winner;
  if (name == Identity::name) return nothing;
  const ActivationInfo& info = activation_infos[activation];
  const bool half = dtype == at::kHalf || dtype == at::kBFloat16;
  return info.output_suffices(params.data()) && !(half && info.coarse_in_half) ? output : preactivation;
}

bool Network::served(const Tensor& input) const {
  for (int64_t l = 0; l < size(); ++l) {
    const Layer& layer = layers[l];
    const bool own = layer.maxout ? linear_maxout_served(input, weights[l], bias(l))
                                  : linear_served(input, weights[l], bias(l)) &&
                                        usual(layer.activation, layer.params, input.scalar_type());
    if (!own || weights[l].scalar_type() != input.scalar_type()) return false;
  }
  return true;
}

at::ScalarType maxout_index_dtype(int64_t pieces) { return pieces <= 256 ? at::kByte : at::kInt; }

namespace {

void check_dtypes(const Tensor& input, const Tensor& weight, const OptionalTensor& bias) {
  TORCH_CHECK(weight.scalar_type() == input.scalar_type(), "weight: dtype ", weight.scalar_type(),
              " does not match input's ", input.scalar_type());
  TORCH_CHECK(!bias || bias->scalar_type() == input.scalar_type(), "bias: dtype ",
              bias ? bias->scalar_type() : input.scalar_type(), " does not match input's ",
              input.scalar_type());
}

void check_in_features(const Tensor& input, const Tensor& weight) {
  TORCH_CHECK(input.dim() >= 1 && input.size(-1) == weight.size(-1), "input: shape ", input.sizes(),
              " does not end in the in_features of weight, whose shape is ", weight.sizes(),
              "; expected (*, ", weight.size(-1), ")");
}

}  // namespace

void check_linear(const Tensor& input, const Tensor& weight, const OptionalTensor& bias) {
  TORCH_CHECK(weight.dim() == 2, "weight: shape ", weight.sizes(), ", expected (out_features, in_features)");
  check_in_features(input, weight);
  TORCH_CHECK(!bias || (bias->dim() == 1 && bias->size(0) == weight.size(0)), "bias: shape ",
              bias ? bias->sizes() : at::IntArrayRef(), ", expected (", weight.size(0),
              "), the out_features of weight");
  check_dtypes(input, weight, bias);
}

void check_linear_maxout(const Tensor& input, const Tensor& weight, const OptionalTensor& bias) {
  TORCH_CHECK(weight.dim() == 3 && weight.size(0) >= 1, "weight: shape ", weight.sizes(),
              ", expected (pieces, out_features, in_features) with at least one piece");
  check_in_features(input, weight);
  TORCH_CHECK(!bias || bias->sizes() == weight.sizes().slice(0, 2), "bias: shape ",
              bias ? bias->sizes() : at::IntArrayRef(), ", expected ", weight.sizes().slice(0, 2),
              ", the pieces and out_features of weight");
  check_dtypes(input, weight, bias);
}

int64_t check_maxout(const Tensor& input, int64_t pieces, int64_t dim) {
  dim = at::maybe_wrap_dim(dim, input.dim());
  TORCH_CHECK(input.dim() >= 1, "input: a 0-d tensor has no dimension to split into pieces");
  TORCH_CHECK(pieces >= 1 && input.size(dim) % pieces == 0, "pieces: ", pieces, " does not divide dimension ",
              dim, " of input, whose shape is ", input.sizes());
  return dim;
}

namespace {

using at::autocast::cached_cast;
constexpr c10::DispatchKeySet autocast_keys({c10::DispatchKey::AutocastCPU, c10::DispatchKey::AutocastCUDA});

at::DeviceType device_type(const Tensor& input) { return input.is_cuda() ? at::kCUDA : at::kCPU; }

// Native autocast runs softplus in float32 on CUDA, and every other activation in the dtype that comes.
bool autocasts_to_float(const Tensor& input, std::string_view name) {
  return input.is_cuda() && name == "softplus";
}

Tensor autocast_activation(const Tensor& input, std::string_view name, Params params) {
  c10::impl::ExcludeDispatchKeyGuard guard(autocast_keys);
  return ops::activation().call(
      autocasts_to_float(input, name) ? cached_cast(at::kFloat, input, device_type(input)) : input, name,
      params);
}

Tensor autocast_linear_activation(const Tensor& input, const Tensor& weight, const OptionalTensor& bias,
                                  std::string_view name, Params params) {
  c10::impl::ExcludeDispatchKeyGuard guard(autocast_keys);
  const auto device = device_type(input);
  const auto dtype = at::autocast::get_autocast_dtype(device);
  const Tensor x = cached_cast(dtype, input, device), w = cached_cast(dtype, weight, device);
  const OptionalTensor b = cached_cast(dtype, bias, device);
  if (autocasts_to_float(input, name))
    return ops::activation().call(ops::linear_activation().call(x, w, b, "identity", {}).to(at::kFloat), name,
                                  params);
  return ops::linear_activation().call(x, w, b, name, params);
}

Tensor autocast_linear_maxout(const Tensor& input, const Tensor& weight, const OptionalTensor& bias) {
  c10::impl::ExcludeDispatchKeyGuard guard(autocast_keys);
  const auto device = device_type(input);
  const auto dtype = at::autocast::get_autocast_dtype(device);
  return ops::linear_maxout().call(cached_cast(dtype, input, device), cached_cast(dtype, weight, device),
                                   cached_cast(dtype, bias, device));
}

Tensor autocast_mlp(const Tensor& input, at::TensorList weights, at::TensorList biases,
                    std::string_view names, Params params) {
  const auto device = device_type(input);
  if (autocasts_to_float(input, "softplus") && names.find("softplus") != names.npos)
    return composite::mlp(input, weights, biases, names, params);
  c10::impl::ExcludeDispatchKeyGuard guard(autocast_keys);
  const auto dtype = at::autocast::get_autocast_dtype(device);
  return ops::mlp().call(cached_cast(dtype, input, device), cached_cast(dtype, weights, device),
                         cached_cast(dtype, biases, device), names, params);
}

void register_autocast(torch::Library& m) {
  m.impl("activation", autocast_activation);
  m.impl("linear_activation", autocast_linear_activation);
  m.impl("linear_maxout", autocast_linear_maxout);
  m.impl("mlp", autocast_mlp);
}

void register_composites(torch::Library& m) {
  m.impl("activation", composite::activation);
  m.impl("activation_", composite::activation_);
  m.impl("activation_backward", composite::activation_backward);
  m.impl("maxout", composite::maxout);
  m.impl("maxout_forward", composite::maxout_forward);
  m.impl("maxout_backward", composite::maxout_backward);
  m.impl("linear_activation", composite::linear_activation);
  m.impl("linear_activation_forward", composite::linear_activation_forward);
  m.impl("linear_activation_backward", composite::linear_activation_backward);
  m.impl("linear_maxout", composite::linear_maxout);
  m.impl("linear_maxout_forward", composite::linear_maxout_forward);
  m.impl("linear_maxout_backward", composite::linear_maxout_backward);
  m.impl("mlp", composite::mlp);
  m.impl("mlp_forward", composite::mlp_forward);
  m.impl("mlp_backward", composite::mlp_backward);
}

}  // namespace

TORCH_LIBRARY_IMPL(mlpext, AutocastCPU, m) { register_autocast(m); }
TORCH_LIBRARY_IMPL(mlpext, AutocastCUDA, m) { register_autocast(m); }
TORCH_LIBRARY_IMPL(mlpext, FuncTorchBatched, m) { register_composites(m); }
// torch's fallback for functionalization takes no operator that returns its argument.
TORCH_LIBRARY_IMPL(mlpext, Functionalize, m) { m.impl("activation_", composite::activation_); }
TORCH_LIBRARY_IMPL(mlpext, CompositeExplicitAutograd, m) { register_composites(m); }

}  // namespace mlpext
