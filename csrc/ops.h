// The operators' typed handles (schemas: ops.cpp) and what every layer asks of them.
#pragma once
#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>

#include <array>
#include <tuple>

#include "activation_info.h"

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
#undef MLPEXT_OPERATOR

}  // namespace ops

// The place of `name` in the list; refuses an unknown name, or the wrong number of parameters for it.
std::size_t activation_index(std::string_view name, Params params);

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
