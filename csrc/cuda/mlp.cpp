// Whole networks on CUDA: layer by layer, and, where epilogues are switched on, with the derivative of a
// layer in the product that makes its gradient, in the layer above.
#include "../mlp.h"

#include <torch/library.h>

#include "tensors.h"

namespace mlpext::cuda {
namespace {

using Layers = Mlp<linear_maxout, linear_maxout_forward, linear_activation_forward>;

// Layers whose derivative cuBLASLt takes from the signs of z, one bit each: mlp_forward adds these to what it
// keeps. Bits that nobody reads are not made.
bool wants_signs(const Network& network, int64_t l) {
  return l + 1 < network.size() && network.layers[l].name == ReLU::name && !network.layers[l + 1].maxout;
}

std::tuple<Tensor, Tensor, std::vector<Tensor>> mlp_forward(const Tensor& input, at::TensorList weights,
                                                            at::TensorList biases, std::string_view names,
                                                            Params params) {
  const Network network(weights, biases, names, params);
  if (!cublaslt() || !network.served(input))
    return Layers::mlp_forward(input, weights, biases, names, params);
  std::vector<Tensor> signs;
  auto result = Layers::layers_forward(
      network, input, [&](const Network&, int64_t l, const Tensor& x) -> std::tuple<Tensor, Tensor> {
        if (!wants_signs(network, l)) return Layers::layer_forward(network, l, x);
        check_linear(x, weights[l], network.bias(l));
        const auto [y, bits] = epilogue_relu_and_signs(rows_of(x), weights[l], network.bias(l));
        if (y.defined()) {
          signs.push_back(bits);
          return {shaped(y, x), Tensor()};
        }
        const On on(x);
        signs.push_back(fresh({0}, at::kByte));  // a place for each
        return Layers::layer_forward(network, l, x);
      });
  auto& kept = std::get<2>(result);
  kept.insert(kept.begin() + network.size() - 1, signs.begin(), signs.end());
  return result;
}

std::vector<Tensor> mlp_backward(const Tensor& grad_output, const Tensor& input, at::TensorList weights,
                                 at::TensorList biases, at::TensorList kept, const OptionalTensor& last,
                                 bool last_is_output, std::string_view names, Params params,
                                 at::IntArrayRef output_mask) {
  const Network network(weights, biases, names, params);
  if (!(cublaslt() || cutlass()) || !network.served(input) ||
      grad_output.scalar_type() != input.scalar_type() || grad_output.device() != input.device())
    return composite::mlp_backward(grad_output, input, weights, biases, kept, last, last_is_output, names,
                                   params, output_mask);
  const Kept all{network, input, kept, last, last_is_output};
  const auto signs_below = [&](int64_t l) {
    int64_t count = 0;
    for (int64_t below = 0; below < l; ++below) count += wants_signs(network, below);
    return count;
  };
  const auto size = static_cast<int64_t>(kept.size());
  const bool has_signs = size == all.end() + signs_below(all.end()) + all.more_from(0);
  const auto signs = [&](int64_t l) {
    return has_signs && wants_signs(network, l) ? kept[all.end() + signs_below(l)] : Tensor();
  };

  bool is_dz = false;  // whether the layer above has made dz, not dy, and db
  Tensor db;
  return network.gradients(
      grad_output, output_mask,
      [&](int64_t l, const Tensor& dy, Mask mask) -> std::tuple<Tensor, Tensor, Tensor> {
        const Network::Layer& layer = network.layers[l];
        if (layer.maxout) return layer_backward(all, l, dy, mask);
        Tensor dz = rows_of(dy), sums = std::exchange(db, Tensor()), dx;
        if (!std::exchange(is_dz, false))
          std::tie(dz, sums) = activation_backward_rows(dy, all.source(l), layer.name, layer.params,
                                                        all.from_output(l), mask[2]);
        // f' of a layer that has one, in the product above it.
        if (mask[0] && l > 0 && !network.layers[l - 1].maxout && all.keep(l - 1) != Network::nothing) {
          const Network::Layer& below = network.layers[l - 1];
          const bool with_sums = !biases.empty() && output_mask[network.size() + l];
          std::tie(dx, db) = epilogue_input_gradient(dz, weights[l], below.activation, below.params,
                                                     rows_of(*all.source(l - 1)), signs(l - 1), with_sums);
          is_dz = dx.defined();
        }
        auto [plain, dw, own] = product_backward(dz, all.x(l), weights[l],
                                                 {mask[0] && !is_dz, mask[1], mask[2] && !sums.defined()});
        return {shaped(is_dz ? dx : plain, dy), dw, sums.defined() ? sums : own};
      });
}

// A narrow network as one kernel where that serves, else its layers one by one.
template <auto narrow, auto layers> struct Either;
template <class Result, class... Arguments, std::optional<Result> (*narrow)(Arguments...),
          Result (*layers)(Arguments...)>
struct Either<narrow, layers> {
  static Result run(Arguments... arguments) {
    if (auto result = narrow(arguments...)) return *std::move(result);
    return layers(arguments...);
  }
};

}  // namespace

TORCH_LIBRARY_IMPL(mlpext, CUDA, m) {
  m.impl("mlp", Either<narrow_mlp, Layers::mlp>::run);
  m.impl("mlp_forward", Either<narrow_mlp_forward, mlp_forward>::run);
  m.impl("mlp_backward", Either<narrow_mlp_backward, mlp_backward>::run);
}

}  // namespace mlpext::cuda
