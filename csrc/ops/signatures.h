// Each operator's C++ type, once (the schemas, in torch's language, are in schema.cpp).
//
// From this list come the dispatcher's handles in `ops`, and the declarations of the same functions out of
// torch's own operators in `composite` and of the kernels of a device in `cpu` and `cuda`. Shapes: input x
// (*, in_features), weight W (out_features, in_features) or, of maxout, (pieces, out_features, in_features),
// bias (out_features) or (pieces, out_features); the pre-activation is z = x W' + b and the output y = f(z).
// A gated layer has two pieces, the gate and the value, side by side in z: y = f(z1) z2.
#pragma once
#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>

#include <array>
#include <string_view>
#include <tuple>
#include <vector>

namespace mlpext {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;
using Params = at::ArrayRef<double>;
using Mask = std::array<bool, 3>;      // which of the gradients of input, weight and bias are asked for
using GateMask = std::array<bool, 2>;  // and of gate and value

namespace signature {

using activation = Tensor(const Tensor& input, std::string_view name, Params params);
using activation_ = Tensor&(Tensor& input, std::string_view name, Params params);
using activation_backward = Tensor(const Tensor& grad_output, const Tensor& saved, std::string_view name,
                                   Params params, bool from_output);

using maxout = Tensor(const Tensor& input, int64_t pieces, int64_t dim);
using maxout_forward = std::tuple<Tensor, Tensor>(const Tensor& input, int64_t pieces, int64_t dim);
using maxout_backward = Tensor(const Tensor& grad_output, const Tensor& index, int64_t pieces, int64_t dim);

using gated = Tensor(const Tensor& gate, const Tensor& value, std::string_view name, Params params);
using gated_backward = std::tuple<Tensor, Tensor>(const Tensor& grad_output, const Tensor& gate,
                                                  const OptionalTensor& value, std::string_view name,
                                                  Params params, GateMask output_mask);

using linear_activation = Tensor(const Tensor& input, const Tensor& weight, const OptionalTensor& bias,
                                 std::string_view name, Params params);
using linear_activation_forward = std::tuple<Tensor, Tensor>(const Tensor& input, const Tensor& weight,
                                                             const OptionalTensor& bias,
                                                             std::string_view name, Params params,
                                                             bool keep_preactivation);
using linear_activation_backward = std::tuple<Tensor, Tensor, Tensor>(
    const Tensor& grad_output, const OptionalTensor& input, const OptionalTensor& weight,
    const OptionalTensor& saved, std::string_view name, Params params, bool from_output, Mask output_mask);

using linear_maxout = Tensor(const Tensor& input, const Tensor& weight, const OptionalTensor& bias);
using linear_maxout_forward = std::tuple<Tensor, Tensor>(const Tensor& input, const Tensor& weight,
                                                         const OptionalTensor& bias);
using linear_maxout_backward = std::tuple<Tensor, Tensor, Tensor>(const Tensor& grad_output,
                                                                  const OptionalTensor& input,
                                                                  const OptionalTensor& weight,
                                                                  const Tensor& index, int64_t pieces,
                                                                  Mask output_mask);

using linear_gated = Tensor(const Tensor& input, const Tensor& weight, const OptionalTensor& bias,
                            std::string_view name, Params params);
using linear_gated_forward = std::tuple<Tensor, Tensor>(const Tensor& input, const Tensor& weight,
                                                        const OptionalTensor& bias, std::string_view name,
                                                        Params params);
using linear_gated_backward = std::tuple<Tensor, Tensor, Tensor>(
    const Tensor& grad_output, const OptionalTensor& input, const OptionalTensor& weight,
    const Tensor& preactivation, std::string_view name, Params params, Mask output_mask);

// y of a gated layer, for the z that it keeps: no operator, but a function of each device.
using gate_forward = Tensor(const Tensor& preactivation, std::string_view name, Params params);

// A network (network.h): `activations` has an index of the list for each layer, or maxout_layer; `params` are
// theirs, one layer after the other.
using mlp = Tensor(const Tensor& input, at::TensorList weights, at::TensorList biases,
                   at::IntArrayRef activations, Params params);
using mlp_forward = std::tuple<Tensor, Tensor, std::vector<Tensor>>(const Tensor& input,
                                                                    at::TensorList weights,
                                                                    at::TensorList biases,
                                                                    at::IntArrayRef activations,
                                                                    Params params);
using mlp_backward = std::vector<Tensor>(const Tensor& grad_output, const Tensor& input,
                                         at::TensorList weights, at::TensorList biases, at::TensorList kept,
                                         const OptionalTensor& last, bool last_is_output,
                                         at::IntArrayRef activations, Params params,
                                         at::IntArrayRef output_mask);

}  // namespace signature

#define MLPEXT_FOR_EACH_OPERATOR(X) \
  X(activation)                     \
  X(activation_)                    \
  X(activation_backward)            \
  X(maxout)                         \
  X(maxout_forward)                 \
  X(maxout_backward)                \
  X(gated)                          \
  X(gated_backward)                 \
  X(linear_activation)              \
  X(linear_activation_forward)      \
  X(linear_activation_backward)     \
  X(linear_maxout)                  \
  X(linear_maxout_forward)          \
  X(linear_maxout_backward)         \
  X(linear_gated)                   \
  X(linear_gated_forward)           \
  X(linear_gated_backward) X(mlp) X(mlp_forward) X(mlp_backward)

// Declares a function of an operator's type (a function may be declared, not defined, by the name of its
// type).
#define MLPEXT_DECLARE(name) signature::name name;

namespace ops {

// ops::maxout().call(...) enters at the top of the dispatcher, .redispatch(keys, ...) below.
#define MLPEXT_HANDLE(name)                                                                            \
  inline const c10::TypedOperatorHandle<signature::name>& name() {                                     \
    static const auto handle =                                                                         \
        c10::Dispatcher::singleton().findSchemaOrThrow("mlpext::" #name, "").typed<signature::name>(); \
    return handle;                                                                                     \
  }
MLPEXT_FOR_EACH_OPERATOR(MLPEXT_HANDLE)
#undef MLPEXT_HANDLE

}  // namespace ops

// The same functions as torch's own operators (composites.cpp): what every unusual path runs, namely
// functorch transforms, forward mode, dispatch modes, wrapper subclasses, dtypes and devices without a kernel
// here, parameters without one (has_kernel), and the graph of a backward. So each of these inherits all of
// torch's behaviour, and derivatives of any order.
namespace composite {
MLPEXT_FOR_EACH_OPERATOR(MLPEXT_DECLARE)

signature::gate_forward gate_forward;
// dE/dz of a gated layer from dE/dy, for the z that it keeps.
Tensor gate_backward(const Tensor& grad_output, const Tensor& preactivation, std::string_view name,
                     Params params);
// (2 n, ...) as (2, n, ...), in operators that every vmap takes; an undefined tensor as it is.
Tensor in_halves(const Tensor& rows);

// mlp_backward without what mlp_forward kept: it goes forward again from the input, so that a graph of it
// reaches all that the gradients depend on.
std::vector<Tensor> mlp_backward_from_input(const Tensor& grad_output, const Tensor& input,
                                            at::TensorList weights, at::TensorList biases,
                                            at::IntArrayRef activations, Params params,
                                            at::IntArrayRef output_mask);
}  // namespace composite

}  // namespace mlpext
