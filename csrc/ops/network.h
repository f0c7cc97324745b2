// A network as the mlp operators take it: a list of layers, each y = f(x W' + b) or a maxout. What its layers
// keep for backward, and how its forward and backward go through them, the same on every device.
#pragma once
#include <c10/util/SmallVector.h>

#include "ops/checks.h"

namespace mlpext {

// In the place of an activation's index, in the lists that the mlp operators take.
inline constexpr int64_t maxout_layer = -1;

// From what the derivative of a fused layer comes in backward, besides its input x: from nothing (f is the
// identity), its output y, its pre-activation z, or the index of the winning piece.
enum class Kept { nothing, output, preactivation, winner };

// y wherever it determines f'(z), because y is there anyway as the next layer's input; but z where y has too
// few digits for that in 16 bits, as near -alpha in elu.
Kept kept_for_backward(std::size_t activation, Params params, at::ScalarType dtype);

struct Network {
  struct Layer {
    int64_t activation;  // index of the list, or maxout_layer
    Params params;

    bool is_maxout() const { return activation == maxout_layer; }
    std::string_view name() const { return activation_infos[activation].name; }
    Kept kept(at::ScalarType dtype) const {
      return is_maxout() ? Kept::winner : kept_for_backward(activation, params, dtype);
    }
    // Whether that is another tensor than its output.
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

// The forward of a network by a device's own operators of one layer, one after the other with nothing in
// between.
template <signature::linear_maxout& linear_maxout, signature::linear_maxout_forward& linear_maxout_forward,
          signature::linear_activation_forward& linear_activation_forward>
struct ByLayers {
  static Tensor mlp(const Tensor& input, at::TensorList weights, at::TensorList biases,
                    at::IntArrayRef activations, Params params) {
    const Network network(weights, biases, activations, params);
    if (!network.is_supported(input)) return composite::mlp(input, weights, biases, activations, params);
    Tensor x = input;  // at most two outputs are alive at a time
    for (int64_t l = 0; l < network.size(); ++l) {
      const Network::Layer& layer = network.layers[l];
      x = layer.is_maxout()
              ? linear_maxout(x, weights[l], network.bias(l))
              : std::get<0>(linear_activation_forward(x, weights[l], network.bias(l), layer.name(),
                                                      layer.params, /*keep_preactivation=*/false));
    }
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
      if (l > 0) kept.push_back(x);
      if (last.defined()) more.push_back(std::move(last));
      const Network::Layer& layer = network.layers[l];
      std::tie(x, last) = layer.is_maxout() ? linear_maxout_forward(x, weights[l], network.bias(l))
                                            : linear_activation_forward(
                                                  x, weights[l], network.bias(l), layer.name(), layer.params,
                                                  layer.kept(x.scalar_type()) == Kept::preactivation);
    }
    kept.insert(kept.end(), more.begin(), more.end());
    return {x, last, std::move(kept)};
  }
};

}  // namespace mlpext
