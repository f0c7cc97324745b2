// A network as the mlp operators take it: a list of layers, each y = f(x W' + b), a maxout or gated. What its
// layers keep for backward, and how its forward and backward go through them, the same on every device.
#pragma once
#include <c10/util/SmallVector.h>

#include "ops/checks.h"

namespace mlpext {

// In the place of an activation's index, in the lists that the mlp operators take. A gated layer has the
// index of its gate's activation there, and a weight of three dimensions.
inline constexpr int64_t maxout_layer = -1;

// From what the derivative of a fused layer comes in backward, besides its input x: from nothing (f is the
// identity), its output y, its pre-activation z, the index of the winning piece, or both halves of a gated
// layer's z. From those also y comes, so that a network need not keep it.
enum class Kept { nothing, output, preactivation, winner, halves };

// y wherever it determines f'(z), because y is there anyway as the next layer's input; but z where y has too
// few digits for that in 16 bits, as near -alpha in elu.
Kept kept_for_backward(std::size_t activation, Params params, at::ScalarType dtype);

struct Network {
  struct Layer {
    int64_t activation;  // index of the list, or maxout_layer
    Params params;
    bool is_gated;

    bool is_maxout() const { return activation == maxout_layer; }
    std::string_view name() const { return activation_infos[activation].name; }
    Kept kept(at::ScalarType dtype) const {
      return is_maxout() ? Kept::winner
             : is_gated  ? Kept::halves
                         : kept_for_backward(activation, params, dtype);
    }
    // Whether that is a tensor beside its output.
    bool keeps_more(at::ScalarType dtype) const {
      return kept(dtype) == Kept::preactivation || kept(dtype) == Kept::winner;
    }
  };
  c10::SmallVector<Layer, 8> layers;
  at::TensorList weights, biases;  // a bias for every layer, or none at all

  // Refuses what does not fit together.
  Network(at::TensorList weights, at::TensorList biases, at::IntArrayRef activations, Params params);

  int64_t size() const { return static_cast<int64_t>(layers.size()); }
  OptionalTensor bias(int64_t layer) const {
    return biases.empty() ? std::nullopt : OptionalTensor(biases[layer]);
  }
  // Whether there are kernels for all of it.
  bool is_supported(const Tensor& input) const;

  // mlp_backward, where `gate` makes a gated layer's y, which mlp_forward has not kept, of the z that it has.
  std::vector<Tensor> backward(signature::gate_forward* gate, const Tensor& grad_output, const Tensor& input,
                               at::TensorList kept, const OptionalTensor& last, bool last_is_output,
                               at::IntArrayRef output_mask) const;
  // What layer l was given.
  Tensor input_of(int64_t l, signature::gate_forward* gate, const Tensor& input, at::TensorList kept) const;

  // The gradients asked for of input, weights and biases, from the last layer back to the first one that is
  // asked for: layer(l, dy, mask) gives those of one layer.
  template <class Backward>
  std::vector<Tensor> gradients(const Tensor& grad_output, at::IntArrayRef mask, Backward layer) const {
    const int64_t n = size();
    std::vector<Tensor> all(1 + n + static_cast<int64_t>(biases.size()));
    auto asked = [&](int64_t l) { return mask[1 + l] || (!biases.empty() && mask[1 + n + l]); };
    int64_t lowest = 0;
    while (!mask[0] && lowest < n && !asked(lowest)) ++lowest;
    Tensor dy = grad_output;
    for (int64_t l = n - 1; l >= lowest; --l) {
      auto [dx, dw, db] = layer(
          l, dy, Mask{l > lowest || mask[0] != 0, mask[1 + l] != 0, !biases.empty() && mask[1 + n + l]});
      all[1 + l] = std::move(dw);
      if (!biases.empty()) all[1 + n + l] = std::move(db);
      dy = std::move(dx);
    }
    if (mask[0]) all[0] = std::move(dy);
    return all;
  }
};

// The mlp operators by a device's own operators of one layer, one after the other with nothing in between.
template <signature::linear_maxout& linear_maxout, signature::linear_maxout_forward& linear_maxout_forward,
          signature::linear_activation_forward& linear_activation_forward,
          signature::linear_gated& linear_gated, signature::linear_gated_forward& linear_gated_forward,
          signature::gate_forward& gate_forward>
struct ByLayers {
  static Tensor mlp(const Tensor& input, at::TensorList weights, at::TensorList biases,
                    at::IntArrayRef activations, Params params) {
    const Network network(weights, biases, activations, params);
    if (!network.is_supported(input)) return composite::mlp(input, weights, biases, activations, params);
    Tensor x = input;  // at most two outputs are alive at a time
    for (int64_t l = 0; l < network.size(); ++l)
      std::tie(x, std::ignore) = forward(network, l, x, /*keeps=*/false);
    return x;
  }

  static std::tuple<Tensor, Tensor, std::vector<Tensor>> mlp_forward(const Tensor& input,
                                                                     at::TensorList weights,
                                                                     at::TensorList biases,
                                                                     at::IntArrayRef activations,
                                                                     Params params) {
    const Network network(weights, biases, activations, params);
    if (!network.is_supported(input))
      return composite::mlp_forward(input, weights, biases, activations, params);
    std::vector<Tensor> kept, more;  // in the order of the schema
    kept.reserve(2 * network.size());
    Tensor x = input, last;
    for (int64_t l = 0; l < network.size(); ++l) {
      if (l > 0) kept.push_back(network.layers[l - 1].is_gated ? std::move(last) : x);
      if (last.defined()) more.push_back(std::move(last));
      std::tie(x, last) = forward(network, l, x, /*keeps=*/true);
    }
    kept.insert(kept.end(), more.begin(), more.end());
    return {x, last, std::move(kept)};
  }

  static std::vector<Tensor> mlp_backward(const Tensor& grad_output, const Tensor& input,
                                          at::TensorList weights, at::TensorList biases, at::TensorList kept,
                                          const OptionalTensor& last, bool last_is_output,
                                          at::IntArrayRef activations, Params params,
                                          at::IntArrayRef output_mask) {
    return Network(weights, biases, activations, params)
        .backward(gate_forward, grad_output, input, kept, last, last_is_output, output_mask);
  }

 private:
  // y of a layer, and what its derivative comes from where that is to be kept.
  static std::tuple<Tensor, Tensor> forward(const Network& network, int64_t l, const Tensor& x, bool keeps) {
    const Network::Layer& layer = network.layers[l];
    const Tensor& weight = network.weights[l];
    const OptionalTensor bias = network.bias(l);
    if (layer.is_maxout())
      return keeps ? linear_maxout_forward(x, weight, bias)
                   : std::tuple(linear_maxout(x, weight, bias), Tensor());
    if (layer.is_gated)
      return keeps ? linear_gated_forward(x, weight, bias, layer.name(), layer.params)
                   : std::tuple(linear_gated(x, weight, bias, layer.name(), layer.params), Tensor());
    return linear_activation_forward(x, weight, bias, layer.name(), layer.params,
                                     keeps && layer.kept(x.scalar_type()) == Kept::preactivation);
  }
};

}  // namespace mlpext
