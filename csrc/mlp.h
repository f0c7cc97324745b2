// A whole network: the kernels of its layers, one after the other, with nothing in between; the same on every
// device. Arguments are the device's operators of one layer.
#pragma once
#include "composites.h"

namespace mlpext {

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

  static std::tuple<Tensor, Tensor, std::vector<Tensor>> mlp_forward(const Tensor& input,
                                                                     at::TensorList weights,
                                                                     at::TensorList biases,
                                                                     std::string_view names, Params params) {
    const Network network(weights, biases, names, params);
    if (!network.served(input)) return composite::mlp_forward(input, weights, biases, names, params);
    std::vector<Tensor> kept, more;
    kept.reserve(2 * network.size());
    Tensor x = input, source;
    for (int64_t l = 0; l < network.size(); ++l) {
      const Network::Layer& layer = network.layers[l];
      if (l > 0) kept.push_back(x);
      if (source.defined()) more.push_back(std::move(source));
      std::tie(x, source) =
          layer.maxout ? linear_maxout_forward(x, weights[l], network.bias(l))
                       : linear_activation_forward(x, weights[l], network.bias(l), layer.name, layer.params,
                                                   layer.keep(input.scalar_type()) == Network::preactivation);
    }
    kept.insert(kept.end(), more.begin(), more.end());
    return {x, source, std::move(kept)};
  }

  static std::vector<Tensor> mlp_backward(const Tensor& grad_output, const Tensor& input,
                                          at::TensorList weights, at::TensorList biases, at::TensorList kept,
                                          const OptionalTensor& last, bool last_is_output,
                                          std::string_view names, Params params,
                                          at::IntArrayRef output_mask) {
    const Network network(weights, biases, names, params);
    if (!network.served(input))
      return composite::mlp_backward(grad_output, input, weights, biases, kept, last, last_is_output, names,
                                     params, output_mask);
    const int64_t end = network.size() - 1;
    auto more = kept.end();  // those that go with the layers, from the last
    return network.gradients(grad_output, output_mask, [&](int64_t l, const Tensor& dy, Mask mask) {
      const Network::Layer& layer = network.layers[l];
      const Network::Keep keep = layer.keep(input.scalar_type());
      const bool from_output = l == end ? last_is_output : keep == Network::output;
      OptionalTensor source = last;
      if (l < end && keep == Network::nothing) source.reset();
      else if (l < end) source = from_output ? kept[l] : *--more;
      const Tensor& x = l ? kept[l - 1] : input;
      return layer.maxout
                 ? ops::linear_maxout_backward().call(dy, x, weights[l], *source, weights[l].size(0), mask)
                 : ops::linear_activation_backward().call(dy, x, weights[l], source, layer.name, layer.params,
                                                          from_output, mask);
    });
  }
};

}  // namespace mlpext
