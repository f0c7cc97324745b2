// What has a kernel, and what is refused: asked by every layer of the operators, on every device.
#pragma once
#include "formulas/activation_info.h"
#include "ops/signatures.h"

namespace mlpext {

#ifdef MLPEXT_WITH_CUDA
inline constexpr bool has_cuda = true;
#else
inline constexpr bool has_cuda = false;
#endif

// The place of `name` in the list; refuses an unknown name, or the wrong number of parameters for it.
std::size_t activation_index(std::string_view name, Params params);

// Whether there are kernels for tensors of this kind: dense float64, float32, bfloat16 or float16, on the CPU
// or, where it is built in, on CUDA. All else is torch's.
bool is_supported(const Tensor& tensor);
// Whether there is one for an activation with these parameters too. torch's operators take the others: they
// round some parameters to the dtype, and refuse what it cannot hold.
bool has_kernel(const Tensor& input, std::size_t activation, Params params);
// The same of f(gate) value, which no broadcasting and no promotion of dtypes makes; identity is a product.
bool has_gate_kernel(const Tensor& gate, const Tensor& value, std::size_t activation, Params params);
// The same of the product of a linear layer, on one device and in shapes that torch's linear does not
// broadcast; and of linear_maxout.
bool is_supported_linear(const Tensor& input, const Tensor& weight, const OptionalTensor& bias);
bool is_supported_linear_maxout(const Tensor& input, const Tensor& weight, const OptionalTensor& bias);

// Refuse shapes and dtypes that do not fit together, naming the argument, its value and what is accepted.
void check_linear(const Tensor& input, const Tensor& weight, const OptionalTensor& bias);
void check_linear_maxout(const Tensor& input, const Tensor& weight, const OptionalTensor& bias);
void check_linear_gated(const Tensor& input, const Tensor& weight, const OptionalTensor& bias);
// `dim` counted from the front, after a check that `pieces` divides that dimension.
int64_t check_maxout(const Tensor& input, int64_t pieces, int64_t dim);

// Of the index of the piece that wins: one byte an output up to 256 pieces.
at::ScalarType maxout_index_dtype(int64_t pieces);

}  // namespace mlpext
