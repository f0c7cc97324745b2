// A whole network: the kernels of its layers, one after the other, with nothing in between; the same on every
// device. Arguments are the device's operators of one layer.
#pragma once
#include "ops/composites.h"

namespace mlpext {

// What mlp_forward kept, by layers.
struct Kept {
  const Network& network;
  const Tensor& input;
  at::TensorList tensors;
  const OptionalTensor& last;
  bool last_is_output;

  int64_t end() const { return network.size() - 1; }
  Network::Keep keep(int64_t l) const { return network.layers[l].keep(input.scalar_type()); }
  bool keeps_more(int64_t l) const { return keep(l) == Network::preactivation || keep(l) == Network::winner; }
  // How many layers from l on, but the last, keep more than their output.
  int64_t more_from(int64_t l) const {
    int64_t count = 0;
    for (; l < end(); ++l) count += keeps_more(l);
    return count;
  }

  const Tensor& x(int64_t l) const { return l ? tensors[l - 1] : input; }
  bool from_output(int64_t l) const { return l == end() ? last_is_output : keep(l) == Network::output; }
  OptionalTensor source(int64_t l) const {
    if (l == end()) return last;
    if (keeps_more(l)) return tensors[tensors.size() - more_from(l)];
    return keep(l) == Network::output ? OptionalTensor(tensors[l]) : std::nullopt;
  }
};

// The gradients of one layer.
inline std::tuple<Tensor, Tensor, Tensor> layer_backward(const Kept& kept, int64_t l, const Tensor& dy,
                                                         Mask mask) {
  const Network::Layer& layer = kept.network.layers[l];
  const Tensor& weight = kept.network.weights[l];
  const OptionalTensor source = kept.source(l);
  return layer.maxout
             ? ops::linear_maxout_backward().call(dy, kept.x(l), weight, *source, weight.size(0), mask)
             : ops::linear_activation_backward().call(dy, kept.x(l), weight, source, layer.name, layer.params,
                                                      kept.from_output(l), mask);
}

template <auto linear_maxout, auto linear_maxout_forward, auto linear_activation_forward> struct Mlp {
  static Tensor mlp(const Tensor& input, at::TensorList weights, at::TensorList biases,
                    std::string_view names, Params params) {
    const Network network(weights, biases, names, params);
    if (!network.served(input)) return composite::mlp(input, weights, biases, names, params);
    Tensor x = input;  // at most two outputs are alive at a time
    for (int64_t l = 0; l < network.size(); ++l) {
      const Network::Layer& layer = network.layers[l];
      x = layer.maxout ? linear_maxout(x, weights[l], network.bias(l))
                       : std::get<0>(linear_activation_forward(x, weights[l], network.bias(l), layer.name,
                                                               layer.params, /*keep_preactivation=*/false));
    }
    return x;
  }

  // The output of layer l, and what more it keeps.
  static std::tuple<Tensor, Tensor> layer_forward(const Network& network, int64_t l, const Tensor& x) {
    const Network::Layer& layer = network.layers[l];
    return layer.maxout
               ? linear_maxout_forward(x, network.weights[l], network.bias(l))
               : linear_activation_forward(x, network.weights[l], network.bias(l), layer.name, layer.params,
                                           layer.keep(x.scalar_type()) == Network::preactivation);
  }

  template <class Forward>
  static std::tuple<Tensor, Tensor, std::vector<Tensor>> layers_forward(const Network& network,
                                                                        const Tensor& input, Forward layer) {
    std::vector<Tensor> kept, more;
    kept.reserve(2 * network.size());
    Tensor x = input, source;
    for (int64_t l = 0; l < network.size(); ++l) {
      if (l > 0) kept.push_back(x);
      if (source.defined()) more.push_back(std::move(source));
      std::tie(x, source) = layer(network, l, x);
    }
    kept.insert(kept.end(), more.begin(), more.end());
    return {x, source, std::move(kept)};
  }

  static std::tuple<Tensor, Tensor, std::vector<Tensor>> mlp_forward(const Tensor& input,
                                                                     at::TensorList weights,
                                                                     at::TensorList biases,
                                                                     std::string_view names, Params params) {
    const Network network(weights, biases, names, params);
    if (!network.served(input)) return composite::mlp_forward(input, weights, biases, names, params);
    return layers_forward(network, input, layer_forward);
  }
};

}  // namespace mlpext
