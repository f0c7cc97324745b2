// What a list of layers must fulfil, what its layers keep, and their composites: the mlp operators by those
// of one layer.
#include "ops/network.h"

namespace mlpext {

Network::Network(at::TensorList weights, at::TensorList biases, at::IntArrayRef activations, Params params)
    : weights(weights), biases(biases) {
  TORCH_CHECK_VALUE(activations.size() == weights.size(), "activations: ", activations.size(), " for ",
                    weights.size(), " weights");
  TORCH_CHECK_VALUE(biases.empty() || biases.size() == weights.size(), "biases: ", biases.size(), " for ",
                    weights.size(), " weights, expected as many or none");
  std::size_t used = 0;
  for (const int64_t activation : activations) {
    TORCH_CHECK_VALUE(activation == maxout_layer ||
                          (activation >= 0 && activation < static_cast<int64_t>(activation_count)),
                      "activations: ", activation, ", expected ", maxout_layer,
                      " (maxout) or an index, 0 to ", activation_count - 1);
    const std::size_t count = activation == maxout_layer ? 0 : activation_infos[activation].params.size();
    TORCH_CHECK_VALUE(used + count <= params.size(), "params: too few for activations ", activations,
                      ", got ", params.size());
    const bool is_gated = activation != maxout_layer && weights[layers.size()].dim() == 3;
    layers.push_back({activation, params.slice(used, count), is_gated});
    used += count;
  }
  TORCH_CHECK_VALUE(used == params.size(), "params: activations ", activations, " take ", used, ", got ",
                    params.size());
}

Kept kept_for_backward(std::size_t activation, Params params, at::ScalarType dtype) {
  if (activation == index_of<Identity>) return Kept::nothing;
  const ActivationInfo& info = activation_infos[activation];
  const bool in_16_bits = dtype == at::kHalf || dtype == at::kBFloat16;
  const bool output = info.output_suffices(params.data()) && !(in_16_bits && info.output_too_coarse_in_16bit);
  return output ? Kept::output : Kept::preactivation;
}

bool Network::is_supported(const Tensor& input) const {
  for (int64_t l = 0; l < size(); ++l) {
    const Layer& layer = layers[l];
    const bool product = layer.is_maxout() || layer.is_gated
                             ? is_supported_linear_maxout(input, weights[l], bias(l))
                             : is_supported_linear(input, weights[l], bias(l));
    const bool own = product && (layer.is_maxout() || has_kernel(input, layer.activation, layer.params));
    if (!own || weights[l].scalar_type() != input.scalar_type()) return false;
  }
  return true;
}

Tensor Network::input_of(int64_t l, signature::gate_forward* gate, const Tensor& input,
                         at::TensorList kept) const {
  if (l == 0) return input;
  const Layer& below = layers[l - 1];
  return below.is_gated ? gate(kept[l - 1], below.name(), below.params) : kept[l - 1];
}

// Its layers' own backward operators, in turn, which choose their kernels.
std::vector<Tensor> Network::backward(signature::gate_forward* gate, const Tensor& grad_output,
                                      const Tensor& input, at::TensorList kept, const OptionalTensor& last,
                                      bool last_is_output, at::IntArrayRef output_mask) const {
  const int64_t end = size() - 1;
  // kept: y, or z of a gated layer, of all layers but the last, then z or the winner's index of those that
  // keep one beside y, in order. Going backward each such layer takes the last one not taken yet.
  auto more = kept.size();
  return gradients(
      grad_output, output_mask,
      [&](int64_t l, const Tensor& dy, Mask mask) -> std::tuple<Tensor, Tensor, Tensor> {
        const Layer& layer = layers[l];
        const Kept what = layer.kept(input.scalar_type());
        OptionalTensor source = last;
        bool from_output = last_is_output;
        if (l < end) {
          from_output = what == Kept::output;
          source = layer.keeps_more(input.scalar_type()) ? OptionalTensor(kept[--more])
                   : from_output || what == Kept::halves ? OptionalTensor(kept[l])
                                                         : std::nullopt;
        }
        const OptionalTensor x = mask[1] ? OptionalTensor(input_of(l, gate, input, kept)) : std::nullopt;
        if (layer.is_maxout())
          return ops::linear_maxout_backward().call(dy, x, weights[l], *source, weights[l].size(0), mask);
        if (layer.is_gated)
          return ops::linear_gated_backward().call(dy, x, weights[l], *source, layer.name(), layer.params,
                                                   mask);
        return ops::linear_activation_backward().call(dy, x, weights[l], source, layer.name(), layer.params,
                                                      from_output, mask);
      });
}

namespace composite {
namespace {

// Outputs of the layers, and for each its pre-activation or the index of the winner.
std::pair<std::vector<Tensor>, std::vector<Tensor>> outputs_of(const Network& network, const Tensor& input) {
  std::vector<Tensor> outputs(network.size()), sources(network.size());
  for (int64_t l = 0; l < network.size(); ++l) {
    const Network::Layer& layer = network.layers[l];
    const Tensor& x = l ? outputs[l - 1] : input;
    const Tensor& weight = network.weights[l];
    const OptionalTensor bias = network.bias(l);
    std::tie(outputs[l], sources[l]) =
        layer.is_maxout() ? linear_maxout_forward(x, weight, bias)
        : layer.is_gated  ? linear_gated_forward(x, weight, bias, layer.name(), layer.params)
                          : linear_activation_forward(x, weight, bias, layer.name(), layer.params,
                                                      /*keep_preactivation=*/true);
  }
  return {std::move(outputs), std::move(sources)};
}

}  // namespace

Tensor mlp(const Tensor& input, at::TensorList weights, at::TensorList biases, at::IntArrayRef activations,
           Params params) {
  const Network network(weights, biases, activations, params);
  Tensor x = input;
  for (int64_t l = 0; l < network.size(); ++l) {
    const Network::Layer& layer = network.layers[l];
    x = layer.is_maxout() ? linear_maxout(x, weights[l], network.bias(l))
        : layer.is_gated  ? linear_gated(x, weights[l], network.bias(l), layer.name(), layer.params)
                          : linear_activation(x, weights[l], network.bias(l), layer.name(), layer.params);
  }
  return x;
}

std::tuple<Tensor, Tensor, std::vector<Tensor>> mlp_forward(const Tensor& input, at::TensorList weights,
                                                            at::TensorList biases,
                                                            at::IntArrayRef activations, Params params) {
  const Network network(weights, biases, activations, params);
  auto [outputs, sources] = outputs_of(network, input);
  const int64_t end = network.size() - 1;
  const auto keeps_more = [&](int64_t l) { return network.layers[l].keeps_more(input.scalar_type()); };
  const auto is_gated = [&](int64_t l) { return network.layers[l].is_gated; };
  std::vector<Tensor> kept;
  kept.reserve(2 * end);
  for (int64_t l = 0; l < end; ++l) kept.push_back((is_gated(l) ? sources : outputs)[l]);
  for (int64_t l = 0; l < end; ++l)
    if (keeps_more(l)) kept.push_back(sources[l]);
  return {outputs[end], keeps_more(end) || is_gated(end) ? sources[end] : Tensor(), std::move(kept)};
}

std::vector<Tensor> mlp_backward(const Tensor& grad_output, const Tensor& input, at::TensorList weights,
                                 at::TensorList biases, at::TensorList kept, const OptionalTensor& last,
                                 bool last_is_output, at::IntArrayRef activations, Params params,
                                 at::IntArrayRef output_mask) {
  return Network(weights, biases, activations, params)
      .backward(gate_forward, grad_output, input, kept, last, last_is_output, output_mask);
}

std::vector<Tensor> mlp_backward_from_input(const Tensor& grad_output, const Tensor& input,
                                            at::TensorList weights, at::TensorList biases,
                                            at::IntArrayRef activations, Params params,
                                            at::IntArrayRef output_mask) {
  const Network network(weights, biases, activations, params);
  const auto [outputs, sources] = outputs_of(network, input);
  const auto gradients = [&, &outputs = outputs, &sources = sources](int64_t l, const Tensor& dy, Mask mask) {
    const Network::Layer& layer = network.layers[l];
    const Tensor& x = l ? outputs[l - 1] : input;
    if (layer.is_maxout())
      return linear_maxout_backward(dy, x, weights[l], sources[l], weights[l].size(0), mask);
    if (layer.is_gated)
      return linear_gated_backward(dy, x, weights[l], sources[l], layer.name(), layer.params, mask);
    return linear_activation_backward(dy, x, weights[l], sources[l], layer.name(), layer.params,
                                      /*from_output=*/false, mask);
  };
  return network.gradients(grad_output, output_mask, gradients);
}

}  // namespace composite
}  // namespace mlpext
