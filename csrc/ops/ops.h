// The operators' typed handles (schemas: ops.cpp) and what every layer asks of them.
#pragma once
#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <c10/util/SmallVector.h>

#include <array>
#include <tuple>
#include <vector>

#include "formulas/activation_info.h"

namespace mlpext {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;
using Params = at::ArrayRef<double>;
using Mask = std::array<bool, 3>;  // which of the gradients of input, weight and bias are asked for

namespace ops {

template <class Signature> auto handle(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Signature>();
}

// ops::relu().call(...) enters at the top of the dispatcher, .redispatch(keys, ...) below.
#define MLPEXT_OPERATOR(name, ...)                                       \
  inline const c10::TypedOperatorHandle<__VA_ARGS__>& name() {           \
    static const auto operator_ = handle<__VA_ARGS__>("mlpext::" #name); \
    return operator_;                                                    \
  }

MLPEXT_OPERATOR(activation, Tensor(const Tensor& input, std::string_view name, Params params))
MLPEXT_OPERATOR(activation_, Tensor&(Tensor& input, std::string_view name, Params params))
MLPEXT_OPERATOR(activation_backward, Tensor(const Tensor& grad_output, const Tensor& saved,
                                            std::string_view name, Params params, bool from_output))

MLPEXT_OPERATOR(maxout, Tensor(const Tensor& input, int64_t pieces, int64_t dim))
MLPEXT_OPERATOR(maxout_forward, std::tuple<Tensor, Tensor>(const Tensor& input, int64_t pieces, int64_t dim))
MLPEXT_OPERATOR(maxout_backward,
                Tensor(const Tensor& grad_output, const Tensor& index, int64_t pieces, int64_t dim))

MLPEXT_OPERATOR(linear_activation, Tensor(const Tensor& input, const Tensor& weight,
                                          const OptionalTensor& bias, std::string_view name, Params params))
MLPEXT_OPERATOR(linear_activation_forward,
                std::tuple<Tensor, Tensor>(const Tensor& input, const Tensor& weight,
                                           const OptionalTensor& bias, std::string_view name, Params params,
                                           bool keep_preactivation))
MLPEXT_OPERATOR(linear_activation_backward,
                std::tuple<Tensor, Tensor, Tensor>(const Tensor& grad_output, const OptionalTensor& input,
                                                   const OptionalTensor& weight, const OptionalTensor& saved,
                                                   std::string_view name, Params params, bool from_output,
                                                   Mask output_mask))

MLPEXT_OPERATOR(linear_maxout, Tensor(const Tensor& input, const Tensor& weight, const OptionalTensor& bias))
MLPEXT_OPERATOR(linear_maxout_forward, std::tuple<Tensor, Tensor>(const Tensor& input, const Tensor& weight,
                                                                  const OptionalTensor& bias))
MLPEXT_OPERATOR(linear_maxout_backward,
                std::tuple<Tensor, Tensor, Tensor>(const Tensor& grad_output, const OptionalTensor& input,
                                                   const OptionalTensor& weight, const Tensor& index,
                                                   int64_t pieces, Mask output_mask))

MLPEXT_OPERATOR(mlp, Tensor(const Tensor& input, at::TensorList weights, at::TensorList biases,
                            std::string_view names, Params params))
MLPEXT_OPERATOR(mlp_forward,
                std::tuple<Tensor, Tensor, std::vector<Tensor>>(const Tensor& input, at::TensorList weights,
                                                                at::TensorList biases, std::string_view names,
                                                                Params params))
MLPEXT_OPERATOR(mlp_backward,
                std::vector<Tensor>(const Tensor& grad_output, const Tensor& input, at::TensorList weights,
                                    at::TensorList biases, at::TensorList kept, const OptionalTensor& last,
                                    bool last_is_output, std::string_view names, Params params,
                                    at::IntArrayRef output_mask))
#undef MLPEXT_OPERATOR

}  // namespace ops

// The place of `name` in the list; refuses an unknown name, or the wrong number of parameters for it.
std::size_t activation_index(std::string_view name, Params params);

// Whether the kernels serve these parameters of an activation in that dtype; else torch's own operators do,
// which round some of them to the dtype, and refuse what it cannot hold.
bool usual(std::size_t activation, Params params, at::ScalarType dtype);

// A network as the mlp operators are given it: `names` are "tanh,maxout,identity", `params` those of its
// activations one after the other; there is a bias for every layer, or none at all.
struct Network {
  // From what a layer's derivative comes in backward, besides its input.
  enum Keep { nothing, output, preactivation, winner };
  struct Layer {
    std::string_view name;
    Params params;
    std::size_t activation;
    bool maxout;

    Keep keep(at::ScalarType dtype) const;
  };
  c10::SmallVector<Layer, 8> layers;
  at::TensorList weights, biases;

  // Refuses what does not fit together.
  Network(at::TensorList weights, at::TensorList biases, std::string_view names, Params params);

  int64_t size() const { return static_cast<int64_t>(layers.size()); }
  OptionalTensor bias(int64_t layer) const {
    return biases.empty() ? std::nullopt : OptionalTensor(biases[layer]);
  }
  // Whether there are kernels for all of it.
  bool served(const Tensor& input) const;

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

#ifdef MLPEXT_WITH_CUDA
inline constexpr bool has_cuda = true;
#else
inline constexpr bool has_cuda = false;
#endif

// Whether there is a kernel for this tensor: dense float64, float32, bfloat16 or float16, on the CPU or,
// where it is built in, on CUDA. The rest is native's.
bool served(const Tensor& tensor);
// Those of a linear layer, on one device and in shapes that torch's linear does not broadcast; and those of
// linear_maxout.
bool linear_served(const Tensor& input, const Tensor& weight, const OptionalTensor& bias);
bool linear_maxout_served(const Tensor& input, const Tensor& weight, const OptionalTensor& bias);

// Refuse shapes and dtypes that do not fit together, naming the argument, its value and what is accepted.
void check_linear(const Tensor& input, const Tensor& weight, const OptionalTensor& bias);
void check_linear_maxout(const Tensor& input, const Tensor& weight, const OptionalTensor& bias);

// One byte an output up to 256 pieces.
at::ScalarType maxout_index_dtype(int64_t pieces);

// `dim` counted from the front, after a check that `pieces` divides that dimension.
int64_t check_maxout(const Tensor& input, int64_t pieces, int64_t dim);

}  // namespace mlpext
